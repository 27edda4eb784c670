"""What all layers of a network hold, and what is done to all of them at once.

A quantity has one array for the first layer and, in either of two layouts, the others': *listed*,
a tuple of arrays [B, H_l] for layers 2..L of any widths, or *stacked*, one array [B, L - 1, H], on
which a product is one batched product for all of these layers. No function here puts layers in an
order: each layer meets itself and its two neighbours only.

Letters: B batch, L layers, H units of a layer, H_l those of layer l.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Several = Any
"""Arrays of several layers: a tuple of [B, H_l], or one array [B, number of layers, H]."""


class Layers(NamedTuple):
    """A quantity of every layer.

    Attributes:
        first: that of the lowest layer, [B, H_1].
        rest: those of layers 2..L: a tuple of arrays [B, H_l], or one array [B, L - 1, H].
    """

    first: jax.Array
    rest: Several


def lower(ys: Layers) -> Several:
    """What layers 1..L-1 hold: for each layer above the first, the one below it."""
    if isinstance(ys.rest, tuple):
        return (ys.first, *ys.rest)[:-1]
    return jnp.concatenate([ys.first[..., None, :], ys.rest[..., :-1, :]], axis=-2)


def plus_lower(ys: Layers, terms: Several) -> Layers:
    """Adds to each of layers 1..L-1 its term."""
    if isinstance(terms, tuple):
        held = (ys.first, *ys.rest)
        first, *rest = (*(a + b for a, b in zip(held, terms, strict=False)), held[-1])
        return Layers(first, tuple(rest))
    above = jnp.pad(terms[..., 1:, :], [(0, 0)] * (terms.ndim - 2) + [(0, 1), (0, 0)])
    return Layers(ys.first + terms[..., 0, :], ys.rest + above)


def through(ys: Several, weights: Several) -> Several:
    """Each layer's array times a matrix of its own.

    Args:
        ys: arrays [B, I_l] of n layers, or [B, n, I].
        weights: as many matrices [I_l, J_l], or [n, I, J].

    Returns:
        Arrays [B, J_l], or [B, n, J].
    """
    if isinstance(ys, tuple):
        return tuple(y @ weight for y, weight in zip(ys, weights, strict=True))
    return jnp.einsum("...li,lij->...lj", ys, weights)


def outer(
    radius: float | None, pre: jax.Array, post: jax.Array, dtype: Any, gain: float = 1.0
) -> jax.Array:
    """The outer products of pre [B, I] and post [B, J], summed over examples and scaled down.

    Args:
        radius: the largest Frobenius norm, or None for any. Where there are fewer pairs of examples
            than numbers in the sum, they tell its norm, `|X'Y|^2 = sum (X X') * (Y Y')`, so that no
            number has to be read again.
        pre: [B, I].
        post: [B, J].
        dtype: in which to sum.
        gain: what the sum is multiplied by; it is scaled down both before and after that.

    Returns:
        The matrix [I, J].
    """
    found = jnp.einsum("bi,bj->ij", pre, post, preferred_element_type=dtype)
    if radius is None:
        return gain * found
    if len(pre) <= min(found.shape):
        pairs = [jnp.matmul(a, a.T, preferred_element_type=dtype) for a in (pre, post)]
        square = jnp.maximum(jnp.vdot(*pairs), 0)  # not below 0 by rounding
    else:
        square = jnp.sum(found * found)
    norm = max(1.0, abs(gain)) * jnp.sqrt(square)
    return found * (gain * radius / jnp.maximum(norm, radius))


def outers(
    radius: float | None, pres: Several, posts: Several, dtype: Any, gain: float = 1.0
) -> Several:
    """`outer` of each layer.

    Args:
        radius: the largest Frobenius norm of each, or None for any.
        pres: arrays [B, I_l] of n layers, or [B, n, I].
        posts: arrays [B, J_l] of as many, or [B, n, J].
        dtype: in which to sum.
        gain: as of `outer`.

    Returns:
        Matrices [I_l, J_l], or [n, I, J].
    """
    one = functools.partial(outer, radius, dtype=dtype, gain=gain)
    if isinstance(pres, tuple):
        return tuple(one(a, b) for a, b in zip(pres, posts, strict=True))
    return jax.vmap(one, (1, 1))(pres, posts)
