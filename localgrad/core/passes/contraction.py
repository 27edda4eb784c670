"""What synapses learn: each layer's own VJP on its stacked (pre, post), once a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from localgrad.core.model.synapses import Anatomy, Site, record
from localgrad.core.params import Leaves, accumulator, placed, under
from localgrad.core.passes.forward import Tape
from localgrad.core.steps import as_rows


def pres(cell: Anatomy, params: Leaves, tape: Tape) -> list[jax.Array]:
    """What each synapse received, [W, B, ...], recomputed for the whole window at once."""

    def step(carry: Any, x: Any, drives: list) -> list:
        return record(cell.module, params, carry, x, drives)[2]

    return jax.vmap(step)(tape.carries, tape.xs, tape.drives)


def contract(sites: Sequence[Site], params: Leaves, received: list, posts: list) -> Leaves:
    """What the synapses learn: each layer's own VJP on its (pre, post), summed over W and B.

    Args:
        sites: the synapse calls of a cell, an encoder or a readout.
        params: its parameters.
        received: pre of each call, [W, B, ...].
        posts: credit of each drive, [W, B, D].

    Returns:
        A gradient for every leaf that a synapse owns, at least float32.
    """
    return outer(sites, params, as_rows(received), as_rows(posts))


def outer(sites: Sequence[Site], params: Leaves, received: list, posts: list) -> Leaves:
    """The layers' VJPs on (pre, post) with one leading axis, which they sum over.

    Args:
        sites: the synapse calls of a cell, an encoder or a readout.
        params: its parameters.
        received: pre of each call, [M, ...].
        posts: credit of each drive, [M, D].

    Returns:
        A gradient for every leaf that a synapse owns, at least float32.
    """
    grads: Leaves = {}
    for site, pre, post in zip(sites, received, posts, strict=True):
        own = {p: v.astype(accumulator(v)) for p, v in under(params, site.layer.path).items()}
        drive, pull = jax.vjp(lambda v, pre=pre, site=site: site.layer.apply(v, pre), own)
        (found,) = pull(post.astype(drive.dtype))
        for path, grad in placed(found, site.layer.path).items():
            grads[path] = grads[path] + grad if path in grads else grad
    return grads
