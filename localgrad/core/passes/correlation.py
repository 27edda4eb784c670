"""What parts of a model learn from signals of their nodes: signals times what synapses received.

Letters: B batch, W steps of the window, K copies, D width of a node.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves, placed, under
from localgrad.core.passes.contraction import contract, outer
from localgrad.core.passes.disturb import Signals
from localgrad.core.passes.heard import Part
from localgrad.core.passes.reward import leaving, ongoing


def paid_for(
    part: Part, signals: list[jax.Array], gaps: jax.Array, paid: jax.Array
) -> list[jax.Array]:
    """Signals of a part's nodes times what they are paid by, summed over copies, [W, B, D].

    Args:
        part: the part; nodes that reach the loss of their own step alone are paid by its gaps.
        signals: of each node, [W, K, B, D].
        gaps: of each step, [W, K, B].
        paid: what other nodes are paid, [W, K, B].
    """
    return [
        jnp.einsum("wkb,wkb...->wb...", (gaps if instant else paid).astype(z.dtype), z)
        for z, instant in zip(signals, part.instant, strict=True)
    ]


def correlated(part: Part, params: Leaves, signals: list[jax.Array]) -> Leaves:
    """Signals of a part's nodes, [W, B, D], times what was received, summed: by whole path."""
    calls = [(i, z) for node, z in zip(part.nodes, signals, strict=True) for i in node]
    sites = [part.sites[i] for i, _ in calls]
    received = [part.received[i] for i, _ in calls]
    own = under(params, part.prefix)
    return placed(contract(sites, own, received, [z for _, z in calls]), part.prefix)


def traced(part: Part, params: Leaves, signals: list[jax.Array], reset: jax.Array | None) -> Leaves:
    """The same since the last reset, for each copy and example: by whole path, [K, B, ...].

    Args:
        part: the part; nodes that reach the loss of their own step alone leave nothing.
        params: the model's parameters.
        signals: of each node, [W, K, B, D].
        reset: [W, B] bool, or None.

    Returns:
        What the window adds to an eligibility.
    """
    calls = [
        (part.sites[i], part.received[i], z)
        for node, z, instant in zip(part.nodes, signals, part.instant, strict=True)
        for i in node
        if not instant
    ]
    if not calls:
        return {}
    sites, received, posts = map(list, zip(*calls, strict=True))
    if reset is not None:
        last = leaving(reset)
        posts = [jnp.where(last.reshape(*last.shape, *(1,) * (z.ndim - 3)), z, 0) for z in posts]
    one = functools.partial(outer, sites, under(params, part.prefix))
    over_batch = jax.vmap(one, (1, 1))  # [W, B, ...]
    return placed(jax.vmap(over_batch, (None, 1))(received, posts), part.prefix)


def carried(
    parts: Sequence[Part],
    params: Leaves,
    reset: jax.Array | None,
    signals: Signals,
    before: Leaves,
) -> Leaves:
    """The eligibility after a window: what was there, unless forgotten, and what came.

    Args:
        parts: of the model, as they were heard.
        params: the model's parameters.
        reset: [W, B] bool, or None.
        signals: of each part's nodes, [W, K, B, D].
        before: the eligibility before it, by whole path, [K, B, ...].

    Returns:
        The same after it.
    """
    came: Leaves = {}
    for part, zs in zip(parts, signals, strict=True):
        came |= traced(part, params, zs, reset)
    kept = {}
    for path, e in before.items():
        if reset is not None:
            again = reset.any(0).reshape(1, -1, *(1,) * (e.ndim - 2))
            e = jnp.where(again, jnp.zeros_like(e), e)
        kept[path] = e + came[path].astype(e.dtype)
    return kept


def recalled(gaps: jax.Array, reset: jax.Array | None, eligibility: Leaves) -> Leaves:
    """What the gaps of a window, [W, K, B], pay of what was eligible before it, by path."""
    entering = gaps if reset is None else jnp.where(ongoing(reset), gaps, 0)
    paid = entering.sum(0)
    return {p: jnp.einsum("kb,kb...->...", paid.astype(e.dtype), e) for p, e in eligibility.items()}
