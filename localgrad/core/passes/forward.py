"""The forward pass of a cell over a window, and a step replayed from its saved drives.

What x alone feeds is computed for the whole window in one matmul; the scan does the rest and saves
the carry and the drives. A replayed step needs no forward matmul, and where synapses are cut none
at all. Letters: B batch, W steps of the window, N units, D width of a drive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.model.synapses import (
    INPUT,
    OUTPUT,
    RECURRENT,
    Anatomy,
    Layer,
    in_use,
    record,
    respond_to,
)
from localgrad.core.params import Leaves, under
from localgrad.core.steps import length, select

EXACT, CUT, DIAGONAL, ONCE, SETS = "exact", "cut", "diagonal", "once", "sets"

Entries = dict[int, tuple[int, int]]
"""By call number of a recurrent synapse: the entry of pre that is unit 0, and N."""


class Method(NamedTuple):
    """How credit passes the recurrent synapses of a cell.

    Attributes:
        cut: `EXACT` lets all of it pass, `CUT` none, `DIAGONAL` what each unit sends to itself,
            `ONCE` that of a step's outputs, one step back and no further, `SETS` (`reach.py`) what
            passes between the units that a parameter reaches.
        entries: for `DIAGONAL` and `SETS`, where the units lie in pre.
        by: for `ONCE`, the cell's parameters with those that credit passes by.
        reach: for `SETS`, which units these are.
    """

    cut: str
    entries: Entries
    by: Leaves | None = None
    reach: Any = None


WHOLE = Method(EXACT, {})


class Tape(NamedTuple):
    """What the forward pass of one cell leaves for the backward pass.

    Attributes:
        carries: the carry that entered each step, after any reset: leaves [W, B, N].
        xs: the inputs, leaves [W, B, ...].
        drives: the drive of each synapse call, nudges included, [W, B, D].
        ys: the outputs, leaves [W, B, ...].
        reset: [W, B] bool, or None.
    """

    carries: Any
    xs: Any
    drives: list[jax.Array]
    ys: Any
    reset: jax.Array | None


class Settle(NamedTuple):
    """What happens to a carry between two steps, once more is known than the inputs.

    Attributes:
        by: `(the carry that leaves a step, what is seen then) -> the carry that goes on`.
        seen: leaves [W, B, ...], such as the targets.
    """

    by: Callable[[Any, Any], Any]
    seen: Any


def forward(
    cell: Anatomy,
    params: Leaves,
    carry: Any,
    xs: Any,
    reset: jax.Array | None,
    initial: Any,
    *,
    nudges: Mapping[int, jax.Array] | None = None,
    settle: Settle | None = None,
) -> tuple[Any, Tape]:
    """Runs a cell over a window.

    Args:
        cell: its anatomy.
        params: its parameters.
        carry: the carry that enters the window, leaves [B, N].
        xs: inputs, leaves [W, B, ...].
        reset: [W, B] bool, forget the carry before this step; or None.
        initial: the carry to start from after a reset, leaves [B, N].
        nudges: what to add to drives, by number of the synapse call, [W, B, D]; or None.
        settle: what happens to the carry after each step; or None.

    Returns:
        The carry that leaves the window, and the tape, whose drives hold the nudges.
    """
    nudges = dict(nudges or {})
    given = jax.vmap(lambda x: drive_inputs(cell, params, x))(xs)
    given = {i: _nudged(drive, nudges.pop(i, None)) for i, drive in given.items()}
    initial = jax.tree.map(lambda a, b: a.astype(b.dtype), initial, carry)

    def step(carry: Any, now: tuple) -> tuple[Any, tuple]:
        x, reset_t, given_t, nudges_t, seen_t = now
        if reset is not None:
            carry = select(reset_t, initial, carry)
        own = {}

        def respond(i: int, layer: Layer, pre: Any) -> jax.Array:
            if cell.sites[i].role == INPUT:
                return given_t[i]
            own[i] = _nudged(layer.apply(under(params, layer.path), pre), nudges_t.get(i))
            return own[i]

        new, y = respond_to(cell.module, params, carry, x, respond)
        if settle is not None:
            new = settle.by(new, seen_t)
        new = jax.tree.map(lambda a, b: a.astype(b.dtype), new, carry)
        return new, (carry, y, own)

    along = (xs, reset, given, nudges, None if settle is None else settle.seen)
    last, (carries, ys, own) = jax.lax.scan(step, carry, along)
    drives = [given[i] if i in given else own[i] for i in range(len(cell.sites))]
    return last, Tape(carries, xs, drives, ys, reset)


def _nudged(drive: jax.Array, nudge: jax.Array | None) -> jax.Array:
    return drive if nudge is None else drive + nudge.astype(drive.dtype)


def drive_inputs(cell: Anatomy, params: Leaves, x: Any) -> dict[int, jax.Array]:
    """The drives of the input synapses, by call number, for x of any batch size."""
    batch = length(x)
    blank = [jnp.zeros((batch, *s.drive.shape[1:]), s.drive.dtype) for s in cell.sites]
    carry = cell.module.initialize_carry(jax.tree.leaves(x)[0].shape)
    _, _, pres = record(cell.module, params, carry, x, blank)
    return {
        i: site.layer.apply(under(params, site.layer.path), pres[i])
        for i, site in enumerate(cell.sites)
        if site.role == INPUT
    }


@jax.custom_vjp
def graft(value: jax.Array, path: jax.Array) -> jax.Array:
    """`value`, with its credit also going to `path`, which computes the same number."""
    del path
    return value


graft.defvjp(lambda value, path: (value, None), lambda _, credit: (credit, credit))


def replay(
    cell: Anatomy, params: Leaves, method: Method, carry: Any, x: Any, drives: list
) -> tuple[Any, Any]:
    """One step from its saved drives; recurrent synapses pass credit as `method` says."""
    cut, frozen = method.cut, []
    if cut != EXACT and any(s.role == RECURRENT and s.reads_x for s in cell.sites):
        frozen = record(cell.module, params, jax.lax.stop_gradient(carry), x, drives)[2]

    def respond(i: int, layer: Layer, pre: Any) -> jax.Array:
        site, drive = cell.sites[i], drives[i]
        own = under(params, layer.path)
        if site.role == INPUT:
            return drive
        if cut == EXACT or site.role == OUTPUT:
            return graft(drive, layer.apply(own, pre))
        if site.reads_x:
            drive = graft(drive, layer.apply(own, frozen[i]))
        if cut == DIAGONAL:
            weight = _own_weight(in_use(layer, own, pre), *method.entries[i], pre)
            drive = graft(drive, weight.astype(drive.dtype))
        return drive

    new, y = respond_to(cell.module, params, carry, x, respond)
    return jax.tree.map(lambda a, b: a.astype(b.dtype), new, carry), y


def _own_weight(kernel: jax.Array, start: int, units: int, pre: jax.Array) -> jax.Array:
    """What each unit sends to itself: the diagonal of each [N, N] block of the kernel.

    The units are the entries `start`, `start + 1`, ... of pre.
    """
    blocks = kernel.shape[-1] // units
    square = kernel[start : start + units].reshape(units, blocks, units)
    weight = jnp.diagonal(square, axis1=0, axis2=2).reshape(1, -1).astype(pre.dtype)
    return jnp.tile(pre[..., start : start + units], blocks) * weight
