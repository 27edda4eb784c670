"""The backward pass of a cell over a window, with any number of credit rows.

First the credit of each step's new carry is found, backward in time: through the whole step
(`sweep`), or for each unit by itself (`sweep_units`). What that credit means within each step, for
drives and inputs (`assign`) and for parameters that no synapse owns (`unowned_...`), needs no order
in time, so it is computed for all W steps at once.
Letters: B batch, W steps of the window, K credit rows, N units, S live carry leaves, D drive width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.model.synapses import INPUT, Anatomy
from localgrad.core.params import Leaves, Path
from localgrad.core.passes.forward import WHOLE, Method, Tape, drive_inputs, replay
from localgrad.core.steps import forget, length, padded, response


class Credit(NamedTuple):
    """What the credit of a cell's states and outputs means for what feeds them.

    Attributes:
        posts: credit of each drive, [W, K, B, D].
        direct: credit of x by ways that pass no input synapse, leaves [W, K, B, ...], or None.
    """

    posts: list[jax.Array]
    direct: Any


def sweep(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    q_end: Any,
    method: Method = WHOLE,
) -> tuple[Any, Any]:
    """Sends K rows of credit backward through a window.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K', B, ...]; rows from K' on have none.
        q_end: credit of the carry that leaves the window, leaves [K, B, ...].
        method: how credit passes the recurrent synapses.

    Returns:
        Credit of the carry that leaves each step, leaves [W, K, B, ...], and of the one that
        entered the window, [K, B, ...].
    """
    k = length(q_end)

    def back(q: Any, now: tuple) -> tuple[Any, Any]:
        carry, x, drives, q_y, reset = now
        _, pull = jax.vjp(lambda c: replay(cell, params, method, c, x, drives), carry)
        (before,) = jax.vmap(pull)((q, jax.tree.map(lambda a: padded(a, k), q_y)))
        if reset is not None:
            before = forget(before, jnp.broadcast_to(reset, (k, *reset.shape)))
        return before, q

    along = (tape.carries, tape.xs, tape.drives, q_ys, tape.reset)
    q_start, left = jax.lax.scan(back, q_end, along, reverse=True)
    return left, q_start


def sweep_units(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    live: list[int],
    probes: int,
    method: Method,
) -> tuple[Any, list[jax.Array]]:
    """Sends credit backward through the unit dynamics alone: a linear recursion for each unit.

    Each of the `probes` rows behind those given starts as ones on one live carry leaf at the
    window's end, so that it becomes that leaf's derivative for the past.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K, B, ...].
        live: the S carry leaves through which a unit remembers.
        probes: S, or 0 for none.
        method: how credit passes the recurrent synapses: cut, once, or along the diagonal.

    Returns:
        Credit of the carry that leaves each step, leaves [W, K + probes, B, N], and of the live
        leaves that entered the window, S of [K + probes, B, N].
    """
    entering, jacobian = unit_dynamics(cell, params, tape, q_ys, live, method)
    steps, rows = entering[0].shape[:2]

    def back(q: tuple, now: tuple) -> tuple[tuple, tuple]:
        entering, jacobian = now
        new = [
            sum(row[j][None] * q_i for row, q_i in zip(jacobian, q, strict=True))
            + padded(entering[j], rows + probes)
            for j in range(len(live))
        ]
        # Leaves may differ in dtype; the credit of each has its own.
        return tuple(a.astype(q_i.dtype) for a, q_i in zip(new, q, strict=True)), q

    ends = tuple(_ones_in_row(rows + i, a, probes) for i, a in enumerate(entering))
    q_start, left = jax.lax.scan(back, ends, (entering, jacobian), reverse=True)
    leaves, treedef = jax.tree.flatten(tape.carries)
    every = [
        left[live.index(k)]
        if k in live
        else jnp.zeros((steps, rows + probes, *leaf.shape[1:]), leaf.dtype)
        for k, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, every), list(q_start)


def unit_dynamics(
    cell: Anatomy, params: Leaves, tape: Tape, q_ys: Any, live: list[int], method: Method
) -> tuple[Any, Any]:
    """What each step's outputs, and its new live carry, say of the carry that entered it.

    The first S of [W, K, B, N]; the second by [i][j], leaf i of the new and leaf j of the old,
    [W, B, N].
    """
    leaves, treedef = jax.tree.flatten(tape.carries)

    def step(params: Leaves, method: Method, *alive: jax.Array) -> tuple[list, Any]:
        full = list(leaves)
        for k, leaf in zip(live, alive, strict=True):
            full[k] = leaf
        whole = jax.tree.unflatten(treedef, full)
        each = jax.vmap(functools.partial(replay, cell, params, method))
        new, y = each(whole, tape.xs, tape.drives)
        return [jax.tree.leaves(new)[k] for k in live], y

    alive = [leaves[k] for k in live]
    (out, y), pull = jax.vjp(functools.partial(step, params, method), *alive)
    none, still = [jnp.zeros_like(leaf) for leaf in out], jax.tree.map(jnp.zeros_like, y)
    shown = pull
    if method.by is not None:
        _, shown = jax.vjp(functools.partial(step, method.by, WHOLE), *alive)
    entering = jax.vmap(lambda q: shown((none, q)), 1, 1)(q_ys)
    jacobian = [
        pull(([jnp.ones_like(leaf) if j == i else leaf for j, leaf in enumerate(none)], still))
        for i in range(len(live))
    ]
    if tape.reset is not None:
        jacobian = forget(jacobian, tape.reset)
        entering = jax.vmap(lambda q: forget(q, tape.reset), 1, 1)(entering)
    return entering, jacobian


def _ones_in_row(place: int, like: jax.Array, probes: int) -> jax.Array:
    """Zeros [K + probes, B, N] for a leaf like [W, K, B, N], with ones in one row, if it exists."""
    rows = like.shape[1] + probes
    ends = jnp.zeros((rows, *like.shape[2:]), like.dtype)
    return ends.at[place].set(1) if place < rows else ends


class _Within(NamedTuple):
    """All steps of a window, side by side and each for itself.

    Attributes:
        step: `(drives, x's direct way, unowned parameters) -> (new carry, y)`, or y alone where the
            new carry has no credit.
        drives: leaves [W, B, D].
        x_path: leaves [W, B, ...], or None if x earns no credit there.
        credit: of what `step` gives, leaves [W, K, B, ...].
    """

    step: Callable[[Any, Any, Leaves], Any]
    drives: list[jax.Array]
    x_path: Any
    credit: Any


def _within(cell: Anatomy, params: Leaves, tape: Tape, q_ys: Any, left: Any) -> _Within:
    count = length(jax.tree.leaves(q_ys)[0][0] if left is None else jax.tree.leaves(left)[0][0])
    q_ys = jax.tree.map(jax.vmap(lambda q: padded(q, count)), q_ys)
    credit = q_ys if left is None else (left, q_ys)
    wants_x = _wants_x(cell, tape.xs)

    def step(drives: list, x_path: Any, unowned: Leaves) -> Any:
        each = jax.vmap(functools.partial(replay, cell, params | unowned, WHOLE))
        new, y = each(tape.carries, x_path if wants_x else tape.xs, drives)
        return y if left is None else (new, y)

    return _Within(step, tape.drives, tape.xs if wants_x else None, credit)


def assign(cell: Anatomy, params: Leaves, tape: Tape, q_ys: Any, left: Any = None) -> Credit:
    """What the credit of each step's outputs and new carry means for that step's drives and x.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K', B, ...]; rows from K' on have none.
        left: credit of the carry that leaves each step, leaves [W, K, B, ...], or None for none.

    Returns:
        The credit of drives and of x.
    """
    at = _within(cell, params, tape, q_ys, left)
    _, pull = jax.vjp(lambda d, p: at.step(d, p, {}), at.drives, at.x_path)
    return Credit(*jax.vmap(pull, 1, 1)(at.credit))


def unowned_whole(cell: Anatomy, params: Leaves, tape: Tape, q_ys: Any, left: Any = None) -> Leaves:
    """What credit means for the parameters that no synapse owns, summed over all: leaves [...].

    Arguments as of `assign`.
    """
    if not cell.unowned:
        return {}
    at = _within(cell, params, tape, q_ys, left)
    unowned = {path: params[path] for path in cell.unowned}
    _, pull = jax.vjp(lambda u: at.step(at.drives, at.x_path, u), unowned)
    return jax.tree.map(lambda q: q.sum(0), jax.vmap(pull, 1)(at.credit)[0])


def unowned_by_example(cell: Anatomy, params: Leaves, tape: Tape, q_ys: Any, left: Any) -> Leaves:
    """The same for each row and example, leaves [K, B, ...]."""
    if not cell.unowned:
        return {}
    unowned = {path: params[path] for path in cell.unowned}

    def one(tape: Tape, q_ys: Any, left: Any) -> Leaves:
        at = _within(cell, params, tape, q_ys, left)
        _, pull = jax.vjp(lambda u: at.step(at.drives, at.x_path, u), unowned)
        return jax.vmap(pull, 1)(at.credit)[0]

    # Each example as a batch of one.
    apart = jax.tree.map(lambda a: jnp.expand_dims(a, 2), tape)
    q_ys, left = jax.tree.map(lambda a: jnp.expand_dims(a, 3), (q_ys, left))
    return jax.vmap(one, in_axes=(1, 2, 2), out_axes=1)(apart, q_ys, left)


def unowned_by_unit(cell: Anatomy, params: Leaves, tape: Tape, left: Any) -> Leaves:
    """What credit of the new carry means for each unit of unit parameters, leaves [K, B, N].

    A unit parameter touches its own unit only, so one tangent of ones shows every unit's response;
    one of G numbers a unit takes G of them, and has leaves [K, B, G N].

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        left: credit of the carry that leaves each step, leaves [W, K, B, N].

    Returns:
        By path, for the parameters that reach the new carry.
    """
    credit = jax.tree.map(lambda q: jnp.moveaxis(q, 1, 0), left)
    units = jax.tree.leaves(tape.carries)[0].shape[-1]

    def per_unit(path: Path, tangent: jax.Array) -> jax.Array:
        def step(value: jax.Array) -> Any:
            each = jax.vmap(functools.partial(replay, cell, params | {path: value}, WHOLE))
            return each(tape.carries, tape.xs, tape.drives)[0]

        felt = response(step, params[path], tangent)
        every = jax.tree.leaves(jax.tree.map(lambda q, r: (q * r[None]).sum(1), credit, felt))
        return functools.reduce(jnp.add, every)

    def each(path: Path, leaf: jax.Array) -> jax.Array:
        group = jnp.arange(leaf.size).reshape(leaf.shape) // units
        tangents = [(group == g).astype(leaf.dtype) for g in range(max(1, leaf.size // units))]
        return jnp.concatenate([per_unit(path, tangent) for tangent in tangents], axis=-1)

    return {path: each(path, params[path]) for path in cell.unowned_reach}


def input_credit(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    credit: Credit,
    feedback: Mapping[int, jax.Array] | None = None,
) -> Any:
    """The credit of a cell's input x, through its input synapses and directly.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        credit: of its drives and of x.
        feedback: by call number, weights (N, D) to send the credit of a drive by, in place of its
            synapse's own.

    Returns:
        Credit of x, leaves [W, K, B, ...].
    """
    if feedback:
        return sum(credit.posts[i] @ weights.T for i, weights in feedback.items())
    given = {i: credit.posts[i] for i, s in enumerate(cell.sites) if s.role == INPUT}
    if not given:
        return credit.direct
    pull = jax.vjp(jax.vmap(lambda x: drive_inputs(cell, params, x)), tape.xs)[1]
    q_x = jax.vmap(lambda posts: pull(posts)[0], 1, 1)(given)
    return q_x if credit.direct is None else jax.tree.map(jnp.add, q_x, credit.direct)


def _wants_x(cell: Anatomy, xs: Any) -> bool:
    """Whether x earns credit beside its input synapses."""
    floating = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in jax.tree.leaves(xs))
    return floating and (
        cell.reads_x or any(site.reads_x and site.role != INPUT for site in cell.sites)
    )
