"""What all layers of a network hold, and what is done to all of them at once.

A quantity has one array for the first layer and, in either of two layouts, the others': *listed*,
a tuple of arrays [B, H_l] for layers 2..L of any widths, or *stacked*, one array [B, L - 1, H], on
which a product is one batched product for all of these layers. No function here puts layers in an
order: each layer meets itself and its two neighbours only.

Letters: B batch, L layers, H units of a layer, H_l those of layer l.
"""

from __future__ import annotations

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


def outer(pre: jax.Array, post: jax.Array, dtype: Any) -> jax.Array:
    """The outer products [I, J] of pre [B, I] and post [B, J], summed over examples."""
    return jnp.einsum("bi,bj->ij", pre, post, preferred_element_type=dtype)


def outers(pres: Several, posts: Several, dtype: Any) -> Several:
    """`outer` of each layer.

    Args:
        pres: arrays [B, I_l] of n layers, or [B, n, I].
        posts: arrays [B, J_l] of as many, or [B, n, J].
        dtype: in which to sum.

    Returns:
        Matrices [I_l, J_l], or [n, I, J].
    """
    if isinstance(pres, tuple):
        return tuple(outer(a, b, dtype) for a, b in zip(pres, posts, strict=True))
    return jnp.einsum("bli,blj->lij", pres, posts, preferred_element_type=dtype)
