"""What is learned: sequences of a fixed length, each from the initial carry.

| name | input | asked for | of the past it takes |
|---|---|---|---|
| `sign` | a sign, then noise | the sign, at the end | the first step |
| `recall` | a cue, then distractors | the cue, after a go signal | the first three steps |
| `copy` | symbols | the same again, after a pause | all of it |

Every batch is drawn anew; those of `experiments.perturbation.series` are windows of a series.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.perturbation.windows import guess_floor, linear_floor
from experiments.tasks import accuracy, delayed_recall
from localgrad import Batch

Score = Callable[[jax.Array, Batch], jax.Array]
HELD_OUT = 512  # sequences of `valid` and of `test`


class Problem(NamedTuple):
    """A task with the size of its network and of its training.

    Attributes:
        name: of the problem.
        title: in tables and figures.
        units: N, of the recurrent layer.
        outputs: O.
        batch_size: B.
        updates: how many every row gets.
        loss: of a step.
        data: what `sample` draws from, or None.
        sample: `(data, key, B) -> Batch`, pure.
        valid: what learning rates are chosen by.
        test: what is reported.
        also: what else is reported of the test: its heading, and `(outputs, batch) -> scalar`.
        floors: what predictions without a network score on `test`.
        digits: of losses in tables.
    """

    name: str
    title: str
    units: int
    outputs: int
    batch_size: int
    updates: int
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    data: Any
    sample: Callable[[Any, jax.Array, int], Batch]
    valid: Batch
    test: Batch
    also: tuple[str, Score]
    floors: dict[str, float]
    digits: int = 4


def sign(seed: int, updates: int, *, steps: int = 10) -> Problem:
    """A sign at the first step, noise after it, and the sign asked for at the last."""

    def sample(data: None, key: jax.Array, batch_size: int) -> Batch:
        sign_key, noise_key = jax.random.split(key)
        signs = jax.random.rademacher(sign_key, (batch_size,), jnp.float32)
        noise = jax.random.normal(noise_key, (batch_size, steps - 1))
        inputs = jnp.concatenate([signs[:, None], noise], axis=1)[..., None]
        targets = jnp.broadcast_to(signs[:, None, None], inputs.shape)
        return Batch(inputs, targets, _asked(jnp.arange(steps) == steps - 1, batch_size))

    def wrong(outputs: jax.Array, batch: Batch) -> jax.Array:
        return 100 * jnp.average((outputs * batch.targets)[..., 0] <= 0, weights=batch.mask)

    valid, test = _held_out(sample, seed)
    floors = {
        "always 0": guess_floor(test, 0.0),
        f"linear filter, {steps} taps": linear_floor(
            sample(None, _key(seed, 3), 2048), test, steps
        ),
    }
    return Problem(
        name="sign",
        title=f"sign: a sign, {steps - 1} steps of noise, the sign",
        units=16,
        outputs=1,
        batch_size=32,
        updates=updates,
        loss=optax.squared_error,
        data=None,
        sample=sample,
        valid=valid,
        test=test,
        also=("wrong %", wrong),
        floors=floors,
    )


def recall(seed: int, updates: int, *, delay: int = 5) -> Problem:
    """Delayed recall with distractors, a choice of four."""
    task = delayed_recall(seed, delay=delay, test_size=HELD_OUT)
    return Problem(
        name="recall",
        title=f"recall: {task.summary}",
        units=24,
        outputs=task.classes,
        batch_size=32,
        updates=updates,
        loss=optax.softmax_cross_entropy_with_integer_labels,
        data=None,
        sample=lambda data, key, batch_size: task.sample(key, batch_size),
        valid=task.sample(_key(seed, 1), HELD_OUT),
        test=task.test,
        also=("wrong %", lambda outputs, batch: 100 * (1 - accuracy(outputs, batch))),
        floors={"always the same": task.floors.loss},
    )


def copy(seed: int, updates: int, *, length: int = 5, delay: int = 3, symbols: int = 8) -> Problem:
    """Symbols, a pause, and markers at which the symbols are asked for; targets are 0 until then.

    Inputs are one-hot: nothing (channel 0), one of the symbols, the marker.
    """
    steps = 2 * length + delay
    time = jnp.arange(steps)

    def sample(data: None, key: jax.Array, batch_size: int) -> Batch:
        drawn = jax.random.randint(key, (batch_size, length), 1, symbols + 1)
        rest = jnp.where(time[length:] < length + delay, 0, symbols + 1)
        rest = jnp.broadcast_to(rest, (batch_size, steps - length))
        inputs = jax.nn.one_hot(jnp.concatenate([drawn, rest], axis=1), symbols + 2)
        recalled = jax.nn.one_hot(drawn, symbols + 2)
        targets = jnp.pad(recalled, ((0, 0), (steps - length, 0), (0, 0)))
        return Batch(inputs, targets, jnp.ones((batch_size, steps)))

    def wrong(outputs: jax.Array, batch: Batch) -> jax.Array:
        found = jnp.argmax(outputs[:, -length:], -1) == jnp.argmax(batch.targets[:, -length:], -1)
        return 100 * (1 - found.mean())

    valid, test = _held_out(sample, seed)
    marginal = np.zeros((steps, symbols + 2))
    marginal[-length:, 1:-1] = 1 / symbols
    floors = {
        "always 0": guess_floor(test, 0.0),
        "each step's mean": guess_floor(test, marginal),
    }
    fitted = sample(None, _key(seed, 3), 1024)
    for taps in (length, length + delay + 1):  # without what is asked for, and with it
        floors[f"linear filter, {taps} taps"] = linear_floor(fitted, test, taps)
    return Problem(
        name="copy",
        title=f"copy: {length} of {symbols} symbols, {delay} steps of pause",
        units=32,
        outputs=symbols + 2,
        batch_size=16,
        updates=updates,
        loss=optax.squared_error,
        data=None,
        sample=sample,
        valid=valid,
        test=test,
        also=("wrong symbols %", wrong),
        floors=floors,
    )


def _asked(steps: jax.Array, batch_size: int) -> jax.Array:
    return jnp.broadcast_to(steps.astype(jnp.float32), (batch_size, len(steps)))


def _key(seed: int, number: int) -> jax.Array:
    """Keys of held-out data; training folds in seeds and updates, which are fewer."""
    return jax.random.fold_in(jax.random.key(seed), 2**31 - 1 - number)


def _held_out(sample: Callable[..., Batch], seed: int) -> tuple[Batch, Batch]:
    return sample(None, _key(seed, 1), HELD_OUT), sample(None, _key(seed, 2), HELD_OUT)
