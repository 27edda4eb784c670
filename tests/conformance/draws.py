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

    Each entry has its z-score, and each leaf one more along the expected leaf, which sees an error
    of size far better than any entry does. What does not vary must be equal.
    """
    found, treedef = jax.tree.flatten(drawn)
    exact = treedef.flatten_up_to(expected)
    scores = {
        jax.tree_util.keystr(path): _scores(np.asarray(a), np.asarray(b))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(drawn), exact, strict=True)
    }
    bar = NormalDist().inv_cdf(1 - CHANCE / 2 / sum(len(z) for z in scores.values()))
    worst = {name: np.abs(z).max() for name, z in scores.items()}
    assert all(z < bar for z in worst.values()), f"z-scores of {worst}, to lie below {bar:.1f}"
    assert found, "nothing was drawn"


def _scores(drawn: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The z-scores of one leaf, [count, ...] beside [...]: infinite where it must be equal."""
    count = len(drawn)
    flat, aim = drawn.reshape(count, -1), expected.reshape(1, -1)
    along = aim / max(np.linalg.norm(aim), np.finfo(float).tiny)
    flat, aim = (np.concatenate([a, (a * along).sum(1, keepdims=True)], 1) for a in (flat, aim))
    gap, error = flat.mean(0) - aim[0], flat.std(0, ddof=1) / np.sqrt(count)
    size = np.abs(aim).max()
    constant = error <= 1e-12 * size
    off = np.where(np.abs(gap) <= 1e-10 * (1 + size), 0.0, np.inf)
    return np.where(constant, off, gap / np.where(constant, 1, error))
