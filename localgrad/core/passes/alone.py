"""Each example run by itself, with weights of its own: noise on parameters.

Letters: B batch, W steps of the window, K copies, S signs of the noise.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves
from localgrad.core.passes.disturb import Noise, Scored, restarted
from localgrad.core.passes.run import Pass, run


class Stretch(NamedTuple):
    """What all copies of some steps share, through which their noise stays.

    Attributes:
        stack: the model, taken apart.
        params: its parameters.
        carries: each cell's clean carry before the steps, leaves [B, N].
        last: each cell's clean carry after them.
        inputs: leaves [W, B, ...].
        reset: [W, B] bool, or None.
        scored: what outputs are scored by.
    """

    stack: Stack
    params: Leaves
    carries: Any
    last: Any
    inputs: Any
    reset: jax.Array | None
    scored: Scored


def disturb_each(how: Noise, at: Stretch, deviation: Any, noise: Leaves) -> tuple[Any, jax.Array]:
    """Runs copies whose parameters are disturbed.

    Args:
        how: they are disturbed.
        at: the steps.
        deviation: of their carries from the clean ones before them, leaves [K, S, B, ...].
        noise: by path [K, B, ...], in units of its standard deviation; of some parameters.

    Returns:
        The deviation after the steps, and what the copies' losses tell, [W, K, B].
    """
    along = (at.carries, at.stack.initial, at.inputs, at.reset)
    if how.scale is None:
        each = functools.partial(_tangent, at)
        each = jax.vmap(each, (0, 0, 0, 0, 1, 1, 1), (0, 1))  # examples
        each = jax.vmap(each, (0, 0, *(None,) * 5), (0, 1))  # copies
        moved = jax.tree.map(lambda a: a[:, 0], deviation)
        scores = (at.scored.targets, at.scored.weight)
        moved, gaps = each(moved, noise, *along, scores)
        return jax.tree.map(lambda a: a[:, None], moved), gaps

    each = functools.partial(_copy, at, how.scale)
    each = jax.vmap(each, (None, 0, 0, 0, 0, 1, 1), (0, 1))  # examples
    each = jax.vmap(each, (0, 0, *(None,) * 5), (0, 1))  # signs
    each = jax.vmap(each, (None, 0, 0, *(None,) * 4), (0, 1))  # copies
    carries, outputs = each(jnp.array(how.signs), deviation, noise, *along)
    apart = jax.tree.map(lambda a, b: a - b[None, None], carries, at.last)
    return restarted(apart), at.scored.gaps(how, outputs)


def _copy(
    at: Stretch,
    scale: float,
    sign: jax.Array,
    deviation: Any,
    noise: Leaves,
    carries: Any,
    initial: Any,
    x: Any,
    reset: Any,
) -> tuple[Any, Any]:
    """One example with weights of its own: its carry, leaves [N], and outputs, leaves [W, ...]."""
    own = dict(at.params)
    for path, z in noise.items():
        own[path] = (own[path] + sign * scale * z).astype(own[path].dtype)
    ran = _run(at, own, jax.tree.map(jnp.add, carries, deviation), initial, x, reset)
    return _example(ran.carries, 0), _example(ran.outputs, 1)


def _tangent(
    at: Stretch,
    deviation: Any,
    noise: Leaves,
    carries: Any,
    initial: Any,
    x: Any,
    reset: Any,
    scores: tuple,
) -> tuple[Any, jax.Array]:
    """How one example's carry, leaves [N], and losses [W] answer to small changes of weights."""
    targets, weight = jax.tree.map(lambda a: jnp.expand_dims(a, 1), scores)

    def go(params: Leaves, carries: Any) -> tuple[Any, jax.Array]:
        ran = _run(at, {**at.params, **params}, carries, initial, x, reset)
        return ran.carries, at.scored.objective.values(ran.outputs, targets, weight)

    disturbed = {path: at.params[path] for path in noise}
    moved = ({path: noise[path].astype(leaf.dtype) for path, leaf in disturbed.items()}, deviation)
    apart, gaps = jax.jvp(go, (disturbed, carries), moved)[1]
    return _example(apart, 0), _example(gaps, 1)


def _run(at: Stretch, params: Leaves, carries: Any, initial: Any, x: Any, reset: Any) -> Pass:
    """Runs one example, leaves [N] and [W, ...], as a batch of one."""
    carries, initial = jax.tree.map(lambda a: a[None], (carries, initial))
    x, reset = jax.tree.map(lambda a: jnp.expand_dims(a, 1), (x, reset))
    return run(at.stack._replace(initial=initial), params, carries, x, reset)


def _example(tree: Any, axis: int) -> Any:
    """The one example of a batch of one."""
    return jax.tree.map(lambda a: a.squeeze(axis), tree)
