"""`readout_only`: the cells stay as they are and only the readout learns."""

from __future__ import annotations

from typing import Any

from localgrad.core.contract.rule import NOTHING, LearningRule, Loss
from localgrad.core.contract.state import CarryState
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path
from localgrad.core.windows import Frame, Window, even_windows, outcome_of


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
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `CarryState`.

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
    return windowed_rule(
        model,
        loss,
        Recipe(
            name="readout_only",
            state=CarryState,
            process=_process,
            credits=_credits,
            default_window=even_windows,
            screen=_screen,
        ),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


def _process(frame: Frame, state: CarryState, window: Window) -> tuple:
    seen = outcome_of(frame, state.carry, window, window.reset)
    return state._replace(carry=frame.stack.pack(seen.ran.carries)), seen.grads, seen.shown


def _screen(stack: Stack, params: Leaves) -> None:
    del params
    if stack.readout is None:
        raise ValueError(
            "readout_only trains the readout of a localgrad.Network, and this model has none. "
            "Wrap it: localgrad.Network((cell,), readout=nn.Dense(O)) (NNX: "
            "localgrad.NNXNetwork)."
        )


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    del stack
    return {path: "exact" if path[:1] == ("readout",) else NOTHING for path in params}
