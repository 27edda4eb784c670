"""The loss of a window, its credit, and how steps are weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.steps import merge_steps, split_steps


class Objective(NamedTuple):
    """A loss of one time step, and what its credit is scaled by.

    Attributes:
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`.
        scale: 1 over the call's total weight for `"mean"`, 1 for `"sum"`.
    """

    loss: Callable[[Any, Any], jax.Array]
    scale: jax.Array

    def credit(self, outputs: Any, targets: Any, weight: jax.Array | None) -> tuple[jax.Array, Any]:
        """The weighted sum of a window's losses, and the scaled credit of its outputs.

        Args:
            outputs: leaves [W, B, ...].
            targets: leaves [W, B, ...].
            weight: [W, B], or None for ones.

        Returns:
            The sum of weight x loss, and dL/d(outputs), leaves [W, B, ...].
        """
        steps, batch = jax.tree.leaves(outputs)[0].shape[:2]
        flat_targets = merge_steps(targets)

        def losses(flat: Any) -> jax.Array:
            found = self.loss(flat, flat_targets)
            if getattr(found, "ndim", 0) < 1 or found.shape[0] != steps * batch:
                raise ValueError(
                    f"loss(outputs, targets) must give one value an example: [B] or [B, ...] with "
                    f"B = {steps * batch} here; got shape {jnp.shape(found)} for outputs "
                    f"{jax.tree.map(jnp.shape, flat)} and targets "
                    f"{jax.tree.map(jnp.shape, flat_targets)}. Do not average over the batch."
                )
            return found.reshape(steps * batch, -1).mean(1)

        values, pull = jax.vjp(losses, merge_steps(outputs))
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        counts = jnp.ones((steps * batch,), dtype)
        if weight is not None:
            counts = weight.reshape(-1).astype(dtype)
        (q,) = pull((counts * self.scale).astype(values.dtype))
        if weight is not None:
            q = jax.tree.map(lambda a: _kept(counts, a), q)
        total = jnp.sum(_kept(counts, values.astype(dtype) * counts))
        return total.astype(self.scale.dtype), split_steps(q, steps)


def _kept(counts: jax.Array, a: jax.Array) -> jax.Array:
    """`a` where its step counts, 0 where it does not, whatever `a` holds there."""
    return jnp.where(counts.reshape(-1, *(1,) * (a.ndim - 1)) != 0, a, jnp.zeros_like(a))


def weights_of(mask: jax.Array | None, count: int) -> tuple[jax.Array | None, jax.Array]:
    """The weight of each step, or None for ones, and their total (1 where that is 0)."""
    dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
    if mask is None:
        return None, jnp.asarray(count, dtype)
    weight = mask.astype(dtype)
    total = weight.sum()
    return weight, jnp.where(total == 0, jnp.ones_like(total), total)
