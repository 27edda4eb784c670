"""Handwritten digits, read row by row or pixel by pixel; the answer is due at the last step.

The data are the 1797 digits of 8 x 8 pixels that come with scikit-learn (a test set of the UCI
repository, Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
https://doi.org/10.24432/C50P49). Nothing is downloaded.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from experiments.tasks.base import Task, constant_floors
from localgrad import Batch

Reading = Literal["rows", "pixels"]
CLASSES = 10


def digits(
    reading: Reading = "rows", seed: int = 0, *, test_share: float = 0.2, graded_steps: int = 1
) -> Task:
    """Makes the digits task.

    Args:
        reading: `"rows"` shows 8 pixels at each of T=8 steps, `"pixels"` one at each of T=64.
        seed: fixes which digits are held out.
        test_share: the share of digits held out, in (0, 1).
        graded_steps: how many of the last steps ask for the answer.

    Returns:
        The task. Inputs have mean 0 and variance 1 over the training digits.
    """
    if reading not in get_args(Reading):
        raise ValueError(f"reading must be one of {get_args(Reading)}; got {reading!r}.")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1; got {test_share}.")
    (train_x, train_labels), (test_x, test_labels) = split_digits(seed, test_share)
    shape = (8, 8) if reading == "rows" else (64, 1)
    if not 1 <= graded_steps <= shape[0]:
        raise ValueError(f"graded_steps must lie in 1..{shape[0]}; got {graded_steps}.")

    def batch_of(images: jax.Array, labels: jax.Array) -> Batch:
        count = images.shape[0]
        asked = jnp.arange(shape[0]) >= shape[0] - graded_steps
        return Batch(
            inputs=images.reshape(count, *shape),
            targets=jnp.broadcast_to(labels[:, None], (count, shape[0])),
            mask=jnp.broadcast_to(asked.astype(images.dtype), (count, shape[0])),
        )

    def sample(key: jax.Array, batch_size: int) -> Batch:
        rows = jax.random.randint(key, (batch_size,), 0, len(train_labels))
        return batch_of(jnp.asarray(train_x)[rows], jnp.asarray(train_labels)[rows])

    frequencies = np.bincount(train_labels, minlength=CLASSES) / len(train_labels)
    return Task(
        name=f"digits_{reading}",
        title=f"digits by {reading}",
        summary=f"T={shape[0]} steps of {shape[1]} pixel(s), answer at the end",
        classes=CLASSES,
        sample=sample,
        test=batch_of(jnp.asarray(test_x), jnp.asarray(test_labels)),
        floors=constant_floors(frequencies, test_labels),
    )


def split_digits(
    seed: int, test_share: float
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Splits the digits into training and test sets, normalised by the training set's statistics.

    Args:
        seed: fixes the split.
        test_share: the share held out.

    Returns:
        `(images [M, 64] float32, labels [M] int32)` for training, then the same for testing.
    """
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    held_out = round(test_share * len(order))
    train, test = order[held_out:], order[:held_out]
    mean, std = data.data[train].mean(), data.data[train].std()
    images = ((data.data - mean) / std).astype(np.float32)
    labels = data.target.astype(np.int32)
    return (images[train], labels[train]), (images[test], labels[test])
