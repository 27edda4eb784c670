"""What is said of a cell that fails at what every cell must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def begun(name: str, shape: tuple[int, ...], begin: Callable[[], Any]) -> Any:
    """A cell's initial carry, or an error that names the cell.

    Args:
        name: what to call it.
        shape: of its inputs, batch axis first.
        begin: makes the carry.

    Returns:
        What `begin` returns.
    """
    try:
        return begin()
    except Exception as error:
        raise ValueError(
            f"{name}.initialize_carry fails for inputs of shape {shape}: {error} It is called "
            "without parameters, as `cell.initialize_carry(key, input_shape)`, batch axis first. "
            "Make a learned initial state a part of the step instead."
        ) from error


def unrunnable(name: str, carry: Any, x: Any, error: Exception) -> ValueError:
    """An error that names a cell whose step fails, and says what it was given."""
    shapes = jax.tree.map(jnp.shape, (carry, x))
    return ValueError(
        f"{name} fails on a carry of shapes {shapes[0]} and an input of shape {shapes[1]}: "
        f"{error} A cell takes B examples, batch axis first. One written for a single example "
        "needs nn.vmap around it, with variable_axes={'params': None} and split_rngs={'params': "
        "False}; and batch.inputs must be what it takes."
    )
