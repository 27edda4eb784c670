"""Windows of a series as sequences, and how well one predicts without a network.

Letters: R rows, D columns, B batch, O outputs, T steps of a window, of which the first `washout`
are not scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad import Batch


class Series(NamedTuple):
    """What is seen, and what is asked for at the same time.

    Attributes:
        inputs: [R, D].
        targets: [R].
    """

    inputs: Any
    targets: Any


class Window(NamedTuple):
    """How a series is cut.

    Attributes:
        steps: T.
        washout: how many of them, at first, are not scored.
    """

    steps: int
    washout: int


def sampler(window: Window) -> Callable[[Series, jax.Array, int], Batch]:
    """What draws windows from anywhere in a series, `(series, key, B) -> Batch`."""

    def sample(series: Series, key: jax.Array, batch_size: int) -> Batch:
        last = len(series.targets) - window.steps
        starts = jax.random.randint(key, (batch_size,), 0, last + 1)
        at = starts[:, None] + jnp.arange(window.steps)[None]
        return _batch(series.inputs[at], series.targets[at], window)

    return sample


def tiled(series: Series, window: Window) -> Batch:
    """The windows that score each row but the first `washout` once, as far as they fit."""
    starts = np.arange(0, len(series.targets) - window.steps + 1, window.steps - window.washout)
    at = starts[:, None] + np.arange(window.steps)
    inputs = jnp.asarray(series.inputs[at], jnp.float32)
    return _batch(inputs, jnp.asarray(series.targets[at], jnp.float32), window)


def _batch(inputs: jax.Array, targets: jax.Array, window: Window) -> Batch:
    mask = jnp.broadcast_to(jnp.arange(window.steps) >= window.washout, targets.shape)
    return Batch(inputs, targets[..., None], mask.astype(jnp.float32))


def linear_floor(train: Batch, test: Batch, taps: int) -> float:
    """Test error of the best linear filter of the last inputs, by least squares on training data.

    Args:
        train: what it is fitted to.
        test: what it is scored on.
        taps: how many steps it sees, that of now included; zeros are before a sequence's first.

    Returns:
        Its mean squared error on the steps that the mask weights.
    """
    seen, asked = _lagged(train, taps)
    weights, *_ = np.linalg.lstsq(seen, asked, rcond=None)
    seen, asked = _lagged(test, taps)
    return float(np.mean((seen @ weights - asked) ** 2))


def _lagged(batch: Batch, taps: int) -> tuple[np.ndarray, np.ndarray]:
    """Each scored step's inputs with those before and a 1, [M, taps D + 1], and targets [M, O]."""
    inputs, asked = np.asarray(batch.inputs, np.float64), np.asarray(batch.mask) > 0
    steps = inputs.shape[1]
    padded = np.pad(inputs, ((0, 0), (taps - 1, 0), (0, 0)))
    lags = [padded[:, taps - 1 - k : taps - 1 - k + steps][asked] for k in range(taps)]
    return np.hstack([*lags, np.ones((len(lags[0]), 1))]), np.asarray(batch.targets)[asked]


def guess_floor(test: Batch, guess: np.ndarray | float) -> float:
    """Test error, on the scored steps, of a prediction that broadcasts to [B, T, O]."""
    targets = np.asarray(test.targets, np.float64)
    wrong = np.mean((np.broadcast_to(guess, targets.shape) - targets) ** 2, axis=-1)
    return float(np.average(wrong, weights=np.asarray(test.mask)))
