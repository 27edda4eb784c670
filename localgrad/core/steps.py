"""Axes of a window: steps first, then credit rows, then examples. W steps, K rows, B examples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def select(reset: jax.Array, fresh: Any, old: Any) -> Any:
    """`fresh` where `reset` [..., B] says so, else `old`, leaf by leaf ([..., B, ...])."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        flags = reset.reshape(reset.shape + (1,) * (b.ndim - reset.ndim))
        return jnp.where(flags, a, b)

    return jax.tree.map(pick, fresh, old)


def merge_steps(tree: Any) -> Any:
    """[W, B, ...] -> [W * B, ...], leaf by leaf."""
    return jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), tree)


def split_steps(tree: Any, steps: int) -> Any:
    """[W * B, ...] -> [W, B, ...], leaf by leaf."""
    return jax.tree.map(lambda a: a.reshape((steps, -1, *a.shape[1:])), tree)


def length(tree: Any) -> int:
    """The size of the leading axis."""
    return jax.tree.leaves(tree)[0].shape[0]


def one_row(tree: Any) -> Any:
    """[W, B, ...] -> [W, 1, B, ...], leaf by leaf: credit as a single row."""
    return jax.tree.map(lambda a: a[:, None], tree)


def row(tree: Any, k: int) -> Any:
    """[W, K, B, ...] -> [W, B, ...], leaf by leaf: the k-th row."""
    return jax.tree.map(lambda a: a[:, k], tree)


def forget(credit: Any, where: jax.Array) -> Any:
    """Zero credit `where` says so, leaf by leaf."""
    return select(where, jax.tree.map(jnp.zeros_like, credit), credit)


def padded(rows: jax.Array, k: int) -> jax.Array:
    """[K', ...] -> [K, ...], with rows of zeros behind."""
    return jnp.pad(rows, [(0, k - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))
