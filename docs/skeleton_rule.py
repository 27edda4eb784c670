"""`immediate`: a skeleton to copy for a new rule. It credits each step within that step alone.

Put the file into `localgrad/rules/`, a line into `localgrad/__init__.py`, a row into the catalogue.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path
from localgrad.core.passes.backward import assign, input_credit, unowned_whole
from localgrad.core.passes.contraction import contract, pres
from localgrad.core.passes.run import Level, descend
from localgrad.core.steps import one_row, row
from localgrad.core.windows import Frame, Window, even_windows, outcome_of


class ImmediateState(NamedTuple):
    """State of `immediate`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None

    outlives = ()  # names of the fields that survive a sequence, such as "key" or "feedback"


def immediate(
    model: Any,
    loss: Loss,
    *,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    """The rule in one line: its equations, what it estimates, what it costs, its reference."""
    recipe = Recipe(
        name="immediate",
        state=ImmediateState,
        process=_process,
        credits=_credits,
        default_window=even_windows,
    )
    return windowed_rule(
        model,
        loss,
        recipe,
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


def _process(frame: Frame, state: ImmediateState, window: Window) -> tuple:
    """One window: run it forward, then visit each cell from the highest down."""
    seen = outcome_of(frame, state.carry, window, window.reset)
    grads, _, q_x = descend(frame.stack, frame.params, seen.ran.tapes, one_row(seen.q_y), _visit)
    if frame.stack.encoder is not None:
        grads |= seen.ran.encode(row(q_x, 0))
    carry = frame.stack.pack(seen.ran.carries)
    return state._replace(carry=carry), seen.grads | grads, seen.shown


def _visit(at: Level, q_y: Any) -> tuple[Leaves, None, Any]:
    """One cell: what its parameters learn, what to keep, and the credit of its input."""
    credit = assign(at.cell, at.params, at.tape, q_y)
    received = pres(at.cell, at.params, at.tape)
    grads = contract(at.cell.sites, at.params, received, row(credit.posts, 0))
    grads |= unowned_whole(at.cell, at.params, at.tape, q_y)
    return grads, None, input_credit(at.cell, at.params, at.tape, credit) if at.below else q_y


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    """How each parameter is credited, as `localgrad.summary` prints it."""
    del stack
    return dict.fromkeys(params, "this step only")
