"""Credit in time without derivatives: which losses an earlier disturbance is held to account for.

Letters: W steps of the window; everything else [...] stands behind, examples last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CREDITS = ("causal", "step", "total")


def later(gaps: jax.Array, reset: jax.Array | None) -> jax.Array:
    """The sum of gaps [W, ..., B] from each step on, up to the next reset [W, B]."""
    if reset is None:
        return jnp.cumsum(gaps[::-1], axis=0)[::-1]

    def back(so_far: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gap, reset = now
        so_far = so_far + gap
        return _forgotten(reset, so_far), so_far

    return jax.lax.scan(back, jnp.zeros_like(gaps[0]), (gaps, reset), reverse=True)[1]


def earlier(gaps: jax.Array, before: jax.Array, reset: jax.Array | None) -> jax.Array:
    """The sum of gaps [W, ..., B] up to each step, since the last reset [W, B].

    Args:
        gaps: of each step.
        before: the sum before the window, [..., B].
        reset: or None.

    Returns:
        The sums, each with its own step's gap, [W, ..., B].
    """
    if reset is None:
        return before[None] + jnp.cumsum(gaps, axis=0)

    def ahead(so_far: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gap, reset = now
        so_far = _forgotten(reset, so_far) + gap
        return so_far, so_far

    return jax.lax.scan(ahead, before, (gaps, reset))[1]


def ongoing(reset: jax.Array) -> jax.Array:
    """Whether no reset [W, B] came since the window began, [W, 1, B]."""
    return (jnp.cumsum(reset, axis=0) == 0)[:, None]


def leaving(reset: jax.Array) -> jax.Array:
    """Whether no reset [W, B] comes until the window ends, [W, 1, B]."""
    met = jnp.cumsum(reset, axis=0)
    return (met == met[-1][None])[:, None]


def _forgotten(reset: jax.Array, sums: jax.Array) -> jax.Array:
    """Sums [..., B], 0 where reset [B] says so."""
    again = reset.reshape((1,) * (sums.ndim - 1) + reset.shape)
    return jnp.where(again, jnp.zeros_like(sums), sums)
