"""Calls within a program, opened: the same few equations, whoever makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

OPENED = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
"""Calls that mean what they hold; a custom derivative is a step of its own."""
UNROLLED = 64
"""The longest loop that is opened too, if parameters work in it."""


def opened(closed: jex.ClosedJaxpr, weighty: Sequence[bool] | None = None) -> jex.ClosedJaxpr:
    """A program without calls.

    Args:
        closed: the program.
        weighty: which of its inputs are parameters; short loops in which these work are opened too.

    Returns:
        The program, of the same inputs.
    """
    reached = [False] * len(closed.in_avals) if weighty is None else weighty
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
    return jax.make_jaxpr(lambda *args: _opened(closed, args, reached)[0])(*given)


def _opened(
    closed: jex.ClosedJaxpr, args: Sequence[Any], weighty: Sequence[bool]
) -> tuple[list, list[bool]]:
    """Runs a program with its calls opened; also, which results a parameter reaches."""
    jaxpr = closed.jaxpr
    known: dict[Any, tuple[Any, bool]] = {
        var: (value, False) for var, value in zip(jaxpr.constvars, closed.consts, strict=True)
    }
    known |= dict(zip(jaxpr.invars, zip(args, weighty, strict=True), strict=True))

    def of(atom: Any) -> tuple[Any, bool]:
        return (atom.val, False) if isinstance(atom, jex.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        ins = [of(atom) for atom in eqn.invars]
        values, reached = [value for value, _ in ins], [weight for _, weight in ins]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in OPENED and inner is not None:
            if not isinstance(inner, jex.ClosedJaxpr):
                inner = jex.ClosedJaxpr(inner, ())
            outs, weights = _opened(inner, values, reached)
        elif _is_short(eqn) and any(reached):
            outs, weights = _unrolled(eqn, values, reached)
        else:
            outs, weights = bound(eqn, values), [any(reached)] * len(eqn.outvars)
        known |= dict(zip(eqn.outvars, zip(outs, weights, strict=True), strict=True))
    found = [of(atom) for atom in jaxpr.outvars]
    return [value for value, _ in found], [weight for _, weight in found]


def _is_short(eqn: Any) -> bool:
    """Whether an equation is a loop of a few passes (another JAX may name its parts otherwise)."""
    params = eqn.params
    named = eqn.primitive.name == "scan" and {"num_consts", "num_carry", "length"} <= params.keys()
    return named and params["length"] <= UNROLLED


def _unrolled(eqn: Any, values: list, reached: list[bool]) -> tuple[list, list[bool]]:
    """A short loop, pass by pass."""
    params = eqn.params
    consts, carries = params["num_consts"], params["num_carry"]
    split = lambda a: (a[:consts], a[consts : consts + carries], a[consts + carries :])  # noqa: E731
    (fixed, carry, xs), (w_fixed, w_carry, w_xs) = split(values), split(reached)
    kept: list[list] = []
    w_out = [False] * len(eqn.outvars)
    steps = range(params["length"])
    for t in reversed(steps) if params["reverse"] else steps:
        outs, weights = _opened(
            params["jaxpr"], [*fixed, *carry, *(x[t] for x in xs)], [*w_fixed, *w_carry, *w_xs]
        )
        carry, w_carry = outs[:carries], weights[:carries]
        kept.append(outs[carries:])
        w_out = [a or b for a, b in zip(w_out, weights, strict=True)]
    ordered = kept[::-1] if params["reverse"] else kept
    ys = [jnp.stack(each) for each in zip(*ordered, strict=True)]
    return [*carry, *ys], w_out


def bound(eqn: Any, values: Sequence[Any]) -> list:
    """What an equation gives for these values."""
    found = eqn.primitive.get_bind_params(eqn.params)
    *functions, params = [found] if isinstance(found, dict) else (*found[0], found[1])
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]
