"""Noisy copies of a window beside the clean one: how much each copy's losses and drives differ.

All is in units of the noise's standard deviation. Nothing is differentiated, unless the noise is
infinitely small. Letters: B batch, W steps of the window, K copies, S signs of the noise (2 if
antithetic), D width of a node.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.noise import drawn
from localgrad.core.contract.objective import Objective
from localgrad.core.model.nodes import Node
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves
from localgrad.core.passes.heard import Heard, Nudges, Part, hear

Signals = list[list[jax.Array]]
"""For each part and each of its nodes, [W, K, B, D]."""


class Noise(NamedTuple):
    """How a model is disturbed.

    Attributes:
        kind: as of `drawn`.
        scale: its standard deviation; None for noise so small that a derivative tells its effect.
        signs: 1 and, if antithetic, -1.
        resync: whether copies begin each step from the clean carry, so that noise ends with its
            step.
    """

    kind: str
    scale: float | None
    signs: tuple[float, ...]
    resync: bool = False


class Scored(NamedTuple):
    """What a window's outputs are scored by, and what the clean copy's score.

    Attributes:
        objective: the loss.
        targets: leaves [W, B, ...].
        weight: [W, B], or None for ones.
        clean: [W, B], the losses without noise.
    """

    objective: Objective
    targets: Any
    weight: jax.Array | None
    clean: jax.Array

    def gaps(self, how: Noise, outputs: Any) -> jax.Array:
        """What each copy's loss tells of its noise, [W, K, B].

        That is its difference to the clean copy's, or half that between the two signs. One that is
        not finite, where the clean loss is, tells nothing.

        Args:
            how: they are disturbed.
            outputs: of the copies, leaves [W, K, S, B, ...].

        Returns:
            The differences, over the noise's standard deviation.
        """
        values, clean = self._values(outputs), self.clean[:, None]
        other = values[:, :, 1] if len(how.signs) == 2 else clean
        gaps = (values[:, :, 0] - other) / (len(how.signs) * (how.scale or 1.0))
        told = jnp.isfinite(gaps) | ~jnp.isfinite(clean)
        return jnp.where(told, gaps, jnp.zeros_like(gaps))

    def _values(self, outputs: Any) -> jax.Array:
        """The weighted losses [W, K, S, B]; the loss sees rows, and no axis of copies."""
        steps, copies, signs, batch = jax.tree.leaves(outputs)[0].shape[:4]

        def rows(a: jax.Array) -> jax.Array:
            return jnp.repeat(a, copies * signs, axis=1)

        def flat(a: jax.Array) -> jax.Array:
            return jnp.moveaxis(a, 3, 1).reshape(steps, -1, *a.shape[4:])

        targets, weight = jax.tree.map(rows, (self.targets, self.weight))
        values = self.objective.values(jax.tree.map(flat, outputs), targets, weight)
        return jnp.moveaxis(values.reshape(steps, batch, copies, signs), 1, 3)


class Window(NamedTuple):
    """What all copies of a window share.

    Attributes:
        stack: the model, taken apart.
        params: its parameters.
        carries: each cell's clean carry before the window, leaves [B, N].
        inputs: leaves [W, B, ...].
        reset: [W, B] bool, or None.
        clean: the clean pass.
        scored: what outputs are scored by.
        disturbed: the parts of the model that noise enters.
    """

    stack: Stack
    params: Leaves
    carries: Any
    inputs: Any
    reset: jax.Array | None
    clean: Heard
    scored: Scored
    disturbed: tuple[Part, ...]


class Copies(NamedTuple):
    """What noisy copies of a window tell.

    Attributes:
        deviation: how far their carries are from the clean ones after it, leaves [K, S, B, ...],
            or None where they begin each step from these.
        gaps: [W, K, B], as of `Scored.gaps`.
        activity: how much each node's drive differs from the clean one's; of copies whose noise
            lasts.
    """

    deviation: Any
    gaps: jax.Array
    activity: Signals


def noise_for(kind: str, keys: jax.Array, parts: Sequence[Part]) -> Signals:
    """Independent noise for each step, copy, example and unit of each node.

    Args:
        kind: as of `drawn`.
        keys: of each step and copy, [W, K].
        parts: that noise enters.

    Returns:
        The noise.
    """

    def one(key: jax.Array) -> Signals:
        def of(part: int, node: int) -> jax.Array:
            own = jax.random.fold_in(jax.random.fold_in(key, part), node)
            like = parts[part].drives[parts[part].nodes[node][0]]
            return drawn(own, like.shape[1:], kind, like.dtype)

        return [[of(p, n) for n in range(len(part.nodes))] for p, part in enumerate(parts)]

    # Drawn once: a compiler that fuses would draw them anew for each use.
    return jax.lax.optimization_barrier(jax.vmap(jax.vmap(one))(keys))


def disturb(how: Noise, at: Window, deviation: Any, noise: Signals) -> Copies:
    """Runs noisy copies of a window.

    Args:
        how: they are disturbed.
        at: the window.
        deviation: of their carries before it, leaves [K, S, B, ...], or None.
        noise: in units of its standard deviation.

    Returns:
        What they tell.
    """
    if how.scale is None:
        return _tangents(at, deviation, noise)

    def copy(deviation: Any, noise: Signals, sign: jax.Array) -> tuple[Any, Any, Signals]:
        nudges = nudges_of(at.disturbed, noise, sign * how.scale)
        if how.resync:
            return None, _each_step(at, nudges), []
        carries = jax.tree.map(jnp.add, at.carries, deviation)
        heard = hear(at.stack, at.params, carries, at.inputs, at.reset, nudges)
        apart = jax.tree.map(jnp.subtract, heard.carries, at.clean.carries)
        return apart, heard.outputs, _activity(heard.parts, at.disturbed)

    signs = jnp.array(how.signs)
    each = jax.vmap(jax.vmap(copy, (0, None, 0), (0, 1, 1)), (0, 1, None), (0, 1, 1))
    apart, outputs, activity = each(deviation, noise, signs)
    average = signs / len(how.signs) / how.scale

    def mean(a: jax.Array) -> jax.Array:
        return jnp.einsum("s,wksb...->wkb...", average.astype(a.dtype), a)

    apart = None if how.resync else restarted(apart)
    return Copies(apart, at.scored.gaps(how, outputs), [list(map(mean, row)) for row in activity])


def _each_step(at: Window, nudges: Nudges) -> Any:
    """Outputs [W, B, ...] of steps that all begin from the clean carry: one run side by side."""

    def step(carries: Any, x: Any, nudges: Nudges) -> Any:
        x, nudges = jax.tree.map(lambda a: a[None], (x, nudges))
        outputs = hear(at.stack, at.params, carries, x, None, nudges).outputs
        return jax.tree.map(lambda a: a[0], outputs)

    return jax.vmap(step)(at.clean.entered, at.inputs, nudges)


def _tangents(at: Window, deviation: Any, noise: Signals) -> Copies:
    """The same for noise without size, whose effect is a derivative, forward in time."""
    scored = at.scored

    def run(carries: Any, nudges: Nudges) -> tuple[Any, jax.Array, list]:
        heard = hear(at.stack, at.params, carries, at.inputs, at.reset, nudges)
        values = scored.objective.values(heard.outputs, scored.targets, scored.weight)
        return heard.carries, values, [part.drives for part in heard.parts]

    def copy(deviation: Any, noise: Signals) -> tuple[Any, jax.Array, Signals]:
        given = (at.carries, nudges_of(at.disturbed, noise, 0))
        moved = (jax.tree.map(lambda a: a[0], deviation), nudges_of(at.disturbed, noise, 1))
        moved = jax.tree.map(lambda a, b: a.astype(b.dtype), moved, given)
        apart, gaps, drives = jax.jvp(run, given, moved)[1]
        activity = [
            [_sum(own, node) for node in part.nodes]
            for own, part in zip(drives, at.disturbed, strict=False)
        ]
        return jax.tree.map(lambda a: a[None], apart), gaps, activity

    return Copies(*jax.vmap(copy, (0, 1), (0, 1, 1))(deviation, noise))


def nudges_of(parts: Sequence[Part], noise: Signals, scale: Any) -> Nudges:
    """Noise as what is added to the first drive of each node, times a scale."""
    return [
        {node[0]: scale * z for node, z in zip(part.nodes, zs, strict=True)}
        for part, zs in zip(parts, noise, strict=True)
    ]


def _activity(parts: Sequence[Part], clean: Sequence[Part]) -> Signals:
    """How much the drives of each node differ, [W, B, D], of those that noise enters."""
    return [
        [_sum(part.drives, node) - _sum(base.drives, node) for node in base.nodes]
        for part, base in zip(parts, clean, strict=False)  # a last part may be without noise
    ]


def _sum(drives: list[jax.Array], node: Node) -> jax.Array:
    return functools.reduce(jnp.add, [drives[i] for i in node])


def restarted(deviation: Any) -> Any:
    """Zero for each copy of an example whose carry is not finite: it goes on from the clean one."""
    lost = [~jnp.isfinite(a).reshape(*a.shape[:3], -1).all(-1) for a in jax.tree.leaves(deviation)]
    gone = jnp.stack(lost).any(0)

    def restart(a: jax.Array) -> jax.Array:
        return jnp.where(gone.reshape(*gone.shape, *(1,) * (a.ndim - 3)), jnp.zeros_like(a), a)

    return jax.tree.map(restart, deviation)
