"""Batches for a network that predicts the next frame, or the next symbol.

At step t it is fed the frame of t - 1, none (zeros) at first, and then shown the frame of t. The
first frame of a sequence follows from nothing, so it is shown but not scored: a P-TNCN's states are
corrected by it. Letters: B streams, T steps of a call, C calls, D numbers of a frame.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad import Batch


class Codes(NamedTuple):
    """Symbols of sentences that lie end to end in streams.

    Attributes:
        target: [..., B, T] the symbol to be predicted; -1 where a stream has ended.
        last: [..., B, T] the one before; -1 where a sentence begins.
    """

    target: np.ndarray
    last: np.ndarray


def next_frames(frames: jax.Array) -> Batch:
    """Frames, each to be predicted from those before.

    Args:
        frames: [B, T, ...], whole sequences; a frame is flattened to D numbers.

    Returns:
        Inputs [B, T, D], which are zeros at first, targets [B, T, D], and a reset at first.

    Example:
        >>> next_frames(jnp.array([[[1], [2], [3]]])).inputs[0, :, 0].tolist()
        [0, 1, 2]
    """
    frames = frames.reshape(*frames.shape[:2], -1)
    inputs = jnp.pad(frames, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    first = jnp.zeros(frames.shape[:2], bool).at[:, 0].set(True)
    return Batch(inputs, frames, reset=first)


def next_symbols(codes: Codes, symbols: int) -> Batch:
    """Symbols, each to be predicted from those before in its sentence.

    Args:
        codes: of one call, [B, T].
        symbols: D, how many symbols there are.

    Returns:
        One-hot inputs, zeros where a sentence begins, and targets [B, T, D]; a mask that is 0 where
        a stream has ended, and a reset where a sentence begins. Call it inside `jit`: codes then
        travel to the device, and vectors do not.
    """
    target, last = map(jnp.asarray, codes)
    there = target >= 0
    return Batch(
        inputs=jax.nn.one_hot(last, symbols),
        targets=jax.nn.one_hot(target, symbols),
        mask=there.astype(jnp.float32),
        reset=there & (last < 0),
    )


def scored(batch: Batch) -> jax.Array:
    """What each prediction counts.

    Args:
        batch: by `next_frames` or `next_symbols`.

    Returns:
        Its mask [B, T], but 0 where a sequence begins. For rules whose states no target corrects,
        it is the mask to learn with: `batch._replace(mask=scored(batch))`.
    """
    mask = jnp.ones(batch.targets.shape[:2]) if batch.mask is None else batch.mask
    return mask if batch.reset is None else jnp.where(batch.reset, 0, mask)


def subset(
    sentences: Sequence[np.ndarray], count: int | None, seed: int | None = None
) -> tuple[np.ndarray, ...]:
    """Some sentences.

    Args:
        sentences: codes.
        count: how many to take; None for all.
        seed: fixes which; None for the first.

    Returns:
        Those, none twice, in the order they had.
    """
    if count is None:
        return tuple(sentences)
    if not 1 <= count <= len(sentences):
        raise ValueError(f"count must lie in 1..{len(sentences)}, the sentences; got {count}.")
    if seed is None:
        return tuple(sentences[:count])
    chosen = np.random.default_rng(seed).choice(len(sentences), count, replace=False)
    return tuple(sentences[i] for i in np.sort(chosen))


def minibatches(
    sentences: Sequence[np.ndarray], batch_size: int, steps: int, seed: Any = 0
) -> Codes:
    """Sentences in a random order, B at a time, each from its beginning.

    Sentences of more than T symbols are cut into several that know nothing of each other; shorter
    ones are padded.

    Args:
        sentences: codes, each [n].
        batch_size: B.
        steps: T.
        seed: fixes the order; one for each epoch.

    Returns:
        `Codes` of [C, B, T], of which each [B, T] begins B sentences; the last is filled up with
        rows of -1.

    Raises:
        ValueError: if B or T is less than 1.

    Example:
        >>> codes = minibatches([np.array([1, 2, 3, 4, 5])], 2, 3)
        >>> sorted(codes.target[0].tolist()), sorted(codes.last[0].tolist())
        ([[1, 2, 3], [4, 5, -1]], [[-1, 1, 2], [-1, 4, -1]])
    """
    _require_sizes(batch_size, steps)
    cut = [
        sentence[at : at + steps] for sentence in sentences for at in range(0, len(sentence), steps)
    ]
    calls = -(-len(cut) // batch_size)
    target = np.full((calls * batch_size, steps), -1, np.int32)
    last = target.copy()
    for row, k in enumerate(np.random.default_rng(seed).permutation(len(cut))):
        target[row, : len(cut[k])] = cut[k]
        last[row, 1 : len(cut[k])] = cut[k][:-1]
    return Codes(*(a.reshape(calls, batch_size, steps) for a in (target, last)))


def streams(sentences: Sequence[np.ndarray], batch_size: int, steps: int, seed: Any = 0) -> Codes:
    """Lays sentences end to end in B streams of about one length, and cuts them into calls.

    The longest are dealt first, each to the shortest stream, so how many calls there are depends
    on the sentences alone; within a stream they are then shuffled. Nothing is padded but the
    streams' ends, and one program serves all calls. A sentence may go on in the next call.

    Args:
        sentences: codes, each [n].
        batch_size: B.
        steps: T.
        seed: fixes the order; one for each epoch.

    Returns:
        `Codes` of [C, B, T].

    Raises:
        ValueError: if B or T is less than 1, or there are fewer sentences than streams.

    Example:
        >>> codes = streams([np.array([1, 2, 3, 4]), np.array([5, 6])], 2, 3)
        >>> codes.target.tolist(), codes.last.tolist()
        ([[[1, 2, 3], [5, 6, -1]], [[4, -1, -1], [-1, -1, -1]]],
         [[[-1, 1, 2], [-1, 5, -1]], [[3, -1, -1], [-1, -1, -1]]])
    """
    _require_sizes(batch_size, steps)
    if len(sentences) < batch_size:
        raise ValueError(f"{len(sentences)} sentences cannot fill {batch_size} streams.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sentences))
    order = order[np.argsort([-len(sentences[i]) for i in order], kind="stable")]
    shortest = [(0, b) for b in range(batch_size)]
    rows: list[list[np.ndarray]] = [[] for _ in shortest]
    for i in order:
        length, b = heapq.heappop(shortest)
        rows[b].append(sentences[i])
        heapq.heappush(shortest, (length + len(sentences[i]), b))
    calls = -(-max(shortest)[0] // steps)
    target = np.full((batch_size, calls * steps), -1, np.int32)
    last = target.copy()
    for b, row in enumerate(rows):
        at = 0
        for k in rng.permutation(len(row)):
            end = at + len(row[k])
            target[b, at:end], last[b, at + 1 : end] = row[k], row[k][:-1]
            at = end
    cut = (a.reshape(batch_size, calls, steps).swapaxes(0, 1) for a in (target, last))
    return Codes(*cut)


def _require_sizes(batch_size: int, steps: int) -> None:
    for name, value in (("batch_size", batch_size), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
