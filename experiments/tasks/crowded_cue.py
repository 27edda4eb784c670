"""A cue in a crowd: one channel of many carries the answer, long before it is asked for.

A pattern of D numbers is shown: the first is the cue, -1 or 1, all others are drawn from N(0, 1).
Background noise follows on every channel, and then the cue is asked for.

* *Depth*: a lower layer of few units that does not learn loses the cue in the crowd, whatever is
  above it; `ceiling` says exactly how much is left.
* *Time*: at the answer the units of a fast lower layer hold nothing but background, so its credit
  has to come through the memory of the layers above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Task, drawn_task
from localgrad import Batch


def crowded_cue(
    seed: int = 0,
    *,
    channels: int = 96,
    delay: int = 10,
    steps: int = 20,
    cue_steps: int = 3,
    answer_steps: int = 2,
    background: float = 0.3,
    test_size: int = 512,
) -> Task:
    """Makes the task, a choice of two.

    Args:
        seed: fixes the test sequences.
        channels: D, the size of the pattern; inputs have one channel more, the go signal.
        delay: steps between pattern and answer.
        steps: T; background comes first, so that sequences of all delays have one length.
        cue_steps: for how many steps the pattern is shown.
        answer_steps: for how many steps the go signal is on and the answer is asked for.
        background: standard deviation of the noise on all D channels outside the pattern.
        test_size: the number of test sequences.

    Returns:
        The task.
    """
    for name, value, least in (
        ("channels", channels, 2),
        ("delay", delay, 0),
        ("cue_steps", cue_steps, 1),
        ("answer_steps", answer_steps, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    first = steps - answer_steps - delay - cue_steps
    if first < 0:
        raise ValueError(
            f"steps must be at least cue_steps + delay + answer_steps = {steps - first}; got "
            f"{steps}."
        )
    time = jnp.arange(steps)
    shown = (time >= first) & (time < first + cue_steps)
    asked = time >= steps - answer_steps

    def sample(key: jax.Array, batch_size: int) -> Batch:
        label_key, crowd_key, noise_key = jax.random.split(key, 3)
        labels = jax.random.randint(label_key, (batch_size,), 0, 2)
        crowd = jax.random.normal(crowd_key, (batch_size, channels - 1))
        pattern = jnp.concatenate([2.0 * labels[:, None] - 1, crowd], axis=1)
        noise = background * jax.random.normal(noise_key, (batch_size, steps, channels))
        go = jnp.broadcast_to(asked.astype(noise.dtype), (batch_size, steps))
        seen = jnp.where(shown[None, :, None], pattern[:, None], noise)
        return Batch(
            inputs=jnp.concatenate([seen, go[..., None]], axis=-1),
            targets=jnp.broadcast_to(labels[:, None], (batch_size, steps)),
            mask=go,
        )

    return drawn_task(
        name="crowded_cue",
        title=f"crowded cue, delay {delay}",
        summary=f"T={steps} steps, the sign of 1 of {channels} channels, {delay} steps before",
        classes=2,
        sample=sample,
        seed=seed,
        test_size=test_size,
    )


def ceiling(kernels: Sequence[jax.Array]) -> float:
    """The best accuracy that anything can reach which sees the pattern through fixed weights.

    Through weights `w` (n,) of the cue and `W` (n, D - 1) of the crowd, the pattern becomes
    `±w + W c` with c from N(0, 1): two normal distributions, which the best of all decisions tells
    apart with probability `Phi(d)`, `d^2 = w^T (W W^T)^-1 w`. With random weights `d^2` is about
    n / (D - n).

    Args:
        kernels: all that read the input, each [D + 1, n_k]; the last row reads the go signal.

    Returns:
        An accuracy in [0.5, 1].

    Example:
        >>> round(ceiling([jax.numpy.asarray([[3.0], [4.0], [9.0]])]), 4)  # d = 3 / 4
        0.7734
    """
    weights = np.concatenate([np.asarray(kernel, np.float64)[:-1] for kernel in kernels], axis=1)
    cue, crowd = weights[0], weights[1:]
    d = math.sqrt(cue @ np.linalg.pinv(crowd.T @ crowd) @ cue)
    return 0.5 * (1 + math.erf(d / math.sqrt(2)))
