"""Axes of a window: steps first, then credit rows, then examples. W steps, K rows, B examples."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def over_examples(learn: Callable[[Any], tuple[Any, Any]], xs: Any) -> tuple[Any, Any]:
    """Applies `learn` to each example, sums what it gives first and stacks what it gives second.

    On a CPU one example at a time, so that what lies between an example's old memory and its new
    stays in cache; if there are several devices, as many at a time, each from a part of the batch
    that may lie on a device of its own. Elsewhere all at once.

    Args:
        learn: `x -> (to sum, to keep)` for one example.
        xs: leaves [B, ...].

    Returns:
        The sum over examples, and what is kept, leaves [B, ...].
    """

    def one_by_one(xs: Any) -> tuple[Any, Any]:
        first = jax.eval_shape(learn, jax.tree.map(lambda a: a[0], xs))[0]
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)

        def step(total: Any, x: Any) -> tuple[Any, Any]:
            found, kept = learn(x)
            return jax.tree.map(jnp.add, total, found), kept

        return jax.lax.scan(step, zeros, xs)

    def together(xs: Any) -> tuple[Any, Any]:
        found, kept = jax.vmap(learn)(xs)
        return jax.tree.map(lambda a: a.sum(0), found), kept

    def side_by_side(xs: Any) -> tuple[Any, Any]:
        parts = jax.tree.map(lambda a: a.reshape(devices, len(a) // devices, *a.shape[1:]), xs)
        found, kept = jax.vmap(one_by_one)(parts)
        return jax.tree.map(lambda a: a.sum(0), found), merge_axes(kept)

    devices = math.gcd(length(xs), jax.device_count())
    on_cpu = one_by_one if devices == 1 else side_by_side
    return jax.lax.platform_dependent(xs, cpu=on_cpu, default=together)


def over_samples(
    learn: Callable[[Any], tuple[Any, Any]], xs: Any, at_once: int | None
) -> tuple[Any, Any]:
    """Applies `learn` to some samples at a time, and sums what it gives first over these times.

    Args:
        learn: `leaves [k, ...] -> (to sum, to keep [k, ...])` for k samples.
        xs: leaves [K, ...].
        at_once: k, a divisor of K, or None for K.

    Returns:
        The sum, and what is kept, leaves [K, ...].
    """
    count = length(xs)
    if at_once is None or at_once >= count:
        return learn(xs)
    some = jax.tree.map(lambda a: a.reshape((-1, at_once, *a.shape[1:])), xs)
    first = jax.eval_shape(learn, jax.tree.map(lambda a: a[0], some))[0]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first)

    def step(total: Any, x: Any) -> tuple[Any, Any]:
        found, kept = learn(x)
        return jax.tree.map(jnp.add, total, found), kept

    total, kept = jax.lax.scan(step, zeros, some)
    return total, merge_axes(kept)


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
