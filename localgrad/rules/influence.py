"""RTRL: the exact gradient, forward in time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from localgrad.core.contract.room import GIB, room_of
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Frame, Recipe, Window, outcome_of, windowed_rule
from localgrad.core.model.locality import require_real
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, added
from localgrad.core.passes.forward import WHOLE, Method
from localgrad.core.passes.influence import (
    carried,
    credit_rows,
    influence_bytes,
    longest_window,
    no_influence,
    reaching,
    recalled,
)


class InfluenceState(NamedTuple):
    """State of `rtrl`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        influence: for each cell, by parameter path, [B, N S, ...]: how the cell's carry, flattened,
            responds to the parameter (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    influence: Any = None

    outlives = ()


def rtrl(
    model: Any,
    loss: Loss,
    *,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    max_influence_bytes: int = 4 * GIB,
    example: Any = None,
) -> LearningRule:
    r"""Real-time recurrent learning: the exact gradient, forward in time.

    With `s_t` the model's whole carry, `J_t = ds_t/ds_{t-1}`, and `M_t = ds_t/dW` the influence::

        M_t = J_t M_{t-1} + I_t                            update = sum_t (dL_t/ds_t) M_t

    Within a window of W steps this is done in reverse (Schmidhuber): with `g` and `M_window` from W
    steps of backpropagation, `A` the window's Jacobian and `c_0` the credit of the carry that
    entered it, `g + c_0 M_0` is the same number, and the next influence is `A M_0 + M_window`.

    *Estimates* BPTT's gradient without bias or variance, however a stream is split (with parameters
    that stay fixed; while they learn, M mixes Jacobians of different parameters). *Costs*
    O(N^3 + N^4 / W) a step and example instead of O(N^4), and an influence of N S P numbers for
    each example. In a stack the influence is kept in blocks (carry of cell l) x (parameters of cell
    k <= l and of the encoder); the readout has none and gets its exact gradient.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and influence persist from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        max_influence_bytes: refuse to allocate more bytes than this for the influence.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is an `InfluenceState`.

    Raises:
        ValueError: if the influence would not fit, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.rtrl(model, optax.l2_loss, batch_size=4)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.influence["cells_0"][("cells_0", "hn", "kernel")].shape  # [B, N, N, N]
        (4, 8, 8, 8)

    Reference:
        Williams and Zipser, "A learning algorithm for continually running fully recurrent neural
        networks", Neural Computation, 1989, https://doi.org/10.1162/neco.1989.1.2.270;
        Schmidhuber, "A fixed size storage O(n^3) time complexity learning algorithm for fully
        recurrent continually running networks", Neural Computation, 1992,
        https://doi.org/10.1162/neco.1992.4.2.243
    """
    recipe = Recipe(
        name="rtrl",
        state=InfluenceState,
        process=functools.partial(process_influence, lambda frame, level: WHOLE),
        credits=_credits,
        settings={"max_influence_bytes": max_influence_bytes},
        remember=no_past,
        default_window=lambda stack, params, steps, alone: longest_window(stack, params, steps),
        screen=_screen,
        room=room_of(
            influence_bytes,
            max_influence_bytes,
            "rtrl's influence [B, N S, P]",
            "localgrad.snap or localgrad.eprop, whose memory is one number a parameter and example",
        ),
        advice="localgrad.snap and localgrad.eprop keep one number a parameter and stream",
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


def no_past(stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What a stream carries at its start: a zero influence."""
    return {"influence": no_influence(stack, params, x)}


def process_influence(
    method: Callable[[Frame, int], Method], frame: Frame, state: InfluenceState, window: Window
) -> tuple:
    """One window: its own credit, what the influence recalls, and the influence after it.

    Args:
        method: `(frame, level) -> how` credit passes the recurrent synapses of a cell.
        frame: as of a recipe's process.
        state: likewise.
        window: likewise.

    Returns:
        The state, the gradients, and the values [W, B].
    """
    stack = frame.stack
    seen = outcome_of(frame, state.carry, window, window.reset)
    methods = [method(frame, level) for level in stack.levels]
    grads, rows = credit_rows(stack, frame.params, seen.ran, seen.q_y, methods, frame.closing)
    grads |= seen.grads
    influence = state.influence
    if not frame.opening:
        grads = added(grads, recalled(stack, influence, rows.loss_credit()))
    if not frame.closing:
        influence = carried(stack, frame.params, influence, rows, window.inputs)
    carry = stack.pack(seen.ran.carries)
    return state._replace(carry=carry, influence=influence), grads, seen.values


def _screen(stack: Stack, params: Leaves) -> None:
    del params
    for level in stack.levels:
        require_real(stack.cells[level], stack.initial[level], stack.name(level), "rtrl")


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    remembered = {path for level in stack.levels for path in reaching(stack, params, level)}
    return {
        path: "exact, whole past (influence)" if path in remembered else "exact, no memory needed"
        for path in params
    }
