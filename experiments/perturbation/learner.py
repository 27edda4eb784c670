"""Learning: a row on a problem, all its seeds in one jitted function. Letters: S seeds, C checks.

Every row has the same networks and batches, the same number of updates, learning rates that fall to
0 on a line, and the same search for the first of them: whole runs at three, and beyond an edge,
judged by `valid`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.deep.trials import crossing
from experiments.folder import Pieces
from experiments.perturbation.problems import Problem
from experiments.perturbation.rows import ROWS, Row
from experiments.progress import progress
from experiments.ptncn.training import beyond
from experiments.train import Run, one_by_one

MOST_RATES = 8  # that are tried, if the best is an edge


class Budget(NamedTuple):
    """What every row gets, beside the problem's updates.

    Attributes:
        seeds: S.
        checks: C, how often a run is tested.
        seed: where all randomness starts.
    """

    seeds: int
    checks: int
    seed: int


class Networks(NamedTuple):
    """What rows with the same cell share.

    Attributes:
        model: the network.
        params: of S untrained ones.
        score: `(params, Batch) -> [S, 2]`, the loss and what else is reported, compiled.
    """

    model: Any
    params: Any
    score: Callable[[Any, localgrad.Batch], jax.Array]


class Learner(NamedTuple):
    """A row made ready for a problem.

    Attributes:
        start: S untrained runs.
        advance: `(Run, rates [S, updates], keys [S, updates], data) -> Run`, compiled.
        score: as of its networks.
    """

    start: Run
    advance: Callable[[Run, jax.Array, jax.Array, Any], Run]
    score: Callable[[Any, localgrad.Batch], jax.Array]


class Outcome(NamedTuple):
    """A finished row.

    Attributes:
        rate: the learning rate that was chosen.
        valid: its mean loss on `valid` at the end.
        tried: those of all learning rates.
        steps: [C + 1] updates made at each check.
        test: [S, C + 1] the loss at each check.
        also: [S] what else is reported, at the end.
        seconds: of all updates of all seeds; other rows may have run beside it.
    """

    rate: float
    valid: float
    tried: dict[float, float]
    steps: np.ndarray
    test: np.ndarray
    also: np.ndarray
    seconds: float

    @property
    def final(self) -> np.ndarray:
        """[S] the loss at the end."""
        return self.test[:, -1]

    def updates_to(self, level: float) -> np.ndarray:
        """[S] updates until the loss is that low; infinity for never."""
        return np.array([crossing(self.steps, -curve, -level) for curve in self.test])


def make_networks(row: Row, problem: Problem, keys: jax.Array) -> Networks:
    """Draws the networks of a row, and of all with its cell, one for each key."""
    model, example = row.model(problem.units, problem.outputs), problem.test.inputs[:1, 0]

    def init(key: jax.Array) -> Any:
        return model.init(key, model.initialize_carry(key, example.shape), example)["params"]

    def score(params: Any, batch: localgrad.Batch) -> jax.Array:
        value, outputs, _ = localgrad.evaluate(model, problem.loss, params, batch)
        return jnp.stack([value, problem.also[1](outputs, batch)])

    return Networks(model, one_by_one(init, keys), jax.jit(jax.vmap(score, in_axes=(0, None))))


def make_learner(row: Row, problem: Problem, networks: Networks, keys: jax.Array) -> Learner:
    """Builds what trains a row's networks; a rule's noise comes from its key."""

    def tx_of(rate: Any, key: jax.Array) -> Any:
        rule = row.rule(networks.model, problem.loss, key)
        return optax.chain(rule, row.optimizer(rate))

    def start(params: Any, key: jax.Array) -> Run:
        return Run(params, tx_of(1.0, key).init(params))

    def advance(run: Run, rates: jax.Array, keys: jax.Array, data: Any) -> Run:
        def step(run: Run, now: tuple[jax.Array, jax.Array]) -> tuple[Run, None]:
            (params, state), (rate, key) = run, now
            tx = tx_of(rate, jax.random.key(0))  # a key matters to `init` alone
            batch = problem.sample(data, key, problem.batch_size)
            updates, state = tx.update(None, state, params, batch=batch)
            return Run(optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, run, (rates, keys))[0]

    return Learner(
        start=jax.jit(jax.vmap(start))(networks.params, keys),
        advance=jax.jit(jax.vmap(advance, in_axes=(0, 0, 0, None))),
        score=networks.score,
    )


def learned(learner: Learner, row: Row, problem: Problem, budget: Budget) -> Outcome:
    """Trains all seeds at each of the row's learning rates, and tests those of the best.

    The best is that of the least mean loss on `valid`; while it lies at an edge, one more is tried
    beyond.

    Args:
        learner: made of the row, and of this problem or of one of the same shapes.
        row: what learns.
        problem: what is learned.
        budget: what every row gets.
    """
    found: dict[float, Outcome] = {}
    best, ahead = row.rates[0], row.rates
    while ahead and len(found) < MOST_RATES:
        for rate in ahead:
            found[rate] = trained(learner, problem, budget, rate)
        best = min(found, key=lambda rate: np.nan_to_num(found[rate].valid, nan=math.inf))
        ahead = beyond(sorted(found), best, 1)
    tried = {rate: found[rate].valid for rate in sorted(found)}
    return found[best]._replace(tried=tried)


def trained(learner: Learner, problem: Problem, budget: Budget, rate: float) -> Outcome:
    """One run of all seeds."""
    segment, run = problem.updates // budget.checks, learner.start
    tests, seconds = [learner.score(run.params, problem.test)], 0.0
    last = time.perf_counter()
    for run in segments(learner, problem, [rate] * budget.seeds, keys_of(budget)[2], budget):
        seconds += time.perf_counter() - last
        tests.append(learner.score(run.params, problem.test))
        last = time.perf_counter()
    return Outcome(
        rate=rate,
        valid=float(learner.score(run.params, problem.valid)[:, 0].mean()),
        tried={},
        steps=np.arange(budget.checks + 1) * segment,
        test=np.stack([np.asarray(found[:, 0]) for found in tests], axis=1),
        also=np.asarray(tests[-1][:, 1]),
        seconds=seconds,
    )


def segments(
    learner: Learner, problem: Problem, rates: Sequence[float], keys: jax.Array, budget: Budget
) -> Iterator[Run]:
    """The runs at each check, while their learning rates [S] fall to 0 on a line."""
    run, segment = learner.start, problem.updates // budget.checks
    for number in range(budget.checks):
        left = 1 - (number * segment + np.arange(segment)) / problem.updates
        now = jnp.asarray(np.outer(rates, left), jnp.float32)
        run = learner.advance(run, now, batch_keys(keys, number, segment), problem.data)
        yield jax.block_until_ready(run)


def batch_keys(keys: jax.Array, number: int, updates: int) -> jax.Array:
    """The keys of a segment's batches, [S, updates]."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number), updates))(keys)


