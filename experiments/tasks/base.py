"""What every task is made of. Letters: B batch, T time steps, O classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad import Batch


class Floors(NamedTuple):
    """What the best constant prediction reaches, one that never looks at the input.

    Attributes:
        loss: cross-entropy in nats of predicting the classes' frequencies in training.
        accuracy: share of answers right when always answering the commonest class in training.
    """

    loss: float
    accuracy: float


class Task(NamedTuple):
    """A sequence classification task.

    Attributes:
        name: its name on the command line.
        title: its name in tables and figures.
        summary: one line for the reader of a table.
        classes: O, the number of classes.
        sample: `(key, batch_size) -> Batch` of training data, a pure function. `inputs` is
            [B, T, I], `targets` [B, T] holds class numbers, `mask` [B, T] is 1 where an answer
            is asked for.
        test: held-out data, one batch.
        floors: what a prediction that ignores the input reaches on `test`.
    """

    name: str
    title: str
    summary: str
    classes: int
    sample: Callable[[jax.Array, int], Batch]
    test: Batch
    floors: Floors


def accuracy(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Share of the asked-for answers that are right.

    Args:
        outputs: [B, T, O] logits.
        batch: the batch they answer; its mask weights the steps.

    Returns:
        A scalar in [0, 1].
    """
    right = jnp.argmax(outputs, axis=-1) == batch.targets
    return jnp.average(right, weights=batch.mask)


def constant_floors(frequencies: np.ndarray, labels: np.ndarray) -> Floors:
    """Computes the floors of a task from its labels.

    Args:
        frequencies: [O] share of each class in training.
        labels: [M] class numbers of the test data.

    Returns:
        The floors on those labels.

    Example:
        >>> constant_floors(np.array([0.5, 0.5]), np.array([0, 1, 1, 1])).accuracy
        0.25
    """
    safe = np.maximum(frequencies, np.finfo(np.float64).tiny)
    return Floors(
        loss=float(-np.mean(np.log(safe)[labels])),
        accuracy=float(np.mean(labels == np.argmax(frequencies))),
    )


def drawn_task(
    name: str,
    title: str,
    summary: str,
    classes: int,
    sample: Callable[[jax.Array, int], Batch],
    seed: int,
    test_size: int,
) -> Task:
    """A task of equally frequent classes whose sequences are drawn anew, with its test set.

    Args:
        name: as in `Task`, and so are `title`, `summary`, `classes` and `sample`.
        title: likewise.
        summary: likewise.
        classes: likewise.
        sample: likewise; the label of a sequence is the same at all steps.
        seed: fixes the test sequences.
        test_size: the number of test sequences.

    Returns:
        The task.
    """
    # Training keys come from `jax.random.key` of other seeds; folding keeps the streams apart.
    test = sample(jax.random.fold_in(jax.random.key(seed), 2**31 - 1), test_size)
    frequencies = np.full(classes, 1 / classes)
    floors = constant_floors(frequencies, np.asarray(test.targets[:, 0]))
    return Task(name, title, summary, classes, sample, test, floors)
