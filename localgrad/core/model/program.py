"""A cell's step as one flat program, and what in it depends on parameters alone.

The step is traced for a single example (a batch of 1), and calls within it are opened, so that a
layer is the same few equations whoever calls it, under `nn.jit`, `nn.remat`, `jax.vmap` or nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from localgrad.core.model.calls import bound, opened
from localgrad.core.model.modules import Module, impure
from localgrad.core.params import Leaves

FIXED, MADE, MOVING = range(3)
"""A value reached by no argument, by parameters alone, and by the carry or x."""


class Program(NamedTuple):
    """The step of a cell, for one example.

    Attributes:
        closed: the jaxpr, of `(params, carry, x) -> (carry, y)`, flattened.
        params: how many of its inputs are parameters, in the order of the leaves.
        carry: how many of the inputs behind them are the carry.
        trees: the structures of the new carry and of y.
        kinds: for each variable, `FIXED`, `MADE` or `MOVING`.
    """

    closed: jex.ClosedJaxpr
    params: int
    carry: int
    trees: tuple[Any, Any]
    kinds: dict[Any, int]

    def kind(self, atom: Any) -> int:
        """What reaches a value."""
        return FIXED if isinstance(atom, jex.Literal) else self.kinds[atom]


def program_of(module: Module, params: Leaves, carry: Any, x: Any) -> Program:
    """Traces a step; shapes of any batch suffice.

    Args:
        module: the cell.
        params: its parameters.
        carry: of B examples.
        x: one step's input of B examples.

    Returns:
        The program of one example.
    """
    shapes = {path: jax.ShapeDtypeStruct(v.shape, jnp.result_type(v)) for path, v in params.items()}
    one = lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), jnp.result_type(a))  # noqa: E731
    carry, x = jax.tree.map(one, (carry, x))
    try:
        traced = jax.make_jaxpr(module.apply, return_shape=True)(shapes, carry, x)
    except Exception as error:
        raise impure(error, module.name) or error from error
    whole, (new, y) = traced
    count, states = len(shapes), len(jax.tree.leaves(carry))
    weighty = [k < count for k in range(len(whole.in_avals))]
    closed = opened(whole, weighty)
    trees = jax.tree.structure(new), jax.tree.structure(y)
    return Program(closed, count, states, trees, _kinds(closed.jaxpr, count))


def _kinds(jaxpr: Any, params: int) -> dict[Any, int]:
    kinds: dict[Any, int] = dict.fromkeys(jaxpr.constvars, FIXED)
    kinds |= {var: MADE if k < params else MOVING for k, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        found = [FIXED if isinstance(atom, jex.Literal) else kinds[atom] for atom in eqn.invars]
        kinds |= dict.fromkeys(eqn.outvars, max(found, default=FIXED))
    return kinds


def steps_to(
    program: Program,
    wanted: Iterable[Any],
    known: Iterable[Any],
    reads: Callable[[Any], Sequence[Any]] = lambda eqn: eqn.invars,
) -> list[Any]:
    """The equations that lead from known variables to wanted ones, in order.

    Args:
        program: the step.
        wanted: variables, or literals.
        known: variables.
        reads: `equation -> what it needs to know`.

    Returns:
        The equations; none whose results nobody asks for.
    """
    jaxpr = program.closed.jaxpr
    held = {*jaxpr.constvars, *known}
    needed = {var for var in wanted if isinstance(var, jex.Var)} - held
    taken = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            taken.append(eqn)
            needed |= {atom for atom in reads(eqn) if isinstance(atom, jex.Var)} - held
    return taken[::-1]


def made(program: Program, values: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
    """What parameters alone make of themselves: the values of some variables."""
    jaxpr = program.closed.jaxpr
    known = dict(zip(jaxpr.constvars, program.closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=False))
    for eqn in steps_to(program, wanted, known):
        ins = [a.val if isinstance(a, jex.Literal) else known[a] for a in eqn.invars]
        known |= dict(zip(eqn.outvars, bound(eqn, ins), strict=True))
    return [known[var] for var in wanted]


def output_of_state(program: Program) -> Callable[[Leaves, jax.Array], jax.Array] | None:
    """How a cell of one carry leaf makes its output [B, N] of the new one, and of nothing else.

    Returns:
        `(params, new carry [B, N]) -> output`, or None where there is no such function.
    """
    state, *outputs = program.closed.jaxpr.outvars
    if program.carry != 1 or len(outputs) != 1:
        return None
    eqns = steps_to(program, outputs, [state])
    inside = {state, *(var for eqn in eqns for var in eqn.outvars)}
    read = [atom for eqn in eqns for atom in eqn.invars] + outputs
    given = list(dict.fromkeys(a for a in read if isinstance(a, jex.Var) and a not in inside))
    if any(program.kind(var) == MOVING for var in given):
        return None

    def one(values: list, new: jax.Array) -> jax.Array:
        known = {state: new[None]} | dict(zip(given, values, strict=True))
        for eqn in eqns:
            ins = [a.val if isinstance(a, jex.Literal) else known[a] for a in eqn.invars]
            known |= dict(zip(eqn.outvars, bound(eqn, ins), strict=True))
        return known[outputs[0]][0]

    def output(params: Leaves, new: jax.Array) -> jax.Array:
        values = made(program, jax.tree.leaves(params), given)
        return jax.vmap(lambda a: one(values, a))(new)

    return output
