"""Eligibilities: how each unit's state responds to that unit's parameters, carried over windows.

Within a window credit runs backward through each unit's own dynamics; between windows every
parameter keeps one number for each live component of its unit's state.
Letters: B batch, W steps of the window, N units, S live carry leaves, D drive width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.examples import over_examples
from localgrad.core.model.locality import (
    Findings,
    own_entries,
    require_fidelity,
    require_local,
    require_units,
    tried,
)
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import RECURRENT, Anatomy
from localgrad.core.params import Leaves, Path, accumulator, placed, under
from localgrad.core.passes.backward import (
    assign,
    input_credit,
    sweep_units,
    unowned_by_unit,
    unowned_whole,
)
from localgrad.core.passes.contraction import contract, outer, pres
from localgrad.core.passes.forward import CUT, DIAGONAL, SETS, Method
from localgrad.core.passes.run import Level
from localgrad.core.steps import even_window, examples_first, one_row, row


def tried_cell(stack: Stack, params: Leaves, level: int) -> Findings:
    """What a trial of one cell shows."""
    own = under(params, stack.prefixes[level])
    return tried(stack.cells[level], own, stack.initial[level], stack.fed[level])


def require_units_apart(rule: str, cut: str, stack: Stack, params: Leaves) -> None:
    """Raises, by name, for a cell whose units a rule cannot treat one by one."""
    for level, cell in enumerate(stack.cells):
        own, name, carry = under(params, stack.prefixes[level]), stack.name(level), stack.initial
        require_units(cell, carry[level], name, rule)
        found = tried_cell(stack, params, level)
        require_fidelity(cell, found, name)
        require_local(cell, own, carry[level], found, name, rule)
        if cut in (DIAGONAL, SETS):
            own_entries(cell, found, name)


def units_never_meet(stack: Stack, params: Leaves) -> bool:
    """Whether no unit of any cell ever feels another of the same cell, over any number of steps.

    So it is where no cell has a recurrent synapse, and all else is what a local rule can credit.
    """
    if any(site.role == RECURRENT for cell in stack.cells for site in cell.sites):
        return False
    try:
        require_units_apart("rtrl", CUT, stack, params)
    except ValueError:
        return False
    return True


def method_of(cut: str, stack: Stack, params: Leaves, level: int) -> Method:
    """How credit passes the recurrent synapses of one cell."""
    if cut not in (DIAGONAL, SETS):
        return Method(cut, {})
    found = tried_cell(stack, params, level)
    return Method(cut, own_entries(stack.cells[level], found, stack.name(level)))


def live_leaves(cell: Anatomy, cut: str) -> list[int]:
    """The carry leaves whose past a parameter's eligibility must remember."""
    return [k for k, alive in enumerate(cell.live) if alive or cut != CUT]


def silent(cell: Anatomy, params: Leaves, carry: Any, cut: str, reach: int = 1) -> Leaves:
    """Zero eligibilities of every parameter that reaches the new carry: [B, R S, ...].

    R is the number of units whose response is kept, one's own alone unless said otherwise.
    """
    live = live_leaves(cell, cut)
    if not live:
        return {}
    batch, units = jax.tree.leaves(carry)[0].shape
    lead = (batch, reach * len(live))
    zeros = {
        path: jnp.zeros((*lead, max(units, params[path].size)), accumulator(params[path]))
        for path in cell.unowned_reach
    }
    for site, reach in zip(cell.sites, cell.drives_reach, strict=True):
        own = under(params, site.layer.path) if reach else {}
        blank = {path: jnp.zeros((*lead, *v.shape), accumulator(v)) for path, v in own.items()}
        zeros |= placed(blank, site.layer.path)
    return zeros


def silent_cells(
    stack: Stack, params: Leaves, cut: str, reach: Mapping[str, int] | None = None
) -> Leaves:
    """`silent` of all cells; `reach` is R by the cell's name, or None for 1."""
    found: Leaves = {}
    for level, prefix in enumerate(stack.prefixes):
        cell, carry, own = stack.cells[level], stack.initial[level], under(params, prefix)
        rows = 1 if reach is None else reach[stack.name(level)]
        found |= placed(silent(cell, own, carry, cut, rows), prefix)
    return found


