"""RTRL: the exact gradient, forward in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from localgrad.core.contract.room import GIB, held_bytes, room_of
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.locality import require_real
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, added, placed, under
from localgrad.core.passes.depth import (
    Held,
    deep_rows,
    nothing_held,
    remembered,
    window_of,
)
from localgrad.core.passes.eligibility import units_never_meet
from localgrad.core.passes.forward import CUT, WHOLE, Method
from localgrad.core.passes.influence import (
    carried,
    credit_rows,
    longest_window,
    no_influence,
    recalled,
)
from localgrad.core.steps import length
from localgrad.core.windows import Frame, Window, outcome_of


class InfluenceState(NamedTuple):
    """State of `rtrl`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        influence: for each cell, by parameter path, [B, N S, ...]: how the cell's carry, flattened,
            responds to the parameter (streaming), or None. Where no unit of the model feels
            another's past, S counts the arrays of the carry that matter to the future, and of the
            cell's own parameters only how their own unit responds is kept, [B, S, ...].
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

    Where no cell has a recurrent layer and no unit of a cell feels another's past (`LRUCell`,
    `RTUCell`, `ElementwiseLSTMCell`, `LeakyCell`, a minGRU), which is read off the cells and tried,
    a parameter reaches its own unit only: the same numbers then cost O(S^2 P) a step, and S numbers
    for each parameter and example, as `eprop` does: 0.9 to 1.8 times BPTT's time from N = 32 to
    512, most in short calls. In a stack of such cells that is so of each cell's own parameters; the
    blocks below stay N S P. One cell with a recurrent layer, and the whole stack is treated as
    dense.

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
        process=_process,
        credits=_credits,
        settings={"max_influence_bytes": max_influence_bytes},
        remember=lambda stack, params, x: {"influence": _nothing(stack, params, length(x))},
        default_window=_default_window,
        screen=_screen,
        room=room_of(
            lambda stack, params, batch: held_bytes(lambda: _nothing(stack, params, batch)),
            max_influence_bytes,
            "rtrl's influence",
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


def _nothing(stack: Stack, params: Leaves, batch: int) -> dict[str, Leaves]:
    """The influence of B sequences at their start, by cell and parameter path."""
    if units_never_meet(stack, params):
        return _by_cell(stack, nothing_held(stack, params, CUT, batch))
    return no_influence(stack, params, batch)


def _by_cell(stack: Stack, held: Held) -> dict[str, Leaves]:
    """What is held of a cell's own parameters, and of those below it, side by side."""
    return {
        stack.name(level): placed(under(held.eligibility, prefix), prefix)
        | held.influence[stack.name(level)]
        for level, prefix in enumerate(stack.prefixes)
    }


def _as_held(stack: Stack, influence: dict[str, Leaves]) -> Held:
    """The inverse of `_by_cell`."""
    own: Leaves = {}
    below: dict[str, Leaves] = {}
    for level, prefix in enumerate(stack.prefixes):
        name = stack.name(level)
        mine = placed(under(influence[name], prefix), prefix)
        own |= mine
        below[name] = {path: v for path, v in influence[name].items() if path not in mine}
    return Held(own, below)


def _default_window(stack: Stack, params: Leaves, steps: int, alone: bool) -> int:
    if units_never_meet(stack, params):
        return window_of(CUT, stack, params, steps, alone)
    return longest_window(stack, params, steps)


def _process(frame: Frame, state: InfluenceState, window: Window) -> tuple:
    if units_never_meet(frame.stack, frame.params):
        return _process_apart(frame, state, window)
    return process_influence(lambda frame, level: WHOLE, frame, state, window)


def _process_apart(frame: Frame, state: InfluenceState, window: Window) -> tuple:
    """One window of a model whose units never meet: what `deep_eprop` cuts is not there."""
    stack, params = frame.stack, frame.params
    seen = outcome_of(frame, state.carry, window, window.reset)
    methods = [Method(CUT, {}) for _ in stack.levels]
    grads, rows = deep_rows(stack, params, seen.ran, seen.q_y, methods, frame.closing)
    grads |= seen.grads
    influence = state.influence
    if not (frame.opening and frame.closing):
        found, held = remembered(
            stack,
            params,
            _as_held(stack, influence),
            rows,
            window.inputs,
            frame.opening,
            frame.closing,
        )
        grads, influence = added(grads, found), _by_cell(stack, held)
    carry = stack.pack(seen.ran.carries)
    return state._replace(carry=carry, influence=influence), grads, seen.shown


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
        The state, the gradients, and what the window showed.
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
        influence = carried(stack, frame.params, influence, rows, window.inputs, grads)
    carry = stack.pack(seen.ran.carries)
    return state._replace(carry=carry, influence=influence), grads, seen.shown


def _screen(stack: Stack, params: Leaves) -> None:
    del params
    for level in stack.levels:
        require_real(stack.cells[level], stack.initial[level], stack.name(level), "rtrl")


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    kept = jax.eval_shape(lambda: _nothing(stack, params, 1))
    remembered = {path for blocks in kept.values() for path in blocks}
    return {
        path: "exact, whole past (influence)" if path in remembered else "exact, no memory needed"
        for path in params
    }
