"""Backpropagation through time: over whole calls (`bptt`), or a sliding horizon (`tbptt`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contraction import contract, pres
from localgrad.core.credit import assign, input_credit, sweep
from localgrad.core.forward import Tape
from localgrad.core.params import Leaves, added, placed, under
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
from localgrad.core.steps import length, one_row


class History(NamedTuple):
    """The last h - 1 steps of a stream, kept so that later losses can still credit them.

    Attributes:
        carry: the model's carry before the oldest step kept.
        inputs: leaves [h - 1, B, ...].
        reset: [h, B] bool, whether credit is cut before each step kept and before the next one.
    """

    carry: Any
    inputs: Any
    reset: jax.Array


class BackpropState(NamedTuple):
    """State of `bptt` and `tbptt`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        start: the model's initial carry (streaming), or None.
        history: what `tbptt` keeps of the past (streaming, horizon > 1), or None.
    """

    loss: jax.Array
    carry: Any = None
    start: Any = None
    history: History | None = None

    def fresh(self) -> BackpropState:
        """The state at the start of new sequences."""
        past = self.history
        if past is not None:
            blank = jax.tree.map(jnp.zeros_like, past.inputs)
            past = past._replace(inputs=blank, reset=jnp.ones_like(past.reset))
        return self._replace(carry=self.start, history=past)


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
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`), needed
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
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`), needed
            by a stream with h > 1, which keeps inputs.

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
    if isinstance(horizon, bool) or not isinstance(horizon, (int, np.integer)) or horizon < 1:
        raise ValueError(f"horizon must be a positive integer, in time steps; got {horizon!r}.")
    horizon = int(horizon)
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

    def begin(stack: Stack, params: Leaves, x: Any) -> BackpropState:
        del params
        carry = stack.pack(stack.initial)
        past = None
        if horizon is not None and horizon > 1:
            inputs = jax.tree.map(lambda a: jnp.zeros((horizon - 1, *a.shape), a.dtype), x)
            past = History(carry, inputs, jnp.ones((horizon, length(x)), bool))
        return BackpropState(jnp.zeros(()), carry, jax.tree.map(jnp.copy, carry), past)

    def process(frame: Frame, state: BackpropState, window: Window) -> tuple:
        stack, params = frame.stack, frame.params
        past = None if frame.opening and frame.closing else state.history
        reset = window.reset if past is None else _following(past, window)
        ran = run(stack, params, stack.unpack(state.carry), window.inputs, reset)
        loss, q_out = frame.objective.credit(ran.outputs, window.targets, window.weight)
        grads, q_y = ran.read(q_out)
        if past is None:
            found, q_x = _unroll_back(stack, params, ran.tapes, q_y, horizon)
            return (
                state._replace(carry=stack.pack(ran.carries)),
                grads | found | ran.encode(q_x),
                loss,
            )
        _check_like(past.inputs, window.inputs)
        before = run(stack, params, stack.unpack(past.carry), past.inputs, past.reset[:-1])
        tapes = [_joined(*pair) for pair in zip(before.tapes, ran.tapes, strict=True)]
        steps = length(past.reset) - 1
        q_y = jax.tree.map(lambda q: _preceded(q, steps), q_y)
        found, q_x = _unroll_back(stack, params, tapes, q_y, horizon)
        old, new = (
            jax.tree.map(lambda q, at=at: q[at], q_x) for at in (slice(steps), slice(steps, None))
        )
        grads |= found | added(before.encode(old), ran.encode(new))
        history = _kept(stack, tapes, past, window.inputs, reset)
        return state._replace(carry=stack.pack(ran.carries), history=history), grads, loss

    reach = (
        "exact, back to the start of the call"
        if horizon is None
        else f"exact over each loss's last {horizon} steps"
    )
    return Recipe(
        name=name,
        begin=begin,
        process=process,
        idle=BackpropState(jnp.zeros(())),
        default_window=lambda stack, params, steps: (
            steps if horizon is None else even_window(steps, max(64, 4 * horizon))
        ),
        credits=lambda stack, params: dict.fromkeys(params, reach),
        needs_example=horizon is not None and horizon > 1,
    )


def _unroll_back(
    stack: Stack, params: Leaves, tapes: list[Tape], q_y: Any, horizon: int | None
) -> tuple[Leaves, Any]:
    """The cells' gradients, and the credit of the first cell's input.

    A loss at step s travels in row s mod K and expires on reaching step s - K, so K = `horizon`
    rows hold every loss that is still young enough.
    """
    steps = length(tapes[0].ys)
    instantly = horizon == 1
    slots, rows = None, 1
    if horizon is not None and not instantly and horizon < steps:
        slots, rows = jnp.arange(steps) % horizon, horizon
    grads: Leaves = {}
    q_y = one_row(q_y) if slots is None else jax.tree.map(lambda q: _in_rows(q, slots, rows), q_y)
    for level in reversed(stack.levels):
        cell, prefix, tape = stack.cells[level], stack.prefixes[level], tapes[level]
        own = under(params, prefix)
        below = level > 0 or stack.encoder is not None
        left = None
        if not instantly:
            at_end = jax.tree.map(lambda a: jnp.zeros((rows, *a.shape[1:]), a.dtype), tape.carries)
            left, _ = sweep(cell, own, tape, q_y, at_end, slots=slots, sum_rows=not below)
        if not below:
            q_y = jax.tree.map(lambda q: q.sum(1, keepdims=True), q_y)
        credit = assign(cell, own, tape, q_y, left)
        learned = [post.sum(1) for post in credit.posts]
        found = contract(cell, own, pres(cell, own, tape), learned) | credit.others
        grads |= placed(found, prefix)
        if below:
            q_y = input_credit(cell, own, tape, credit)
    return grads, jax.tree.map(lambda q: q.sum(1), q_y)


def _in_rows(q: jax.Array, slots: jax.Array, rows: int) -> jax.Array:
    """[W, B, ...] -> [W, K, B, ...], each step's credit in its own row."""
    here = slots[:, None] == jnp.arange(rows)[None]
    return jnp.where(here.reshape(*here.shape, *(1,) * (q.ndim - 1)), q[:, None], 0)