def around_cells(stack: Stack, params: Leaves) -> dict[Path, str]:
    """How readout and encoder are credited by a rule that credits each cell by itself."""
    found: dict[Path, str] = {}
    for path in params:
        if path[:1] == ("readout",) and stack.readout is not None:
            found[path] = "exact"
        elif path[:1] == ("encoder",) and stack.encoder is not None:
            found[path] = "same time step only"
    return found


def default_window(cut: str, stack: Stack, params: Leaves, steps: int, alone: bool) -> int:
    """Up to 128 steps, or all if no eligibility is needed and memory allows.

    Windows that follow each other hold the eligibilities, and 1 + S rows of credit: about as much
    as one window of 1.6 W steps, and as many more as have a tape of the eligibilities' size.
    Measured, equal memory is at 252 steps for a GRU and 306 for an LSTM of 128 units, where the
    estimate is 260 and 297; for 512 rate units, at 226, the estimate is 317, or 1.4 times.
    What renewing the eligibilities takes grows with their size too, so one window may take more
    memory by three times that: for an LSTM of 500 steps 67 MiB instead of 41, in .86 of BPTT's time
    instead of 1.32; for a GRU of 500, where it would save nothing, it stays with 24.
    """
    size = even_window(steps)
    if not alone:
        return size
    held = 0
    for level, prefix in enumerate(stack.prefixes):
        cell, own, carry = stack.cells[level], under(params, prefix), stack.initial[level]
        held += _numbers(jax.eval_shape(functools.partial(silent, cell, cut=cut), own, carry))
    return steps if steps <= 1.6 * size + 4 * held / tape_numbers(stack) else size


def tape_numbers(stack: Stack) -> int:
    """How many numbers the tapes hold of one step: carries, drives and outputs of B examples."""
    drives = [site.drive for cell in stack.cells for site in cell.sites]
    outputs = [jax.tree.leaves(carry)[0] for carry in stack.initial]
    return _numbers((stack.initial, drives, outputs))


