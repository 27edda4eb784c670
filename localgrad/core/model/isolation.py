"""Do the examples of a batch know nothing of each other, nor of their number? Never assumed.

Every rule runs a module on all steps of a window at once where order does not matter, so a module
that mixes the examples of a batch would mix time steps too, and one that treats rows by their place
or divides by their number would give other numbers than it does step by step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from localgrad.core.model.modules import Module
from localgrad.core.model.trial import Draws, Outline, apart, tried_once
from localgrad.core.ownership.owners import strays
from localgrad.core.ownership.walk import owners_of
from localgrad.core.params import Leaves

ROWS = 3


def require_apart(label: str, module: Module, params: Leaves, *args: Any) -> None:
    """Raises unless a module gives for one example what that example alone tells.

    Args:
        label: what to call it.
        module: a cell, an encoder or a readout.
        params: its parameters; shapes suffice.
        *args: what it is called with, batch axis first; shapes suffice.
    """
    found = tried_once(_tried, module, params, args)
    if found.mixes:
        raise ValueError(
            f"{label} ({module.name}) mixes the examples of a batch: what it gives for one depends "
            "on another, as with a mean over axis 0. Rules treat every example by itself; let it "
            "work on the last axes only."
        )
    if found.counts:
        raise ValueError(
            f"{label} ({module.name}) treats the rows of a batch by their place or number: it "
            "gives something else for the same rows among others, as with noise or dropout drawn "
            "from a fixed key, or a division by x.shape[0]. Rules run it on many steps at once; "
            "draw noise outside the model and feed it as a part of the input, and do not use the "
            "batch size in the step."
        )


class _Found(NamedTuple):
    """Whether one example depends on another, and on which row it is or how many there are."""

    mixes: bool
    counts: bool


def _tried(module: Module, leaves: Outline, given: Outline) -> _Found:
    draw = Draws()
    params = leaves.filled(draw.weights)
    one = [draw.values((ROWS, *shape), dtype) for shape, dtype in given.leaves]
    other = [np.concatenate([draw.values((1, *a.shape[1:]), a.dtype), a[1:]]) for a in one]
    twice = [np.concatenate([a, a]) for a in one]

    def give(params: Leaves, rows: list) -> list:
        return jax.tree.leaves(module.apply(params, *jax.tree.unflatten(given.treedef, rows)))

    def trial(params: Leaves, *each: list) -> list:
        with jax.default_matmul_precision("highest"):  # or the number of rows may choose it
            return [give(params, rows) for rows in each]

    program = jax.make_jaxpr(give)(params, one)
    if _meet(program, one):
        return _Found(mixes=True, counts=False)
    try:
        found = apart(trial, params, one, other, twice)
    except jax.errors.UnexpectedTracerError:  # it closes over a traced value: nothing to try
        return _Found(mixes=False, counts=False)
    first, second, both = jax.tree.map(np.asarray, found)
    differ = functools.partial(_differ, tolerance=1e-3)
    mixes = any(differ(a[1:], b[1:]) for a, b in zip(first, second, strict=True))
    differ = functools.partial(_differ, tolerance=_rounding(program))
    counts = any(differ(np.concatenate([a, a]), b) for a, b in zip(first, both, strict=True))
    return _Found(mixes, counts)


def _meet(program: jex.ClosedJaxpr, rows: list) -> bool:
    """Whether the program lets a row of its last inputs reach another row of what it gives."""
    labels = [_row_labels(a.shape) for a in rows]
    rest: list[Any] = [None] * (len(program.in_avals) - len(rows))
    owners = owners_of(program, rest + labels, credit=False)
    return any(
        found is not None
        and (found.lo.shape[:1] != (ROWS,) or strays(found, _row_labels(found.lo.shape)))
        for found in owners
    )


def _row_labels(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1)), shape)


def _rounding(program: jex.ClosedJaxpr) -> float:
    """A bound on how far rounding can take two runs of a program apart, for its coarsest dtype."""
    met = [*_dtypes(program.jaxpr), jnp.float64]
    return max(float(jnp.finfo(dtype).eps) for dtype in met) ** 0.5


def _dtypes(jaxpr: Any) -> Iterator[Any]:
    """The floating dtypes met in a jaxpr and those within."""
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            if jnp.issubdtype(var.aval.dtype, jnp.inexact):
                yield var.aval.dtype
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _dtypes(inner)


def _differ(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return bool((a != b).any())
    kind = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(kind), b.astype(kind)
    size = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    return not np.allclose(a, b, rtol=0, atol=tolerance * size, equal_nan=True)
