"""Arguments of cells that are a number, or one number a unit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contract.checks import LEGAL

Numbers = float | tuple[float, ...]


def numbers(name: str, value: Any, features: int, must: str, hint: str) -> Numbers:
    """The value as plain numbers, which can be hashed.

    Args:
        name: of the argument.
        value: a number, or an array (N,) of one a unit.
        features: N.
        must: what is asked of it, one of `LEGAL`.
        hint: how to get it right; the end of the message.

    Returns:
        A float, or a tuple of N of them.

    Raises:
        ValueError: if it is of another shape, or not what it must be.
    """
    array = np.asarray(value, np.float64)
    if array.shape not in ((), (features,)):
        raise ValueError(
            f"{name} must be a number or an array of shape ({features},), one a unit; got shape "
            f"{array.shape}."
        )
    if not np.all(LEGAL[must](array)):
        raise ValueError(
            f"{name} must {must}; got values from {array.min()} to {array.max()}. {hint}"
        )
    return tuple(array.tolist()) if array.ndim else float(array)


def each(value: Numbers, like: jax.Array) -> jax.Array:
    """A number, or one a unit, for each unit and example of `like` [B, N]."""
    return jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape)
