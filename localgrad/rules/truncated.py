"""Truncated backpropagation through time: each loss credits its last steps, no more (`tbptt`)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import positive_integer
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, added
from localgrad.core.passes.ages import Summed, grid_of, sweep_ages
from localgrad.core.passes.forward import Tape
from localgrad.core.passes.run import Level, descend, learned, run
from localgrad.core.steps import even_window, length, one_row
from localgrad.core.windows import Frame, Outcome, Window, outcome_of
from localgrad.rules.backprop import backpropagated


class History(NamedTuple):
    """The last h + k - 2 steps of a stream, kept so that later losses can still credit them.

    Attributes:
        carry: the model's carry before the oldest step kept.
        inputs: leaves [h + k - 2, B, ...].
        linked: [h + k - 1, B] bool, whether credit passes to before each step kept, and to before
            the next one.
        phase: how many steps of the next one's block have gone by, or None where k = 1.
    """

    carry: Any
    inputs: Any
    linked: Any
    phase: Any


class TruncatedState(NamedTuple):
    """State of `tbptt`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        history: what is kept of the past (streaming, unless h = k = 1), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    history: History | None = None

    outlives = ()
    streams = {"history": History(carry=0, inputs=1, linked=1, phase=0)}


def tbptt(
    model: Any,
    loss: Loss,
    *,
    horizon: int,
    stride: int = 1,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Truncated backpropagation: each loss credits its last h steps, or some more.

    With `L_s` the loss of step s, `h` the horizon and `k` the stride, losses go back in blocks of k
    steps, all of a block to h - 1 steps before its first step `b(s) = k floor(s / k)`::

        update = sum_s sum_{t = b(s)-h+1..s} dL_s/da_t (x) pre_t

    A loss thus credits h to h + k - 1 steps, its own among them: just h with `stride=1`. With
    `stride=k` an update every k steps is the truncated BPTT of Williams and Peng, who call k and
    h + k - 1 h' and h; with `horizon=1` stretches of k steps are unrolled, each by itself.

    The call that sees a loss delivers all its credit, also to steps of earlier calls, and blocks
    are counted from the stream's first step, so splitting a stream changes nothing but the rounding
    (with parameters that stay fixed). A reset ends all credit, and begins no new block.

    *Estimates* the gradient without some of the paths longer than h steps, and all of those longer
    than h + k - 1: biased when such paths matter, equal to `bptt` once h reaches the sequence's
    length. `horizon=1` uses no past at all and is hard to beat for its price. *Costs* a forward
    pass and about (h + k) / k backward passes, which go back together, all blocks of a window one
    step at a time; memory grows with the window, h and k, not with T. A stream also keeps its last
    h + k - 2 inputs, and runs them again at each window.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        horizon: h, the time steps that each loss credits at least, its own among them.
        stride: k, how many steps' losses go back together. Calls of whole blocks, such as an
            update every k steps (`localgrad.learn(..., chunk=k)`), cost least.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and last inputs persist from
            call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is or joined to the
            carry, and by a stream with h > 1 or k > 1, which keeps inputs, if those are not of the
            parameters' dtype (int32 for symbols).

    Returns:
        A `LearningRule`; its state is a `TruncatedState`.

    Raises:
        ValueError: if `horizon` or `stride` is no positive integer, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.tbptt(model, optax.l2_loss, horizon=3)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.loss.shape, updates["readout"]["bias"].shape
        ((), (2,))

    Reference:
        Williams and Peng, "An efficient gradient-based algorithm for on-line training of recurrent
        network trajectories", Neural Computation, 1990, https://doi.org/10.1162/neco.1990.2.4.490
    """
    counted = "It is counted in time steps."
    horizon = positive_integer("horizon", horizon, counted)
    reach = Reach(horizon, positive_integer("stride", stride, counted))
    return windowed_rule(
        model,
        loss,
        _recipe(reach),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


class Reach(NamedTuple):
    """How far losses are credited: h steps at least, k steps' losses together."""

    horizon: int
    stride: int

    @property
    def kept(self) -> int:
        """How many steps before a window its losses may credit."""
        return self.horizon + self.stride - 2


def _recipe(reach: Reach) -> Recipe:
    most = "" if reach.stride == 1 else f" to {reach.kept + 1}"
    credit = f"exact over each loss's last {reach.horizon}{most} steps"
    return Recipe(
        name="tbptt",
        state=TruncatedState,
        process=functools.partial(_process, reach),
        credits=lambda stack, params: dict.fromkeys(params, credit),
        by_window=True,
        settings=reach._asdict(),
        remember=functools.partial(_no_history, reach),
        default_window=functools.partial(_default_window, reach),
    )


def _default_window(reach: Reach, stack: Stack, params: Leaves, steps: int, _: bool) -> int:
    return even_window(steps, max(128, 4 * (reach.kept + 1)))


def _no_history(reach: Reach, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    if not reach.kept:
        return {}
    inputs = jax.tree.map(lambda a: jnp.zeros((reach.kept, *a.shape), a.dtype), x)
    carry = stack.pack(jax.tree.map(jnp.copy, stack.initial))
    linked = jnp.zeros((reach.kept + 1, length(x)), bool)
    phase = None if reach.stride == 1 else jnp.zeros((), jnp.int32)
    return {"history": History(carry, inputs, linked, phase)}


def _process(reach: Reach, frame: Frame, state: TruncatedState, window: Window) -> tuple:
    """One window: its own losses, credited in it and in what is kept of the past."""
    past = None if frame.opening and frame.closing else state.history
    reset = window.reset if past is None else _following(past, window)
    seen = outcome_of(frame, state.carry, window, reset)
    if past is None:
        back = functools.partial(_unroll_back, reach, None, 0)
        if reach.horizon >= length(window.inputs):
            back = backpropagated
        grads, q_x = back(frame, seen.ran.tapes, seen.q_y)
        grads, past = grads | seen.ran.encode(q_x), state.history
    else:
        grads, past = _with_history(reach, frame, past, seen, window.inputs, reset)
    carry = frame.stack.pack(seen.ran.carries)
    return state._replace(carry=carry, history=past), seen.grads | grads, seen.shown


def _with_history(
    reach: Reach, frame: Frame, past: History, seen: Outcome, xs: Any, reset: Any
) -> tuple[Leaves, History]:
    """The gradients of a window that follows others, and the history after it."""
    _require_alike(past.inputs, xs)
    stack, steps = frame.stack, reach.kept
    before = run(stack, frame.params, stack.unpack(past.carry), past.inputs, ~past.linked[:-1])
    tapes = [_joined(*pair) for pair in zip(before.tapes, seen.ran.tapes, strict=True)]
    q_y = jax.tree.map(lambda q: _preceded(q, steps), seen.q_y)
    grads, q_x = _unroll_back(reach, past.phase, steps, frame, tapes, q_y)
    old, new = jax.tree.map(lambda q: q[:steps], q_x), jax.tree.map(lambda q: q[steps:], q_x)
    grads |= added(before.encode(old), seen.ran.encode(new))
    return grads, _kept(reach, stack, tapes, past, xs, reset)


def _unroll_back(
    reach: Reach, phase: Any, first: int, frame: Frame, tapes: list[Tape], q_y: Any
) -> tuple[Leaves, Any]:
    """The cells' gradients, and the credit of the first cell's input."""
    if not reach.kept:
        grads, _, q_x = descend(frame.stack, frame.params, tapes, one_row(q_y), _instantly)
        return grads, jax.tree.map(lambda q: q.sum(1), q_x)
    steps = length(tapes[0].ys)

    def sweep(phase: Any) -> Summed:
        grid = grid_of(steps, first, reach.horizon, reach.stride, phase)
        return sweep_ages(frame.stack, frame.params, tapes, q_y, reach.horizon, grid)

    if phase is None or (steps - first) % reach.stride:
        summed = sweep(phase)
    else:  # most often whole blocks, one fewer than may be touched
        summed = jax.lax.cond(phase == 0, lambda: sweep(None), lambda: sweep(phase))
    grads, _, q_x = descend(
        frame.stack, frame.params, tapes, None, functools.partial(_visit, summed)
    )
    return grads, q_x


def _visit(summed: Summed, at: Level, _: Any) -> tuple[Leaves, None, Any]:
    """One cell: its gradients, and the credit of its input."""
    left, q_y = one_row((summed.left[at.number], summed.q_ys[at.number]))
    grads, q_x = learned(at, q_y, left)
    return grads, None, jax.tree.map(lambda q: q.sum(1), q_x)


def _instantly(at: Level, q_y: Any) -> tuple[Leaves, None, Any]:
    """One cell, where each step's loss credits that step alone."""
    grads, q_x = learned(at, q_y, None)
    return grads, None, q_x


def _following(past: History, window: Window) -> jax.Array:
    """The window's resets, with the one that the past holds ready for its first step."""
    reset = window.reset
    if reset is None:
        reset = jnp.zeros((length(window.inputs), past.linked.shape[1]), bool)
    return reset.at[0].set(reset[0] | ~past.linked[-1])


def _require_alike(kept: Any, new: Any) -> None:
    """Raises if the inputs are not what `example` said they would be."""
    old, now = ([(a.shape[2:], a.dtype.name) for a in jax.tree.leaves(t)] for t in (kept, new))
    if old != now or jax.tree.structure(kept) != jax.tree.structure(new):
        raise ValueError(
            f"batch.inputs are, for one step and example, {now}, but tbptt keeps inputs of {old} "
            "(shape, dtype), as its example says, or else the parameters. Give it "
            "example=jax.tree.map(lambda a: a[0, 0], batch.inputs)."
        )


def _joined(a: Tape, b: Tape) -> Tape:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _preceded(q: jax.Array, steps: int) -> jax.Array:
    return jnp.concatenate([jnp.zeros((steps, *q.shape[1:]), q.dtype), q])


def _kept(
    reach: Reach, stack: Stack, tapes: list[Tape], past: History, xs: Any, reset: Any
) -> History:
    """The last of the steps that the tapes hold, of which xs [W, B, ...] are the new."""
    steps = length(xs)
    inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[steps:], past.inputs, xs)
    linked = jnp.concatenate([past.linked[:-1], ~reset, jnp.ones_like(reset[:1])])[steps:]
    oldest = [jax.tree.map(lambda a: a[steps], tape.carries) for tape in tapes]
    phase = None if past.phase is None else (past.phase + steps) % reach.stride
    return History(stack.pack(oldest), inputs, linked, phase)
