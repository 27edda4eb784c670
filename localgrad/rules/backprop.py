"""Backpropagation through time over whole calls: `bptt`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.params import Leaves
from localgrad.core.passes.backward import sweep
from localgrad.core.passes.forward import Tape
from localgrad.core.passes.run import Level, descend, learned
from localgrad.core.steps import one_row
from localgrad.core.windows import Frame, Window, outcome_of

REACH = "exact, back to the start of the call"


class BackpropState(NamedTuple):
    """State of `bptt`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None

    outlives = ()


def bptt(
    model: Any,
    loss: Loss,
    *,
    batch_size: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Backpropagation through time: the exact gradient of the call's loss.

    With the credit `c_t = dL/da_t` of each drive, the whole future of the call included, and what
    each synapse received, `pre_t`::

        c_t = q_t + c_{t+1} J_{t+1}            dL/dW = sum_t c_t (x) pre_t

    *Estimates* the gradient of the loss of one call with respect to parameters that stay fixed in
    it. An episodic call gives the exact gradient; a streaming call is cut at its start, so that T
    steps a call are truncated BPTT with a period of T. *Costs* one forward and one backward pass;
    memory grows with T.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry persists from call
            to call.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `BackpropState`.

    Raises:
        ValueError: for arguments it cannot use, and at trace time for a batch or a model it cannot.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.bptt(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.loss.shape, updates["readout"]["bias"].shape
        ((), (2,))

    Reference:
        Werbos, "Backpropagation through time: what it does and how to do it", Proceedings of the
        IEEE, 1990, https://doi.org/10.1109/5.58337
    """
    return windowed_rule(
        model,
        loss,
        Recipe(
            name="bptt",
            state=BackpropState,
            process=_process,
            credits=lambda stack, params: dict.fromkeys(params, REACH),
            by_window=True,
        ),
        batch_size=batch_size,
        window=None,
        reduction=reduction,
        example=example,
    )


def _process(frame: Frame, state: BackpropState, window: Window) -> tuple:
    """One call: its losses, credited back to its start."""
    seen = outcome_of(frame, state.carry, window, window.reset)
    grads, q_x = backpropagated(frame, seen.ran.tapes, seen.q_y)
    carry = frame.stack.pack(seen.ran.carries)
    return state._replace(carry=carry), seen.grads | grads | seen.ran.encode(q_x), seen.shown


def backpropagated(frame: Frame, tapes: list[Tape], q_y: Any) -> tuple[Leaves, Any]:
    """The cells' gradients over all steps of their tapes, and the credit of the first one's input.

    Args:
        frame: the rule's frame.
        tapes: of the forward pass, one a cell.
        q_y: credit of the highest cell's outputs, leaves [W, B, ...].

    Returns:
        Gradients by path, and leaves [W, B, ...].
    """
    grads, _, q_x = descend(frame.stack, frame.params, tapes, one_row(q_y), _visit)
    return grads, jax.tree.map(lambda q: q.sum(1), q_x)


def _visit(at: Level, q_y: Any) -> tuple[Leaves, None, Any]:
    """One cell: its gradients, and the credit of its input."""
    end = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), at.tape.carries)
    left, _ = sweep(at.cell, at.params, at.tape, q_y, end)
    grads, q_x = learned(at, q_y, left)
    return grads, None, q_x
