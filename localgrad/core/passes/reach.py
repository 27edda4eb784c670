"""Influences kept on the units that a parameter reaches within a few steps, along sparse weights.

A parameter of unit i keeps how the units of a fixed set, i and those a few synapses behind it,
respond to it. Credit for it then runs backward through the step's Jacobian between these units: a
recursion for each unit i, whose own part of the credit is what its parameters learn from.
Letters: B batch, W steps of the window, K credit rows, N units, R units of a set, S carry leaves, D
drive width, G = D / N.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.examples import over_examples
from localgrad.core.model.synapses import Anatomy, in_use, record
from localgrad.core.params import Leaves, under
from localgrad.core.passes.backward import (
    assign,
    unit_dynamics,
    unowned_by_unit,
    unowned_whole,
)
from localgrad.core.passes.contraction import contract, outer, pres
from localgrad.core.passes.forward import CUT, Entries, Method, Tape
from localgrad.core.passes.run import Level
from localgrad.core.steps import (
    example_row_step,
    examples_first,
    forget,
    one_row,
    padded,
    row,
)


class Reach(NamedTuple):
    """The sparsity of one cell.

    Attributes:
        units: [N, R].
        kept: by path within the cell.
    """

    units: jax.Array
    kept: Leaves


class _Synapse(NamedTuple):
    """How one recurrent layer takes credit from unit to unit.

    Attributes:
        weights: between the units of each set, [N, R (pre), G, R (post)].
        heard: how each leaf of the carry moves what the layer receives, [W, B, S, N].
        moves: how the layer's drive moves each leaf of the new carry, [W, B, S, G, N].
        credit: of the drive by this step's outputs, [W, B, G, N].
    """

    weights: jax.Array
    heard: jax.Array
    moves: jax.Array
    credit: jax.Array


def sweep_sets(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    probing: bool,
    entries: Entries,
    reach: Reach,
) -> tuple[Any, jax.Array]:
    """Sends credit backward between the units of each set.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, 1, B, ...].
        probing: whether to add a row for each of the R S numbers that a set holds at the window's
            end, which becomes that number's derivative for the past.
        entries: where the units lie in pre.
        reach: the sets.

    Returns:
        Each unit's own part of the credit of the carry that leaves each step, leaves [W, K, B, N],
        and the credit of the sets that entered the window, [R S, K, B, N].
    """
    leaves, treedef = jax.tree.flatten(tape.carries)
    count, dtype = len(leaves), functools.reduce(jnp.promote_types, [a.dtype for a in leaves])
    batch, (units, width) = leaves[0].shape[1], reach.units.shape
    entering, jacobian = unit_dynamics(
        cell, params, tape, q_ys, list(range(count)), Method(CUT, {})
    )
    given = jnp.stack([a[:, 0] for a in entering], 2).astype(dtype)  # [W, B, S, N]
    fading = jnp.stack([jnp.stack(line, 2) for line in jacobian], 2)  # [W, B, S new, S old, N]
    synapses = [
        _synapse(cell, params, tape, q_ys, number, place, reach)
        for number, place in entries.items()
    ]
    pick = functools.partial(_of_sets, units=reach.units)

    def back(q: jax.Array, now: tuple) -> tuple[jax.Array, jax.Array]:
        given, fading, along = now  # q is [K, B, S, N, R]
        new = jnp.einsum("btsnr,kbtnr->kbsnr", pick(fading), q)
        new += padded(pick(given)[None], len(q))
        for weights, (heard, moves, credit) in zip(between, along, strict=True):
            drive = jnp.einsum("bsgnr,kbsnr->kbgnr", pick(moves), q)
            drive += padded(pick(credit)[None], len(q))
            felt = jnp.einsum("nlgr,kbgnr->kbnl", weights, drive)
            new += pick(heard)[None] * felt[:, :, None]
        return new.astype(dtype), q[..., 0]

    between = [synapse.weights for synapse in synapses]
    along = [(synapse.heard, synapse.moves, synapse.credit) for synapse in synapses]
    q = jnp.zeros((1, batch, count, units, width), dtype)
    if probing:
        ends = jnp.eye(width * count, dtype=dtype).reshape(-1, width, count).swapaxes(1, 2)
        ends = jnp.broadcast_to(ends[:, None, :, None], (width * count, *q.shape[1:]))
        q = jnp.concatenate([q, ends])
    q_start, left = jax.lax.scan(back, q, (given, fading, along), reverse=True)
    own = [left[:, :, :, s].astype(leaf.dtype) for s, leaf in enumerate(leaves)]
    sets = jnp.moveaxis(q_start, (4, 2), (0, 1)).reshape(width * count, len(q), batch, units)
    return jax.tree.unflatten(treedef, own), sets


def _synapse(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    number: int,
    place: tuple[int, int],
    reach: Reach,
) -> _Synapse:
    (start, units), layer = place, cell.sites[number].layer

    def received(carry: Any) -> jax.Array:
        each = jax.vmap(lambda *step: record(cell.module, params, *step)[2][number])
        return each(carry, tape.xs, tape.drives)

    pre, pull = jax.vjp(received, tape.carries)
    moved = jnp.zeros_like(pre).at[..., start : start + units].set(1)
    heard = jax.tree.leaves(pull(moved)[0])  # one unit moves one entry
    if tape.reset is not None:
        heard = forget(heard, tape.reset)

    blank = jax.tree.map(jnp.zeros_like, q_ys)
    moves = assign(cell, params, tape, blank, _leaf_by_leaf(tape.carries)).posts[number]
    credit = assign(cell, params, tape, q_ys).posts[number][:, 0]
    own = under(params, layer.path)
    kernel = in_use(layer, own, pre[0])
    kernel = jnp.where(reach.kept[(*layer.path, "kernel")], kernel, 0)
    square = kernel[start : start + units].reshape(units, -1, units)
    fill = {"mode": "fill", "fill_value": 0}
    sources = jnp.take(square, reach.units, axis=0, **fill)  # [N, R, G, N]
    weights = jax.vmap(lambda a, to: jnp.take(a, to, axis=-1, **fill))(sources, reach.units)
    return _Synapse(
        weights,
        jnp.stack(heard, 2),
        _by_gate(jnp.moveaxis(moves, 1, 2), units),
        _by_gate(credit, units),
    )


def _by_gate(drive: jax.Array, units: int) -> jax.Array:
    """[..., D] -> [..., G, N]."""
    return drive.reshape(*drive.shape[:-1], -1, units)


def _leaf_by_leaf(carries: Any) -> Any:
    """Leaves [W, B, N] -> credit of ones, a row for each leaf: leaves [W, S, B, N]."""
    leaves, treedef = jax.tree.flatten(carries)
    rows = [
        jnp.stack([jnp.full_like(leaf, i == j) for j in range(len(leaves))], 1)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, rows)


def _of_sets(a: jax.Array, units: jax.Array) -> jax.Array:
    """[..., N] -> [..., N, R], with zeros where a set has no unit."""
    return jnp.take(a, units, axis=-1, mode="fill", fill_value=0)


class _Traces(NamedTuple):
    """What a window tells of the eligibilities; each leaf with the examples first.

    Attributes:
        entering: credit of the sets that entered the window, [B, 1 + R S, R S, N].
        received: pre of each synapse, [B, W, ...].
        posts: credit of each drive for the rows but the loss's, [B, R S, W, D].
        unowned: the same of the parameters that no synapse owns, [B, R S, N], or a multiple.
    """

    entering: jax.Array
    received: list[jax.Array]
    posts: list[jax.Array]
    unowned: Leaves


def learn_sets(
    at: Level, q_y: Any, eligibility: Leaves, method: Method, opening: bool, closing: bool
) -> tuple[Leaves, Leaves]:
    """What `learn_units` does, with sets of units in place of units.

    Args:
        at: the cell.
        q_y: learning signal of its outputs, leaves [W, B, N].
        eligibility: before the window, leaves [B, R S, ...].
        method: where the units lie in pre, and their sets.
        opening: the eligibilities before the window are known to be zero.
        closing: those after it are not needed.

    Returns:
        The gradients and the new eligibilities.
    """
    cell, params, tape = at.cell, at.params, at.tape
    received, signal = pres(cell, params, tape), one_row(q_y)
    left, entering = sweep_sets(
        cell, params, tape, signal, not closing, method.entries, method.reach
    )
    credit = assign(cell, params, tape, signal, left)
    grads = contract(cell.sites, params, received, row(credit.posts, 0))
    grads |= unowned_whole(cell, params, tape, signal, jax.tree.map(lambda q: q[:, :1], left))
    if not (opening and closing):
        after = jax.tree.map(lambda q: q[:, 1:], left)
        by_unit = {} if closing else unowned_by_unit(cell, params, tape, after)
        traces = _Traces(
            entering=jnp.transpose(entering, (2, 1, 0, 3)),
            received=examples_first(received, 1),
            posts=[example_row_step(post[:, 1:]) for post in credit.posts],
            unowned=examples_first(by_unit, 1),
        )
        recall = functools.partial(_recalled, cell, params)
        renew = None if closing else functools.partial(_renewed, cell, params)
        recalled, eligibility = over_examples(eligibility, traces, recall, renew)
        for path, grad in recalled.items():
            grads[path] += grad
    kept_weights = method.reach.kept
    masked = {path: jnp.where(kept_weights[path], grads[path], 0) for path in kept_weights}
    return grads | masked, eligibility


def _recalled(cell: Anatomy, params: Leaves, held: Leaves, at: _Traces) -> Leaves:
    """What the eligibilities of one example add to the gradients."""
    found: Leaves = {}
    for path, old in held.items():
        grad = _through_sets(at.entering[:1], old)[0]
        if path in cell.unowned and params[path].size == 1:
            grad = grad.sum()
        found[path] = grad.reshape(params[path].shape)
    return found


def _renewed(cell: Anatomy, params: Leaves, held: Leaves, at: _Traces) -> Leaves:
    """What they become."""
    learn = functools.partial(outer, cell.sites, params, at.received)
    window = (jax.vmap(learn)(at.posts) if cell.sites else {}) | at.unowned
    return {
        path: window[path].astype(old.dtype) + _through_sets(at.entering[1:], old)
        for path, old in held.items()
    }


def _through_sets(credit: jax.Array, old: jax.Array) -> jax.Array:
    """Credit [K, R S, N] of the sets, times their eligibility [R S, ..., D]: [K, ..., D]."""
    units = credit.shape[-1]
    split = old.reshape(len(old), -1, units)
    total = jnp.einsum("ksn,smn->kmn", credit.astype(old.dtype), split)
    return total.reshape(len(credit), *old.shape[1:])
