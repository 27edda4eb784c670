"""Copies of each example with weights of their own: what the rules that disturb parameters share.

Letters: B batch, W steps of a window, K samples, S signs of the noise, P parameters.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.noise import beginning, drawn, require_key
from localgrad.core.contract.objective import Shown
from localgrad.core.examples import over_samples
from localgrad.core.frame import Recipe
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, accumulator
from localgrad.core.passes.alone import Stretch, disturb_each
from localgrad.core.passes.disturb import Noise, Scored
from localgrad.core.passes.run import run
from localgrad.core.steps import length
from localgrad.core.windows import Frame, Window, even_windows


class ParticleState(NamedTuple):
    """State of `weight_perturbation`, `pes` and `forward_gradient` on weights.

    Attributes:
        loss: mean loss of the last call, without noise.
        carry: the model's carry without noise (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        deviation: how far each copy's carry is from it, leaves [K, S, B, ...] (streaming).
        noise: by parameter path [K, B, ...], that of now, in units of its deviation (streaming).
        met: likewise, the sum of what was drawn in the sequence (streaming, if it is drawn anew).
        since: [B], steps since the sequence began (streaming).
        key: what noise is drawn from.
        clock: how many steps have been seen.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    deviation: Any = None
    noise: Any = None
    met: Any = None
    since: Any = None
    key: Any = None
    clock: Any = None

    outlives = ("key", "clock")
    streams = {"deviation": 2, "noise": 1, "met": 1}


class Options(NamedTuple):
    """What these rules differ in, and what they were told.

    Attributes:
        rule: its name.
        noise: how parameters are disturbed.
        samples: K.
        at_once: how many of them at a time, or None for all.
        lifetime: steps from one draw to the next, or None for one draw a sequence.
        credit: `"causal"` or `"step"`.
        key: to begin with.
    """

    rule: str
    noise: Noise
    samples: int
    at_once: int | None
    lifetime: int | None
    credit: str
    key: jax.Array

    @property
    def sums(self) -> bool:
        """Whether more noise is paid than that of now."""
        return self.lifetime is not None and self.credit == "causal"


class _Particles(NamedTuple):
    """What some samples go on from; as of `ParticleState`."""

    deviation: Any
    noise: Leaves
    met: Leaves


class _Draw(NamedTuple):
    """When noise is drawn.

    Attributes:
        key: of the stream.
        clock: the number of the first of these steps.
        renewed: [B], whether noise is drawn anew before them.
        begins: [B], whether a sequence begins with them.
    """

    key: jax.Array
    clock: jax.Array
    renewed: jax.Array
    begins: jax.Array


def recipe_of(options: Options, told: dict[str, Any]) -> Recipe:
    """The recipe of a rule; raises for a key that is none."""
    require_key(options.key)
    return Recipe(
        name=options.rule,
        state=ParticleState,
        process=functools.partial(_process, options),
        credits=functools.partial(_credits, options),
        settings=told,
        remember=functools.partial(_nothing_yet, options),
        draw=lambda params: beginning(options.key),
        default_window=even_windows,
    )


def _process(options: Options, frame: Frame, state: ParticleState, window: Window) -> tuple:
    """One window: at once where noise is drawn at its start at most, else step by step."""
    learn = functools.partial(_stretch, options, frame, state.key)
    carries = frame.stack.unpack(state.carry)
    particles = _Particles(state.deviation, state.noise, state.met)
    work = (carries, particles, state.since, state.clock)
    if options.lifetime is None and window.reset is None:
        work, (grads, shown) = learn(work, window)
    else:

        def step(so_far: tuple, now: Window) -> tuple[tuple, Shown]:
            work, total = so_far
            work, (found, shown) = learn(work, jax.tree.map(lambda a: a[None], now))
            return (work, jax.tree.map(jnp.add, total, found)), jax.tree.map(lambda a: a[0], shown)

        own = {p: leaf for p, leaf in frame.params.items() if frame.stack.asks(p)}
        blank = {p: jnp.zeros(leaf.shape, accumulator(leaf)) for p, leaf in own.items()}
        (work, grads), shown = jax.lax.scan(step, (work, blank), window)
    carries, particles, since, clock = work
    state = state._replace(
        carry=frame.stack.pack(carries), **particles._asdict(), since=since, clock=clock
    )
    scale = frame.objective.scale / options.samples
    return state, {path: g * scale.astype(g.dtype) for path, g in grads.items()}, shown


