"""Training: a row's learning rate is chosen, all its seeds learn, epoch by epoch, and are tested.

A run is saved after each epoch and goes on from there. Letters: S runs, C calls, T steps of a call.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import localgrad
from experiments.datasets import scored
from experiments.ptncn.checkpoints import Progress, Run, restore, save
from experiments.ptncn.learner import Learner, make_score
from experiments.ptncn.problems import Problem

RIDGES = (1e-2, 1.0, 1e2)
TRIAL = 2**16 - 1  # the epoch of which learning rates are chosen
MOST_RATES = 9  # that are tried, even if the best is an edge


class Outcome(NamedTuple):
    """A finished row.

    Attributes:
        units: of a layer.
        parameters: of the network.
        rate: the learning rate that was chosen.
        tried: by learning rate, the score on `valid` after the first epoch.
        valid: [S, epochs + 1] the score on `valid` after each epoch, the untrained network first.
        test: [S] the score on `test` at the end.
        frames: [S, T] the score of each step of a test sequence, if all have one length.
        seconds: of an epoch, all runs together; other rows may have run beside it.
        params: what was learned, [S, ...].
    """

    units: int
    parameters: int
    rate: float
    tried: dict[float, float]
    valid: np.ndarray
    test: np.ndarray
    frames: np.ndarray
    seconds: float
    params: Any


def learned(
    learner: Learner,
    epochs: int,
    seeds: int,
    tick: Callable[[], Any],
    folder: Path | None = None,
) -> Outcome:
    """Chooses a learning rate by one epoch each, trains all seeds, and tests them.

    Args:
        learner: what learns.
        epochs: how often it goes through the data.
        seeds: S; as many learning rates are tried at a time.
        tick: called after each epoch.
        folder: where to save after each epoch and to go on from; None for neither.

    Returns:
        The outcome.
    """
    score = make_score(learner)
    problem, row = learner.problem, learner.row
    keys = jax.random.split(jax.random.key(0), seeds)
    run = learner.init(keys)
    settings = settings_of(learner, seeds)
    if row.rule is None:
        run = fitted(learner, run, score, epochs)
        done = Progress(row.rates[0], {}, [score(run.params, problem.valid)[:, -1].tolist()])
    else:
        run, done = restore(folder, run, settings, epochs) or (run, choose(learner, run, score))
        tick()
    for _ in range(done.epochs, epochs if row.rule is not None else 0):
        run, done = epoch_of(learner, run, done, done.epochs)
        done.scores.append(score(run.params, problem.valid)[:, -1].tolist())
        if folder is not None:
            save(folder, run, done, settings)
        tick()
    frames = score(run.params, problem.test)
    return Outcome(
        units=learner.units,
        parameters=learner.parameters,
        rate=done.rate,
        tried=done.tried,
        valid=np.array(done.scores).T,
        test=frames[:, -1],
        frames=frames[:, :-1],
        seconds=done.seconds,
        params=run.params,
    )


def epoch_of(learner: Learner, run: Run, done: Progress, number: int) -> tuple[Run, Progress]:
    """One epoch more of a run, on that one of the problem's that has this number."""
    seeds = len(jax.tree.leaves(run.params)[0])
    pieces = drawn(learner.problem, range(seeds), number)
    begin = time.perf_counter()
    run, _ = jax.block_until_ready(learner.advance(run, jnp.full(seeds, done.rate), pieces))
    seconds = time.perf_counter() - begin
    return run, done._replace(epochs=done.epochs + 1, seconds=seconds)


def choose(learner: Learner, run: Run, score: Any) -> Progress:
    """The best of the row's learning rates after one epoch, from one seed's network and data.

    While the best lies at an edge, as many more are tried beyond it.
    """
    seeds, tried = len(jax.tree.leaves(run.params)[0]), {}
    first = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), run)
    pieces = drawn(learner.problem, [0] * seeds, TRIAL)
    best, ahead = learner.row.rates[0], learner.row.rates if len(learner.row.rates) > 1 else ()
    while ahead and len(tried) < MOST_RATES:
        for at in range(0, len(ahead), seeds):
            some = [*ahead[at : at + seeds], *ahead[:seeds]][:seeds]
            found, _ = learner.advance(first, jnp.array(some), pieces)
            values = score(found.params, learner.problem.valid)[:, -1]
            tried |= dict(zip(some, values.tolist(), strict=True))
        best = min(tried, key=lambda rate: np.nan_to_num(tried[rate], nan=math.inf))
        ahead = beyond(sorted(tried), best, len(learner.row.rates))
    tried = dict(sorted(tried.items()))
    return Progress(best, tried, [score(run.params, learner.problem.valid)[:, -1].tolist()])


def beyond(rates: list[float], best: float, count: int) -> tuple[float, ...]:
    """So many learning rates more, spaced as these are, where the best of them is an edge."""
    ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    if best not in (rates[0], rates[-1]):
        return ()
    outwards = ratio if best == rates[-1] else 1 / ratio
    return tuple(float(f"{best * outwards**k:.2g}") for k in range(1, count + 1))


def drawn(problem: Problem, seeds: Any, epoch: int) -> Any:
    """An epoch of each seed, stacked."""
    return jax.tree.map(lambda *a: jnp.stack(a), *(problem.draw(seed, epoch) for seed in seeds))


def fitted(learner: Learner, run: Run, score: Any, epochs: int) -> Run:
    """Each seed's readout in closed form, by the ridge that serves `valid` best."""
    problem = learner.problem
    expand = jax.jit(problem.expand)

    def batches(seed: int) -> Iterator[localgrad.Batch]:
        for epoch in range(epochs):
            pieces = problem.draw(seed, epoch)
            for c in range(len(jax.tree.leaves(pieces)[0])):
                batch = expand(jax.tree.map(operator.itemgetter(c), pieces))
                yield batch._replace(mask=scored(batch))

    def fit(seed: int, ridge: float) -> Any:
        own = jax.tree.map(operator.itemgetter(seed), run.params)
        return localgrad.fit_ridge(learner.model, own, batches(seed), ridge=ridge)

    seeds = range(len(jax.tree.leaves(run.params)[0]))
    found = [
        jax.tree.map(lambda *a: jnp.stack(a), *(fit(seed, ridge) for seed in seeds))
        for ridge in RIDGES
    ]
    best = min(found, key=lambda params: score(params, problem.valid)[:, -1].mean())
    return run._replace(params=best)


def settings_of(learner: Learner, seeds: int) -> dict[str, Any]:
    """What a saved run must have been made with, to go on."""
    return {
        "problem": learner.problem.name,
        "batch_size": learner.problem.batch_size,
        "label": learner.row.label,
        "parameters": learner.parameters,
        "rates": list(learner.row.rates),
        "seeds": seeds,
    }
