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
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import OUTPUT
from localgrad.core.params import Leaves, Path, accumulator, added, placed, under
from localgrad.core.passes import disturb
from localgrad.core.passes.contraction import contract, outer
from localgrad.core.passes.disturb import Noise, Signals
from localgrad.core.passes.heard import Heard, Part, hear, unheard
from localgrad.core.passes.reward import earlier, later
from localgrad.core.steps import even_window, length, merge_steps, over_samples

NORMS = ("layer", "joint", "variance", "fernandez2024")


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
    for part in clean.parts:
        _require_heard(options.rule, part, params)
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
        own = under(params, part.prefix)
        each = contract(part.sites, own, part.received, _by_call(part, post))
        grads |= placed(_scaled(options, frame, each), part.prefix)
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
    signals = noise if options.norm is None else _normalised(options.norm, at, ran.activity)
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
    entering = gaps if at.reset is None else jnp.where(_ongoing(at.reset), gaps, 0)
    recalled = {
        path: jnp.einsum("kb,kb...->...", entering.sum(0).astype(e.dtype), e)
        for path, e in eligibility.items()
        if not frame.opening
    }
    if not frame.closing:
        eligibility = _traced(at, signals, eligibility)
    return (posts, recalled), (ran.deviation, eligibility, returned)


def _ongoing(reset: jax.Array) -> jax.Array:
    """[W, 1, B], whether no reset came since the window began."""
    return (jnp.cumsum(reset, axis=0) == 0)[:, None]


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


def _normalised(norm: str, at: disturb.Window, activity: Signals) -> Signals:
    """Activity, finite, times k_t."""
    activity = [[jnp.where(jnp.isfinite(a), a, 0) for a in row] for row in activity]
    if norm == "variance":
        return activity
    squares = [sum((a * a).reshape(*a.shape[:3], -1).sum(-1) for a in row) for row in activity]
    widths = [sum(a[0, 0, 0].size for a in row) for row in activity]
    if norm == "joint":
        squares, widths = [sum(squares)] * len(widths), [sum(widths)] * len(widths)
    if norm == "fernandez2024":
        seen = sum(a[0, 0].size for a in jax.tree.leaves(at.inputs))
        widths = [(sum(widths) + seen) ** 0.5] * len(widths)

    def normal(a: jax.Array, square: Any, width: float) -> jax.Array:
        factor = jnp.where(square > 0, width / jnp.where(square > 0, square, 1), 0)
        return a * factor.reshape(*factor.shape, *(1,) * (a.ndim - 3)).astype(a.dtype)

    return [
        [normal(a, square, width) for a in row]
        for row, square, width in zip(activity, squares, widths, strict=True)
    ]


def _by_call(part: Part, posts: list[jax.Array]) -> list[jax.Array]:
    """What each node learns as what each synapse call does."""
    found = {i: post for node, post in zip(part.nodes, posts, strict=True) for i in node}
    return [found[i] for i in range(len(part.sites))]


def _traced(at: disturb.Window, signals: Signals, before: Leaves) -> Leaves:
    """The eligibility after a window: what was there, unless forgotten, and what came."""
    found: Leaves = {}
    for part, zs in zip(at.disturbed, signals, strict=True):
        own = under(at.params, part.prefix)
        calls = [
            (part.sites[i], part.received[i], z)
            for node, z, instant in zip(part.nodes, zs, part.instant, strict=True)
            for i in node
            if not instant
        ]
        if not calls:
            continue
        sites, received, posts = map(list, zip(*calls, strict=True))
        if at.reset is not None:
            met = jnp.cumsum(at.reset, axis=0)
            leaving = (met == met[-1][None])[:, None]  # [W, 1, B]
            posts = [
                jnp.where(leaving.reshape(*leaving.shape, *(1,) * (z.ndim - 3)), z, 0)
                for z in posts
            ]
        one = functools.partial(outer, sites, own)
        over_batch = jax.vmap(one, (1, 1))  # [W, B, ...]
        each = jax.vmap(over_batch, (None, 1))(received, posts)
        found |= placed(each, part.prefix)
    kept = {}
    for path, e in before.items():
        if at.reset is not None:
            again = at.reset.any(0).reshape(1, -1, *(1,) * (e.ndim - 2))
            e = jnp.where(again, jnp.zeros_like(e), e)
        kept[path] = e + found[path].astype(e.dtype)
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
        cell = stack.cells[level]
        if cell.unowned:
            where = f"{stack.name(level)} ({cell.module.name})"
            _refuse(options.rule, where, cell.unowned[0], blind="OptimizedLSTM" in cell.module.name)
    if options.exact_readout and stack.readout is None:
        raise ValueError(
            f'{options.rule} with readout="exact" needs the readout of a localgrad.Network, and '
            "this model has none. Wrap it: localgrad.Network((cell,), readout=nn.Dense(O))."
        )


def _require_heard(rule: str, part: Part, params: Leaves) -> None:
    """Raises for parameters of an encoder or readout that no noise enters by."""
    for path in unheard(part, params):
        _refuse(rule, part.label, path[len(part.prefix) :])


def _refuse(rule: str, where: str, path: Path, blind: bool = False) -> None:
    other = "Use nn.LSTMCell: the same parameters load unchanged. Or take" if blind else "Use"
    raise ValueError(
        f"{rule} cannot credit parameter {'/'.join(path)} of {where}: noise enters a model by its "
        f"linear layers, and this one lies in none that it can see. {other} "
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
