"""Floors: how well one predicts without a network. All but the first step of a sequence counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SymbolFloors(NamedTuple):
    """Cross-entropies in bits a symbol.

    Attributes:
        uniform: of guessing all symbols alike.
        unigram: of the symbols' frequencies in training, each counted once more.
        bigram: of their frequencies after the last symbol, by Witten and Bell.
    """

    uniform: float
    unigram: float
    bigram: float


class Score(NamedTuple):
    """How wrong a prediction is, on average over pixels.

    Attributes:
        cross_entropy: binary, in nats.
        squared_error: of which no half is taken.
    """

    cross_entropy: float
    squared_error: float


class VideoFloors(NamedTuple):
    """Scores of predictions without a network.

    Attributes:
        mean: of each pixel's mean in training.
        copied: of the last frame.
        itself: of the very frame that comes, the best there is: pixels are grey, so that its
            cross-entropy is not 0.
    """

    mean: Score
    copied: Score
    itself: Score


def symbol_floors(
    train: Sequence[np.ndarray], test: Sequence[np.ndarray], symbols: int
) -> SymbolFloors:
    """Floors of a text.

    With `n(a b)` how often b follows a in training, `n(a)` how often anything does and `t(a)` how
    many different symbols do, the bigram is `p(b | a) = (n(a b) + t(a) p(b)) / (n(a) + t(a))`, and
    p(b) where nothing follows a. There is nothing in it to tune.

    Args:
        train: the sentences that a network learns from, codes.
        test: those it is scored on.
        symbols: V, how many symbols there are.

    Returns:
        The floors on every symbol of `test` but the first of a sentence.

    Reference:
        Witten and Bell, "The zero-frequency problem: estimating the probabilities of novel events
        in adaptive text compression", 1991, https://doi.org/10.1109/18.87000 (method C)
    """
    before, after = _pairs(train)
    counts = np.bincount(after, minlength=symbols)
    single = (counts + 1) / (len(after) + symbols)
    seen, times = np.unique(before * symbols + after, return_counts=True)
    followed = np.bincount(before, minlength=symbols)
    different = np.bincount(seen // symbols, minlength=symbols)

    before, after = _pairs(test)
    pair = before * symbols + after
    at = np.minimum(np.searchsorted(seen, pair), len(seen) - 1)
    together = np.where(seen[at] == pair, times[at], 0)
    rest = np.maximum(different[before], 1)  # where nothing follows, only p(b) is left
    double = (together + rest * single[after]) / (followed[before] + rest)
    return SymbolFloors(
        uniform=math.log2(symbols),
        unigram=float(-np.log2(single[after]).mean()),
        bigram=float(-np.log2(double).mean()),
    )


def _pairs(sentences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each symbol that has one before it, and that one."""
    before = np.concatenate([sentence[:-1] for sentence in sentences])
    return before.astype(np.int64), np.concatenate([sentence[1:] for sentence in sentences])


def video_floors(train: np.ndarray, test: np.ndarray, clip: float = 0.01) -> VideoFloors:
    """Floors of videos.

    Args:
        train: videos [M, F, H, W] in [0, 1], for the mean.
        test: those that are scored, [M', F, H, W].
        clip: a predicted pixel is at least this bright and at most one less this; the copy's
            cross-entropy depends on it (nothing wrong is infinite), squared errors do not.

    Returns:
        The floors on every frame of `test` but the first of a video.

    Raises:
        ValueError: if `clip` does not lie between 0 and 1/2.
    """
    if not 0 < clip < 0.5:
        raise ValueError(f"clip must lie between 0 and 1/2; got {clip}.")
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    frames = test[:, 1:]

    def score(guess: np.ndarray, least: float) -> Score:
        p = np.clip(guess, least, 1 - least)
        nats = -(frames * np.log(p) + (1 - frames) * np.log(1 - p))
        return Score(float(nats.mean()), float(np.mean((frames - guess) ** 2)))

    return VideoFloors(
        mean=score(train[:, 1:].mean(axis=(0, 1)), clip),
        copied=score(test[:, :-1], clip),
        itself=score(frames, 1e-12),
    )
