"""What is said of a mean over random draws: z-scores, entry by entry and leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import numpy as np

DRAWS = 2000
CHANCE = 1e-6  # of a false alarm, in one comparison of two trees


def sample(draw: Callable[[jax.Array], Any], count: int = DRAWS, seed: int = 0) -> Any:
    """`draw(key)` for many keys, in one program: leaves [count, ...]."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=100))(keys)


def assert_mean(drawn: Any, expected: Any) -> None:
    """Asserts that trees drawn, leaves [count, ...], are `expected` on average.

    Each entry has its z-score, and each leaf one more, of its whole gap: that sees a small error
    that many entries share, in any direction. What does not vary must be equal.
    """
    exact = jax.tree.structure(drawn).flatten_up_to(expected)
    scores = {
        jax.tree_util.keystr(path): scores_of(np.asarray(a), np.asarray(b))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(drawn), exact, strict=True)
    }
    assert scores, "nothing was drawn"
    bar = NormalDist().inv_cdf(1 - CHANCE / 2 / sum(len(z) for z in scores.values()))
    worst = {name: float(np.abs(z).max()) for name, z in scores.items()}
    assert all(z < bar for z in worst.values()), f"z-scores of {worst}, to lie below {bar:.1f}"


def scores_of(drawn: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The z-scores of a leaf's entries, infinite where one must be equal, and that of the leaf."""
    count = len(drawn)
    flat, aim = drawn.reshape(count, -1), expected.reshape(-1)
    gap, error = flat.mean(0) - aim, flat.std(0, ddof=1) / np.sqrt(count)
    constant = error <= 1e-12 * (1 + np.abs(aim))
    off = np.where(np.abs(gap) <= 1e-10 * (1 + np.abs(aim)), 0.0, np.inf)
    entries = np.where(constant, off, gap / np.where(constant, 1, error))
    if constant.all():
        return entries
    return np.append(entries, _whole(flat[:, ~constant], gap[~constant]))


def _whole(flat: np.ndarray, gap: np.ndarray) -> float:
    """Hotelling's T^2 of a gap, which is chi^2, as a z-score (Wilson and Hilferty)."""
    count = len(flat)
    size, ways = np.linalg.eigh(np.cov(flat.T).reshape(len(gap), -1))
    held = size > 1e-8 * size.max()
    free = held.sum()
    total = count * np.sum((gap @ ways[:, held]) ** 2 / size[held]) * (count - free) / (count - 1)
    return float(((total / free) ** (1 / 3) - 1 + 2 / (9 * free)) / np.sqrt(2 / (9 * free)))
