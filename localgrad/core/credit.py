"""The backward pass of a cell over a window, with any number of credit rows.

First the credit of each step's new carry is found, backward in time: through every synapse
(`sweep`), or through the unit dynamics alone (`sweep_units`). What that credit means within each
step (`assign`) needs no order in time, so it is computed for all W steps at once.
Letters: B batch, W steps of the window, K credit rows, N units, S live carry leaves, D drive width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.forward import EXACT, Entries, Tape, drive_inputs, replay
from localgrad.core.params import Leaves
from localgrad.core.steps import forget, length, merge_steps, padded, response, split_steps
from localgrad.core.synapses import INPUT, Anatomy


class Credit(NamedTuple):
    """What the credit of a cell's states and outputs means for what feeds them.

    Attributes:
        posts: credit of each drive, [W, K, B, D].
        others: credit of the parameters that no synapse owns, summed over steps: [...] (summed over
            rows and examples; with `per_unit` of row 0 alone) or [K, B, ...] (`per_example`).
        units: with `per_unit`, what the rows after row 0 mean for each unit of such a parameter
            that reaches the new carry, [K - 1, B, N]; else nothing.
        direct: credit of x by ways that pass no input synapse, leaves [W, K, B, ...], or None.
    """

    posts: list[jax.Array]
    others: Leaves
    units: Leaves
    direct: Any


def sweep(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    q_end: Any,
    *,
    slots: jax.Array | None = None,
    sum_rows: bool = False,
) -> tuple[Any, Any]:
    """Sends K rows of credit backward through a window, through every synapse.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K', B, ...]; rows from K' on have none.
        q_end: credit of the carry that leaves the window, leaves [K, B, ...].
        slots: [W], the row whose credit expires on reaching each step, or None.
        sum_rows: sum the credit that is kept over the rows.

    Returns:
        Credit of the carry that leaves each step, leaves [W, K, B, ...] (or [W, 1, B, ...]), and of
        the one that entered the window, [K, B, ...].
    """
    k = length(q_end)

    def back(q: Any, now: tuple) -> tuple[Any, Any]:
        carry, x, drives, q_y, reset, slot = now
        if slot is not None:
            q = forget(q, jnp.arange(k) == slot)
        left = jax.tree.map(lambda a: a.sum(0, keepdims=True), q) if sum_rows else q
        _, pull = jax.vjp(lambda c: replay(cell, params, EXACT, {}, c, x, drives), carry)
        (q,) = jax.vmap(pull)((q, jax.tree.map(lambda a: padded(a, k), q_y)))
        if reset is not None:
            q = forget(q, jnp.broadcast_to(reset, (k, *reset.shape)))
        return q, left

    along = (tape.carries, tape.xs, tape.drives, q_ys, tape.reset, slots)
    q_start, left = jax.lax.scan(back, q_end, along, reverse=True)
    return left, q_start


def sweep_units(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    live: list[int],
    probes: int,
    cut: str,
    entries: Entries,
) -> tuple[Any, list[jax.Array]]:
    """Sends credit backward through the unit dynamics alone: a linear recursion for each unit.

    Row 0 is the loss. Each of the `probes` rows after it starts as ones on one live carry leaf at
    the window's end, so that it becomes that leaf's derivative for the past.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, B, ...].
        live: the S carry leaves through which a unit remembers.
        probes: S, or 0 for the loss alone.
        cut: `CUT` or `DIAGONAL`.
        entries: for `DIAGONAL`, where the units lie in pre.

    Returns:
        Credit of the carry that leaves each step, leaves [W, K, B, N], and of the live leaves that
        entered the window, S of [K, B, N].
    """
    steps = length(tape.ys)
    carry, x, drives = merge_steps((tape.carries, tape.xs, tape.drives))
    leaves, treedef = jax.tree.flatten(carry)

    def step(*alive: jax.Array) -> tuple[list, Any]:
        full = list(leaves)
        for k, leaf in zip(live, alive, strict=True):
            full[k] = leaf
        whole = jax.tree.unflatten(treedef, full)
        new, y = replay(cell, params, cut, entries, whole, x, drives)
        return [jax.tree.leaves(new)[k] for k in live], y

    (out, y), pull = jax.vjp(step, *(leaves[k] for k in live))
    none, still = [jnp.zeros_like(leaf) for leaf in out], jax.tree.map(jnp.zeros_like, y)
    entering = pull((none, merge_steps(q_ys)))  # what the outputs say of the carry, S of [WB, N]
    jacobian = [
        pull(([jnp.ones_like(leaf) if j == i else leaf for j, leaf in enumerate(none)], still))
        for i in range(len(live))
    ]  # [i][j]: how leaf i of the new carry feels leaf j of the old, [WB, N]
    if tape.reset is not None:
        flat = tape.reset.reshape(-1)
        entering, jacobian = forget(entering, flat), forget(jacobian, flat)
    entering, jacobian = split_steps((entering, jacobian), steps)

    def back(q: tuple, now: tuple) -> tuple[tuple, tuple]:
        entering, jacobian = now
        new = tuple(
            sum(row[j][None] * q_i for row, q_i in zip(jacobian, q, strict=True))
            + padded(entering[j][None], 1 + probes)
            for j in range(len(live))
        )
        return new, q

    ends = tuple(
        jnp.stack([jnp.full(a.shape[1:], float(i == r), a.dtype) for r in range(-1, probes)])
        for i, a in enumerate(entering)
    )
    q_start, left = jax.lax.scan(back, ends, (entering, jacobian), reverse=True)
    every = [
        left[live.index(k)]
        if k in live
        else jnp.zeros((steps, 1 + probes, *leaf.shape[1:]), leaf.dtype)
        for k, leaf in enumerate(jax.tree.leaves(tape.carries))
    ]
    return jax.tree.unflatten(treedef, every), list(q_start)


def assign(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    left: Any = None,
    *,
    per_example: bool = False,
    per_unit: bool = False,
) -> Credit:
    """What the credit of each step's outputs and new carry means within that step, all W at once.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K', B, ...]; rows from K' on have none.
        left: credit of the carry that leaves each step, leaves [W, K, B, ...], or None for none.
        per_example: keep the credit of other parameters per row and example.
        per_unit: of the rows after row 0, keep it per row, example and unit.

    Returns:
        The credit of drives, other parameters and x.
    """
    others = {path: params[path] for path in cell.others}
    wants_x = _wants_x(cell, tape.xs)
    count = length(jax.tree.leaves(q_ys)[0][0] if left is None else jax.tree.leaves(left)[0][0])
    q_ys = jax.tree.map(lambda q: padded(jnp.moveaxis(q, 1, 0), count), q_ys)
    credit = q_ys if left is None else (jax.tree.map(lambda q: jnp.moveaxis(q, 1, 0), left), q_ys)
    credit = jax.tree.map(lambda q: q.reshape(count, -1, *q.shape[3:]), credit)
    carry, x, drives = merge_steps((tape.carries, tape.xs, tape.drives))

    def step(carry: Any, x: Any, drives: list, x_path: Any, others: Leaves) -> Any:
        seen = x_path if wants_x else x
        new, y = replay(cell, params | others, EXACT, {}, carry, seen, drives)
        if left is None:
            return y
        return jax.tree.map(lambda a, b: a.astype(b.dtype), new, carry), y

    x_path = x if wants_x else None
    _, pull = jax.vjp(lambda d, p, o: step(carry, x, d, p, o), drives, x_path, others)
    posts, direct, q_others = jax.vmap(pull)(credit)
    steps = length(tape.ys)
    units: Leaves = {}
    if per_unit:
        at = (carry, x, drives, x_path)
        reach = {path: params[path] for path in cell.others_reach}
        after = jax.tree.map(lambda q: q[1:], credit[0])
        if count > 1:
            units = _per_unit(lambda o: step(*at, others | o)[0], reach, after, steps)
        q_others = jax.tree.map(lambda q: q[0], q_others)
    elif per_example and others:
        q_others = _per_example(step, (carry, x, drives, x_path), others, credit, steps)
    else:
        q_others = jax.tree.map(lambda q: q.sum(0), q_others)
    posts, direct = jax.tree.map(
        lambda q: jnp.moveaxis(q.reshape(count, steps, -1, *q.shape[2:]), 0, 1), (posts, direct)
    )
    return Credit(posts, q_others, units, direct)


def _per_example(step: Any, at: tuple, others: Leaves, credit: Any, steps: int) -> Leaves:
    """Credit of the other parameters for each row and example, [K, B, ...]."""

    def one(at: tuple, credit: Any) -> Leaves:
        return jax.vjp(lambda o: step(*at, o), others)[1](credit)[0]

    by_example = jax.vmap(one, in_axes=1)
    at = split_steps(at, steps)
    credit = jax.tree.map(lambda q: q.reshape(len(q), steps, -1, *q.shape[2:]), credit)
    return jax.vmap(by_example, in_axes=(None, 0))(at, credit)


def _per_unit(step: Any, others: Leaves, credit: Any, steps: int) -> Leaves:
    """What credit of the new carry means for each unit of unit parameters, [K, B, N].

    A unit parameter touches its own unit only, so one tangent of ones shows every unit's response.
    """
    found = {}
    for path, leaf in others.items():
        felt = response(lambda v, path=path: step(others | {path: v}), leaf, jnp.ones_like(leaf))
        every = jax.tree.leaves(jax.tree.map(lambda q, r: q * r[None], credit, felt))
        total = functools.reduce(jnp.add, every)
        found[path] = total.reshape(total.shape[0], steps, -1, total.shape[-1]).sum(1)
    return found


def input_credit(cell: Anatomy, params: Leaves, tape: Tape, credit: Credit) -> Any:
    """The credit of a cell's input x, through its input synapses and directly.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        credit: of its drives and of x.

    Returns:
        Credit of x, leaves [W, K, B, ...].
    """
    given = {i: credit.posts[i] for i, s in enumerate(cell.sites) if s.role == INPUT}
    if not given:
        return credit.direct
    steps = length(tape.ys)
    pull = jax.vjp(lambda x: drive_inputs(cell, params, x), merge_steps(tape.xs))[1]
    one_row = lambda posts: split_steps(pull(merge_steps(posts))[0], steps)  # noqa: E731
    q_x = jax.vmap(one_row, 1, 1)(given)
    return q_x if credit.direct is None else jax.tree.map(jnp.add, q_x, credit.direct)


def _wants_x(cell: Anatomy, xs: Any) -> bool:
    """Whether x earns credit beside its input synapses."""
    floating = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in jax.tree.leaves(xs))
    return floating and (
        cell.reads_x or any(site.reads_x and site.role != INPUT for site in cell.sites)
    )
