"""Batches for a network that predicts the next frame, or the next symbol.

At step t it is fed the frame of t - 1, none (zeros) at first, and then shown the frame of t. The
first frame of a sequence follows from nothing, so it is shown but not scored: a P-TNCN's states are
corrected by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from localgrad import Batch


def next_frames(frames: jax.Array, mask: jax.Array | None = None) -> Batch:
    """Frames, each to be predicted from those before.

    Args:
        frames: [B, T, ...]; a frame is flattened to D numbers.
        mask: [B, T], 0 where there is no frame; None for ones.

    Returns:
        Inputs [B, T, D], which are zeros at first, and targets [B, T, D].

    Example:
        >>> next_frames(jnp.array([[[1], [2], [3]]])).inputs[0, :, 0].tolist()
        [0, 1, 2]
    """
    frames = frames.reshape(*frames.shape[:2], -1)
    inputs = jnp.pad(frames, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    return Batch(inputs, frames, mask)


def next_symbols(codes: jax.Array, symbols: int) -> Batch:
    """Symbols, each to be predicted from those before.

    Args:
        codes: [B, T] integers; negative after the end of a sentence.
        symbols: D, how many symbols there are.

    Returns:
        `next_frames` of their one-hot vectors, masked after the end. Call it inside `jit`: codes
        then travel to the device, and vectors do not.

    Example:
        >>> next_symbols(jnp.array([[1, 0, -1]]), 2).targets.tolist()
        [[[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]]
    """
    frames = jax.nn.one_hot(codes, symbols)
    return next_frames(frames, (codes >= 0).astype(frames.dtype))


def scored(batch: Batch) -> jax.Array:
    """What each prediction counts.

    Args:
        batch: by `next_frames` or `next_symbols`.

    Returns:
        Its mask [B, T], but 0 at the first step. For rules whose states no target corrects, it is
        the mask to learn with: `batch._replace(mask=scored(batch))`.
    """
    mask = jnp.ones(batch.targets.shape[:2]) if batch.mask is None else batch.mask
    return mask.at[:, 0].set(0)


def subset(
    sentences: Sequence[np.ndarray], count: int, seed: int | None = None
) -> tuple[np.ndarray, ...]:
    """Some sentences.

    Args:
        sentences: codes.
        count: how many to take.
        seed: fixes which; None for the first.

    Returns:
        Those, none twice, in the order they had.

    Raises:
        ValueError: if there are not so many.
    """
    if not 1 <= count <= len(sentences):
        raise ValueError(f"count must lie in 1..{len(sentences)}, the sentences; got {count}.")
    if seed is None:
        return tuple(sentences[:count])
    chosen = np.random.default_rng(seed).choice(len(sentences), count, replace=False)
    return tuple(sentences[i] for i in np.sort(chosen))


def widths(sentences: Sequence[np.ndarray], count: int = 6) -> tuple[int, ...]:
    """Lengths that sentences are padded to: few, so that few programs are compiled.

    Args:
        sentences: all that will be seen, training and test.
        count: how many lengths at most.

    Returns:
        Multiples of 8, ascending: one that holds all, and others, each in its turn the one that
        saves most.

    Raises:
        ValueError: if `count` is not positive.

    Example:
        >>> widths([np.zeros(n) for n in range(2, 100)], count=3)
        (32, 56, 104)
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}.")
    rounded = [-(-len(sentence) // 8) * 8 for sentence in sentences]
    sizes, times = np.unique(rounded, return_counts=True)

    def steps(chosen: list[int]) -> int:
        ascending = np.sort(chosen)
        return int(np.sum(ascending[np.searchsorted(ascending, sizes)] * times))

    chosen = [int(sizes[-1])]
    for _ in range(min(count, len(sizes)) - 1):
        chosen.append(min(sizes.tolist(), key=lambda size: steps([*chosen, size])))
    return tuple(sorted(chosen))


def batches(
    sentences: Sequence[np.ndarray],
    batch_size: int,
    widths: Sequence[int],
    seed: int | None = None,
) -> Iterator[np.ndarray]:
    """All sentences once, in batches of sentences of similar length.

    Args:
        sentences: codes.
        batch_size: B.
        widths: the lengths that batches may have; see `widths`.
        seed: fixes a random order of the sentences of a width, and of the batches; give each epoch
            its own. None for the order they have, short ones first.

    Yields:
        Codes [B, T] int32, T one of the widths, -1 after the end of a sentence; the last batch of
        a width is filled up with rows of -1, which count nothing.

    Raises:
        ValueError: if a sentence is longer than the last width, or `batch_size` not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    lengths = np.array([len(sentence) for sentence in sentences])
    if lengths.max() > max(widths):
        raise ValueError(
            f"widths must reach {lengths.max()}, the longest sentence; got {tuple(widths)}. Take "
            "those of all sentences, test and validation too."
        )
    rng = None if seed is None else np.random.default_rng(seed)
    width_of = np.searchsorted(np.sort(widths), lengths)
    planned = []
    for k, width in enumerate(sorted(widths)):
        members = np.flatnonzero(width_of == k)
        if rng is not None:
            rng.shuffle(members)
        planned += [
            (width, members[at : at + batch_size]) for at in range(0, len(members), batch_size)
        ]
    for i in range(len(planned)) if rng is None else rng.permutation(len(planned)):
        width, members = planned[i]
        codes = np.full((batch_size, width), -1, np.int32)
        for row, member in enumerate(members):
            codes[row, : lengths[member]] = sentences[member]
        yield codes
