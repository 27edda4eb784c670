"""What is predicted: symbols or frames, how a prediction is scored, and where the data come from.

Letters: B streams, T steps of a call, D numbers of a frame or symbols, C calls of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.datasets import (
    Codes,
    Text,
    Video,
    minibatches,
    next_frames,
    next_symbols,
    streams,
    subset,
)

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
        draw: `(seed, epoch) -> pieces [C, ...]` to learn from; in each, sequences begin anew.
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
        return next_frames(frames)

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


def of_text(
    text: Text,
    batch_size: int,
    steps: int,
    sentences: int | None = None,
    tested: int | None = None,
    valid: int = 400,
    scored: int = 200,
) -> tuple[Problem, Sequence[np.ndarray]]:
    """Symbols of sentences, of which an epoch shows each once; scored on sentences end to end.

    Args:
        text: the source.
        batch_size: B.
        steps: T, of a call; what is longer is cut to learn from, and scored whole.
        sentences: how many, at most, of the training set, drawn once; None for all.
        tested: the first so many of the test set; None for all.
        valid: the first so many of the validation set, at most.
        scored: streams that are scored at a time, at most.

    Returns:
        The problem, and the sentences to learn from.
    """
    few = None if sentences is None else min(sentences, len(text.train))
    chosen = subset(text.train, few, seed=0)
    symbols = len(text.symbols)

    def held_out(sentences: Sequence[np.ndarray], count: int | None) -> Codes:
        some = subset(sentences, None if count is None else min(count, len(sentences)))
        return streams(some, min(scored, len(some)), steps)

    problem = Problem(
        name=text.name,
        outputs=SYMBOLS,
        size=symbols,
        batch_size=batch_size,
        draw=lambda seed, epoch: minibatches(chosen, batch_size, steps, (seed, epoch)),
        expand=lambda codes: next_symbols(codes, symbols),
        valid=held_out(text.valid, valid),
        test=held_out(text.test, tested),
    )
    return problem, chosen
