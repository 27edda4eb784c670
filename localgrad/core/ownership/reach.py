"""Which inputs of a program each of its outputs depends on: a fact of its trace."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex


def dependencies(jaxpr: Any, credit: bool = False) -> list[set[int]]:
    """For each output of a jaxpr, the numbers of the inputs it depends on.

    Looks into jit, custom derivatives, remat, cond and scan; any other primitive is taken to join
    all its inputs to all its outputs.

    Args:
        jaxpr: the program.
        credit: only where a derivative may follow: `stop_gradient`, comparisons and integers end
            it, outside of custom derivatives.

    Returns:
        A set for each output.
    """
    known: dict[Any, set[int]] = {var: {i} for i, var in enumerate(jaxpr.invars)}

    def of(atom: Any) -> set[int]:
        return set() if isinstance(atom, jex.Literal) else known.get(atom, set())

    for eqn in jaxpr.eqns:
        ins = [of(atom) for atom in eqn.invars]
        for var, out in zip(eqn.outvars, _through(eqn, ins, credit), strict=True):
            known[var] = set() if credit and _ends_credit(eqn, var) else out
    return [of(atom) for atom in jaxpr.outvars]


def _ends_credit(eqn: Any, var: Any) -> bool:
    discrete = not jnp.issubdtype(var.aval.dtype, jnp.inexact)
    return eqn.primitive.name == "stop_gradient" or discrete


def _through(eqn: Any, ins: list[set[int]], credit: bool) -> list[set[int]]:
    if eqn.primitive.name == "cond":
        branches = [dependencies(branch.jaxpr, credit) for branch in eqn.params["branches"]]
        return [
            ins[0].union(*(ins[1:][i] for branch in branches for i in branch[k]))
            for k in range(len(eqn.outvars))
        ]
    inner = next(
        (
            value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
            for value in eqn.params.values()
            if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)
        ),
        None,
    )
    if eqn.primitive.name == "while" or inner is None or len(inner.invars) != len(ins):
        return [set().union(*ins)] * len(eqn.outvars)
    depends = dependencies(inner, credit and not eqn.primitive.name.startswith("custom"))
    if eqn.primitive.name != "scan":
        return [set().union(*(ins[i] for i in out)) for out in depends]
    # A scan's invars are consts, carry, xs and its outvars carry, ys; xs and ys have an axis more
    # outside than inside.
    n_carry = sum(map(_same_rank, eqn.outvars, inner.outvars))
    n_kept = sum(map(_same_rank, eqn.invars, inner.invars))
    n_consts = n_kept - n_carry
    ins = list(ins)
    for _ in range(n_carry + 1):  # what one pass of the loop hands to the next
        outs = [set().union(*(ins[i] for i in out)) for out in depends]
        for k in range(n_carry):
            ins[n_consts + k] = ins[n_consts + k] | outs[k]
    return outs


def calls_out(jaxpr: Any) -> bool:
    """Whether a program, or one inside it, calls a function outside of JAX."""
    for eqn in jaxpr.eqns:
        if "callback" in eqn.primitive.name:
            return True
        held = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program)
        if any(calls_out(getattr(p, "jaxpr", p)) for p in held if _is_program(p)):
            return True
    return False


def _is_program(x: Any) -> bool:
    return isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)


def _same_rank(a: Any, b: Any) -> bool:
    return a.aval.ndim == b.aval.ndim
