"""A spike, and the functions that stand in for its derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Surrogate = Callable[[jax.Array], jax.Array]

SURROGATES: dict[str, Surrogate] = {
    "triangular": lambda u: jnp.maximum(0, 1 - jnp.abs(u)),
    "sigmoid": lambda u: 4 * jax.nn.sigmoid(u) * jax.nn.sigmoid(-u),
    "fast_sigmoid": lambda u: 1 / (1 + jnp.abs(u)) ** 2,
    "arctan": lambda u: 1 / (1 + u**2),
}
"""What stands in for the derivative of a spike, by name; each is 1 at the threshold."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def spike(u: jax.Array, slope: Surrogate) -> jax.Array:
    """1 where u > 0, else 0, with derivative `slope(u)`, forwards and backwards.

    Args:
        u: any floating array.
        slope: the derivative to use, as a function of u.

    Returns:
        Zeros and ones, in the shape and dtype of u.
    """
    del slope
    return (u > 0).astype(u.dtype)


@spike.defjvp
def _spike_jvp(slope: Surrogate, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return spike(*primals, slope), slope(*primals).astype(primals[0].dtype) * tangents[0]
