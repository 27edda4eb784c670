"""Noisy copies of a model, and what their losses say of its synapses.

What node and activity perturbation share. Letters: B batch, W steps of a window, K samples, S signs
of the noise, D width of a node.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.noise import require_key, step_keys
from localgrad.core.frame import Frame, Recipe, Window
from localgrad.core.model.locality import require_layers
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import OUTPUT
from localgrad.core.params import Leaves, Path, accumulator, added, placed, under
from localgrad.core.passes import disturb
from localgrad.core.passes.correlation import correlated, traced
from localgrad.core.passes.disturb import Noise, Signals
from localgrad.core.passes.heard import Heard, Part, hear, unheard
from localgrad.core.passes.reward import earlier, later, ongoing
from localgrad.core.steps import even_window, length, merge_steps, over_samples
from localgrad.rules.perturbation.norms import normalised


class NodeState(NamedTuple):
    """State of `node_perturbation` and `activity_perturbation`.

    Attributes:
        loss: mean loss of the last call, without noise.
        carry: the model's carry without noise (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        deviation: how far each noisy copy's carry is from it, leaves [K, S, B, ...] (streaming).
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
    return Recipe(
        name=options.rule,
        state=NodeState,
        process=functools.partial(_process, options),
        credits=functools.partial(_credits, options),
        settings=told,
        remember=functools.partial(_nothing_yet, options),
        draw=lambda params: {"key": options.key, "clock": jnp.zeros((), jnp.uint32)},
        default_window=lambda stack, params, steps, alone: even_window(steps),
        screen=functools.partial(_screen, options),
    )


def _process(options: Options, frame: Frame, state: NodeState, window: Window) -> tuple:
    """One window: the clean copy, then some noisy ones at a time."""
    stack, params = frame.stack, frame.params
    carries = stack.unpack(state.carry)
    clean = hear(stack, params, carries, window.inputs, window.reset)
    values = frame.objective.values(clean.outputs, window.targets, window.weight)
    parts = tuple(p for p in clean.parts if not (options.exact_readout and p.label == "readout"))
    for part in parts:
        _require_heard(options.rule, stack, part, params)
    scored = disturb.Scored(frame.objective, window.targets, window.weight, values)
    at = disturb.Window(stack, params, carries, window.inputs, window.reset, clean, scored, parts)
    keys = step_keys(state.key, state.clock, length(window.inputs))
    learn = functools.partial(_some_samples, options, frame, at, keys)
    memory = (state.deviation, state.eligibility, state.returned)
    (posts, recalled), (deviation, eligibility, returned) = over_samples(
        learn, (jnp.arange(options.samples), *memory), options.at_once
    )
    grads = _exact(frame, window, clean) if options.exact_readout else {}
    for part, post in zip(parts, posts, strict=True):
        grads |= _scaled(options, frame, correlated(part, params, post))
    grads = added(grads, _scaled(options, frame, recalled))
    state = state._replace(
        carry=stack.pack(clean.carries),
        deviation=deviation,
        eligibility=eligibility,
        returned=returned,
        clock=state.clock + length(window.inputs),
    )
    return state, grads, values


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
    posts = [
        [
            jnp.einsum("wkb,wkb...->wb...", (gaps if instant else paid).astype(z.dtype), z)
            for z, instant in zip(zs, part.instant, strict=True)
        ]
        for part, zs in zip(at.disturbed, signals, strict=True)
    ]
    if options.credit == "step":
        return (posts, {}), (ran.deviation, {}, returned)
    entering = gaps if at.reset is None else jnp.where(ongoing(at.reset), gaps, 0)
    recalled = {
        path: jnp.einsum("kb,kb...->...", entering.sum(0).astype(e.dtype), e)
        for path, e in eligibility.items()
        if not frame.opening
    }
    if not frame.closing:
        eligibility = _carried(at, signals, eligibility)
    return (posts, recalled), (ran.deviation, eligibility, returned)


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


