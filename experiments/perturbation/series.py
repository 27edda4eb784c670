"""Series to predict, or to remember, cut into windows that each begin at the initial carry.

| name | input | asked for | of the past it takes |
|---|---|---|---|
| `ahead` | Mackey-Glass | 15 steps ahead | a few tens of steps |
| `behind` | Mackey-Glass | 15 steps ago | that step alone |
| `weather_1h`, `_24h`, `_48h` | nine columns | the temperature, so many hours ahead | little |

Windows are drawn anew for every batch from anywhere in the training part; a window's first steps
are not scored. Test windows tile the test part: every row after the first few is scored once. So
BPTT means the exact gradient of a window.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.datasets import mackey_glass, scaled, weather
from experiments.perturbation.problems import Problem
from experiments.perturbation.windows import (
    Series,
    Window,
    guess_floor,
    linear_floor,
    sampler,
    tiled,
)
from localgrad import Batch

SIZES = (8, 32, 64)  # numbers of units of `ahead`
DELAY = 15  # steps of Mackey-Glass
WINDOW = Window(steps=40, washout=20)
DAY = Window(steps=48, washout=24)
HOURS = (1, 24, 48)
SPLIT, VALID = 33600, 3000  # rows of weather: where the test begins, and how many come before it


def ahead(seed: int, updates: int, *, units: int = 32) -> Problem:
    """Mackey-Glass, predicted."""
    cut = [Series(s[:-DELAY, None], s[DELAY:]) for s in _chaos(seed)]
    title = f"Mackey-Glass, {DELAY} steps ahead"
    return _series("ahead", title, cut, WINDOW, units, updates, taps=(1, WINDOW.washout))


def behind(seed: int, updates: int) -> Problem:
    """Mackey-Glass, remembered: what the published code trains, x(t + 15) in and x(t) out."""
    cut = [Series(s[DELAY:, None], s[:-DELAY]) for s in _chaos(seed)]
    title = f"Mackey-Glass, {DELAY} steps ago (the published direction)"
    return _series("behind", title, cut, WINDOW, 32, updates, taps=(1, WINDOW.washout))


def forecast(seed: int, updates: int, hours: int, data_dir: Path | None) -> Problem:
    """The temperature some hours ahead; all is scaled by the rows that are learned from."""
    del seed  # nothing is drawn but windows
    table = weather(data_dir)
    values = scaled(table.values, SPLIT - VALID)
    column = values[:, table.target]
    bounds = ((0, SPLIT - VALID), (SPLIT - VALID, SPLIT), (SPLIT, len(values)))
    last = max(HOURS)  # so that the same rows are scored, however far ahead
    cut = [Series(values[a : b - last], column[a + hours : b - last + hours]) for a, b in bounds]
    name, title = f"weather_{hours}h", f"weather, {hours} h ahead"
    return _series(name, title, cut, DAY, 32, updates, taps=(1, DAY.washout), now=table.target)


def _chaos(seed: int) -> list[np.ndarray]:
    """Three series of other histories, without the mean of the first, which is learned from."""
    made = [mackey_glass(steps, 3 * seed + k) for k, steps in enumerate((5000, 1500, 3000))]
    return [each - made[0].mean() for each in made]


def _series(
    name: str,
    title: str,
    cut: list[Series],
    window: Window,
    units: int,
    updates: int,
    *,
    taps: tuple[int, ...],
    now: int = 0,
) -> Problem:
    """A problem of windows; `cut` has what is learned from, `valid` and `test`."""
    train, valid, test = (tiled(each, window) for each in cut)
    floors = {
        "mean in training": guess_floor(test, _mean(train)),
        "what is now": guess_floor(test, np.asarray(test.inputs)[..., now : now + 1]),
    }
    for count in taps:
        label = "linear, of now" if count == 1 else f"linear filter, {count} taps"
        floors[label] = linear_floor(train, test, count)

    return Problem(
        name=name,
        title=title,
        units=units,
        outputs=1,
        batch_size=8,
        updates=updates,
        loss=optax.squared_error,
        data=jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), cut[0]),
        sample=sampler(window),
        valid=valid,
        test=test,
        also=("% of variance", unexplained),
        floors=floors,
        digits=6,
    )


def unexplained(outputs: jax.Array, batch: Batch) -> jax.Array:
    """The squared error in per cent of what the best constant leaves."""
    targets, weights = batch.targets[..., 0], batch.mask
    wrong = jnp.average((outputs[..., 0] - targets) ** 2, weights=weights)
    mean = jnp.average(targets, weights=weights)
    return 100 * wrong / jnp.average((targets - mean) ** 2, weights=weights)


def _mean(batch: Batch) -> float:
    return float(np.average(np.asarray(batch.targets)[..., 0], weights=np.asarray(batch.mask)))
