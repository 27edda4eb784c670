"""Learning online: a row on a problem, all its seeds in one jitted function. Letters: L lanes.

A lane is a network with a stream of its own. Every row sees the same streams, in calls of T steps,
of which `localgrad.learn` makes an update every few; BPTT, which is not online, one for the whole
call. Rates fall to 0 on a line, and each row has the same search for the first of them: whole runs
of a network of another seed, judged by `valid`, and more beyond an edge; then all seeds learn at
the best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import localgrad
from experiments.online.problems import STEPS, Problem, grown
from experiments.online.rows import ROWS, Row
from experiments.progress import progress
from experiments.ptncn.checkpoints import Progress, Run, restore, save
from experiments.ptncn.training import beyond
from experiments.train import one_by_one

MOST_RATES = 9  # that are tried, if the best is an edge
ALIKE, NOTHING = 0.02, 1e-4  # losses as good as another, and as 0 beside the first floor's
TRIAL = 1  # seeds of which learning rates are chosen, beside those that count


class Budget(NamedTuple):
    """What every row gets.

    Attributes:
        units: N.
        calls: of T steps, a multiple of `checks`.
        checks: C, how often a run is tested, and its pause made longer.
        seeds: S.
        seed: where all randomness starts.
    """

    units: int
    calls: int
    checks: int
    seeds: int
    seed: int


class Learner(NamedTuple):
    """A row made ready for problems of one shape.

    Attributes:
        row: what learns.
        params: of S + 1 untrained networks.
        start: `(params [L], keys [L]) -> Run`, compiled.
        advance: `(Run, rates [L, calls], Batch [L, calls, B, T, ...]) -> (Run, losses [L, calls,
            U])`, compiled.
    """

    row: Row
    params: Any
    start: Callable[[Any, jax.Array], Run]
    advance: Callable[[Run, jax.Array, localgrad.Batch], tuple[Run, jax.Array]]


class Judge(NamedTuple):
    """What all rows with one kind of network share on a problem, compiled.

    Attributes:
        score: `(params [L], Batch) -> [L, 2]`, what is reported and what else is.
        begin: `keys [L] -> streams`.
        draw: `(streams, keys [L, calls], pauses [L]) -> (streams, Batch [L, calls, B, T, ...])`.
    """

    score: Callable[[Any, localgrad.Batch], jax.Array]
    begin: Callable[[jax.Array], Any]
    draw: Callable[[Any, jax.Array, jax.Array], tuple[Any, localgrad.Batch]]


class Journey(NamedTuple):
    """Lanes that have learned.

    Attributes:
        run: what they are in the end.
        test: [L, C + 1] on `test` at each check.
        also: [L] what else is reported, at the end.
        pauses: [L, C + 1] of a problem that grows.
        seconds: of all updates.
    """

    run: Run
    test: np.ndarray
    also: np.ndarray
    pauses: np.ndarray
    seconds: float


class Outcome(NamedTuple):
    """A finished row.

    Attributes:
        rate: the learning rate that was chosen.
        tried: by learning rate, what a run of another seed ended with on `valid`.
        steps: [C + 1] of a stream, at each check.
        test: [S, C + 1] on `test` at each check.
        also: [S] what else is reported, at the end.
        pauses: [S, C + 1] of a problem that grows.
        seconds: of all updates of the seeds; other rows may have run beside it.
        params: what was learned, [S, ...].
    """

    rate: float
    tried: dict[float, float]
    steps: np.ndarray
    test: np.ndarray
    also: np.ndarray
    pauses: np.ndarray
    seconds: float
    params: Any

    @property
    def final(self) -> np.ndarray:
        """[S] what is reported, at the end."""
        return self.test[:, -1]


def keys_of(budget: Budget) -> jax.Array:
    """Of networks, of rules and of data, [3, S + 1]; the last are those of a trial."""
    return jax.random.split(jax.random.key(budget.seed), (3, budget.seeds + TRIAL))


def make_learner(row: Row, problem: Problem, budget: Budget, streams: int) -> Learner:
    """Draws the networks of a row and compiles what trains them."""
    model = row.model(budget.units, problem.outputs)
    x = problem.test.inputs[:1, 0].repeat(streams, axis=0)

    def tx_of(rate: Any, key: jax.Array) -> Any:
        return row.transformation(row.rule(model, problem.loss, key, x), rate)

    def init(key: jax.Array) -> Any:
        return model.init(key, model.initialize_carry(key, x.shape), x)["params"]

    def start(params: Any, key: jax.Array) -> Run:
        return Run(params, tx_of(1.0, key).init(params))

    def advance(run: Run, rates: jax.Array, batches: localgrad.Batch) -> tuple[Run, jax.Array]:
        def call(run: Run, now: tuple[jax.Array, localgrad.Batch]) -> tuple[Run, jax.Array]:
            tx = tx_of(now[0], jax.random.key(0))  # a key matters to `init` alone
            params, state, losses = localgrad.learn(tx, *run, now[1], row.chunk or STEPS)
            return Run(params, state), losses

        return jax.lax.scan(call, run, (rates, batches))

    return Learner(
        row=row,
        params=one_by_one(init, keys_of(budget)[0]),
        start=jax.jit(jax.vmap(start)),
        advance=jax.jit(jax.vmap(advance)),
    )


def make_judges(
    problems: Sequence[Problem], rows: Sequence[Row], budget: Budget
) -> dict[tuple[Any, str], Judge]:
    """By cells and problem: what draws its streams, and what scores such networks."""
    judges = {}
    for problem in problems:
        begin, draw = jax.jit(jax.vmap(problem.begin)), _drawing(problem)
        for cells, row in {row.cells: row for row in rows}.items():
            judges[cells, problem.name] = Judge(_scoring(row, problem, budget), begin, draw)
    return judges


def _drawing(problem: Problem) -> Callable[..., tuple[Any, localgrad.Batch]]:
    def draw(stream: Any, keys: jax.Array, pause: jax.Array) -> tuple[Any, localgrad.Batch]:
        return jax.lax.scan(lambda s, key: problem.draw(s, key, pause), stream, keys)

    return jax.jit(jax.vmap(draw))


def _scoring(row: Row, problem: Problem, budget: Budget) -> Callable[..., jax.Array]:
    model = row.model(budget.units, problem.outputs)

    def score(params: Any, batch: localgrad.Batch) -> jax.Array:
        value, outputs, _ = localgrad.evaluate(model, problem.loss, params, batch)
        return jnp.stack([problem.scale * value, problem.also[1](outputs, batch)])

    return jax.jit(jax.vmap(score, in_axes=(0, None)))


def travel(
    learner: Learner,
    judge: Judge,
    problem: Problem,
    budget: Budget,
    lanes: Sequence[int],
    rates: Sequence[float],
) -> Journey:
    """Runs lanes to the end of their streams.

    Args:
        learner: of the row.
        judge: of the problem.
        problem: what is learned.
        budget: what every row gets.
        lanes: whose networks, keys and data each has, of the S + 1.
        rates: their learning rates.
    """
    _, rule_keys, data_keys = (keys[jnp.array(lanes)] for keys in keys_of(budget))
    run = learner.start(jax.tree.map(lambda a: a[jnp.array(lanes)], learner.params), rule_keys)
    streams, pause = judge.begin(data_keys), np.ones(len(lanes), int)
    tests, pauses, seconds = [judge.score(run.params, problem.test)], [pause], 0.0
    segment = budget.calls // budget.checks
    for number in range(budget.checks):
        keys = _segment(data_keys, number, segment)
        left = 1 - (number * segment + np.arange(segment)) / budget.calls
        now = jnp.asarray(np.outer(rates, left), jnp.float32)
        streams, batches = judge.draw(streams, keys, jnp.asarray(pause))
        jax.block_until_ready(batches)
        last = time.perf_counter()
        run, losses = jax.block_until_ready(learner.advance(run, now, batches))
        seconds += time.perf_counter() - last
        if problem.grows:
            pause = grown(pause, mean_loss(losses, batches.mask))
        tests.append(judge.score(run.params, problem.test))
        pauses.append(pause)
    return Journey(
        run=run,
        test=np.stack([np.asarray(found[:, 0]) for found in tests], axis=1),
        also=np.asarray(tests[-1][:, 1]),
        pauses=np.stack(pauses, axis=1),
        seconds=seconds,
    )


def mean_loss(losses: jax.Array, mask: jax.Array | None) -> np.ndarray:
    """The mean over a segment's asked steps, [L], from the means of chunks [L, calls, U]."""
    assert mask is not None  # every problem has one
    lanes, calls, updates = losses.shape
    weights = np.asarray(mask).reshape(lanes, calls, -1, updates, STEPS // updates)
    return np.average(np.asarray(losses), axis=(1, 2), weights=weights.sum(axis=(2, 4)))


def _segment(keys: jax.Array, number: int, calls: int) -> jax.Array:
    """The keys of a segment's calls, [L, calls]."""
    return jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number), calls))(keys)


