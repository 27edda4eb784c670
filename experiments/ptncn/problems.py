"""What is predicted: symbols or frames, how a prediction is scored, and where the data come from.

Letters: B streams, T steps of a call, D numbers of a frame or symbols, C calls of an epoch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.datasets import Text, Video, next_frames, next_symbols

LEAST = 0.01  # what a linear output is taken for at least, where a probability is asked for


class Outputs(NamedTuple):
    """What a model's outputs stand for.

    Attributes:
        squash: from logits to what is predicted.
        of_logits: the loss of models whose outputs are logits, as rules take it.
        of_predictions: the loss of models that squash their outputs themselves.
        as_prediction: what a linear output is taken for.
        unit: what scores are given in.
        scale: from the nats that losses give to that unit; of losses a number of the frame.
    """

    squash: Callable[[jax.Array], jax.Array]
    of_logits: Callable[[jax.Array, jax.Array], jax.Array]
    of_predictions: Callable[[jax.Array, jax.Array], jax.Array]
    as_prediction: Callable[[jax.Array], jax.Array]
    unit: str
    scale: float


def _distribution(y: jax.Array) -> jax.Array:
    y = jnp.clip(y, LEAST / y.shape[-1], 1)
    return y / y.sum(axis=-1, keepdims=True)


SYMBOLS = Outputs(
    jax.nn.softmax,
    optax.softmax_cross_entropy,
    localgrad.categorical_cross_entropy,
    _distribution,
    "bits a symbol",
    1 / np.log(2).item(),
)
PIXELS = Outputs(
    jax.nn.sigmoid,
    optax.sigmoid_binary_cross_entropy,
    localgrad.binary_cross_entropy,
    lambda y: jnp.clip(y, LEAST, 1 - LEAST),
    "nats a frame",
    1.0,
)


class Problem(NamedTuple):
    """A stream to be predicted.

    Attributes:
        name: what it is, in tables.
        outputs: what is predicted.
        size: D.
        batch_size: B, in training.
        draw: `(seed, epoch) -> pieces [C, ...]` to learn from.
        expand: `piece -> Batch`, which marks by `reset` where a sequence begins. Its first step is
            shown and not scored.
        valid: pieces to choose by, [C, ...].
        test: pieces to report, [C, ...].
    """

    name: str
    outputs: Outputs
    size: int
    batch_size: int
    draw: Callable[[int, int], Any]
    expand: Callable[[Any], localgrad.Batch]
    valid: Any
    test: Any


def of_video(
    video: Video, batch_size: int, sequences: int, valid: int, scored: int = 200
) -> Problem:
    """Frames of a video; an epoch has this many sequences, never the same ones.

    Args:
        video: the source.
        batch_size: B.
        sequences: in an epoch, a multiple of B.
        valid: how many training videos to choose by.
        scored: sequences scored at a time; divides `valid` and the number of test videos.
    """
    for name, count, of in (
        ("sequences", sequences, batch_size),
        ("valid", valid, scored),
        ("test videos", len(video.test), scored),
    ):
        if count % of:
            raise ValueError(f"{name} must be a multiple of {of}; got {count}.")
    make = jax.jit(video.sample, static_argnums=1)

    def draw(seed: int, epoch: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed + 1), epoch)
        return jax.random.split(key, sequences // batch_size)

    def expand(piece: jax.Array) -> localgrad.Batch:
        keyed = jnp.issubdtype(piece.dtype, jax.dtypes.prng_key)
        frames = video.sample(piece, batch_size) if keyed else piece
        return begun(next_frames(frames))

    chosen = make(jax.random.fold_in(jax.random.key(0), 2**31 - 2), valid)
    return Problem(
        name=video.name,
        outputs=PIXELS,
        size=int(np.prod(video.shape[1:])),
        batch_size=batch_size,
        draw=draw,
        expand=expand,
        valid=chosen.reshape(-1, scored, *video.shape),
        test=video.test.reshape(-1, scored, *video.shape),
    )


def begun(batch: localgrad.Batch) -> localgrad.Batch:
    """A batch whose first step begins a sequence."""
    shape = batch.targets.shape[:2]
    return batch._replace(reset=jnp.zeros(shape, bool).at[:, 0].set(True))


class Piece(NamedTuple):
    """A call's share of streams of sentences.

    Attributes:
        codes: [B, T] what is to be predicted; -1 where a stream has ended.
        last: [B, T] the symbol before; -1 at the first of a sentence.
    """

    codes: np.ndarray
    last: np.ndarray


def of_text(
    text: Text,
    batch_size: int,
    steps: int,
    sentences: int | None = None,
    scored: int | None = None,
) -> tuple[Problem, Sequence[np.ndarray]]:
    """Symbols of sentences, laid end to end in B streams; an epoch shows each sentence once.

    Args:
        text: the source.
        batch_size: B.
        steps: T, of a call.
        sentences: how many, of the training set, drawn once; None for all.
        scored: the first so many of the test set; None for all.

    Returns:
        The problem, and the sentences to learn from.
    """
    chosen = text.train
    if sentences is not None and sentences < len(chosen):
        picked = np.random.default_rng(0).permutation(len(chosen))[:sentences]
        chosen = tuple(chosen[i] for i in picked)

    def draw(seed: int, epoch: int) -> Piece:
        return streams(chosen, batch_size, steps, (seed, epoch))

    def expand(piece: Piece) -> localgrad.Batch:
        batch = next_symbols(jnp.asarray(piece.codes), len(text.symbols))
        inputs = jax.nn.one_hot(piece.last, len(text.symbols))  # of -1: zeros
        first = (jnp.asarray(piece.last) < 0) & (jnp.asarray(piece.codes) >= 0)
        return batch._replace(inputs=inputs, reset=first)

    problem = Problem(
        name=text.name,
        outputs=SYMBOLS,
        size=len(text.symbols),
        batch_size=batch_size,
        draw=draw,
        expand=expand,
        valid=streams(text.valid[:scored][:400], 4 * batch_size, steps),
        test=streams(text.test[:scored], 4 * batch_size, steps),
    )
    return problem, chosen


def streams(sentences: Sequence[np.ndarray], batch_size: int, steps: int, seed: Any = 0) -> Piece:
    """Lays sentences end to end in B streams of about one length, and cuts them into calls.

    The longest come first, each to the shortest stream: how many calls there are depends on the
    sentences alone. Within a stream they are then shuffled.

    Args:
        sentences: codes, each [n].
        batch_size: B.
        steps: T.
        seed: fixes the order.

    Returns:
        `Piece` of [C, B, T].

    Example:
        >>> piece = streams([np.array([1, 2, 3]), np.array([4, 5])], 1, 4)
        >>> piece.codes.tolist(), piece.last.tolist()
        ([[[4, 5, 1, 2]], [[3, -1, -1, -1]]], [[[-1, 4, -1, 1]], [[2, -1, -1, -1]]])
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sentences))
    order = order[np.argsort([-len(sentences[i]) for i in order], kind="stable")]
    lengths = [(0, b) for b in range(batch_size)]
    rows: list[list[np.ndarray]] = [[] for _ in lengths]
    for i in order:
        length, b = heapq.heappop(lengths)
        rows[b].append(sentences[i])
        heapq.heappush(lengths, (length + len(sentences[i]), b))
    calls = -(-max(lengths)[0] // steps)
    codes = np.full((batch_size, calls * steps), -1, np.int32)
    last = codes.copy()
    for b, row in enumerate(rows):
        at = 0
        for k in rng.permutation(len(row)):
            end = at + len(row[k])
            codes[b, at:end], last[b, at + 1 : end] = row[k], row[k][:-1]
            at = end
    cut = (a.reshape(batch_size, calls, steps).swapaxes(0, 1) for a in (codes, last))
    return Piece(*cut)
