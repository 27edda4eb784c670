"""Mean and variance of an estimate, exactly: what theory says that a rule's updates do.

To first order in the noise `z` (Gaussian, of T steps and all M = T (N + O) nodes), a step's losses
and activities are linear in it. With `g_t` what step t is paid by, `A_t` its signal and `x_t` what
its synapses received, an estimate is `sum_t (g_t . z) (A_t z) (outer) x_t`, and by Wick's theorem

    mean      = sum_t A_t g_t (outer) x_t
    variance  = sum_st (x_s . x_t) [(g_s . g_t) tr(A_s A_t^T) + (A_s g_t) . (A_t g_s)]

For node perturbation under total credit, where `A_t` picks the noise of step t and `g` is the same
for all, that is `|g|^2 Q + |G|^2`, `Q` being N times the squares of all that synapses received. The
derivatives are taken of a network written here, not of the library's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any


class Moments(NamedTuple):
    """Of an estimate of all parameters.

    Attributes:
        mean: a tree as the parameters.
        variance: the mean of the squared distance to it.
    """

    mean: Params
    variance: jax.Array


class Linear(NamedTuple):
    """A network near what it does without noise.

    Attributes:
        losses: [T, M] the derivative of each step's loss by the noise.
        nodes: of the hidden layer [T, N, M], and of the outputs [T, O, M]: of what they receive.
        inputs: what their synapses receive, [T, I + 1 + N] and [T, N + 1], a 1 for the bias.
    """

    losses: jax.Array
    nodes: tuple[jax.Array, jax.Array]
    inputs: tuple[jax.Array, jax.Array]


def linearised(params: Params, inputs: jax.Array, targets: jax.Array) -> Linear:
    """A tanh network with a linear readout and half a squared error, on one sequence [T, ...]."""
    cell, readout = params["cells_0"], params["readout"]
    units, outputs = readout["kernel"].shape

    def run(noise: jax.Array) -> tuple:
        def step(h: jax.Array, now: tuple) -> tuple[jax.Array, tuple]:
            u, d, z = now
            a = u @ cell["i"]["kernel"] + cell["i"]["bias"] + h @ cell["h"]["kernel"] + z[:units]
            x = jnp.tanh(a)
            o = x @ readout["kernel"] + readout["bias"] + z[units:]
            return x, (jnp.mean(0.5 * (o - d) ** 2), a, o, h, x)

        return jax.lax.scan(step, jnp.zeros(units), (inputs, targets, noise))[1]

    still = jnp.zeros((len(inputs), units + outputs))
    losses, a, o, *_ = jax.jacfwd(run)(still)
    *_, before, after = run(still)
    ones = jnp.ones((len(inputs), 1))
    flat = [jac.reshape(*jac.shape[:-2], -1) for jac in (losses, a, o)]
    seen = jnp.hstack([inputs, ones, before]), jnp.hstack([after, ones])
    return Linear(flat[0], (flat[1], flat[2]), seen)


def node_moments(linear: Linear, credit: str, activity: bool) -> Moments:
    """Of node perturbation, or of activity perturbation times 1 over the noise's variance.

    Args:
        linear: the network.
        credit: "step", "causal" or "total", the readout's being always of its step, or "resync":
            of its step, which has seen no earlier noise.
        activity: whether signals are all that changed, and not the noise alone.
    """
    steps, units, size = linear.nodes[0].shape
    own = linear.losses
    if credit == "resync":
        credit, own = "step", own * jnp.repeat(jnp.eye(steps), size // steps, axis=1)
    later = jnp.cumsum(own[::-1], axis=0)[::-1]
    paid = {"step": own, "causal": later, "total": jnp.broadcast_to(later[:1], own.shape)}[credit]
    noise = jnp.eye(size).reshape(steps, size // steps, size)
    signals = linear.nodes if activity else (noise[:, :units], noise[:, units:])
    hidden, readout = (
        _of_layer(a, g, x) for a, g, x in zip(signals, (paid, own), linear.inputs, strict=True)
    )
    width = linear.inputs[0].shape[1] - 1 - units
    mean = {
        "cells_0": {
            "i": {"kernel": hidden.mean[:width], "bias": hidden.mean[width]},
            "h": {"kernel": hidden.mean[width + 1 :]},
        },
        "readout": {"kernel": readout.mean[:-1], "bias": readout.mean[-1]},
    }
    return Moments(mean, hidden.variance + readout.variance)


def _of_layer(signals: jax.Array, paid: jax.Array, inputs: jax.Array) -> Moments:
    own = jnp.einsum("tnm,tm->tn", signals, paid)
    across = jnp.einsum("tnm,sm->tsn", signals, paid)
    flat = signals.reshape(len(signals), -1)
    pairs = (paid @ paid.T) * (flat @ flat.T) + jnp.einsum("tsn,stn->ts", across, across)
    return Moments(jnp.einsum("tk,tn->kn", inputs, own), jnp.sum((inputs @ inputs.T) * pairs))


def weight_moments(gradient: Params) -> Moments:
    """Of weight perturbation with one draw a sequence: P + 1 times the square of the gradient."""
    count = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    return Moments(gradient, (count + 1) * square(gradient))


def square(tree: Params) -> jax.Array:
    """The sum of all squares."""
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)), jnp.zeros(()))
