"""Credit from unit to unit over many steps, as far as the units' types tell.

A unit of one type answers a unit of another, wherever the two lie, by the mean weight between the
types and one slope. How the units of a type answer a parameter is then one trace, and what becomes
of it a filter: what they tell each other on its way back is a recursion of K numbers.
Letters: B batch, W steps of the window, R credit rows, N units, K types.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves
from localgrad.core.passes.backward import unit_dynamics
from localgrad.core.passes.eligibility import learn_from
from localgrad.core.passes.forward import CUT, Method, replay
from localgrad.core.passes.run import Level
from localgrad.core.steps import one_row, padded

Output = Callable[[Leaves, jax.Array], jax.Array]
"""`(params, state [B, N]) -> output [B, N]`."""


class Types(NamedTuple):
    """The types of a cell's units.

    Attributes:
        members: whether each unit is of each type, 0 or 1, [N, K].
        weights: the mean weight from a unit of each type to one of each, [K, K].
        slope: what stands for the response of a unit's state to its recurrent drive.
    """

    members: jax.Array
    weights: jax.Array
    slope: float


def learn_types(
    at: Level,
    q_y: jax.Array,
    output: Output,
    eligibility: Leaves,
    types: Types,
    opening: bool,
    closing: bool,
) -> tuple[Leaves, Leaves]:
    """The gradient estimate of one cell for a window, and its eligibilities after it.

    Args:
        at: the cell, whose units have one state.
        q_y: learning signal of its outputs, [W, B, N].
        output: how it makes these of its states.
        eligibility: before the window, leaves [B, K + 1, ...]: how units of each type answer a
            parameter through others, and how its own unit does by itself.
        types: of its units.
        opening: the eligibilities before the window are known to be zero.
        closing: those after it are not needed.

    Returns:
        The gradients and the new eligibilities.
    """
    cell, params, tape, method = at.cell, at.params, at.tape, Method(CUT, {})
    signal = one_row(q_y)
    step = functools.partial(replay, cell, params, method)
    states = jax.tree.leaves(jax.vmap(step)(tape.carries, tape.xs, tape.drives)[0])[0]
    _, pull = jax.vjp(jax.vmap(functools.partial(output, params)), states)
    (q_state,) = pull(q_y)
    _, jacobian = unit_dynamics(cell, params, tape, signal, [0], method)
    left, own, of_types = _sweep_types(types, q_state, jacobian[0][0], tape.reset, closing)
    each = jnp.moveaxis(of_types, -1, 0)[..., None]
    entering = [*jnp.broadcast_to(each, (len(each), *own.shape)), own]
    left = jax.tree.unflatten(jax.tree.structure(tape.carries), [left])
    return learn_from(at, signal, left, entering, eligibility, opening, closing)


def _sweep_types(
    types: Types,
    q_state: jax.Array,
    jacobian: jax.Array,
    reset: jax.Array | None,
    closing: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sends credit backward through each unit by itself, and from type to type.

    Of R rows the first is the loss's; then, if they are needed, come those that begin as ones at
    the window's end, of each type and of the units themselves.

    Returns:
        Credit of the state that leaves each step, [W, R, B, N], without that of the step's output;
        of the state that entered the window, [R, B, N]; of what is kept of each type, [R, B, K].
    """
    steps, batch, units = q_state.shape
    members = types.members.astype(q_state.dtype)
    weights = types.slope * types.weights.astype(q_state.dtype)
    counts = members.sum(0)
    kinds = len(counts)
    rows = 1 if closing else kinds + 2
    fades = jacobian @ members / counts[None, None]
    kept = jnp.ones((steps, batch), bool) if reset is None else ~reset

    def back(leaving: tuple, now: tuple) -> tuple[tuple, jax.Array]:
        (of_units, of_types), (signal, own, fade, kept_t) = leaving, now
        heard = of_types + padded((signal @ members)[None], rows)
        passed = jnp.where(kept_t[None, :, None], heard @ weights.T, 0)
        before = own[None] * (of_units + padded(signal[None], rows)) + passed @ members.T
        return (before, fade[None] * heard + counts[None, None] * passed), of_units

    units_end = jnp.zeros((rows, batch, units), q_state.dtype)
    if not closing:
        units_end = units_end.at[-1].set(1)
    types_end = jnp.eye(rows, kinds, -1, q_state.dtype)[:, None]
    ends = units_end, jnp.broadcast_to(types_end, (rows, batch, kinds))
    along = q_state, jacobian, fades, kept
    (own, of_types), left = jax.lax.scan(back, ends, along, reverse=True)
    return left, own, of_types
