"""Noisy copies of a model, and what their losses say of its synapses.

What node and activity perturbation share. Letters: B batch, W steps of a window, K samples, S signs
of the noise, D width of a node.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.noise import beginning, require_key, step_keys
from localgrad.core.contract.objective import Shown
from localgrad.core.examples import over_samples
from localgrad.core.frame import Recipe
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, added, placed, under
from localgrad.core.passes import disturb
from localgrad.core.passes.correlation import carried, correlated, paid_for, recalled
from localgrad.core.passes.disturb import Noise
from localgrad.core.passes.heard import Heard, hear
from localgrad.core.passes.reward import earlier, later
from localgrad.core.steps import length
from localgrad.core.windows import Frame, Window, even_windows
from localgrad.rules.perturbation.norms import normalised
from localgrad.rules.perturbation.reached import (
    blank_eligibility,
    credits_of,
    require_heard,
    require_reached,
)


class NodeState(NamedTuple):
    """State of `node_perturbation` and `activity_perturbation`.

    Attributes:
        loss: mean loss of the last call, without noise.
        carry: the model's carry without noise (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        deviation: how far each noisy copy's carry is from it, leaves [K, S, B, ...] (streaming),
            or None where copies begin each step from it.
        eligibility: by parameter path [K, B, ...], the noise (or activity) of the sequence so far
            times what the synapse received (streaming).
        returned: [K, B], the loss differences of the sequence so far (`credit="total"`), or None.
        key: what noise is drawn from.
        clock: how many steps have been seen.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    deviation: Any = None
    eligibility: Any = None
    returned: Any = None
    key: Any = None
    clock: Any = None

    outlives = ("key", "clock")
    streams = {"deviation": 2, "eligibility": 1, "returned": 1}


class Options(NamedTuple):
    """What the two rules differ in, and what they were told.

    Attributes:
        rule: its name.
        noise: how the model is disturbed.
        samples: K.
        at_once: how many of them at a time, or None for all.
        credit: which losses a disturbance is held to account for.
        norm: how activity is normalised; None for the noise itself.
        exact_readout: whether the readout gets its gradient, and no noise.
        key: to begin with.
    """

    rule: str
    noise: Noise
    samples: int
    at_once: int | None
    credit: str
    norm: str | None
    exact_readout: bool
    key: jax.Array


def recipe_of(options: Options, told: dict[str, Any]) -> Recipe:
    """The recipe of a rule; raises for options that do not fit."""
    require_key(options.key)
    what = "noise" if options.norm is None else f"activity, norm={options.norm!r},"
    signal = f"{what} paid by loss differences"
    return Recipe(
        name=options.rule,
        state=NodeState,
        process=functools.partial(_process, options),
        credits=functools.partial(credits_of, signal, options.credit, options.exact_readout),
        settings=told,
        remember=functools.partial(_nothing_yet, options),
        draw=lambda params: beginning(options.key),
        default_window=even_windows,
        screen=lambda stack, params: require_reached(options.rule, options.exact_readout, stack),
        by_synapse=True,
    )


def _process(options: Options, frame: Frame, state: NodeState, window: Window) -> tuple:
    """One window: the clean copy, then some noisy ones at a time."""
    stack, params = frame.stack, frame.params
    carries = stack.unpack(state.carry)
    clean = hear(stack, params, carries, window.inputs, window.reset)
    values = frame.objective.values(clean.outputs, window.targets, window.weight)
    parts = tuple(p for p in clean.parts if not (options.exact_readout and p.label == "readout"))
    for part in parts:
        require_heard(options.rule, stack, part, params)
    scored = disturb.Scored(frame.objective, window.targets, window.weight, values)
    at = disturb.Window(stack, params, carries, window.inputs, window.reset, clean, scored, parts)
    keys = step_keys(state.key, state.clock, length(window.inputs))
    learn = functools.partial(_some_samples, options, frame, at, keys)
    memory = (state.deviation, state.eligibility, state.returned)
    (posts, due), (deviation, eligibility, returned) = over_samples(
        learn, (jnp.arange(options.samples), *memory), options.at_once
    )
    grads = _exact(frame, window, clean) if options.exact_readout else {}
    for part, post in zip(parts, posts, strict=True):
        grads |= _scaled(options, frame, correlated(part, params, post))
    grads = added(grads, _scaled(options, frame, due))
    state = state._replace(
        carry=stack.pack(clean.carries),
        deviation=deviation,
        eligibility=eligibility,
        returned=returned,
        clock=state.clock + length(window.inputs),
    )
    return state, grads, Shown(values, clean.outputs)


def _scaled(options: Options, frame: Frame, grads: Leaves) -> Leaves:
    scale = frame.objective.scale / options.samples
    return {path: grad * scale.astype(grad.dtype) for path, grad in grads.items()}


def _some_samples(
    options: Options,
    frame: Frame,
    at: disturb.Window,
    keys: jax.Array,
    given: tuple,
) -> tuple[Any, Any]:
    """What some samples say, summed over them, and what they remember."""
    numbers, deviation, eligibility, returned = given
    own_keys = jax.vmap(lambda key: jax.vmap(lambda k: jax.random.fold_in(key, k))(numbers))(keys)
    noise = disturb.noise_for(options.noise.kind, own_keys, at.disturbed)
    ran = disturb.disturb(options.noise, at, deviation, noise)
    gaps = ran.gaps
    signals = noise if options.norm is None else normalised(options.norm, at.inputs, ran.activity)
    paid, returned = _paid(options.credit, gaps, returned, at.reset)
    posts = [paid_for(part, zs, gaps, paid) for part, zs in zip(at.disturbed, signals, strict=True)]
    if options.credit == "step":
        return (posts, {}), (ran.deviation, {}, returned)
    due = {} if frame.opening else recalled(gaps, at.reset, eligibility)
    if not frame.closing:
        eligibility = carried(at.disturbed, at.params, at.reset, signals, eligibility)
    return (posts, due), (ran.deviation, eligibility, returned)


def _paid(
    credit: str, gaps: jax.Array, returned: Any, reset: jax.Array | None
) -> tuple[jax.Array, Any]:
    """What the noise of each step is paid by, [W, K, B], and the sum of its sequence's gaps."""
    if credit == "step":
        return gaps, returned
    after = later(gaps, reset)
    if credit == "causal":
        return after, returned
    before = earlier(gaps, returned.astype(gaps.dtype), reset)
    return after + before - gaps, before[-1].astype(returned.dtype)


def _exact(frame: Frame, window: Window, clean: Heard) -> Leaves:
    """The readout's gradient."""
    readout: Any = frame.stack.readout
    _, q = frame.objective.credit(clean.outputs, window.targets, window.weight)
    own = under(frame.params, ("readout",))
    (found,) = jax.vjp(lambda p: jax.vmap(lambda y: readout.apply(p, y))(clean.ys), own)[1](q)
    return placed(found, ("readout",))


def _nothing_yet(options: Options, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What is remembered at the start of B sequences."""
    copies = (options.samples, len(options.noise.signs))
    batch, later = length(x), options.credit != "step"
    floating = jnp.promote_types(jnp.result_type(float), jnp.float32)
    total = options.credit == "total"
    apart = jax.tree.map(lambda a: jnp.zeros((*copies, *a.shape), a.dtype), stack.initial)
    return {
        "deviation": None if options.noise.resync else apart,
        "eligibility": blank_eligibility(stack, params, options.samples, batch) if later else {},
        "returned": jnp.zeros((options.samples, batch), floating) if total else None,
    }
