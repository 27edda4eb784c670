"""Where noise enters a cell: its pre-activations, each the sum of some drives.

Two drives that a cell adds up before anything else happens to them, such as those of its input and
of its state, are one *node*: noise on either is noise on their sum. Found by trial, never assumed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.model.modules import Module
from localgrad.core.model.synapses import Anatomy, dissect, record
from localgrad.core.model.trial import POINTS, Draws, Outline, apart, tried_once
from localgrad.core.params import Leaves

Node = tuple[int, ...]
"""The numbers of the synapse calls whose drives are summed."""


def nodes_of(cell: Anatomy, params: Leaves, carry: Any, x: Any) -> tuple[Node, ...]:
    """The nodes of a cell, in the order of their first synapse.

    Args:
        cell: its anatomy.
        params: its parameters; shapes suffice.
        carry: of B examples; shapes suffice.
        x: one step's input of B examples; shapes suffice.

    Returns:
        The calls of each node; every call is in one.
    """
    return tried_once(_found, cell.module, params, (carry, x))


def _found(module: Module, leaves: Outline, given: Outline) -> tuple[Node, ...]:
    draw = Draws()
    params = leaves.filled(draw.weights)
    carry, x = given.filled(lambda shape, dtype: draw.values((POINTS, *shape), dtype))
    cell = dissect(module, params, carry, x)
    drives = [draw.values(site.drive.shape, site.drive.dtype) for site in cell.sites]
    bumps = {a.shape: draw.values(a.shape, a.dtype) for a in drives}

    def trial(params: Leaves, carry: Any, x: Any, drives: list, bumps: list) -> list:
        def emitted(at: int | None) -> list:
            moved = [a + bumps[i] if i == at else a for i, a in enumerate(drives)]
            return jax.tree.leaves(record(module, params, carry, x, moved))

        return [emitted(at) for at in (None, *range(len(drives)))]

    each = [bumps[a.shape] for a in drives]
    still, *moved = apart(trial, params, carry, x, drives, each)
    same = functools.partial(_same, np.asarray)
    nodes: list[list[int]] = []
    for i, a in enumerate(drives):
        for node in nodes:
            alike = drives[node[0]].shape == a.shape and same(moved[i], moved[node[0]])
            if alike and not same(moved[i], still):
                node.append(i)
                break
        else:
            nodes.append([i])
    return tuple(map(tuple, nodes))


def _same(as_array: Any, a: list, b: list) -> bool:
    """Whether two runs of a step differ by rounding only."""
    pairs = [(as_array(x), as_array(y)) for x, y in zip(a, b, strict=True)]
    return all(
        np.allclose(x, y, rtol=0, atol=_rounding(x), equal_nan=True)
        for x, y in pairs
        if jnp.issubdtype(x.dtype, jnp.inexact)
    )


def _rounding(a: np.ndarray) -> float:
    """A bound on what another order of sums can change."""
    size = np.abs(a[np.isfinite(a)]).max(initial=1.0)
    return float(jnp.finfo(a.dtype).eps) ** 0.75 * float(size)
