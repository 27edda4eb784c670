"""What the rules must give, written without localgrad: plain scans, `jax.grad` and `stop_gradient`.

A learning rule's estimate is the gradient of a program with some dependencies cut. Each oracle here
is such a program. Letters: B batch, T steps, N units, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

sg = jax.lax.stop_gradient


# ------------------------------------------------------------------------------------------------
# Whole models, run by Flax itself: exact gradients, and gradients over a horizon.


class Steps(NamedTuple):
    """A batch, time first, with everything optional filled in.

    Attributes:
        inputs: [T, B, ...].
        targets: [T, B, ...].
        weight: [T, B].
        reset: [T, B] bool.
        cut: [T] bool, let no credit pass to before this step.
    """

    inputs: Any
    targets: Any
    weight: jax.Array
    reset: jax.Array
    cut: jax.Array


def steps_of(batch: Any, cut: Any = ()) -> Steps:
    """A batch as the oracles take it; `cut` lists the steps credit cannot go back past."""
    size, steps = batch.inputs.shape[:2]
    weight = jnp.ones((size, steps)) if batch.mask is None else batch.mask
    reset = jnp.zeros((size, steps), bool) if batch.reset is None else batch.reset
    swap = [jnp.swapaxes(a, 0, 1) for a in (batch.inputs, batch.targets, weight, reset)]
    return Steps(*swap, jnp.isin(jnp.arange(steps), jnp.asarray(list(cut), int)))


def runner(model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`step(params, carry, x) -> (carry, y)` and `start(x) -> carry` of a Flax model."""

    def wide(carry: Any) -> Any:
        return jax.tree.map(
            lambda a: a.astype(jnp.promote_types(a.dtype, jnp.result_type(float))), carry
        )

    if isinstance(model, nn.Module):
        return (
            lambda params, carry, x: model.apply({"params": params}, carry, x),
            lambda x: wide(model.initialize_carry(jax.random.key(0), x.shape)),
        )

    def step(params: Any, carry: Any, x: Any) -> Any:
        own = jax.tree.map(jnp.asarray, params)  # nnx.vmap refuses variables of another trace
        return nnx.merge(model.graphdef, own)(carry, x)

    return step, lambda x: wide(model.initialize_carry(x.shape))


def choose(flags: jax.Array, a: Any, b: Any) -> Any:
    """`a` where flags [B], else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(flags.reshape(-1, *(1,) * (y.ndim - 1)), x, y), a, b)


def weighed(outputs: jax.Array, steps: Steps) -> jax.Array:
    """Half the squared error, averaged over the outputs and summed by weight over the rest.

    What has no weight may be NaN.
    """
    weight = steps.weight
    counts = (weight != 0).reshape(*weight.shape, *(1,) * (outputs.ndim - weight.ndim))
    each = 0.5 * (outputs - jnp.where(counts, steps.targets, 0)) ** 2
    return jnp.sum(each.reshape(*weight.shape, -1).mean(-1) * weight)


def outputs_of(model: Any, params: Any, steps: Steps) -> jax.Array:
    """The model's outputs, [T, B, O]."""
    step, start = runner(model)
    initial = start(steps.inputs[0])

    def body(carry: Any, now: tuple) -> tuple[Any, jax.Array]:
        x, reset, cut = now
        carry = choose(reset, initial, carry)
        carry = jax.tree.map(lambda a: jnp.where(cut, sg(a), a), carry)
        return step(params, carry, x)

    return jax.lax.scan(body, initial, (steps.inputs, steps.reset, steps.cut))[1]


def bptt(model: Any, params: Any, steps: Steps) -> Any:
    """The gradient of the summed loss."""
    return jax.grad(lambda p: weighed(outputs_of(model, p, steps), steps))(params)


