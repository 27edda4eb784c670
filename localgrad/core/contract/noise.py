"""Random numbers of a rule: a typed key in its state, and a key of its own for each time step."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

NOISES = ("gaussian", "rademacher")


def require_key(key: Any) -> None:
    """Raises unless `key` is a typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(
            "key must be a typed PRNG key: pass jax.random.key(seed); got "
            f"{type(key).__name__} of dtype {getattr(key, 'dtype', None)}."
        )
    if key.ndim:
        raise ValueError(
            f"key must be a single typed PRNG key; got an array of shape {key.shape}. Pass one of "
            "them."
        )


def beginning(key: jax.Array) -> dict[str, jax.Array]:
    """A stream's key and clock, in buffers of their own, so that a state can be donated."""
    own = jnp.copy(jax.random.key_data(key))
    return {
        "key": jax.random.wrap_key_data(own, impl=jax.random.key_impl(key)),
        "clock": jnp.zeros((), jnp.uint32),
    }


def step_keys(key: jax.Array, clock: jax.Array, steps: int) -> jax.Array:
    """A key for each of the next steps, [W].

    It is made from the number of the step alone, so that what is drawn does not depend on how a
    stream is split into calls and windows.

    Args:
        key: the key in the rule's state.
        clock: how many steps the stream has seen.
        steps: W.

    Returns:
        Keys [W].
    """
    return jax.vmap(lambda t: jax.random.fold_in(key, t))(clock + jnp.arange(steps))


def drawn(key: jax.Array, shape: tuple[int, ...], noise: str, dtype: Any) -> jax.Array:
    """Independent numbers of mean 0 and variance 1, `"gaussian"` or -1 and 1 (`"rademacher"`)."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    if noise == "gaussian":
        return jax.random.normal(key, shape, dtype)
    count = math.prod(shape)
    words = jax.random.bits(key, (-(-count // 32),), jnp.uint32)  # a sign takes one bit
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (1 - 2 * bits.astype(dtype)).reshape(-1)[:count].reshape(shape)