def learned(learner: Learner, judge: Judge, problem: Problem, budget: Budget) -> Outcome:
    """Chooses a learning rate, and trains all seeds at it."""
    rate, tried = choose(learner, judge, problem, budget)
    lanes = range(budget.seeds)
    journey = travel(learner, judge, problem, budget, lanes, [rate] * budget.seeds)
    return Outcome(
        rate=rate,
        tried=tried,
        steps=checked_steps(budget),
        test=journey.test,
        also=journey.also,
        pauses=journey.pauses,
        seconds=journey.seconds,
        params=journey.run.params,
    )


def choose(
    learner: Learner, judge: Judge, problem: Problem, budget: Budget
) -> tuple[float, dict[float, float]]:
    """The best of the row's rates, and what each led to; as many lanes at a time as seeds."""
    row, tried, count = learner.row, {}, budget.seeds
    best, ahead = row.rates[0], row.rates
    while ahead and len(tried) < MOST_RATES:
        for at in range(0, len(ahead), count):
            some = [*ahead[at : at + count], *ahead * count][:count]
            journey = travel(learner, judge, problem, budget, [count] * count, some)
            values = judge.score(journey.run.params, problem.valid)[:, 0]
            tried |= dict(zip(some, values.tolist(), strict=True))
        best = best_of(tried, row.rates, problem)
        ahead = beyond(sorted(tried), best, len(row.rates))
    return best, dict(sorted(tried.items()))