def _numbers(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def learn_units(
    at: Level, q_y: Any, eligibility: Leaves, method: Method, opening: bool, closing: bool
) -> tuple[Leaves, Leaves]:
    """The gradient estimate of one cell for a window, and its eligibilities after it.

    Args:
        at: the cell.
        q_y: learning signal of its outputs, leaves [W, B, N].
        eligibility: before the window, leaves [B, S, ...].
        method: how credit passes the recurrent synapses: cut, once, or along the diagonal.
        opening: the eligibilities before the window are known to be zero.
        closing: those after it are not needed.

    Returns:
        The gradients and the new eligibilities.
    """
    signal = one_row(q_y)
    live = live_leaves(at.cell, method.cut)
    left, entering = None, []
    if live:
        probes = 0 if closing else len(live)
        own = at.cell, at.params, at.tape
        left, entering = sweep_units(*own, signal, live, probes, method)
    return learn_from(at, signal, left, entering, eligibility, opening, closing)


def learn_from(
    at: Level,
    q_ys: Any,
    left: Any,
    entering: list[jax.Array],
    eligibility: Leaves,
    opening: bool,
    closing: bool,
) -> tuple[Leaves, Leaves]:
    """What credit means for the parameters of one cell, and for the eligibilities after the window.

    Rows of credit are the loss's, then those of each eligibility's end, which are left out if it is
    not needed.

    Args:
        at: the cell.
        q_ys: credit of its outputs, leaves [W, 1, B, N].
        left: credit of the carry that leaves each step, leaves [W, 1 + S, B, N]; None if S is 0.
        entering: credit of what each eligibility is of, before the window, S of [1 + S, B, N].
        eligibility: before the window, leaves [B, S, ...].
        opening: as of `learn_units`.
        closing: likewise.

    Returns:
        The gradients and the new eligibilities.
    """
    cell, params, tape = at.cell, at.params, at.tape
    received = pres(cell, params, tape)
    credit = assign(cell, params, tape, q_ys, left)
    grads = contract(cell.sites, params, received, row(credit.posts, 0))
    first = None if left is None else jax.tree.map(lambda q: q[:, :1], left)
    grads |= unowned_whole(cell, params, tape, q_ys, first)
    if not entering or (opening and closing):
        return grads, eligibility

    after = jax.tree.map(lambda q: q[:, 1:], left)
    traces = _Traces(
        entering=[jnp.moveaxis(lam, 1, 0) for lam in entering],
        received=examples_first(received, 1),
        posts=[jnp.moveaxis(post[:, 1:], (2, 1), (0, 1)) for post in credit.posts],
        unowned={} if closing else examples_first(unowned_by_unit(cell, params, tape, after), 1),
    )
    renew = functools.partial(_renewed, cell, params, opening)
    recalled, eligibility = over_examples(
        eligibility, traces, None if opening else _recalled, None if closing else renew
    )
    for path, grad in recalled.items():
        grads[path] += to_leaf(grad, params[path]) if path in cell.unowned else grad
    return grads, eligibility


def same_time_credit(at: Level, q_y: Any, feedback: Mapping[int, jax.Array] | None = None) -> Any:
    """The credit of a cell's input within each step, carries held fixed.

    Args:
        at: the cell.
        q_y: credit of its outputs, leaves [W, B, N].
        feedback: as of `input_credit`.

    Returns:
        Leaves [W, B, ...].
    """
    credit = assign(at.cell, at.params, at.tape, one_row(q_y))
    return row(input_credit(at.cell, at.params, at.tape, credit, feedback), 0)


class _Traces(NamedTuple):
    """What a window tells of the eligibilities; each leaf with the examples first.

    Attributes:
        entering: credit of the live carry leaves that entered the window, S of [B, 1 + S, N].
        received: pre of each synapse, [B, W, ...].
        posts: credit of each drive for a window's end of ones, [B, S, W, D].
        unowned: the same of the parameters that no synapse owns, [B, S, N], or a multiple of N.
    """

    entering: list[jax.Array]
    received: list[jax.Array]
    posts: list[jax.Array]
    unowned: Leaves


def _recalled(held: Leaves, at: _Traces) -> Leaves:
    """What one example's eligibilities, [S, ...], add: the credit of what entered, times them."""
    found: Leaves = {}
    for path, old in held.items():
        terms = [spread(lam[0], old) * old[s] for s, lam in enumerate(at.entering)]
        found[path] = functools.reduce(jnp.add, terms)
    return found


def _renewed(cell: Anatomy, params: Leaves, opening: bool, held: Leaves, at: _Traces) -> Leaves:
    """What they become: `e_T = A e_0 + e_window`.

    With A how each live state component of the entering carry fades into each of the leaving one.
    """
    # A loop over S, not a vmap: a product with a batch axis of 1 is a third slower on CPU.
    each = [
        outer(cell.sites, params, at.received, [post[s] for post in at.posts])
        for s in range(len(at.entering))
    ]
    window = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) | at.unowned
    kept: Leaves = {}
    for path, old in held.items():
        terms: list[jax.Array] = [window[path].astype(old.dtype)]
        if not opening:
            terms += [spread(lam[1:], old) * old[s][None] for s, lam in enumerate(at.entering)]
        kept[path] = functools.reduce(jnp.add, terms)
    return kept


def spread(per_unit: jax.Array, like: jax.Array) -> jax.Array:
    """[..., N] -> [..., 1, ..., D] beside `like` [S, ..., D]: column d is of unit d modulo N."""
    tiled = jnp.tile(per_unit, like.shape[-1] // per_unit.shape[-1])
    between = (1,) * (like.ndim - 2)  # the leaf's axes but its last
    return tiled.reshape(*tiled.shape[:-1], *between, tiled.shape[-1]).astype(like.dtype)


def to_leaf(per_unit: jax.Array, leaf: jax.Array) -> jax.Array:
    """Credit of the units [N] as credit of a unit parameter: some a unit, or one for all."""
    return (per_unit.sum() if leaf.size == 1 else per_unit).reshape(leaf.shape)
