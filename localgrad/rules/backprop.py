"""Backpropagation through time: over whole calls (`bptt`), or a sliding horizon (`tbptt`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves, added, placed, under
from localgrad.core.passes import (
    Tape,
    assign,
    contract,
    input_credit,
    length,
    one_row,
    pres,
    sweep,
)
from localgrad.core.rule import Frame, LearningRule, Loss, Recipe, Window, even_window, windowed_rule
from localgrad.core.stack import Stack, run


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
            past = past._replace(reset=jnp.ones_like(past.reset))
        return self._replace(carry=self.start, history=past)


def bptt(
    model: Any,
    loss: Loss,
    *,
    batch_size: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    """BPTT."""
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
    """TBPTT."""
    if not isinstance(horizon, int) or horizon < 1:
        raise ValueError(f"horizon must be a positive integer, in time steps; got {horizon!r}.")
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
        return BackpropState(jnp.zeros(()), carry, carry, past)

    def process(frame: Frame, state: BackpropState, window: Window) -> tuple:
        stack, params = frame.stack, frame.params
        past = None if frame.opening else state.history
        reset = window.reset if past is None else _following(past, window)
        ran = run(stack, params, stack.unpack(state.carry), window.inputs, reset)
        loss, q_out = frame.objective.credit(ran.outputs, window.targets, window.weight)
        grads, q_y = ran.read(q_out)
        tapes, encoders = ran.tapes, [ran.encode]
        if past is not None:
            before = run(stack, params, stack.unpack(past.carry), past.inputs, past.reset[:-1])
            tapes = [_joined(*pair) for pair in zip(before.tapes, ran.tapes, strict=True)]
            encoders = [before.encode, ran.encode]
            q_y = jax.tree.map(lambda q: _preceded(q, horizon - 1), q_y)
        found, q_x = _unroll_back(stack, params, tapes, q_y, horizon)
        grads |= found
        if stack.encoder is not None:
            at = 0 if past is None else horizon - 1
            pieces = [jax.tree.map(lambda q: q[at:], q_x)]
            if past is not None:
                pieces.insert(0, jax.tree.map(lambda q: q[:at], q_x))
            for encode, piece in zip(encoders, pieces, strict=True):
                grads = added(grads, encode(piece))
        kept = state.history if past is None else _kept(stack, tapes, past, window, reset)
        return state._replace(carry=stack.pack(ran.carries), history=kept), grads, loss

    return Recipe(
        name=name,
        begin=begin,
        process=process,
        idle=BackpropState(jnp.zeros(())),
        default_window=lambda stack, params, steps: (
            steps if horizon is None else even_window(steps, max(64, 4 * horizon))
        ),
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
    slots = None
    if horizon is not None and not instantly and horizon < steps:
        slots = jnp.arange(steps) % horizon
    rows = 1 if slots is None else horizon
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


def _joined(a: Tape, b: Tape) -> Tape:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _preceded(q: jax.Array, steps: int) -> jax.Array:
    return jnp.concatenate([jnp.zeros((steps, *q.shape[1:]), q.dtype), q])


def _kept(
    stack: Stack, tapes: list[Tape], past: History, window: Window, reset: jax.Array
) -> History:
    """The last h - 1 of the steps that the tapes hold."""
    steps = length(window.inputs)
    inputs = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b])[steps:], past.inputs, window.inputs
    )
    flags = jnp.concatenate([past.reset[:-1], reset, jnp.zeros_like(reset[:1])])[steps:]
    oldest = [jax.tree.map(lambda a: a[steps], tape.carries) for tape in tapes]
    return History(stack.pack(oldest), inputs, flags)
