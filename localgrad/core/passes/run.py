"""One pass through a whole model: forward over a window, and down again from cell to cell.

Letters: B batch, W steps of the window, K credit rows, N units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.model.modules import Module
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import Anatomy
from localgrad.core.params import Leaves, Path, placed, under
from localgrad.core.passes.backward import assign, input_credit, unowned_whole
from localgrad.core.passes.contraction import contract, pres
from localgrad.core.passes.forward import Settle, Tape, forward


class Pass(NamedTuple):
    """One forward pass over a window.

    Attributes:
        carries: each cell's carry after the window.
        tapes: each cell's tape.
        outputs: the model's outputs, leaves [W, B, ...].
        encode: credit of the first cell's input [W, B, ...] -> the encoder's gradient.
        read: credit of the outputs -> (the readout's gradient, credit of the last cell's output).
    """

    carries: tuple[Any, ...]
    tapes: list[Tape]
    outputs: Any
    encode: Callable[[Any], Leaves]
    read: Callable[[Any], tuple[Leaves, Any]]


def run(
    stack: Stack,
    params: Leaves,
    carries: Any,
    xs: Any,
    reset: jax.Array | None,
    *,
    settle: Settle | None = None,
) -> Pass:
    """Runs a model over a window.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        carries: each cell's carry before the window, leaves [B, N].
        xs: inputs, leaves [W, B, ...].
        reset: [W, B] bool, or None.
        settle: what happens to the carry after each step, for a model of one cell; or None.

    Returns:
        The pass, with what the backward pass needs.
    """
    if settle is not None and len(stack.cells) > 1:
        raise ValueError(
            f"carries can be settled after each step in a model of one cell only; this one has "
            f"{len(stack.cells)}, which run one after the other over a whole window."
        )
    zs, encode = _memoryless(stack.encoder, under(params, ("encoder",)), xs)
    last, tapes = through_cells(stack, params, carries, zs, reset, settle=settle)
    outputs, read = _memoryless(stack.readout, under(params, ("readout",)), tapes[-1].ys)
    return Pass(
        last,
        tapes,
        outputs,
        lambda q: placed(encode(q)[0], ("encoder",)),
        lambda q: (placed((found := read(q))[0], ("readout",)), found[1]),
    )


def through_cells(
    stack: Stack,
    params: Leaves,
    carries: Any,
    zs: Any,
    reset: jax.Array | None,
    *,
    nudges: Sequence[Mapping[int, jax.Array]] | None = None,
    settle: Settle | None = None,
) -> tuple[tuple[Any, ...], list[Tape]]:
    """Runs the cells of a model over a window, one after the other.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        carries: each cell's carry before the window, leaves [B, N].
        zs: inputs of the lowest cell, leaves [W, B, ...].
        reset: [W, B] bool, or None.
        nudges: for each cell, what to add to its drives, by call number, [W, B, D]; or None.
        settle: what happens to the carry after each step; or None.

    Returns:
        Each cell's carry after the window, and its tape.
    """
    last, tapes = [], []
    for level in stack.levels:
        carry, tape = forward(
            stack.cells[level],
            under(params, stack.prefixes[level]),
            carries[level],
            zs,
            reset,
            stack.initial[level],
            nudges=None if nudges is None else nudges[level],
            settle=settle,
        )
        last.append(carry)
        tapes.append(tape)
        zs = tape.ys
    return tuple(last), tapes


class Level(NamedTuple):
    """One cell of a stack on the way down.

    Attributes:
        number: 0 for the lowest cell.
        name: how states and messages call it.
        prefix: where its parameters lie in the model's.
        cell: its anatomy.
        params: its own parameters.
        tape: of its forward pass.
        below: whether something below it, a cell or the encoder, learns from its input's credit.
    """

    number: int
    name: str
    prefix: Path
    cell: Anatomy
    params: Leaves
    tape: Tape
    below: bool


Visit = Callable[[Level, Any], tuple[Leaves, Any, Any]]


def descend(
    stack: Stack, params: Leaves, tapes: list[Tape], q_y: Any, visit: Visit
) -> tuple[Leaves, list[Any], Any]:
    """Takes credit from the highest cell to the lowest.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        tapes: of the forward pass, one a cell.
        q_y: credit of the highest cell's outputs.
        visit: `(level, credit of the cell's outputs) -> (gradients of its own parameters, what to
            keep, credit of its input)`.

    Returns:
        The gradients, what was kept of each cell, and the credit of the lowest cell's input.
    """
    grads: Leaves = {}
    kept: list[Any] = []
    for number in reversed(stack.levels):
        prefix, below = stack.prefixes[number], number > 0 or stack.encoder is not None
        own = under(params, prefix)
        level = Level(
            number, stack.name(number), prefix, stack.cells[number], own, tapes[number], below
        )
        found, keep, q_y = visit(level, q_y)
        grads |= placed(found, prefix)
        kept.insert(0, keep)
    return grads, kept, q_y


def learned(at: Level, q_y: Any, left: Any) -> tuple[Leaves, Any]:
    """What a cell's parameters learn once the credit of its carry is known, and that of its input.

    Args:
        at: the cell.
        q_y: credit of its outputs, leaves [W, K, B, ...].
        left: credit of the carry that leaves each step, leaves [W, K, B, N]; or None.

    Returns:
        Gradients summed over rows, and leaves [W, K, B, ...]; the latter None if nothing below the
        cell learns.
    """
    cell, own, tape = at.cell, at.params, at.tape
    credit = assign(cell, own, tape, q_y, left)
    posts = [post.sum(1) for post in credit.posts]
    grads = contract(cell.sites, own, pres(cell, own, tape), posts)
    grads |= unowned_whole(cell, own, tape, q_y, left)
    return grads, input_credit(cell, own, tape, credit) if at.below else None


def _memoryless(module: Module | None, params: Leaves, xs: Any) -> tuple[Any, Any]:
    """A module without memory on all steps at once, and its VJP for parameters and input.

    Nothing is differentiated until the VJP is called.
    """
    if module is None:
        return xs, lambda q: ({}, q)
    apply = jax.vmap(module.apply, (None, 0))
    floating = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in jax.tree.leaves(xs))

    def back(q: Any) -> tuple[Leaves, Any]:
        if not floating:
            return *jax.vjp(lambda p: apply(p, xs), params)[1](q), None
        return jax.vjp(apply, params, xs)[1](q)

    return apply(params, xs), back


def encoded_each(encoder: Module, params: Leaves, x: Any, q: Any) -> Leaves:
    """The encoder's gradient of one example for each row.

    Args:
        encoder: the memoryless module below the cells.
        params: the model's parameters.
        x: inputs of one example, leaves [W, ...].
        q: credit of the encoder's outputs, leaves [K, W, ...].

    Returns:
        Leaves [K, ...].
    """
    own = under(params, ("encoder",))
    _, pull = jax.vjp(lambda p: encoder.apply(p, x), own)
    return placed(jax.vmap(lambda q: pull(q)[0])(q), ("encoder",))