def keys_of(budget: Budget) -> jax.Array:
    """Of networks, of rules and of data, [3, S]."""
    return jax.random.split(jax.random.key(budget.seed), (3, budget.seeds))


def compete(
    problems: Sequence[Problem],
    names: Sequence[str],
    budget: Budget,
    workers: int,
    pieces: Pieces,
) -> list[dict[str, Outcome]]:
    """Trains rows on problems, as many rows at a time as there are workers.

    Args:
        problems: of the same shapes, so that what trains a row is compiled once.
        names: of rows.
        budget: what every row gets.
        workers: threads.
        pieces: rows that were finished before.

    Returns:
        For each problem the outcomes by row.
    """
    param_keys, rule_keys, _ = keys_of(budget)
    rows = {name: ROWS[name] for name in names}
    networks = {
        row.cell: make_networks(row, problems[0], param_keys)
        for row in {row.cell: row for row in rows.values()}.values()
    }
    with (
        ThreadPoolExecutor(workers) as pool,
        progress(total=len(rows) * len(problems), unit="row", desc=problems[0].name) as bar,
    ):

        def one(name: str) -> list[Outcome]:
            row, found = rows[name], []
            learner = make_learner(row, problems[0], networks[row.cell], rule_keys)
            for problem in problems:
                made = functools.partial(learned, learner, row, problem, budget)
                found.append(pieces.made(f"{problem.name}_{problem.units}_{name}", made))
                bar.update()
            return found

        found = dict(zip(rows, pool.map(one, rows), strict=True))
    return [{name: each[k] for name, each in found.items()} for k in range(len(problems))]
