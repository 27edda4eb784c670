"""`readout_only`: the cells stay as they are and only the readout learns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves
from localgrad.core.rule import Frame, LearningRule, Loss, Recipe, Window, even_window, windowed_rule
from localgrad.core.stack import Stack, run


class ReadoutState(NamedTuple):
    """State of `readout_only`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        start: the model's initial carry (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    start: Any = None

    def fresh(self) -> ReadoutState:
        """The state at the start of new sequences."""
        return self._replace(carry=self.start)


def readout_only(
    model: Any,
    loss: Loss,
    *,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    """Readout only."""

    def begin(stack: Stack, params: Leaves, x: Any) -> ReadoutState:
        del params, x
        carry = stack.pack(stack.initial)
        return ReadoutState(jnp.zeros(()), carry, carry)

    def process(frame: Frame, state: ReadoutState, window: Window) -> tuple:
        stack = frame.stack
        carries = stack.unpack(state.carry)
        ran = run(stack, frame.params, carries, window.inputs, window.reset)
        value, q_out = frame.objective.credit(ran.outputs, window.targets, window.weight)
        return state._replace(carry=stack.pack(ran.carries)), ran.read(q_out)[0], value

    def screen(stack: Stack, params: Leaves) -> None:
        del params
        if stack.readout is None:
            raise ValueError(
                "readout_only trains the readout of a localgrad.Network, and this model has none. "
                "Wrap it: localgrad.Network((cell,), readout=nn.Dense(O))."
            )

    recipe = Recipe(
        name="readout_only",
        begin=begin,
        process=process,
        idle=ReadoutState(jnp.zeros(())),
        default_window=lambda stack, params, steps: even_window(steps),
        screen=screen,
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
