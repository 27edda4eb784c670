"""Truncated credit, age by age: all losses of a window go back one step at a time, side by side.

Losses are credited in blocks of k steps, each block back to h - 1 steps before its first one. Every
block takes as many steps back as the others, so all take them together: h + k - 1 steps on M B rows
at a time, where a sweep over the window would take W + h - 1.
Letters: B batch, W steps of the window, H steps of the tape (W and what is kept of the past), h
horizon, k stride, M blocks, G = M and those that the first reaches back to, N units.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, under
from localgrad.core.passes.backward import assign, input_credit
from localgrad.core.passes.forward import WHOLE, Tape, replay
from localgrad.core.steps import forget, length, merge_axes, one_row, row


class Summed(NamedTuple):
    """Credit of each cell, summed over the losses that still reach a step.

    Attributes:
        left: of the carry that leaves each step, leaves [H, B, N].
        q_ys: of the outputs, leaves [H, B, ...].
    """

    left: list[Any]
    q_ys: list[Any]


class Grid(NamedTuple):
    """How a tape is laid out in rows of k steps, so that each block is a row.

    Attributes:
        blocks: M.
        above: how many rows the first block reaches back over.
        stride: k.
        front: repeated steps before the tape.
        behind: repeated steps after it.
        start: of those, the step in which the grid begins.
    """

    blocks: int
    above: int
    stride: int
    front: int
    behind: int
    start: Any

    def lay(self, a: jax.Array, mode: str = "edge") -> jax.Array:
        """[H, ...] -> [G, k, ...]."""
        wide = jnp.pad(a, [(self.front, self.behind)] + [(0, 0)] * (a.ndim - 1), mode)
        size = (self.blocks + self.above) * self.stride
        return jax.lax.dynamic_slice_in_dim(wide, self.start, size).reshape(
            -1, self.stride, *a.shape[1:]
        )

    def lift(self, a: jax.Array, steps: int) -> jax.Array:
        """[G, k, ...] -> [H, ...]."""
        wide = jnp.zeros((self.front + steps + self.behind, *a.shape[2:]), a.dtype)
        wide = jax.lax.dynamic_update_slice_in_dim(wide, merge_axes(a), self.start, 0)
        return wide[self.front : self.front + steps]

    def at(self, tree: Any, place: jax.Array) -> Any:
        """[G, k, ...] -> [M, ...]: of each block the step this far down from the grid's first."""
        place_, column = jnp.divmod(place, self.stride)

        def pick(a: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_slice_in_dim(a, place_, self.blocks)
            return jax.lax.dynamic_index_in_dim(rows, column, 1, keepdims=False)

        return jax.tree.map(pick, tree)

    def add(self, tree: Any, place: jax.Array, more: Any) -> Any:
        """Adds [M, ...] there."""
        place_, column = jnp.divmod(place, self.stride)

        def put(a: jax.Array, b: jax.Array, old: jax.Array) -> jax.Array:
            new = (old + b.astype(a.dtype))[:, None]
            return jax.lax.dynamic_update_slice(a, new, (place_, column, *(0,) * (a.ndim - 2)))

        return jax.tree.map(put, tree, more, self.at(tree, place))


def grid_of(steps: int, first: int, horizon: int, stride: int, phase: jax.Array | None) -> Grid:
    """The grid of a tape.

    Args:
        steps: H.
        first: H - W, the steps kept of the past.
        horizon: h.
        stride: k.
        phase: how far the first of the W steps is into its block; None for 0.

    Returns:
        The grid.
    """
    new, late = steps - first, 0 if phase is None else stride - 1
    blocks, above = -(-(new + late) // stride), -(-(horizon - 1) // stride)
    front = max(0, above * stride - (first - late))
    start = front + first - above * stride - (0 if phase is None else phase)
    return Grid(blocks, above, stride, front, blocks * stride - new, start)


def sweep_ages(
    stack: Stack, params: Leaves, tapes: list[Tape], q_y: Any, horizon: int, grid: Grid
) -> Summed:
    """Sends the credit of each block of losses back as far as it may go.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        tapes: of the forward pass, one a cell, of H steps.
        q_y: credit of the highest cell's outputs, leaves [H, B, ...].
        horizon: h.
        grid: how the steps are laid out.

    Returns:
        The credit of all cells.
    """
    steps, ages = length(tapes[0].ys), horizon + grid.stride - 1
    laid = jax.tree.map(grid.lay, tapes)
    given = jax.tree.map(lambda q: grid.lay(q, "constant"), q_y)
    top = len(tapes) - 1
    slopes = [
        _slope(stack, i, under(params, stack.prefixes[i]), laid[i], grid) for i in stack.levels
    ]

    def older(so_far: tuple, age: jax.Array) -> tuple[tuple, None]:
        """One step back: what reaches this age is kept, and passed on."""
        q, left, q_ys = (list(part) for part in so_far)
        place = (grid.above + 1) * grid.stride - 1 - age
        fresh = jnp.broadcast_to(age < grid.stride, (grid.blocks,))
        credit = forget(grid.at(given, place), ~fresh)
        for level in reversed(stack.levels):
            own, tape = under(params, stack.prefixes[level]), grid.at(laid[level], place)
            left[level] = grid.add(left[level], place, q[level])
            if level < top:
                q_ys[level] = grid.add(q_ys[level], place, credit)
            below = _passed_down(stack, level, own, tape, credit, q[level]) if level else None
            pull = slopes[level].at(grid, place)
            back = pull((q[level], credit))[0]
            q[level] = back if tape.reset is None else forget(back, tape.reset)
            credit = below
        return (q, left, q_ys), None

    blank = [jax.tree.map(jnp.zeros_like, tape.carries) for tape in laid]
    start = jax.tree.map(lambda a: jnp.zeros((grid.blocks, *a.shape[2:]), a.dtype), blank)
    lower = [jax.tree.map(jnp.zeros_like, tape.ys) for tape in laid[:-1]]
    so_far, _ = jax.lax.scan(older, (start, blank, lower), jnp.arange(ages - 1))
    (_, left, q_ys), _ = older(so_far, jnp.asarray(ages - 1))
    lift = lambda tree: jax.tree.map(lambda a: grid.lift(a, steps), tree)  # noqa: E731
    return Summed(lift(left), [*lift(q_ys), q_y])


class Slope(NamedTuple):
    """The backward pass of a cell's step, linearised once at all steps of a grid.

    Attributes:
        residuals: what it needs; where the axis is not None, [G, k, ...], that axis split and moved
            there.
        axes: of each residual, the axis over blocks, or None for what all blocks share.
        treedef: of the backward pass over M blocks.
    """

    residuals: list[jax.Array]
    axes: list[int | None]
    treedef: Any

    def at(self, grid: Grid, place: jax.Array) -> Any:
        """The backward pass of M blocks, `credit of (new carry, y) -> (credit of the carry,)`."""

        def pick(a: jax.Array, axis: int | None) -> jax.Array:
            return a if axis is None else jnp.moveaxis(grid.at(a, place), 0, axis)

        found = [pick(*pair) for pair in zip(self.residuals, self.axes, strict=True)]
        return jax.tree.unflatten(self.treedef, found)


def _slope(stack: Stack, level: int, own: Leaves, laid: Tape, grid: Grid) -> Slope:
    def pull(tape: Tape) -> Any:
        each = jax.vmap(functools.partial(replay, stack.cells[level], own, WHOLE))
        return jax.vjp(lambda c: each(c, tape.xs, tape.drives), tape.carries)[1]

    size = (grid.blocks + grid.above, grid.stride)
    whole = jax.tree.leaves(pull(jax.tree.map(merge_axes, laid)))
    some, treedef = jax.tree.flatten(jax.eval_shape(lambda: pull(grid.at(laid, jnp.asarray(0)))))
    axes = [_differing(a.shape, b.shape) for a, b in zip(whole, some, strict=True)]
    rows = [
        a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(whole, axes, strict=True)
    ]
    residuals = [
        a if axis is None else a.reshape(*size, *a.shape[1:])
        for a, axis in zip(rows, axes, strict=True)
    ]
    return Slope(residuals, axes, treedef)


def _differing(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    """The axis in which two shapes differ, or None."""
    return next((i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n), None)


def _passed_down(stack: Stack, level: int, own: Leaves, tape: Tape, q_y: Any, left: Any) -> Any:
    """Credit of a cell's input, leaves [M, B, ...]."""
    cell, q_y, left = stack.cells[level], one_row(q_y), one_row(left)
    credit = assign(cell, own, tape, q_y, left)
    return row(input_credit(cell, own, tape, credit), 0)
