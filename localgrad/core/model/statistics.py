"""Normalisations whose statistics carry no credit, so that they do not join the units of a cell.

`y = gain (x - m) / s + bias`, with mean m and deviation s over many units: held, m and s are what
they are, but count as constants in every derivative, and a unit's y answers to its own x alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jax.extend import core as jex

LINEN_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
NNX_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm)
NAMES = "LayerNorm, RMSNorm or GroupNorm"


def holding() -> AbstractContextManager:
    """Holds the statistics of every normalisation that a Linen module calls meanwhile."""
    inside = False

    def intercept(next_fun, args, kwargs, context):
        nonlocal inside
        layer = context.module
        if inside or type(layer) not in LINEN_NORMS or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        inside, free = True, layer.clone(parent=None, name=None)
        try:
            return _held(lambda *args: free.apply(layer.variables, *args, **kwargs), *args)
        finally:
            inside = False

    return nn.intercept_methods(intercept)


def hold(module: nnx.Module) -> None:
    """Holds the statistics of every normalisation in an NNX module, a copy of one's own."""
    for _, layer in list(nnx.iter_modules(module)):
        kind = type(layer)
        if kind in NNX_NORMS:
            graphdef, state = nnx.split(layer)

            def respond(self, *args, graphdef=graphdef, state=state, **kwargs):
                del self
                return _held(lambda *args: nnx.merge(graphdef, state)(*args, **kwargs), *args)

            held = type(kind.__name__, (kind,), {"__call__": respond})
            object.__setattr__(layer, "__class__", held)


def _held(call: Callable[..., Any], *args: Any) -> Any:
    """`call(*args)`, of a normalisation: what it sums up gets no credit."""
    program, shape = jax.make_jaxpr(call, return_shape=True)(*args)
    found = _run(program, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _run(program: jex.ClosedJaxpr, given: list[Any]) -> list[Any]:
    jaxpr = program.jaxpr
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *given], strict=True))

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        ins, name = [of(atom) for atom in eqn.invars], eqn.primitive.name
        if name in ("jit", "pjit"):
            outs = _run(eqn.params["jaxpr"], ins)
        else:
            outs = eqn.primitive.bind(*ins, **eqn.params)  # pyrefly: ignore
            outs = outs if eqn.primitive.multiple_results else [outs]
        if name.startswith("reduce_"):
            outs = jax.lax.stop_gradient(outs)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]
