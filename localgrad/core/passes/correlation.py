"""What parts of a model learn from signals of their nodes: signals times what synapses received.

Letters: B batch, W steps of the window, K copies, D width of a node.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves, placed, under
from localgrad.core.passes.contraction import contract, outer
from localgrad.core.passes.heard import Part
from localgrad.core.passes.reward import leaving


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
