"""The phases of a P-TNCN's step: drive, predict, compare, correct. Learning is a rule's.

Within a phase every layer reads what the phase before left, its own and its neighbours', so all
layers run at once; only the phases have an order. Nothing is differentiated.

Letters: B batch, D numbers of a frame, L layers, H_l units of layer l.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.cells.layers import Layers, Several, lower, plus_lower, through

Activation = Callable[[jax.Array], jax.Array]


class Weights(NamedTuple):
    """The matrices of a P-TNCN, [from, to]; those of several layers listed or stacked.

    Attributes:
        W1: [H_1, D], what the first layer predicts of the frame.
        E1: [D, H_1], the error of the frame to the first layer.
        M1: [D, H_1], the last frame to the first layer.
        V1: [H_1, H_1], the first layer's memory.
        W: [H_l, H_{l-1}] for l = 2..L, what each layer predicts of the one below.
        E: [H_{l-1}, H_l] for l = 2..L, the error of the layer below.
        M: [H_{l-1}, H_l] for l = 2..L, the last state of the layer below; None without it.
        V: [H_l, H_l] for l = 2..L, each layer's memory.
        U: [H_{l+1}, H_l] for l = 1..L-1, the last state of the layer above; None without it.
    """

    W1: Any
    E1: Any
    M1: Any
    V1: Any
    W: Several
    E: Several
    M: Several
    V: Several
    U: Several


class Errors(NamedTuple):
    """Prediction less what was predicted.

    Attributes:
        frame: [B, D], that of the frame.
        layers: those of layers 1..L-1, [B, H_l] each, listed or stacked.
    """

    frame: jax.Array
    layers: Several


def drive(weights: Weights, x: jax.Array, state: Layers) -> Layers:
    """What each layer is driven by: the last frame and the last states around it."""
    first = x @ weights.M1 + state.first @ weights.V1
    found = Layers(first, through(state.rest, weights.V))
    if weights.M is None:
        return found
    below = through(lower(state), weights.M)
    found = found._replace(rest=jax.tree.map(jnp.add, below, found.rest))
    return plus_lower(found, through(state.rest, weights.U))


def predict(weights: Weights, activity: Layers, g: Activation) -> tuple[jax.Array, Several]:
    """The frame that the first layer predicts, and what each other layer does of the one below."""
    return g(activity.first @ weights.W1), through(activity.rest, weights.W)


def compare(output: jax.Array, prediction: Several, activity: Layers, target: jax.Array) -> Errors:
    """The errors of the predicted frame and of the predicted layers."""
    return Errors(output - target, jax.tree.map(jnp.subtract, prediction, lower(activity)))


def correct(
    weights: Weights,
    drives: Layers,
    errors: Errors,
    f: Activation,
    beta: float,
    alpha: float,
    sparsity: float,
) -> Layers:
    """The states that would have made smaller errors: one step on the drives, through f again."""

    def towards_rest(a: jax.Array) -> jax.Array:
        return sparsity * jnp.sign(a) if sparsity else jnp.zeros_like(a)

    found = jax.tree.map(towards_rest, drives)
    found = Layers(
        found.first + errors.frame @ weights.E1,
        jax.tree.map(jnp.add, found.rest, through(errors.layers, weights.E)),
    )
    found = plus_lower(found, jax.tree.map(lambda e: -alpha * e, errors.layers))
    return jax.tree.map(lambda a, d: f(a - beta * d), drives, found)
