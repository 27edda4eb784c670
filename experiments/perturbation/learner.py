"""Learning: a row on a problem, all its seeds in one jitted function. Letters: S seeds, C checks.

Every row has the same networks and batches, the same number of updates and the same search for its
learning rate: one run of the first seed's network for each rate, half as long, on other batches,
judged by `valid`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import localgrad
from experiments.deep.trials import crossing
from experiments.perturbation.problems import Problem
from experiments.perturbation.rows import ROWS, Row
from experiments.ptncn.learner import beyond
from experiments.train import Run, one_by_one

MOST_RATES = 15  # that are tried, if the best is an edge


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


class Learner(NamedTuple):
    """A row made ready for a problem.

    Attributes:
        init: `keys [S] -> Run` of untrained networks.
        advance: `(Run, rates [S], keys [S, updates], data) -> Run`, one segment, compiled.
        score: `(params, Batch) -> [S, 2]`, the loss and what else is reported, compiled.
    """

    init: Callable[[jax.Array], Run]
    advance: Callable[[Run, jax.Array, jax.Array, Any], Run]
    score: Callable[[Any, localgrad.Batch], jax.Array]


class Outcome(NamedTuple):
    """A finished row.

    Attributes:
        rate: the learning rate that was chosen.
        tried: by learning rate, the loss on `valid` after half the updates.
        steps: [C + 1] updates made at each check.
        test: [S, C + 1] the loss at each check.
        also: [S] what else is reported, at the end.
        seconds: of all updates of all seeds; other rows may have run beside it.
    """

    rate: float
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


def make_learner(row: Row, problem: Problem) -> Learner:
    """Builds the network and what trains it."""
    example = problem.test.inputs[:1, 0]
    model = row.model(problem.units, problem.outputs)

    def tx_of(rate: Any, key: jax.Array) -> Any:
        return optax.chain(row.rule(model, problem.loss, key), row.optimizer(rate))

    def init(key: jax.Array) -> Run:
        param_key, rule_key = jax.random.split(key)
        carry = model.initialize_carry(key, example.shape)
        params = model.init(param_key, carry, example)["params"]
        return Run(params, tx_of(1.0, rule_key).init(params))

    def advance(run: Run, rate: jax.Array, keys: jax.Array, data: Any) -> Run:
        tx = tx_of(rate, jax.random.key(0))  # a key matters to `init` alone

        def step(run: Run, key: jax.Array) -> tuple[Run, None]:
            params, state = run
            batch = problem.sample(data, key, problem.batch_size)
            updates, state = tx.update(None, state, params, batch=batch)
            return Run(optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, run, keys)[0]

    def score(params: Any, batch: localgrad.Batch) -> jax.Array:
        value, outputs, _ = localgrad.evaluate(model, problem.loss, params, batch)
        return jnp.stack([value, problem.also[1](outputs, batch)])

    return Learner(
        init=lambda keys: one_by_one(init, keys),
        advance=jax.jit(jax.vmap(advance, in_axes=(0, 0, 0, None))),
        score=jax.jit(jax.vmap(score, in_axes=(0, None))),
    )


def learned(learner: Learner, row: Row, problem: Problem, budget: Budget) -> Outcome:
    """Chooses a learning rate, trains all seeds, and tests them.

    Args:
        learner: made of the row, and of this problem or of one of the same shapes.
        row: what learns.
        problem: what is learned.
        budget: what every row gets.
    """
    root = jax.random.key(budget.seed)
    param_keys, data_keys, trial_keys = jax.random.split(root, (3, budget.seeds))
    start = learner.init(param_keys)
    rate, tried = choose(learner, row, problem, budget, start, trial_keys[:1])
    rates = jnp.array([rate] * budget.seeds)
    run, tests, seconds = start, [learner.score(start.params, problem.test)], 0.0
    for check in range(budget.checks):
        keys = segment_keys(data_keys, check, problem.updates // budget.checks)
        begin = time.perf_counter()
        run = jax.block_until_ready(learner.advance(run, rates, keys, problem.data))
        seconds += time.perf_counter() - begin
        tests.append(learner.score(run.params, problem.test))
    return Outcome(
        rate=rate,
        tried=tried,
        steps=np.arange(budget.checks + 1) * (problem.updates // budget.checks),
        test=np.stack([np.asarray(found[:, 0]) for found in tests], axis=1),
        also=np.asarray(tests[-1][:, 1]),
        seconds=seconds,
    )


def choose(
    learner: Learner, row: Row, problem: Problem, budget: Budget, start: Run, key: jax.Array
) -> tuple[float, dict[float, float]]:
    """The best of the row's learning rates, and the loss of each on `valid`.

    As many are tried at a time as there are seeds, and while the best lies at an edge, more beyond.
    """
    seeds, tried, ahead = budget.seeds, {}, row.rates
    first = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), start)
    best = ahead[0]
    while ahead and len(tried) < MOST_RATES:
        for at in range(0, len(ahead), seeds):
            some = [*ahead[at : at + seeds], *ahead[:1] * seeds][:seeds]
            run = first
            for check in range(math.ceil(budget.checks / 2)):
                keys = segment_keys(key, check, problem.updates // budget.checks)
                keys = jnp.broadcast_to(keys, (seeds, *keys.shape[1:]))
                run = learner.advance(run, jnp.array(some), keys, problem.data)
            values = learner.score(run.params, problem.valid)[:, 0]
            tried |= dict(zip(some, values.tolist(), strict=True))
        best = min(tried, key=lambda rate: np.nan_to_num(tried[rate], nan=math.inf))
        ahead = beyond(sorted(tried), best, len(row.rates))
    return best, dict(sorted(tried.items()))


def segment_keys(keys: jax.Array, check: int, updates: int) -> jax.Array:
    """The keys of a segment's batches, [S, updates]."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, check), updates))(keys)


def compete(
    problems: Sequence[Problem], names: Sequence[str], budget: Budget, workers: int
) -> list[dict[str, Outcome]]:
    """Trains rows on problems, as many rows at a time as there are workers.

    Args:
        problems: of the same shapes, so that what trains a row is compiled once.
        names: of rows.
        budget: what every row gets.
        workers: threads.

    Returns:
        For each problem the outcomes by row.
    """
    total = len(names) * len(problems)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, unit="row", desc=problems[0].name) as bar,
    ):

        def one(name: str) -> list[Outcome]:
            learner, found = make_learner(ROWS[name], problems[0]), []
            for problem in problems:
                found.append(learned(learner, ROWS[name], problem, budget))
                bar.update()
            return found

        found = dict(zip(names, pool.map(one, names), strict=True))
    return [{name: found[name][k] for name in names} for k in range(len(problems))]
