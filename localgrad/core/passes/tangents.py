"""The forward twin of the backward pass: how small changes travel through a window.

Letters: B batch, W steps of the window, K tangents, N units, D drive width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import INPUT, Anatomy
from localgrad.core.params import Leaves, under
from localgrad.core.passes.forward import WHOLE, Method, Tape, drive_inputs, replay
from localgrad.core.steps import forget, length, response


def push(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    d_start: Any,
    d_drives: list[jax.Array],
    d_xs: Any = None,
    *,
    method: Method = WHOLE,
) -> tuple[Any, Any]:
    """Sends K tangents forward through a window: the transpose of `sweep` and `assign`.

    Works on cells with derivatives of their own for reverse mode alone, as `jax.jvp` does not.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        d_start: tangents of the carry that enters the window, leaves [K, B, ...].
        d_drives: tangents of each drive, [W, K, B, D], beside what carry and x bring about.
        d_xs: tangents of x, leaves [W, K, B, ...], or None for none.
        method: how tangents pass the recurrent synapses.

    Returns:
        Tangents of the outputs, leaves [W, K, B, ...], and of the carry that leaves the window,
        [K, B, ...].
    """
    if d_xs is not None:
        d_drives = _fed(cell, params, tape, d_drives, d_xs)

    def ahead(d_carry: Any, now: tuple) -> tuple[Any, Any]:
        carry, x, drives, d_drives, d_x, reset = now
        if reset is not None:
            d_carry = forget(d_carry, jnp.broadcast_to(reset, (length(d_carry), *reset.shape)))

        def step(at: tuple) -> tuple[Any, Any]:
            carry, drives, moved = at
            return replay(cell, params, method, carry, x if moved is None else moved, drives)

        at = (carry, drives, None if d_x is None else x)
        return jax.vmap(lambda d: response(step, at, d))((d_carry, d_drives, d_x))

    along = (tape.carries, tape.xs, tape.drives, d_drives, d_xs, tape.reset)
    d_end, d_ys = jax.lax.scan(ahead, d_start, along)
    return d_ys, d_end


def _fed(cell: Anatomy, params: Leaves, tape: Tape, d_drives: list, d_xs: Any) -> list:
    """The tangents of drives, with those that x brings about through input synapses."""
    each = jax.vmap(lambda x: drive_inputs(cell, params, x))
    felt = jax.vmap(lambda d_x: response(each, tape.xs, d_x), 1, 1)(d_xs)
    return [
        d + felt[i] if site.role == INPUT else d
        for i, (site, d) in enumerate(zip(cell.sites, d_drives, strict=True))
    ]


def push_carries(stack: Stack, params: Leaves, tapes: list[Tape], d_starts: list[Any]) -> list[Any]:
    """Sends tangents of the cells' carries through a window, from cell to cell as inputs.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        tapes: of the forward pass, one a cell.
        d_starts: for each cell, tangents of the carry that enters the window, leaves [K, B, ...].

    Returns:
        For each cell, tangents of the carry that leaves it, leaves [K, B, ...].
    """
    d_xs, d_ends = None, []
    for level, (tape, d_start) in enumerate(zip(tapes, d_starts, strict=True)):
        still = [
            jnp.zeros((len(drive), length(d_start), *drive.shape[1:]), drive.dtype)
            for drive in tape.drives
        ]
        own = under(params, stack.prefixes[level])
        d_xs, d_end = push(stack.cells[level], own, tape, d_start, still, d_xs)
        d_ends.append(d_end)
    return d_ends