def _stretch(
    options: Options, frame: Frame, key: jax.Array, work: tuple, window: Window
) -> tuple[tuple, tuple[Leaves, Shown]]:
    """Some steps with the same noise: the clean copy, then some noisy ones at a time."""
    carries, particles, since, clock = work
    steps = length(window.inputs)
    ran = run(frame.stack, frame.params, carries, window.inputs, window.reset)
    clean = frame.objective.values(ran.outputs, window.targets, window.weight)
    if window.reset is not None:
        since = jnp.where(window.reset[0], 0, since)
    begins = since == 0
    renewed = begins if options.lifetime is None else since % options.lifetime == 0
    scored = Scored(frame.objective, window.targets, window.weight, clean)
    shared = (frame.stack, frame.params, carries, ran.carries, window.inputs, window.reset, scored)
    draw = _Draw(key, clock, renewed, begins)
    some = functools.partial(_some_samples, options, Stretch(*shared), draw)
    grads, particles = over_samples(some, (jnp.arange(options.samples), particles), options.at_once)
    clock = clock + jnp.asarray(steps, clock.dtype)
    work = ran.carries, particles, since + steps, clock
    return work, (grads, Shown(clean, ran.outputs))


def _some_samples(
    options: Options, at: Stretch, draw: _Draw, given: tuple
) -> tuple[Leaves, _Particles]:
    """What some samples say, summed over them, and what becomes of them."""
    numbers, particles = given
    noise, met = _renewed(options, draw, numbers, particles)
    deviation, gaps = disturb_each(options.noise, at, particles.deviation, noise)
    gaps = gaps.sum(0)  # [K, B]
    paid = met if options.sums else noise
    grads = {path: jnp.einsum("kb,kb...->...", gaps.astype(z.dtype), z) for path, z in paid.items()}
    return grads, _Particles(deviation, noise, met)


def _renewed(
    options: Options, draw: _Draw, numbers: jax.Array, before: _Particles
) -> tuple[Leaves, Leaves]:
    """The noise of these steps, and all that was met, [K, B, ...]."""
    now = jax.random.fold_in(draw.key, draw.clock)
    keys = jax.vmap(lambda k: jax.random.fold_in(now, k))(numbers)

    def anew(held: tuple[Leaves, Leaves]) -> tuple[Leaves, Leaves]:
        noise, met = dict(held[0]), dict(held[1])
        for n, (path, old) in enumerate(held[0].items()):
            fresh = jax.vmap(
                lambda k, n=n, old=old: drawn(
                    jax.random.fold_in(k, n), old.shape[1:], options.noise.kind, old.dtype
                )
            )(keys).astype(old.dtype)

            def where(flags: jax.Array, a: Any, b: jax.Array) -> jax.Array:
                return jnp.where(flags.reshape(1, -1, *(1,) * (b.ndim - 2)), a, b)

            noise[path] = where(draw.renewed, fresh, old)
            if path in met:
                kept = where(draw.begins, 0, met[path])
                met[path] = where(draw.renewed, kept + fresh, kept)
        return noise, met

    return jax.lax.cond(draw.renewed.any(), anew, lambda held: held, (before.noise, before.met))


def _nothing_yet(options: Options, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What is remembered at the start of B sequences."""
    batch, samples = length(x), options.samples
    copies = (samples, len(options.noise.signs))
    noise = {
        path: jnp.zeros((samples, batch, *leaf.shape), accumulator(leaf))
        for path, leaf in params.items()
        if stack.asks(path)
    }
    return {
        "deviation": jax.tree.map(lambda a: jnp.zeros((*copies, *a.shape), a.dtype), stack.initial),
        "noise": noise,
        "met": jax.tree.map(jnp.copy, noise) if options.sums else {},
        "since": jnp.zeros(batch, jnp.uint32),
    }


def _credits(options: Options, stack: Stack, params: Leaves) -> dict[Path, str]:
    """How each parameter is credited, as `localgrad.summary` prints it."""
    del stack
    lived = "sequence" if options.lifetime is None else f"{options.lifetime} steps"
    said = f"noise of its own, drawn each {lived}, paid by loss differences"
    return dict.fromkeys(params, said)
