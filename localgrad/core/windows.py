"""Windows: a batch cut into stretches of steps, and what a rule gets and learns of each."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.objective import Objective, Shown
from localgrad.core.contract.rule import Batch
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, placed
from localgrad.core.passes.run import Pass, Visit, descend, run
from localgrad.core.steps import even_window, merge_axes


class Window(NamedTuple):
    """A stretch of W consecutive steps of a batch, time first.

    Attributes:
        inputs: leaves [W, B, ...].
        targets: leaves [W, B, ...].
        weight: [W, B], or None for ones.
        reset: [W, B] bool, or None.
    """

    inputs: Any
    targets: Any
    weight: jax.Array | None
    reset: jax.Array | None


class Frame(NamedTuple):
    """What a rule's process gets beside its state.

    Attributes:
        stack: the model, taken apart for this batch.
        params: its parameters by path.
        objective: the loss with its normaliser.
        steps: T of the call that the window is part of.
        share: what a step of an example counts in a mean over the call, whatever its weight:
            1 / (B T) for `"mean"`, 1 for `"sum"`.
        opening: whether no influence enters this window.
        closing: whether nothing after this window needs an influence.
    """

    stack: Stack
    params: Leaves
    objective: Objective
    steps: int
    share: float
    opening: bool
    closing: bool


def even_windows(stack: Stack, params: Leaves, steps: int, alone: bool) -> int:
    """Short windows, of a rule whose cost does not depend on them."""
    del stack, params, alone
    return even_window(steps)


class Outcome(NamedTuple):
    """A window run forward, and what its loss says.

    Attributes:
        ran: the pass.
        shown: its losses and outputs.
        q_out: credit of the model's outputs, leaves [W, B, ...].
        grads: the readout's gradients.
        q_y: credit of the highest cell's outputs, leaves [W, B, ...].
    """

    ran: Pass
    shown: Shown
    q_out: Any
    grads: Leaves
    q_y: Any


def outcome_of(frame: Frame, carry: Any, window: Window, reset: jax.Array | None) -> Outcome:
    """Runs a window forward from the model's carry, and its loss back to the highest cell."""
    stack = frame.stack
    ran = run(stack, frame.params, stack.unpack(carry), window.inputs, reset)
    values, q_out = frame.objective.credit(ran.outputs, window.targets, window.weight)
    grads, q_y = ran.read(q_out)
    return Outcome(ran, Shown(values, ran.outputs), q_out, grads, q_y)


def cell_by_cell(frame: Frame, state: Any, seen: Outcome, visit: Visit) -> tuple[Any, Leaves]:
    """Credits each cell by itself, from the highest down.

    Args:
        frame: the window's frame.
        state: the rule's, with a `carry` and an `eligibility`.
        seen: what the window gave.
        visit: as of `descend`, of rows of credit as `seen` has them: [W, B, ...]; what it gives
            second are the cell's eligibilities.

    Returns:
        The state after the window, and the gradients.
    """
    stack, ran = frame.stack, seen.ran
    grads, kept, q_x = descend(stack, frame.params, ran.tapes, seen.q_y, visit)
    grads |= seen.grads | ran.encode(q_x)
    eligibility = functools.reduce(operator.or_, map(placed, kept, stack.prefixes))
    return state._replace(carry=stack.pack(ran.carries), eligibility=eligibility), grads


def over_windows(
    body: Callable[..., tuple[Any, Any]],
    acc: Any,
    batch: Batch,
    weight: Any,
    size: int,
    alone: bool,
) -> tuple[Any, Any]:
    """Folds `body(acc, window, opening, closing)` over a batch: full windows, then a shorter one.

    Args:
        body: what to do with one window; gives the next acc, and leaves [W, B, ...] to keep.
        acc: where to start.
        batch: leaves [B, T, ...].
        weight: [B, T] or None.
        size: W.
        alone: whether the batch neither takes over an influence nor hands one on.

    Returns:
        The last acc, and what was kept, leaves [B, T, ...].
    """
    arrays = Window(batch.inputs, batch.targets, weight, batch.reset)
    steps = jax.tree.leaves(batch.inputs)[0].shape[1]
    full, rest = divmod(steps, size)

    def cut(start: Any, width: int) -> Window:
        def piece(a: jax.Array) -> jax.Array:
            return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(a, start, width, axis=1), 1, 0)

        return jax.tree.map(piece, arrays)

    if full == 1:
        acc, kept = body(acc, cut(0, size), alone, alone and not rest)
    else:

        def step(acc: Any, k: jax.Array) -> tuple[Any, Any]:
            return body(acc, cut(k * size, size), False, False)

        acc, kept = jax.lax.scan(step, acc, jnp.arange(full))
        kept = merge_axes(kept)
    if rest:
        acc, last = body(acc, cut(full * size, rest), False, alone)
        kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, last)
    return acc, jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), kept)
