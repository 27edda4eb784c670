"""Examples and samples one after the other: how memory is recalled and renewed in little room.

Letters: B batch, K samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from localgrad.core.steps import length, merge_axes


def over_examples(
    held: Any,
    xs: Any,
    recall: Callable[[Any, Any], Any] | None,
    renew: Callable[[Any, Any], Any] | None,
    read: Any = (),
) -> tuple[Any, Any]:
    """What is recalled from each example's memory, summed, and new memory in the old's place.

    On a CPU one example at a time, in cache and in place; if there are several devices, as many at
    a time, each from a part of the batch that may lie on a device of its own. Elsewhere all at
    once.

    Args:
        held: memory, leaves [B, ...].
        xs: what else there is of each example, leaves [B, ...].
        recall: `(memory, x) -> a dict` to sum over examples, or None for nothing.
        renew: `(memory, x) -> memory`, or None where it stays.
        read: what was computed from the memory before, so that no copy is kept for that.

    Returns:
        The sum, and the memory then.
    """

    def summed(held: Any, xs: Any) -> Any:
        if recall is None:
            return {}
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (held, xs))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(recall, *one))

        def add(total: Any, at: tuple[Any, Any]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, recall(*at)), None

        return jax.lax.scan(add, zeros, (held, xs))[0]

    def renewed(held: Any, xs: Any) -> Any:
        if renew is None:
            return held

        def put(held: Any, at: tuple[jax.Array, Any]) -> tuple[Any, None]:
            i, x = at
            old = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), held)
            into = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return jax.tree.map(into, held, renew(old, x)), None

        return jax.lax.scan(put, held, (jnp.arange(length(xs), dtype=jnp.uint32), xs))[0]

    def one_by_one(held: Any, xs: Any, read: Any) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(xs)
        if length(xs) == 1:
            leaves = settled(leaves)
        total = summed(held, jax.tree.unflatten(treedef, leaves))
        if renew is None:
            return total, held
        if jax.tree.leaves((total, read)):
            # All of one example, whose loop is none; else the least, which is enough for an order.
            least = min(range(len(leaves)), key=lambda k: (not _real(leaves[k]), leaves[k].size))
            late = slice(least, least + 1) if length(xs) > 1 else slice(None)
            total, _, leaves[late] = settled((total, read, leaves[late]))
        return total, renewed(held, jax.tree.unflatten(treedef, leaves))

    def together(held: Any, xs: Any, read: Any) -> tuple[Any, Any]:
        del read
        each = {} if recall is None else jax.vmap(recall)(held, xs)
        total = jax.tree.map(lambda a: a.sum(0), each)
        return total, held if renew is None else jax.vmap(renew)(held, xs)

    def side_by_side(held: Any, xs: Any, read: Any) -> tuple[Any, Any]:
        del read

        def divided(a: jax.Array) -> jax.Array:
            return a.reshape(devices, len(a) // devices, *a.shape[1:])

        def one_part(held: Any, xs: Any) -> tuple[Any, Any]:
            return summed(held, xs), renewed(held, xs)

        found, held = jax.vmap(one_part)(*jax.tree.map(divided, (held, xs)))
        return jax.tree.map(lambda a: a.sum(0), found), merge_axes(held)

    devices = math.gcd(length(xs), jax.device_count())
    on_cpu = one_by_one if jax.device_count() == 1 else side_by_side
    return jax.lax.platform_dependent(held, xs, read, cpu=on_cpu, default=together)


def settled(tree: Any) -> Any:
    """The same numbers, all there before any is used: a barrier that XLA keeps on a CPU.

    There `optimization_barrier` is gone when it matters, so that XLA would compute what is small
    anew for each number of what is large, and copy a memory where it sees no order between those
    that read it and those that overwrite it. Hence a branch that is never taken, for no number
    exceeds infinity, which XLA does not know. Without a real number in the tree it is no barrier.
    """
    first = next((a.ravel()[0] for a in jax.tree.leaves(tree) if _real(a)), None)
    if first is None:
        return tree

    def changed(a: jax.Array) -> jax.Array:
        return -a if _real(a) else a

    return jax.lax.cond(first > jnp.inf, lambda a: jax.tree.map(changed, a), lambda a: a, tree)


def _real(a: jax.Array) -> bool:
    """Whether it holds real numbers."""
    return bool(a.size) and jnp.issubdtype(a.dtype, jnp.floating)


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
