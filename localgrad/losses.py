"""Losses of predicted probabilities, as a `localgrad.PTNCN` gives them; Optax's take logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LEAST = 1e-8
"""What stands for a probability that rounding has made 0."""


def categorical_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Minus the log-likelihood, in nats, of symbols under predicted probabilities.

    Args:
        outputs: probabilities [B, D], such as a softmax gives.
        targets: [B, D], one-hot, or probabilities.

    Returns:
        [B]. Divide by log 2 for bits.

    Example:
        >>> import jax.numpy as jnp, localgrad
        >>> guess, symbol = jnp.array([[0.5, 0.25, 0.25]]), jnp.array([[1.0, 0.0, 0.0]])
        >>> localgrad.categorical_cross_entropy(guess, symbol)
        Array([0.6931472], dtype=float32)
    """
    _require_alike(outputs, targets)
    return -jnp.sum(targets * _log(outputs), axis=-1)


def binary_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Minus the log-likelihood, in nats, of a frame of independent pixels.

    Args:
        outputs: probabilities [B, D], such as a sigmoid gives.
        targets: [B, D], in [0, 1].

    Returns:
        [B], summed over the frame.

    Example:
        >>> import jax.numpy as jnp, localgrad
        >>> localgrad.binary_cross_entropy(jnp.full((1, 2), 0.5), jnp.array([[0.0, 1.0]]))
        Array([1.3862944], dtype=float32)
    """
    _require_alike(outputs, targets)
    found = targets * _log(outputs) + (1 - targets) * _log(1 - outputs)
    return -jnp.sum(found, axis=-1)


def _log(p: jax.Array) -> jax.Array:
    p = p.astype(jnp.promote_types(p.dtype, jnp.float32))  # half precision has no such number
    return jnp.log(jnp.where(p <= 0, jnp.asarray(LEAST, p.dtype), p))


def _require_alike(outputs: jax.Array, targets: jax.Array) -> None:
    """Raises unless there is a target for each output."""
    if jnp.shape(outputs) != jnp.shape(targets):
        raise ValueError(
            f"outputs and targets must have one shape, [B, D]; got {jnp.shape(outputs)} and "
            f"{jnp.shape(targets)}. Make symbols one-hot: jax.nn.one_hot(targets, D)."
        )
