"""Node perturbation without a clean copy: one noisy network, and the loss that it is used to.

Letters: B batch, W steps of a window, D width of a node.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.noise import beginning, require_key, step_keys
from localgrad.core.contract.objective import Shown
from localgrad.core.frame import Recipe
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, added
from localgrad.core.passes import disturb
from localgrad.core.passes.correlation import carried, correlated, paid_for, recalled
from localgrad.core.passes.heard import Nudges, Part, hear
from localgrad.core.passes.reward import later
from localgrad.core.steps import length
from localgrad.core.windows import Frame, Window, even_windows
from localgrad.rules.perturbation.copies import Options
from localgrad.rules.perturbation.reached import (
    blank_eligibility,
    credits_of,
    require_heard,
    require_reached,
)

SHARE = 0.1
"""How much the last call's loss counts in the running mean, once there were 1 / SHARE calls."""


class LoneState(NamedTuple):
    """State of `node_perturbation` with `baseline="running_mean"`.

    Attributes:
        loss: mean loss of the last call, with noise.
        carry: the model's carry with noise (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        eligibility: by parameter path [1, B, ...], the noise of the sequence so far times what the
            synapse received (streaming).
        usual: the running mean of the losses of all calls but the last; of those in which some
            step weighed anything.
        calls: how many there were.
        due: whether the last call was one of them.
        counting: whether this call is, as far as it went.
        key: what noise is drawn from.
        clock: how many steps have been seen.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    eligibility: Any = None
    usual: Any = None
    calls: Any = None
    due: Any = None
    counting: Any = None
    key: Any = None
    clock: Any = None

    outlives = ("usual", "calls", "due", "key", "clock")
    streams = {"eligibility": 1}


def recipe_of(options: Options, told: dict[str, Any]) -> Recipe:
    """The recipe of the rule; raises for a key that is none."""
    require_key(options.key)
    signal = "noise paid by losses less their running mean"
    return Recipe(
        name=options.rule,
        state=LoneState,
        process=functools.partial(_process, options),
        credits=functools.partial(credits_of, signal, options.credit, False),
        settings=told,
        remember=functools.partial(_nothing_yet, options),
        draw=functools.partial(_begun, options),
        default_window=even_windows,
        finish=_finished,
        screen=lambda stack, params: require_reached(options.rule, False, stack),
        by_synapse=True,
        lone='with baseline="running_mean" the network itself is noisy. Use baseline="clean".',
    )


def _process(options: Options, frame: Frame, state: LoneState, window: Window) -> tuple:
    """One window of the noisy network."""
    stack, params = frame.stack, frame.params
    carries, steps = stack.unpack(state.carry), length(window.inputs)
    scale: Any = options.noise.scale

    def run(nudges: Nudges | None) -> Any:
        return hear(stack, params, carries, window.inputs, window.reset, nudges)

    parts = _abstract(run)
    for part in parts:
        require_heard(options.rule, stack, part, params)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(
        step_keys(state.key, state.clock, steps)
    )
    noise = disturb.noise_for(options.noise.kind, keys[:, None], parts)
    heard = run(disturb.nudges_of(parts, [[z[:, 0] for z in zs] for zs in noise], scale))
    values = frame.objective.values(heard.outputs, window.targets, window.weight)
    usual = _usual(state).astype(values.dtype)
    surprise = values - (usual if window.weight is None else usual * window.weight)
    gaps = surprise[:, None] / scale  # [W, 1, B]
    paid = gaps if options.credit == "step" else later(gaps, window.reset)
    grads: Leaves = {}
    for part, zs in zip(heard.parts, noise, strict=True):
        grads |= _scaled(frame, correlated(part, params, paid_for(part, zs, gaps, paid)))
    eligibility = state.eligibility
    if options.credit == "causal":
        if not frame.opening:
            grads = added(grads, _scaled(frame, recalled(gaps, window.reset, eligibility)))
        if not frame.closing:
            eligibility = carried(heard.parts, params, window.reset, noise, eligibility)
    state = state._replace(
        carry=stack.pack(heard.carries),
        eligibility=eligibility,
        counting=state.counting | (True if window.weight is None else (window.weight != 0).any()),
        clock=state.clock + steps,
    )
    return state, grads, Shown(values, heard.outputs)


def _abstract(run: Any) -> list[Part]:
    """The parts of a model with the shapes of their drives, without running it."""
    parts: list[Part] = []

    def drives() -> list[list[jax.Array]]:
        parts.extend(run(None).parts)
        return [part.drives for part in parts]

    shapes = jax.eval_shape(drives)
    return [p._replace(drives=own, received=[]) for p, own in zip(parts, shapes, strict=True)]


def _scaled(frame: Frame, grads: Leaves) -> Leaves:
    return {p: g * frame.objective.scale.astype(g.dtype) for p, g in grads.items()}


def _usual(state: LoneState) -> jax.Array:
    """The running mean of the losses of all calls before this one; 0 before the first."""
    share = jnp.maximum(1 / (state.calls + 1), SHARE)
    mean = state.usual + share * (state.loss - state.usual)
    return jnp.where(_counts(state), mean, state.usual)


def _counts(state: LoneState) -> jax.Array:
    """Whether the last call's loss enters the mean."""
    return state.due & jnp.isfinite(state.loss)


def _finished(state: LoneState) -> LoneState:
    """At the end of a call, whose own loss is not there yet."""
    return state._replace(
        usual=_usual(state).astype(state.usual.dtype),
        calls=state.calls + _counts(state).astype(state.calls.dtype),
        due=state.counting,
        counting=jnp.zeros_like(state.counting),
    )


def _begun(options: Options, params: Leaves) -> dict[str, Any]:
    """What outlives sequences, at first."""
    del params
    mean = {"usual": jnp.zeros(()), "calls": jnp.zeros((), jnp.uint32)}
    return mean | {"due": jnp.zeros((), bool)} | beginning(options.key)


def _nothing_yet(options: Options, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What is remembered at the start of B sequences."""
    causal = options.credit == "causal"
    return {
        "eligibility": blank_eligibility(stack, params, 1, length(x)) if causal else {},
        "counting": jnp.zeros((), bool),
    }
