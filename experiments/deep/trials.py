"""The trials: every rule on every stack, depth and delay. Letters: S seeds, C checkpoints."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import operator
import signal
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import localgrad
from experiments.deep.memory import beside_carry, bytes_of
from experiments.deep.stacks import LOSS, ROWS, STACKS, StackName, rows_at
from experiments.folder import Pieces
from experiments.measure import Cost, Update, compile_update, costs
from experiments.progress import progress
from experiments.tasks import Task
from experiments.tasks.crowded_cue import ceiling, crowded_cue
from experiments.train import Budget, History, Problem, Shared, make_shared, make_trainer, train


class Outcome(NamedTuple):
    """One rule on one stack of one depth.

    Attributes:
        histories: its trainings, by delay.
        cosine: of its update to BPTT's at the initial parameters, by delay, [S, layers].
        norm_ratio: likewise.
        state_bytes: what it carries for a batch of streams, beside the carry.
        cost: the price of one update, or None before it is measured.
    """

    histories: dict[int, History]
    cosine: dict[int, np.ndarray]
    norm_ratio: dict[int, np.ndarray]
    state_bytes: int
    cost: Cost | None = None

    def accuracy(self, delay: int) -> np.ndarray:
        """On held-out data at the end, [S]."""
        return np.asarray(self.histories[delay].test_accuracy)[:, -1]

    def updates_to(self, criterion: float, delay: int) -> np.ndarray:
        """Updates until the accuracy reaches a criterion, [S]; infinity for never."""
        history = self.histories[delay]
        curves = np.asarray(history.test_accuracy)
        return np.array([crossing(history.steps, curve, criterion) for curve in curves])


class Trial(NamedTuple):
    """One stack of one depth.

    Attributes:
        stack: the stack's name.
        depth: L.
        ceilings: the best accuracy with the lowest layer's initial weights, [S].
        outcomes: by rule.
    """

    stack: StackName
    depth: int
    ceilings: np.ndarray
    outcomes: dict[str, Outcome]


def crossing(steps: np.ndarray, curve: np.ndarray, level: float) -> float:
    """Where a curve first reaches a level, between the points by a straight line.

    Example:
        >>> crossing(np.array([0, 10, 20]), np.array([0.5, 0.8, 1.0]), 0.9)
        15.0
    """
    above = np.flatnonzero(curve >= level)
    if not above.size:
        return float("inf")
    at = above[0]
    if at == 0:
        return float(steps[0])
    share = (level - curve[at - 1]) / (curve[at] - curve[at - 1])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def run_trials(config: Any, pieces: Pieces, keep: Callable[[list[Trial]], object]) -> list[Trial]:
    """Runs every stack at every depth, `config.workers` at a time, each in a process of its own.

    Args:
        config: the experiment's options.
        pieces: trials that were finished before.
        keep: called after each with all that are finished.

    Returns:
        What they found, in order.
    """
    cases = [(config, pieces, name, depth) for name in config.stacks for depth in config.depths]
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[Trial]] = map
        if config.workers > 1:
            pool = ProcessPoolExecutor(
                config.workers,
                mp_context=multiprocessing.get_context("spawn"),  # a fork would lose JAX's threads
                initializer=signal.signal,
                initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to answer
            )
            run = stack.enter_context(pool).map
        found: list[Trial] = []
        for trial in progress(run(run_trial, cases), total=len(cases), unit="trial"):
            found.append(trial)
            keep(found)
    return found


def run_trial(case: tuple[Any, Pieces, StackName, int]) -> Trial:
    """One stack of one depth, if it was not run before."""
    config, pieces, name, depth = case
    return pieces.made(f"{name}_{depth}", functools.partial(learned, config, name, depth))


def learned(config: Any, name: StackName, depth: int) -> Trial:
    """One stack of one depth: every rule, at every delay."""
    stack = STACKS[name]
    model = stack.make(depth)
    budget = Budget(
        steps=config.steps_of(stack),
        batch_size=config.batch_size,
        learning_rate=stack.learning_rate,
        clip=1.0,
        seeds=config.seeds,
        checkpoints=config.checkpoints,
        seed=config.seed,
    )
    tasks = {d: crowded_cue(config.seed, channels=stack.channels, delay=d) for d in config.delays}
    shared = {d: make_shared(Problem(model, LOSS, task), budget) for d, task in tasks.items()}
    first = shared[config.delays[0]]
    shared = {d: each._replace(align=first.align) for d, each in shared.items()}  # compiled once
    seeds = [jax.tree.map(operator.itemgetter(s), first.params) for s in range(config.seeds)]
    batches = {d: first_batches(each, config.seeds) for d, each in shared.items()}
    sequence = batches[config.delays[0]][0].inputs[0]
    window, example = len(sequence) // 2, sequence[0]
    updates, outcomes, reference = {}, {}, {}
    for rule in rows_at(depth, config.full):
        row = ROWS[rule]
        trainer = make_trainer(first, lambda key, row=row: row.rule(model), optax.adam, budget)
        histories = {d: train(trainer, shared[d], budget, lambda: None) for d in config.delays}
        stream = row.stream(model, config.batch_size, window, example)
        updates[rule] = compile_update(stream, seeds[0], batches[config.delays[0]][0])
        made = {d: gradients(updates[rule], stream, seeds, batches[d]) for d in config.delays}
        reference = reference or made  # BPTT comes first
        aligned = {d: alignment(made[d], reference[d], depth) for d in config.delays}
        outcomes[rule] = Outcome(
            histories=histories,
            cosine={d: cosine for d, (cosine, _) in aligned.items()},
            norm_ratio={d: ratio for d, (_, ratio) in aligned.items()},
            state_bytes=bytes_of(beside_carry(stream, seeds[0])),
        )
    best = [ceiling(reading(params, stack.channels + 1)) for params in seeds]
    prices = costs(updates, config.repeats)
    outcomes = {rule: each._replace(cost=prices[rule]) for rule, each in outcomes.items()}
    return Trial(name, depth, np.array(best), outcomes)


def first_batches(shared: Shared, seeds: int) -> list[localgrad.Batch]:
    """The first batch of each seed."""
    drawn = shared.draw(0)
    return [jax.tree.map(operator.itemgetter((seed, 0)), drawn) for seed in range(seeds)]


def gradients(
    update: Update, rule: Any, seeds: list[Any], batches: list[localgrad.Batch]
) -> list[Any]:
    """A rule's update at each seed's initial parameters, on its first batch."""
    return [
        update.compiled(params, rule.init(params), batch)[0]
        for params, batch in zip(seeds, batches, strict=True)
    ]


def alignment(made: list[Any], exact: list[Any], depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and norm ratio of updates to BPTT's, for each seed and layer, [S, layers]."""
    found = [localgrad.compare(*pair) for pair in zip(made, exact, strict=True)]
    layers = [[each[f"cells_{level}"] for level in range(depth)] for each in found]
    cosine = np.array([[float(layer.cosine) for layer in each] for each in layers])
    return cosine, np.array([[float(layer.norm_ratio) for layer in each] for each in layers])


def reading(params: Mapping[str, Any], width: int) -> list[jax.Array]:
    """The kernels of the lowest cell that read an input of this width."""
    leaves = jax.tree.leaves(params["cells_0"])
    return [leaf for leaf in leaves if leaf.ndim == 2 and leaf.shape[0] == width]


def linear_floors(task: Task, samples: int, seed: int = 1) -> tuple[float, float]:
    """Accuracy of a linear classifier of the last two steps' inputs, and of all steps'.

    Fitted by least squares to `samples` fresh sequences, with a ridge of one per cent of the mean
    square.
    """
    drawn = task.sample(jax.random.key(seed), samples)

    def score(steps: slice) -> float:
        train, test = (
            np.asarray(batch.inputs[:, steps]).reshape(len(batch.inputs), -1)
            for batch in (drawn, task.test)
        )
        gram = train.T @ train
        ridge = 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram))
        signs = 2.0 * np.asarray(drawn.targets[:, -1]) - 1
        weights = np.linalg.solve(gram + ridge, train.T @ signs)
        return float(np.mean((test @ weights > 0) == np.asarray(task.test.targets[:, -1])))

    return score(slice(-2, None)), score(slice(None))