def tbptt(
    model: Any, params: Any, steps: Steps, horizon: Any, stride: Any = 1, longest: int = 7
) -> Any:
    """The sum of each loss's own gradient, run again from a fixed carry further back.

    That is `horizon - 1` steps before its block of `stride` steps. One program serves every
    horizon and stride with `horizon + stride - 1` up to `longest`.
    """
    step, start = runner(model)
    initial = start(steps.inputs[0])
    length = len(steps.inputs)

    def enter(carry: Any, now: tuple) -> tuple[Any, Any]:
        x, reset = now
        return step(params, choose(reset, initial, carry), x)[0], carry

    _, entering = jax.lax.scan(enter, initial, (steps.inputs, steps.reset))

    def loss_at(params: Any, s: jax.Array) -> jax.Array:
        oldest = jnp.maximum(s - s % stride - horizon + 1, 0)

        def go(carry: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            now = jnp.minimum(t, length - 1)
            new, y = step(params, choose(steps.reset[now], initial, carry), steps.inputs[now])
            return jax.tree.map(lambda a, b: jnp.where(t <= s, a, b), new, carry), y

        carry = sg(jax.tree.map(lambda a: a[oldest], entering))
        _, ys = jax.lax.scan(go, carry, oldest + jnp.arange(longest))
        return weighed(ys[s - oldest], Steps(*(a[s] for a in steps)))

    every = jax.vmap(jax.grad(loss_at), in_axes=(None, 0))(params, jnp.arange(length))
    return jax.tree.map(lambda a: a.sum(0), every)


# ------------------------------------------------------------------------------------------------
# Cells, written out: credit on its way back through a recurrent layer is cut or thinned out.

EXACT, CUT, DIAGONAL, ONCE, HELD = "exact", "cut", "diagonal", "once", "held"
TYPES, SLOPE = "types", 0.3
"""What a recurrent layer sends back: all, nothing, each unit's credit to itself, or `ONCE` all from
a step's outputs and nothing from what goes on. A cell that is `HELD` takes its carry for a constant
altogether: credit passes only within the time step. `TYPES` sends back nothing, but all units hear
of each other by a path of their own, on which they are alike (`alike`)."""

Params = dict[str, Any]


def dense(p: Params, x: jax.Array) -> jax.Array:
    """An affine layer."""
    y = x @ p["kernel"]
    return y + p["bias"][None, :] if "bias" in p else y


def recurrent(p: Params, h: jax.Array, how: str) -> jax.Array:
    """The same, fed by the carry."""
    if how != EXACT:
        kernel = p["kernel"]
        through = (h - sg(h)) * sg(jnp.diagonal(kernel))[None, :] if how == DIAGONAL else 0.0
        return dense(p, sg(h)) + through
    return dense(p, h)


def thirds(p: Params) -> list[Params]:
    """A layer of 3 N units as three layers."""
    return [{name: jnp.split(leaf, 3, axis=-1)[k] for name, leaf in p.items()} for k in range(3)]


def rate(p: Params, h: jax.Array, x: jax.Array, how: str, alpha: Any = 0.25) -> tuple:
    """A leaky rate unit."""
    h = (1 - alpha) * h + alpha * jnp.tanh(dense(p["i"], x) + recurrent(p["h"], h, how))
    return h, h


def rate_alpha(p: Params, h: jax.Array, x: jax.Array, how: str) -> tuple:
    """The same with a learned leak a unit."""
    return rate(p, h, x, how, jnp.broadcast_to(p["alpha"], h.shape))


def simple(p: Params, h: jax.Array, x: jax.Array, how: str) -> tuple:
    """An Elman unit."""
    h = jnp.tanh(dense(p["i"], x) + recurrent(p["h"], h, how))
    return h, h


def gru(p: Params, h: jax.Array, x: jax.Array, how: str) -> tuple:
    """A GRU that resets after its recurrent layer."""
    r = jax.nn.sigmoid(dense(p["ir"], x) + recurrent(p["hr"], h, how))
    z = jax.nn.sigmoid(dense(p["iz"], x) + recurrent(p["hz"], h, how))
    n = jnp.tanh(dense(p["in"], x) + r * recurrent(p["hn"], h, how))
    h = (1 - z) * n + z * h
    return h, h


def lstm(p: Params, carry: tuple, x: jax.Array, how: str) -> tuple:
    """An LSTM."""
    c, h = carry
    i, f, g, o = (
        dense(p["i" + gate], x) + recurrent(p["h" + gate], h, how) for gate in ("i", "f", "g", "o")
    )
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (c, h), h


def mgu(p: Params, h: jax.Array, x: jax.Array, how: str) -> tuple:
    """A minimal gated unit."""
    f = jax.nn.sigmoid(dense(p["if"], x) + recurrent(p["hf"], h, how))
    n = jnp.tanh(dense(p["in"], x) + f * recurrent(p["hn"], h, how))
    h = (1 - f) * n + f * h
    return h, h


def nnx_simple(p: Params, h: jax.Array, x: jax.Array, how: str) -> tuple:
    """`simple` under NNX's names."""
    return simple({"i": p["dense_i"], "h": p["dense_h"]}, h, x, how)


def nnx_gru(p: Params, h: jax.Array, x: jax.Array, how: str) -> tuple:
    """`gru` with its three gates in one kernel."""
    layers = dict(zip(("ir", "iz", "in"), thirds(p["dense_i"]), strict=True))
    layers |= dict(zip(("hr", "hz", "hn"), thirds(p["dense_h"]), strict=True))
    return gru(layers, h, x, how)


def nnx_lstm(p: Params, carry: tuple, x: jax.Array, how: str) -> tuple:
    """`lstm` under NNX's names."""
    return lstm(p | {"if": p["if_"]}, carry, x, how)


def spikes(v: jax.Array, bar: Any, r: jax.Array) -> tuple:
    """Spikes over a bar, with the derivative of a logistic function, and what is refractory."""
    u = (v - bar) / THRESHOLD
    smooth = DAMPENING * 4 * jax.nn.sigmoid(u)
    z = sg((u > 0).astype(v.dtype) - smooth) + smooth
    z = jnp.where(r > 0, jnp.zeros_like(z), z)
    return z, sg(jnp.where(z > 0, 1.0, jnp.maximum(r - 1, 0)))


THRESHOLD, DAMPENING = 0.5, 0.6


def voltage(p: Params, v: jax.Array, z: jax.Array, x: jax.Array, how: str) -> jax.Array:
    """A membrane with reset; no unit sends spikes to itself."""
    kernel = p["h"]["kernel"]
    drive = dense(p["i"], x) + recurrent({"kernel": kernel * (1 - jnp.eye(len(kernel)))}, z, how)
    return 0.8 * v + 0.7 * drive - THRESHOLD * sg(z)


def lif(p: Params, carry: tuple, x: jax.Array, how: str) -> tuple:
    """A spiking unit, refractory for one step."""
    v, z, r = carry
    v = voltage(p, v, z, x, how)
    z, r = spikes(v, THRESHOLD, r)
    return (v, z, r), z


def alif(p: Params, carry: tuple, x: jax.Array, how: str) -> tuple:
    """The same with a threshold that adapts."""
    v, a, z, r = carry
    v = voltage(p, v, z, x, how)
    z, r = spikes(v, THRESHOLD + 0.3 * a, r)
    return (v, 0.9 * a + z, z, r), z


def leaky(p: Params, y: jax.Array, x: jax.Array, how: str) -> tuple:
    """A low-pass filter."""
    del how
    y = 0.7 * y + 0.3 * dense(p["i"], x)
    return y, y


def lru(p: Params, carry: tuple, x: jax.Array, how: str) -> tuple:
    """A complex diagonal recurrence."""
    del how
    spin = jnp.exp(-jnp.exp(p["nu_log"]) + 1j * jnp.exp(p["theta_log"]))[None]
    fed = dense(p["B_re"], x) + 1j * dense(p["B_im"], x)
    h = spin * (carry[0] + 1j * carry[1]) + jnp.exp(p["gamma_log"])[None] * fed
    y = h @ (p["C_re"]["kernel"] + 1j * p["C_im"]["kernel"])
    return (h.real, h.imag), y.real + dense(p["D"], x)


def rtu(p: Params, carry: tuple, x: jax.Array, how: str) -> tuple:
    """A pair of units that turns, under a tanh."""
    del how
    size = jnp.exp(-jnp.exp(p["nu_log"]))[None]
    spin = size * jnp.exp(1j * jnp.exp(p["theta_log"]))[None]
    fed = dense(p["W_1"], x) + 1j * dense(p["W_2"], x)
    u = spin * (carry[0] + 1j * carry[1]) + jnp.sqrt(1 - size**2) * fed
    h = jnp.tanh(u.real), jnp.tanh(u.imag)
    return h, jnp.concatenate(h, axis=-1)


def elstm(p: Params, c: jax.Array, x: jax.Array, how: str) -> tuple:
    """An LSTM whose gates see their own unit alone."""
    del how
    z = jnp.tanh(dense(p["z"], x) + p["w_z"][None] * c)
    f = jax.nn.sigmoid(dense(p["f"], x) + p["w_f"][None] * c)
    c = f * c + (1 - f) * z
    return c, jax.nn.sigmoid(dense(p["o"], jnp.concatenate([x, c], -1))) * c


_ALL = (rate, rate_alpha, simple, gru, lstm, mgu, nnx_simple, nnx_gru, nnx_lstm)
CELLS = {f.__name__: f for f in (*_ALL, lif, alif, leaky, lru, rtu, elstm)}


def alike(name: str, p: Params, carry: Any, x: jax.Array) -> tuple:
    """A cell whose units answer each other by one mean weight and `SLOPE`.

    How they do is a number an example, always 0, that has the credit of them all.
    """
    h, heard = carry
    kernel = p["dense_h" if name == "nnx_simple" else "h"]["kernel"]
    weight, units = sg(kernel.mean()), len(kernel)
    kept = jax.jvp(lambda h: CELLS[name](p, h, x, CUT)[0], (h,), (jnp.ones_like(h),))[1]
    told = (h - sg(h)).sum(-1, keepdims=True) + units * heard
    heard = sg(kept.mean(-1, keepdims=True)) * heard + SLOPE * weight * told
    h, y = CELLS[name](p, h, x, CUT)
    return (h, heard), y + heard


# ------------------------------------------------------------------------------------------------
# Networks of such cells, one level of credit at a time.


class Net(NamedTuple):
    """A network to be run by this file.

    Attributes:
        cells: its cells: `(params, carry, x, how) -> (carry, y)`, or their names in `CELLS`.
        initial: each cell's initial carry.
        bare: whether it is a cell without encoder and readout.
    """

    cells: tuple[Any, ...]
    initial: tuple[Any, ...]
    bare: bool


def net_of(cells: tuple[Any, ...], model: Any, steps: Steps) -> Net:
    """The network that a model of the table is."""
    carry = runner(model)[1](steps.inputs[0])
    bare = not hasattr(model, "readout")
    return Net(cells, (carry,) if bare else tuple(carry), bare)


def levels(net: Net, params: Params, steps: Steps, hows: list[str]) -> tuple[list, jax.Array]:
    """What each cell puts out [T, B, N], and the network [T, B, O]."""
    zs, found = steps.inputs, []
    if "encoder" in params:
        zs = params["encoder"]["embedding"][zs]
    for level, (name, initial, how) in enumerate(zip(net.cells, net.initial, hows, strict=True)):
        own = params if net.bare else params[f"cells_{level}"]
        if how == TYPES:
            initial = initial, jnp.zeros_like(initial[:, :1])

        def body(carry: Any, now: tuple, name=name, own=own, initial=initial, how=how) -> tuple:
            x, reset = now
            carry = choose(reset, initial, carry)
            if how == HELD:
                carry = sg(carry)
            cell = CELLS.get(name, name)
            if how == TYPES:
                return alike(name, own, carry, x)
            if how == ONCE:
                return cell(own, carry, x, CUT)[0], cell(own, carry, x, EXACT)[1]
            return cell(own, carry, x, EXACT if how == HELD else how)

        zs = jax.lax.scan(body, initial, (zs, steps.reset))[1]
        found.append(zs)
    ys = zs if net.bare else jax.vmap(lambda z: dense(params["readout"], z))(zs)
    return found, ys


def local(net: Net, params: Params, steps: Steps, how: str, feedback: Any = None) -> Params:
    """Credit that stays within a unit over time, and crosses cells only within a time step.

    Args:
        net: the network.
        params: its parameters, a nested dict.
        steps: the data.
        how: what recurrent layers send back.
        feedback: by cell, the (N, O) weights that bring it the outputs' error, or None to send the
            error down the way the outputs came.

    Returns:
        What every parameter learns.
    """
    depth = len(net.cells)
    error = jax.grad(lambda ys: weighed(ys, steps))(levels(net, params, steps, [HELD] * depth)[1])

    def value(params: Params, hows: list[str], level: int) -> jax.Array:
        zs, ys = levels(net, params, steps, hows)
        if feedback is None:
            return weighed(ys, steps)
        return jnp.sum(zs[level] * (error @ feedback[f"cells_{level}"].T))

    learned: Params = {}
    for level in range(depth):
        hows = [HELD] * level + [how] + [HELD] * (depth - level - 1)
        grads = jax.grad(value)(params, hows, level)
        if net.bare:
            return grads
        learned[f"cells_{level}"] = grads[f"cells_{level}"]
    if "encoder" in params:
        learned["encoder"] = jax.grad(value)(params, [HELD] * depth, 0)["encoder"]
    return learned | {"readout": readout(net, params, steps)["readout"]}


def deep(net: Net, params: Params, steps: Steps, how: str) -> Params:
    """Credit that takes every way through the network but those from unit to unit of a layer."""
    hows = [how] * len(net.cells)
    return jax.grad(lambda p: weighed(levels(net, p, steps, hows)[1], steps))(params)


def readout(net: Net, params: Params, steps: Steps) -> Params:
    """The readout's own gradient, and zeros elsewhere."""

    def value(p: Params) -> jax.Array:
        ys = levels(net, params | {"readout": p}, steps, [EXACT] * len(net.cells))[1]
        return weighed(ys, steps)

    zeros = jax.tree.map(jnp.zeros_like, params)
    return zeros | {"readout": jax.grad(value)(params["readout"])}