def best_of(tried: dict[float, float], rates: Sequence[float], problem: Problem) -> float:
    """The rate with the least value; of those that are as good, that in the middle of the grid."""
    values = {rate: v if math.isfinite(v) else math.inf for rate, v in tried.items()}
    floor = next(iter(problem.floors.values()))
    enough = max((1 + ALIKE) * min(values.values()), NOTHING * floor)
    middle = math.log(rates[0] * rates[-1]) / 2
    alike = [rate for rate, value in values.items() if value <= enough]
    return min(alike or values, key=lambda rate: abs(math.log(rate) - middle))


def checked_steps(budget: Budget) -> np.ndarray:
    """Steps of a stream at each check, [C + 1]."""
    return np.arange(budget.checks + 1) * (budget.calls // budget.checks * STEPS)


def compete(
    problems: Sequence[Problem],
    names: Sequence[str],
    budget: Budget,
    workers: int,
    streams: int,
    folder: Path,
) -> list[dict[str, Outcome]]:
    """Trains rows on problems, as many rows at a time as there are workers.

    Args:
        problems: of one shape, so that what trains a row is compiled once.
        names: of rows.
        budget: what every row gets.
        workers: threads.
        streams: B.
        folder: where finished rows are kept; those that are there are not run again.

    Returns:
        For each problem the outcomes by row.
    """
    total = len(names) * len(problems)
    title = ", ".join(problem.name for problem in problems)
    judges = make_judges(problems, [ROWS[name] for name in names], budget)
    with ThreadPoolExecutor(workers) as pool, progress(total=total, unit="row", desc=title) as bar:

        def one(name: str) -> list[Outcome]:
            row, found = ROWS[name], []
            learner = make_learner(row, problems[0], budget, streams)
            for problem in problems:
                judge = judges[row.cells, problem.name]
                place = folder / problem.name / name
                outcome = restored(place, learner, problem, budget)
                if outcome is None:
                    outcome = learned(learner, judge, problem, budget)
                    kept(place, outcome, learner, problem, budget)
                found.append(outcome)
                bar.update()
            return found

        found = dict(zip(names, pool.map(one, names), strict=True))
    return [{name: each[k] for name, each in found.items()} for k in range(len(problems))]


def kept(
    folder: Path, outcome: Outcome, learner: Learner, problem: Problem, budget: Budget
) -> None:
    """Writes a finished row."""
    parts = (outcome.test, outcome.also, outcome.pauses)
    done = Progress(
        rate=outcome.rate,
        tried=outcome.tried,
        scores=[part.tolist() for part in parts],
        epochs=budget.calls,
        seconds=outcome.seconds,
    )
    save(folder, Run(outcome.params, ()), done, settings_of(learner, problem, budget))


def restored(folder: Path, learner: Learner, problem: Problem, budget: Budget) -> Outcome | None:
    """A row that was finished before, or None."""
    like = Run(jax.tree.map(lambda a: a[: budget.seeds], learner.params), ())
    there = restore(folder, like, settings_of(learner, problem, budget), budget.calls)
    if there is None:
        return None
    run, done = there
    test, also, pauses = map(np.array, done.scores)
    steps = checked_steps(budget)
    return Outcome(done.rate, done.tried, steps, test, also, pauses, done.seconds, run.params)


def settings_of(learner: Learner, problem: Problem, budget: Budget) -> dict[str, Any]:
    """What a row that is kept must have been made with."""
    row = learner.row
    own = {"row": row.label, "chunk": row.chunk, "rates": list(row.rates), "title": problem.title}
    return own | budget._asdict()
