"""How activity is normalised, so that its signals are of the size of noise.

Letters: B batch, W steps of the window, K samples, D width of a node.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from localgrad.core.passes.disturb import Signals

NORMS = ("layer", "joint", "variance", "fernandez2024")


def normalised(norm: str, inputs: Any, activity: Signals) -> Signals:
    """Activity, finite, times k_t.

    Args:
        norm: one of `NORMS`.
        inputs: of the model, leaves [W, B, ...], whose numbers the published norm counts too.
        activity: in units of the noise's standard deviation.

    Returns:
        The signals.
    """
    activity = [[jnp.where(jnp.isfinite(a), a, 0) for a in row] for row in activity]
    if norm == "variance":
        return activity
    squares = [sum((a * a).reshape(*a.shape[:3], -1).sum(-1) for a in row) for row in activity]
    widths = [sum(a[0, 0, 0].size for a in row) for row in activity]
    if norm == "joint":
        squares, widths = [sum(squares)] * len(widths), [sum(widths)] * len(widths)
    if norm == "fernandez2024":
        seen = sum(a[0, 0].size for a in jax.tree.leaves(inputs))
        widths = [(sum(widths) + seen) ** 0.5] * len(widths)

    def normal(a: jax.Array, square: Any, width: float) -> jax.Array:
        factor = jnp.where(square > 0, width / jnp.where(square > 0, square, 1), 0)
        return a * factor.reshape(*factor.shape, *(1,) * (a.ndim - 3)).astype(a.dtype)

    return [
        [normal(a, square, width) for a in row]
        for row, square, width in zip(activity, squares, widths, strict=True)
    ]