def _following(past: History, window: Window) -> jax.Array:
    """The window's resets, with the one that the past holds ready for its first step."""
    reset = window.reset
    if reset is None:
        reset = jnp.zeros((length(window.inputs), past.reset.shape[1]), bool)
    return reset.at[0].set(reset[0] | past.reset[-1])


def _check_like(kept: Any, new: Any) -> None:
    """Raises if the inputs are not what `example` said they would be."""
    old, now = ([(a.shape[2:], a.dtype.name) for a in jax.tree.leaves(t)] for t in (kept, new))
    if old != now or jax.tree.structure(kept) != jax.tree.structure(new):
        raise ValueError(
            f"batch.inputs are, for one step and example, {now}, but tbptt was made with an "
            f"example of {old} (shape, dtype). Give it example=batch.inputs[0, 0]."
        )


def _joined(a: Tape, b: Tape) -> Tape:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _preceded(q: jax.Array, steps: int) -> jax.Array:
    return jnp.concatenate([jnp.zeros((steps, *q.shape[1:]), q.dtype), q])


def _kept(stack: Stack, tapes: list[Tape], past: History, xs: Any, reset: Any) -> History:
    """The last h - 1 of the steps that the tapes hold, of which xs [W, B, ...] are the new."""
    steps = length(xs)
    inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[steps:], past.inputs, xs)
    flags = jnp.concatenate([past.reset[:-1], reset, jnp.zeros_like(reset[:1])])[steps:]
    oldest = [jax.tree.map(lambda a: a[steps], tape.carries) for tape in tapes]
    return History(stack.pack(oldest), inputs, flags)
