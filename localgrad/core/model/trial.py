"""What is found out of modules once: by reading their traces, or by trying them.

Trials run on concrete random numbers, the same every time, whatever is being traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

POINTS = 8
SIZES = np.tile([0.3, 1.0, 1.0, 10.0], 2)


class Outline(NamedTuple):
    """A tree but for its numbers: what tells one trace from another. It can be hashed.

    Attributes:
        treedef: its structure.
        leaves: shape and dtype of each leaf.
    """

    treedef: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    def filled(self, fill: Callable[[tuple[int, ...], str], Any]) -> Any:
        """The tree, with `fill(shape, dtype)` for leaves."""
        return jax.tree.unflatten(self.treedef, [fill(*leaf) for leaf in self.leaves])


def outline(tree: Any) -> Outline:
    """The outline of a tree of arrays, of dtypes as JAX takes them now; shapes suffice."""
    flat, treedef = jax.tree.flatten(tree)
    taken = jax.dtypes.canonicalize_dtype
    return Outline(treedef, tuple((a.shape, jnp.dtype(taken(a.dtype)).name) for a in flat))


class Draws:
    """Deterministic random numbers of any dtype."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def values(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Normal numbers for states and inputs; zeros where the dtype is no floating one.

        Over `POINTS` rows their size varies, and half the rows are the others with signs turned.
        """
        if not jnp.issubdtype(dtype, jnp.inexact):
            return np.zeros(shape, dtype)
        drawn = self.rng.normal(size=shape)
        if shape and shape[0] == POINTS:
            drawn[POINTS // 2 :] = -drawn[: POINTS // 2]  # no unit is silent at every point
            drawn *= SIZES.reshape(-1, *(1,) * (len(shape) - 1))
        return drawn.astype(dtype)

    def weights(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Positive numbers of the size of 1 over the fan-in, for parameters."""
        fan_in = shape[0] if len(shape) > 1 else 1
        return (self.rng.uniform(0.1, 0.9, size=shape) / max(1, fan_in)).astype(dtype)


def apart(trial: Callable[..., Any], *args: Any) -> Any:
    """`trial(*args)`; compiled ahead and given plain numbers, it is no part of an outer trace."""
    with jax.disable_jit(False):
        return jax.jit(trial).lower(*args).compile()(*args)


@functools.cache
def memoised(trial: Callable[..., Any]) -> Callable[..., Any]:
    """A pure function of what can be hashed, with its findings kept; else as it is."""
    kept = functools.lru_cache(maxsize=256)(lambda wide, *args: trial(*args))

    def look_up(*args: Any) -> Any:
        try:
            hash(args)
        except TypeError:
            return trial(*args)
        return kept(jnp.result_type(float), *args)  # a trace depends on it

    return look_up


def tried_once(trial: Callable[..., Any], module: Any, params: Any, given: Any) -> Any:
    """What a trial of a module finds; once for all numbers of examples.

    Args:
        trial: `(module, outline of its parameters, outline of one example of what it is given)`.
        module: the module.
        params: its parameters; shapes suffice.
        given: what it is given, batch axis first; shapes suffice.

    Returns:
        What the trial returns.
    """
    treedef, leaves = outline(given)
    one = Outline(treedef, tuple((shape[1:], dtype) for shape, dtype in leaves))
    return memoised(trial)(module, outline(params), one)
