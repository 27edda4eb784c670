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


def merge_axes(tree: Any) -> Any:
    """[M, N, ...] -> [M * N, ...], leaf by leaf."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), tree)


def as_rows(tree: Any) -> Any:
    """[W, B, ...] -> [W B, ...], leaf by leaf, in the order that `from_rows` undoes.

    Where there are several devices, examples come first, so that the rows of an example stay on its
    device; on one, steps do, for which nothing moves.
    """
    if jax.device_count() == 1:
        return merge_axes(tree)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape((-1, *a.shape[2:])), tree)


def from_rows(tree: Any, steps: int) -> Any:
    """[W B, ...] -> [W, B, ...], leaf by leaf."""
    if jax.device_count() == 1:
        return jax.tree.map(lambda a: a.reshape((steps, -1, *a.shape[1:])), tree)
    return jax.tree.map(lambda a: a.reshape((-1, steps, *a.shape[1:])).swapaxes(0, 1), tree)


def length(tree: Any) -> int:
    """The size of the leading axis."""
    return jax.tree.leaves(tree)[0].shape[0]


def even_window(steps: int, most: int = 128) -> int:
    """At most `most` steps; if possible a divisor of `steps`, so that no short window remains."""
    return next((w for w in range(min(most, steps), most // 2, -1) if steps % w == 0), most)


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


def examples_first(tree: Any, axis: int) -> Any:
    """Moves the examples from this axis to the front, leaf by leaf."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), tree)


def example_row_step(a: jax.Array) -> jax.Array:
    """[W, K, B, ...] -> [B, K, W, ...]."""
    return jnp.moveaxis(a, (2, 1), (0, 1))


def response(f: Any, at: Any, tangent: Any) -> Any:
    """How `f` answers to a small change of its argument.

    By transposing its backward pass, since `jax.jvp` refuses `jax.custom_vjp` functions, as which
    many write the surrogate derivative of a spike.
    """
    out, pull = jax.vjp(f, at)
    (found,) = jax.linear_transpose(lambda q: pull(q)[0], out)(tangent)
    return found