def _carried(at: disturb.Window, signals: Signals, before: Leaves) -> Leaves:
    """The eligibility after a window: what was there, unless forgotten, and what came."""
    came: Leaves = {}
    for part, zs in zip(at.disturbed, signals, strict=True):
        came |= traced(part, at.params, zs, at.reset)
    kept = {}
    for path, e in before.items():
        if at.reset is not None:
            again = at.reset.any(0).reshape(1, -1, *(1,) * (e.ndim - 2))
            e = jnp.where(again, jnp.zeros_like(e), e)
        kept[path] = e + came[path].astype(e.dtype)
    return kept


def _exact(frame: Frame, window: Window, clean: Heard) -> Leaves:
    """The readout's gradient."""
    readout: Any = frame.stack.readout
    _, q = frame.objective.credit(clean.outputs, window.targets, window.weight)
    own, ys = under(frame.params, ("readout",)), merge_steps(clean.ys)
    (found,) = jax.vjp(lambda p: readout.apply(p, ys), own)[1](merge_steps(q))
    return placed(found, ("readout",))


def _lasting(stack: Stack, params: Leaves) -> Iterator[Path]:
    """The parameters whose noise reaches later losses, by whole path."""
    params = {path: leaf for path, leaf in params.items() if stack.asks(path)}
    for path in params:
        if path[:1] == ("encoder",) and stack.encoder is not None:
            yield path
    for level in stack.levels:
        cell, prefix = stack.cells[level], stack.prefixes[level]
        highest = level == stack.levels[-1]
        heads = [
            prefix + site.layer.path for site in cell.sites if not (highest and site.role == OUTPUT)
        ]
        yield from (path for path in params if any(path[: len(h)] == h for h in heads))


def _nothing_yet(options: Options, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What is remembered at the start of B sequences."""
    copies = (options.samples, len(options.noise.signs))
    batch = length(x)
    eligibility = {}
    if options.credit != "step":
        eligibility = {
            path: jnp.zeros(
                (options.samples, batch, *params[path].shape), accumulator(params[path])
            )
            for path in dict.fromkeys(_lasting(stack, params))
        }
    floating = jnp.promote_types(jnp.result_type(float), jnp.float32)
    total = options.credit == "total"
    return {
        "deviation": jax.tree.map(lambda a: jnp.zeros((*copies, *a.shape), a.dtype), stack.initial),
        "eligibility": eligibility,
        "returned": jnp.zeros((options.samples, batch), floating) if total else None,
    }


def _screen(options: Options, stack: Stack, params: Leaves) -> None:
    """Raises for parameters of cells that no noise enters by, and for no readout to be exact."""
    del params
    for level in stack.levels:
        cell, name = stack.cells[level], stack.name(level)
        require_layers(cell, name, options.rule)
        unowned = [path for path in cell.unowned if stack.asks(stack.prefixes[level] + path)]
        if unowned:
            _refuse(options.rule, f"{name} ({cell.module.name})", unowned[0])
    if options.exact_readout and stack.readout is None:
        raise ValueError(
            f'{options.rule} with readout="exact" needs the readout of a localgrad.Network, and '
            "this model has none. Wrap it: localgrad.Network((cell,), readout=nn.Dense(O))."
        )


def _require_heard(rule: str, stack: Stack, part: Part, params: Leaves) -> None:
    """Raises for parameters of an encoder or readout that no noise enters by."""
    for path in unheard(part, params):
        if stack.asks(path):
            _refuse(rule, part.label, path[len(part.prefix) :])


def _refuse(rule: str, where: str, path: Path) -> None:
    raise ValueError(
        f"{rule} cannot credit parameter {'/'.join(path)} of {where}: noise enters a model by its "
        "linear layers, and this one lies in none that it can see. Use "
        "localgrad.weight_perturbation, which takes every parameter."
    )


def _credits(options: Options, stack: Stack, params: Leaves) -> dict[Path, str]:
    """How each parameter is credited, as `localgrad.summary` prints it."""
    lasting = set(_lasting(stack, params))
    what = "noise" if options.norm is None else f"activity, norm={options.norm!r},"
    found = {}
    for path in params:
        if options.exact_readout and path[:1] == ("readout",):
            found[path] = "exact"
        else:
            when = options.credit if path in lasting else "step"
            found[path] = f"{what} paid by loss differences ({when} credit)"
    return found
