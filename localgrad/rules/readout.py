"""`readout_only`: the cells stay as they are and only the readout learns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves
from localgrad.core.rule import (
    Frame,
    LearningRule,
    Loss,
    Recipe,
    Window,
    even_window,
    windowed_rule,
)
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
    r"""Trains the readout and leaves everything else as it is: the floor every rule should beat.

    The readout's parameters get their exact gradient, all others exact zeros. A random network with
    a trained readout solves many tasks that look as if they needed temporal credit.

    *Estimates* the gradient with respect to the readout. *Costs* a forward pass; memory does not
    grow with T.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry persists from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`), needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `ReadoutState`.

    Raises:
        ValueError: if the model has no readout, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.readout_only(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> [
        ...     bool(jnp.any(u))
        ...     for u in (updates["readout"]["bias"], updates["cells_0"]["in"]["bias"])
        ... ]
        [True, False]

    Reference:
        Jaeger, "The echo state approach to analysing and training recurrent neural networks", GMD
        Report 148, 2001, https://www.ai.rug.nl/minds/uploads/EchoStatesTechRep.pdf
    """

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
        credits=lambda stack, params: {
            path: "exact" if path[:1] == ("readout",) else "nothing: stays as it is"
            for path in params
        },
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
