"""Backpropagation through time: over whole calls (`bptt`), or a sliding horizon (`tbptt`)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import positive_integer
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import (
    Frame,
    Outcome,
    Recipe,
    Window,
    outcome_of,
    windowed_rule,
)
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, added
from localgrad.core.passes.backward import assign, input_credit, sweep, unowned_whole
from localgrad.core.passes.contraction import contract, pres
from localgrad.core.passes.forward import Tape
from localgrad.core.passes.run import Level, descend, run
from localgrad.core.steps import even_window, length, one_row


class History(NamedTuple):
    """The last h - 1 steps of a stream, kept so that later losses can still credit them.

    Attributes:
        carry: the model's carry before the oldest step kept.
        inputs: leaves [h - 1, B, ...].
        linked: [h, B] bool, whether credit passes to before each step kept, and to before the next
            one.
    """

    carry: Any
    inputs: Any
    linked: jax.Array


class BackpropState(NamedTuple):
    """State of `bptt` and `tbptt`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        history: what `tbptt` keeps of the past (streaming, horizon > 1), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    history: History | None = None

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
        _recipe("bptt", None),
        batch_size=batch_size,
        window=None,
        reduction=reduction,
        example=example,
    )


def tbptt(
    model: Any,
    loss: Loss,
    *,
    horizon: int,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Truncated backpropagation with a sliding horizon: each loss credits its last h steps.

    With `L_s` the loss of step s and `h` the horizon::

        update = sum_s sum_{t = s-h+1..s} dL_s/da_t (x) pre_t

    The call that sees loss s delivers all its credit, also to steps of earlier calls, so splitting
    a stream changes nothing but the rounding (with parameters that stay fixed).

    *Estimates* the gradient without every path longer than h steps: biased when such paths matter,
    equal to `bptt` once h reaches the sequence's length. `horizon=1` uses no past at all and is
    hard to beat for its price. *Costs* about `1 + h` backward passes of one step for each step (h
    rows of credit in one scan); memory grows with the window and h, not with T. A stream also keeps
    its last h - 1 inputs, and runs them again at each window.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        horizon: h, the time steps that each loss credits, its own among them.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and last inputs persist from
            call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is or joined to the
            carry, and by a stream with h > 1, which keeps inputs, if those are not of the
            parameters' dtype (int32 for symbols).

    Returns:
        A `LearningRule`; its state is a `BackpropState`.

    Raises:
        ValueError: if `horizon` is no positive integer, and as in `bptt`.

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
    horizon = positive_integer("horizon", horizon, "It is counted in time steps.")
    return windowed_rule(
        model,
        loss,
        _recipe("tbptt", horizon),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


def _recipe(name: str, horizon: int | None) -> Recipe:
    """Credit back to the call's start (horizon None), or over each loss's last `horizon` steps."""
    reach = (
        "exact, back to the start of the call"
        if horizon is None
        else f"exact over each loss's last {horizon} steps"
    )
    return Recipe(
        name=name,
        state=BackpropState,
        process=functools.partial(_process, horizon),
        credits=lambda stack, params: dict.fromkeys(params, reach),
        settings={} if horizon is None else {"horizon": horizon},
        remember=functools.partial(_no_history, horizon),
        default_window=functools.partial(_default_window, horizon),
    )


def _default_window(horizon: int | None, stack: Stack, params: Leaves, steps: int, _: bool) -> int:
    return steps if horizon is None else even_window(steps, max(64, 4 * horizon))


def _no_history(horizon: int | None, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    if horizon is None or horizon == 1:
        return {}
    inputs = jax.tree.map(lambda a: jnp.zeros((horizon - 1, *a.shape), a.dtype), x)
    carry = stack.pack(jax.tree.map(jnp.copy, stack.initial))
    return {"history": History(carry, inputs, jnp.zeros((horizon, length(x)), bool))}


def _process(horizon: int | None, frame: Frame, state: BackpropState, window: Window) -> tuple:
    """One window: its own losses, credited in it and in what is kept of the past."""
    past = None if frame.opening and frame.closing else state.history
    reset = window.reset if past is None else _following(past, window)
    seen = outcome_of(frame, state.carry, window, reset)
    if past is None:
        grads, q_x = _unroll_back(frame, seen.ran.tapes, seen.q_y, horizon)
        grads, past = grads | seen.ran.encode(q_x), state.history
    else:
        grads, past = _with_history(frame, past, seen, window.inputs, reset, horizon)
    carry = frame.stack.pack(seen.ran.carries)
    return state._replace(carry=carry, history=past), seen.grads | grads, seen.shown


def _with_history(
    frame: Frame, past: History, seen: Outcome, xs: Any, reset: Any, horizon: int | None
) -> tuple[Leaves, History]:
    """The gradients of a window that follows others, and the history after it."""
    _require_alike(past.inputs, xs)
    stack = frame.stack
    before = run(stack, frame.params, stack.unpack(past.carry), past.inputs, ~past.linked[:-1])
    tapes = [_joined(*pair) for pair in zip(before.tapes, seen.ran.tapes, strict=True)]
    steps = length(past.inputs)
    q_y = jax.tree.map(lambda q: _preceded(q, steps), seen.q_y)
    grads, q_x = _unroll_back(frame, tapes, q_y, horizon)
    old, new = jax.tree.map(lambda q: q[:steps], q_x), jax.tree.map(lambda q: q[steps:], q_x)
    grads |= added(before.encode(old), seen.ran.encode(new))
    return grads, _kept(stack, tapes, past, xs, reset)


def _unroll_back(
    frame: Frame, tapes: list[Tape], q_y: Any, horizon: int | None
) -> tuple[Leaves, Any]:
    """The cells' gradients, and the credit of the first cell's input.

    A loss at step s travels in row s mod K and expires on reaching step s - K, so K = `horizon`
    rows hold every loss that is still young enough.
    """
    steps, slots, rows = length(tapes[0].ys), None, 1
    if horizon is not None and 1 < horizon < steps:
        slots, rows = jnp.arange(steps) % horizon, horizon
    q_y = one_row(q_y) if slots is None else jax.tree.map(lambda q: _in_rows(q, slots, rows), q_y)
    visit = functools.partial(_visit, slots, rows, horizon == 1)
    grads, _, q_x = descend(frame.stack, frame.params, tapes, q_y, visit)
    return grads, jax.tree.map(lambda q: q.sum(1), q_x)


def _visit(slots: Any, rows: int, instantly: bool, at: Level, q_y: Any) -> tuple[Leaves, None, Any]:
    """One cell: its gradients, and the credit of its input."""
    cell, own, tape = at.cell, at.params, at.tape
    left = None
    if not instantly:
        end = jax.tree.map(lambda a: jnp.zeros((rows, *a.shape[1:]), a.dtype), tape.carries)
        left, _ = sweep(cell, own, tape, q_y, end, slots=slots, sum_rows=not at.below)
    if not at.below:
        q_y = jax.tree.map(lambda q: q.sum(1, keepdims=True), q_y)
    credit = assign(cell, own, tape, q_y, left)
    learned = contract(
        cell.sites, own, pres(cell, own, tape), [post.sum(1) for post in credit.posts]
    )
    learned |= unowned_whole(cell, own, tape, q_y, left)
    return learned, None, input_credit(cell, own, tape, credit) if at.below else q_y


def _in_rows(q: jax.Array, slots: jax.Array, rows: int) -> jax.Array:
    """[W, B, ...] -> [W, K, B, ...], each step's credit in its own row."""
    here = slots[:, None] == jnp.arange(rows)[None]
    return jnp.where(here.reshape(*here.shape, *(1,) * (q.ndim - 1)), q[:, None], 0)


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


def _kept(stack: Stack, tapes: list[Tape], past: History, xs: Any, reset: Any) -> History:
    """The last h - 1 of the steps that the tapes hold, of which xs [W, B, ...] are the new."""
    steps = length(xs)
    inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[steps:], past.inputs, xs)
    linked = jnp.concatenate([past.linked[:-1], ~reset, jnp.ones_like(reset[:1])])[steps:]
    oldest = [jax.tree.map(lambda a: a[steps], tape.carries) for tape in tapes]
    return History(stack.pack(oldest), inputs, linked)
