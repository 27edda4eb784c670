"""Kinds of recurrent cells that people write, each with the equations that local rules must see.

Most hold their weights as raw parameters, which no Flax layer owns. A cell with `how` other than
`WHOLE` stops what the rule of that name does not credit: it is then the rule's oracle, under BPTT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WHOLE, CUT, DIAGONAL = "whole", "cut", "diagonal"
N, IN, OUT = 4, 3, 2

sg, sigmoid = jax.lax.stop_gradient, jax.nn.sigmoid
normal = nn.initializers.normal(0.5)


def times(h: jax.Array, w: jax.Array, how: str, owner: Any = None) -> jax.Array:
    """`h @ w`, of which a local rule sees nothing, or what a unit tells itself.

    `owner` has the unit of each column: the column's number modulo N if it is None.
    """
    if how == WHOLE:
        return h @ w
    if how == CUT:
        return sg(h) @ w
    columns = np.arange(w.shape[1])
    owner = columns % len(w) if owner is None else owner
    return sg(h) @ w + (h - sg(h))[:, owner] * sg(w[owner, columns])[None]


class Cell(nn.RNNCellBase):
    """A cell with one carry [B, N] unless it says otherwise."""

    how: str = WHOLE
    features: int = N

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        """Away from zero."""
        return jnp.full((*input_shape[:-1], self.features), 0.3)

    @property
    def num_feature_axes(self) -> int:
        """One axis of features."""
        return 1

    def raw(self, name: str, *shape: int) -> Any:
        """A bare parameter."""
        return self.param(name, normal, shape)

    def row(self, name: str) -> Any:
        """One number a unit, [1, N]."""
        return self.raw(name, self.features)[None]

    def fed(self, h: Any, x: Any, suffix: str = "") -> Any:
        """`x W + h U + b` of bare parameters."""
        w, u = self.raw("w" + suffix, IN, self.features), self.raw("u" + suffix, self.features, N)
        return x @ w + times(h, u, self.how) + self.row("b" + suffix)


class Two(Cell):
    """A cell with two carries."""

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        h = super().initialize_carry(rng, input_shape)
        return h, h / 2


class Vanilla(Cell):
    """Raw weights and a bias."""

    @nn.compact
    def __call__(self, h, x):
        h = 0.5 * h + 0.5 * jnp.tanh(self.fed(h, x))
        return h, h


class CTRNN(Cell):
    """A continuous-time network with learned time constants."""

    @nn.compact
    def __call__(self, h, x):
        rate = 0.5 / (0.5 + jax.nn.softplus(self.row("tau")))
        h = h + rate * (jnp.tanh(self.fed(h, x)) - h)
        return h, h


class LTC(Cell):
    """A liquid time constant: what is fed sets how fast a unit moves, and where to."""

    @nn.compact
    def __call__(self, h, x):
        f, tau, a = sigmoid(self.fed(h, x)), jax.nn.softplus(self.row("tau")), self.row("a")
        h = (h + 0.3 * f * a) / (1 + 0.3 * (1 / (0.1 + tau) + f))
        return h, h


class LRC(Cell):
    """Liquid resistance and capacitance: an elastance beside the liquid leak."""

    @nn.compact
    def __call__(self, h, x):
        elastance = sigmoid(self.fed(h, x, "_e"))
        leak, drive = self.fed(h, x, "_f"), self.fed(h, x, "_u")
        leak = sigmoid(leak) + jax.nn.softplus(self.row("leak"))
        h = h + 0.3 * elastance * (jnp.tanh(drive) - leak * h)
        return h, h


class Hopfield(Cell):
    """Symmetric weights without a diagonal, made of a parameter."""

    @nn.compact
    def __call__(self, h, x):
        v = self.raw("v", N, N)
        w = (v + v.T) * (1 - jnp.eye(N))
        h = h + 0.3 * (times(jnp.tanh(h), w, self.how) + x @ self.raw("w", IN, N) - h)
        return h, h


class RTU(Two):
    """A recurrent trace unit: a rotation a unit, and no recurrent weights."""

    @nn.compact
    def __call__(self, carry, x):
        a, b = carry
        size, angle = jnp.exp(-jnp.exp(self.row("nu"))), self.row("theta")
        g, phi = size * jnp.cos(angle), size * jnp.sin(angle)
        gain = jnp.sqrt(1 - size**2)
        a, b = (
            g * a - phi * b + gain * (x @ self.raw("w_a", IN, N)),
            g * b + phi * a + gain * (x @ self.raw("w_b", IN, N)),
        )
        return (a, b), jax.nn.silu(a) + jnp.tanh(b)


class StateSpace(Cell):
    """A diagonal state-space model, discretised, with a matrix out and a way past the state."""

    @nn.compact
    def __call__(self, h, x):
        step, pole = jnp.exp(self.row("log_step") - 1), -jnp.exp(self.row("log_pole"))
        fade = jnp.exp(step * pole)
        h = fade * h + (fade - 1) / pole * (x @ self.raw("b", IN, N))
        return h, jax.nn.gelu(h @ self.raw("c", N, N)) + x @ self.raw("d", IN, N)


class MinimalGated(Cell):
    """A gate and a candidate that see the input alone."""

    @nn.compact
    def __call__(self, h, x):
        z = sigmoid(x @ self.raw("w_z", IN, N) + self.row("b_z"))
        h = (1 - z) * h + z * (x @ self.raw("w_h", IN, N))
        return h, h


class ScalarLSTM(Cell):
    """xLSTM's sLSTM: exponential gates, a normaliser, a stabiliser; recurrent weights in heads."""

    heads: int = 2

    @nn.compact
    def __call__(self, carry, x):
        c, n, m, h = carry
        width = N // self.heads
        r = self.raw("r", self.heads, width, 4, width)
        if self.how == WHOLE:
            fed = jnp.einsum("bhk,hkgd->bghd", h.reshape(-1, self.heads, width), r)
        else:
            eye = np.eye(self.heads)[:, None, None, :, None]
            full = (eye * r[:, :, :, None, :]).reshape(N, 4 * N)
            fed = times(h, full, self.how)
        drive = fed.reshape(-1, 4 * N) + x @ self.raw("w", IN, 4 * N) + self.raw("b", 4 * N)[None]
        i, f, z, o = jnp.split(drive, 4, -1)
        f = jax.nn.log_sigmoid(f)
        top = jnp.maximum(f + m, i)
        keep, add = jnp.exp(f + m - top), jnp.exp(i - top)
        c, n = keep * c + add * jnp.tanh(z), keep * n + add
        h = sigmoid(o) * c / n
        return (c, n, top, h), h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        h = super().initialize_carry(rng, input_shape)
        return h, 2 * h, h / 2, h / 3


class Interleaved(Two):
    """An LSTM whose gates lie unit by unit in one kernel."""

    @nn.compact
    def __call__(self, carry, x):
        h, c = carry
        owner = np.arange(4 * N) // 4
        drive = x @ self.raw("w", IN, 4 * N) + times(h, self.raw("u", N, 4 * N), self.how, owner)
        gates = (drive + self.raw("b", 4 * N)[None]).reshape(-1, N, 4)
        i, f, g, o = (gates[..., k] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
        return (h, c), h


class InterleavedLayers(Cell):
    """The same of Flax layers, with two gates."""

    @nn.compact
    def __call__(self, h, x):
        w = nn.Dense(2 * N, name="w")
        owner = np.arange(2 * N) // 2
        if self.how == WHOLE:
            fed = nn.Dense(2 * N, use_bias=False, name="u")(h)
        else:
            kernel = _Kernel(2 * N, name="u")(h)
            fed = times(h, kernel, self.how, owner)
        z, g = jnp.moveaxis((w(x) + fed).reshape(-1, N, 2), -1, 0)
        h = sigmoid(z) * h + (1 - sigmoid(z)) * jnp.tanh(g)
        return h, h


class _Kernel(nn.Module):
    """The kernel that a Dense layer of this name would have."""

    features: int

    @nn.compact
    def __call__(self, h):
        return self.param("kernel", normal, (h.shape[-1], self.features))


class Masked(Cell):
    """A wiring that a mask fixes, as a neural circuit policy has it."""

    @nn.compact
    def __call__(self, h, x):
        mask = (np.arange(N * N).reshape(N, N) % 3 != 1).astype(float)
        u = jax.nn.softplus(self.raw("u", N, N)) * mask
        h = 0.6 * h + jnp.tanh(x @ self.raw("w", IN, N) + times(h, u, self.how))
        return h, h


class Transposed(Cell):
    """A GRU as PyTorch stores it: kernels transposed, gates in one, two biases."""

    @nn.compact
    def __call__(self, h, x):
        w, u = self.raw("w", 3 * N, IN), self.raw("u", 3 * N, N)
        fed = x @ w.T + self.raw("b_w", 3 * N)[None]
        seen = times(h, u.T, self.how) + self.raw("b_u", 3 * N)[None]
        (r, z, n), (hr, hz, hn) = jnp.split(fed, 3, -1), jnp.split(seen, 3, -1)
        r, z = sigmoid(r + hr), sigmoid(z + hz)
        h = (1 - z) * jnp.tanh(n + r * hn) + z * h
        return h, h


class WeightNormed(Cell):
    """Kernels of unit columns, times a gain."""

    @nn.compact
    def __call__(self, h, x):
        v = self.raw("v", N, N)
        u = self.row("g") * v / jnp.linalg.norm(v, axis=0, keepdims=True)
        h = 0.6 * h + jnp.tanh(x @ self.raw("w", IN, N) + times(h, u, self.how))
        return h, h


class LowRank(Cell):
    """Recurrent weights that are a product."""

    @nn.compact
    def __call__(self, h, x):
        w = self.raw("m", N, 2) @ self.raw("n", 2, N)
        h = 0.6 * h + 0.4 * (times(jnp.tanh(h), w, self.how) + x @ self.raw("w", IN, N))
        return h, h


class Fused(Cell):
    """One raw matrix for input, state and bias."""

    @nn.compact
    def __call__(self, h, x):
        w = self.raw("w", IN + N + 1, N)
        ones = jnp.ones((len(x), 1))
        if self.how == WHOLE:
            drive = jnp.concatenate([x, h, ones], -1) @ w
        else:
            drive = x @ w[:IN] + times(h, w[IN:-1], self.how) + w[-1:]
        h = 0.5 * h + jnp.tanh(drive)
        return h, h


class Lifted(Cell):
    """Layers inside `nn.jit` and `nn.remat`."""

    lift: Any = nn.jit

    @nn.compact
    def __call__(self, h, x):
        fed = self.lift(nn.Dense)(N, name="i")(x)
        if self.how == WHOLE:
            fed = fed + self.lift(nn.Dense)(N, use_bias=False, name="h")(h)
        else:
            fed = fed + times(h, _Kernel(N, name="h")(h), self.how)
        h = 0.5 * h + jnp.tanh(fed)
        return h, h


class Peephole(Two):
    """An LSTM whose gates see the cell's state too, by a weight a unit."""

    @nn.compact
    def __call__(self, carry, x):
        h, c = carry
        fed = x @ self.raw("w", IN, 4 * N) + times(h, self.raw("u", N, 4 * N), self.how)
        i, f, g, o = jnp.split(fed + self.raw("b", 4 * N)[None], 4, -1)
        p = self.raw("p", 3, N)
        i, f = sigmoid(i + p[:1] * c), sigmoid(f + p[1:2] * c)
        c = f * c + i * jnp.tanh(g)
        h = sigmoid(o + p[2:] * c) * jnp.tanh(c)
        return (h, c), h


class Traces(Cell):
    """Each unit keeps a memory of three numbers beside its state."""

    @nn.compact
    def __call__(self, carry, x):
        h, memory = carry
        fade = sigmoid(self.raw("fade", N, 3))[None]
        memory = fade * memory + (1 - fade) * h[..., None]
        seen = (memory * self.raw("mix", N, 3)[None]).sum(-1)
        h = jnp.tanh(self.fed(h, x) + seen)
        return (h, memory), h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        h = super().initialize_carry(rng, input_shape)
        return h, jnp.stack([h, h / 2, h / 3], -1)


class Heads(Cell):
    """A state in heads, each with a kernel of its own."""

    @nn.compact
    def __call__(self, h, x):
        r = self.raw("r", 2, N // 2, N // 2)
        if self.how == WHOLE:
            fed = jnp.einsum("bhk,hkd->bhd", h, r)
        else:
            full = jax.scipy.linalg.block_diag(*r)
            fed = times(h.reshape(-1, N), full, self.how).reshape(h.shape)
        drive = (x @ self.raw("w", IN, N)).reshape(h.shape)
        h = 0.5 * h + jnp.tanh(drive + fed)
        return h, h.reshape(-1, N)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return super().initialize_carry(rng, input_shape).reshape(*input_shape[:-1], 2, N // 2)


class Alone(Cell):
    """Written for one example, and mapped over the batch; weights stand on the left."""

    @nn.compact
    def __call__(self, h, x):
        w, u, b = self.raw("w", N, IN), self.raw("u", N, N), self.raw("b", N)
        if self.how == WHOLE:
            h = jax.vmap(lambda h, x: 0.5 * h + jnp.tanh(w @ x + u @ h + b))(h, x)
        else:
            h = 0.5 * h + jnp.tanh(x @ w.T + times(h, u.T, self.how) + b[None])
        return h, h


class Mapped(Cell):
    """Flax layers, called for one example and mapped over the batch."""

    @nn.compact
    def __call__(self, h, x):
        w = nn.Dense(N, name="w")
        if self.how != WHOLE:
            h = 0.5 * h + jnp.tanh(w(x) + times(h, _Kernel(N, name="u")(h), self.how))
            return h, h
        u = nn.Dense(N, use_bias=False, name="u")
        if self.is_initializing():  # Flax makes no parameters inside jax.vmap
            w(x), u(h)
        h = jax.vmap(lambda h, x: 0.5 * h + jnp.tanh(w(x) + u(h)))(h, x)
        return h, h


class Twice(Cell):
    """One layer, called for the input and for the carry; and a gain that all units share."""

    @nn.compact
    def __call__(self, h, x):
        x = jnp.pad(x, ((0, 0), (0, N - IN)))
        if self.how == WHOLE:
            layer = nn.Dense(N, use_bias=False, name="w")
            fed = layer(h) + layer(x)
        else:
            kernel = _Kernel(N, name="w")(h)
            fed = times(h, kernel, self.how) + x @ kernel
        h = 0.5 * h + self.raw("gain", 1)[None] * jnp.tanh(fed)
        return h, h


class Namesakes(Cell):
    """A parameter that works twice, and one called like the second of its uses."""

    @nn.compact
    def __call__(self, h, x):
        x = jnp.pad(x, ((0, 0), (0, N - IN)))
        w = self.raw("w", N, N)
        h = 0.5 * h + jnp.tanh(x @ w + times(h, w, self.how) + 2 * x @ self.raw("w_2", N, N))
        return h, h


class Tied(Cell):
    """Its output layer is its input layer, turned about; one kernel entry works by itself, too."""

    @nn.compact
    def __call__(self, h, x):
        w, u = self.raw("w", IN, N), self.raw("u", N, N)
        drive = x @ w + times(h, u, self.how) - 0.5 * h * jnp.diagonal(u)[None]
        h = 0.5 * h + jnp.tanh(drive)
        return h, h @ w.T


class NNXRaw(nnx.Module):
    """An NNX cell of bare parameters, one of them inside `jax.checkpoint`."""

    def __init__(self, how: str = WHOLE):
        key = jax.random.key(0)
        self.w, self.u = nnx.Param(normal(key, (IN, N))), nnx.Param(normal(key, (N, N)))
        self.how = how

    def __call__(self, h, x):
        if self.how == WHOLE:
            fed = jax.checkpoint(lambda h, u: jnp.tanh(h) @ u)(h, self.u[...])
        else:
            fed = times(jnp.tanh(h), self.u[...], self.how)
        h = 0.5 * h + 0.5 * (x @ self.w[...] + fed)
        return h, h

    def initialize_carry(self, input_shape, rngs=None):
        return jnp.full((*input_shape[:-1], N), 0.3)


class NNXMapped(nnx.Module):
    """NNX layers inside `nnx.vmap`: over examples, and over as many kernels as there are units."""

    def __init__(self, how: str = WHOLE):
        rngs = nnx.Rngs(0)
        self.w = nnx.Linear(IN, N, rngs=rngs)
        self.u = _members(rngs.split(N))
        self.how = how

    def __call__(self, h, x):
        if self.how == WHOLE:
            apply = lambda layer, value: layer(value)  # noqa: E731
            fed = nnx.vmap(apply, in_axes=(None, 0))(self.w, x)
            fed = fed + nnx.vmap(apply, in_axes=(0, None))(self.u, h).mean(0)
        else:
            fed = self.w(x) + times(h, self.u.kernel[...].mean(0), self.how)
        h = 0.5 * h + 0.5 * jnp.tanh(fed)
        return h, h

    def initialize_carry(self, input_shape, rngs=None):
        return jnp.full((*input_shape[:-1], N), 0.3)


@nnx.vmap
def _members(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(N, N, use_bias=False, rngs=rngs)


# ------------------------------------------------------------------------------------------------
# Cells in which units meet.


class ResetsBefore(Cell):
    """A GRU that resets before its recurrent weights."""

    @nn.compact
    def __call__(self, h, x):
        r, z = sigmoid(self.fed(h, x, "_r")), sigmoid(self.fed(h, x, "_z"))
        h = z * h + (1 - z) * jnp.tanh(self.fed(r * h, x))
        return h, h


class Normed(Cell):
    """Drives that are normalised over units."""

    @nn.compact
    def __call__(self, h, x):
        h = 0.5 * h + jnp.tanh(nn.LayerNorm()(self.fed(h, x)))
        return h, h


class Legendre(Two):
    """A linear memory of what all units write, read by all of them."""

    @nn.compact
    def __call__(self, carry, x):
        h, m = carry
        a = 0.2 * np.tri(N) - 0.1
        m = m + m @ a + (h @ self.raw("e", N, 1) + x @ self.raw("f", IN, 1)) * np.ones((1, N))
        h = jnp.tanh(self.fed(h, x) + m @ self.raw("r", N, N))
        return (h, m), h


class Unfolded(Cell):
    """An ODE solver that applies the recurrent weights three times a step."""

    @nn.compact
    def __call__(self, h, x):
        w, u = self.raw("w", IN, N), self.raw("u", N, N)
        h = jax.lax.fori_loop(0, 3, lambda i, h: h + 0.2 * (jnp.tanh(x @ w + h @ u) - h), h)
        return h, h


class Pairwise(Cell):
    """Each pair of units has a sigmoid of its own, as the synapses of a worm."""

    @nn.compact
    def __call__(self, h, x):
        steep, at, w = self.raw("steep", N, N), self.raw("at", N, N), self.raw("u", N, N)
        felt = sigmoid(steep[None] * (h[:, :, None] - at[None])) * w[None]
        h = 0.6 * h + 0.3 * (felt.sum(1) + x @ self.raw("w", IN, N))
        return h, h


class Kind(NamedTuple):
    """A kind of cell.

    Attributes:
        make: `how -> cell`, a Linen one or an NNX one.
        refusal: what a local rule says to it; empty if it takes the cell.
    """

    make: Callable[[str], Any]
    refusal: str = ""


KINDS: dict[str, Kind] = {
    "vanilla": Kind(Vanilla),
    "ctrnn": Kind(CTRNN),
    "ltc": Kind(LTC),
    "lrc": Kind(LRC),
    "hopfield": Kind(Hopfield),
    "rtu": Kind(RTU),
    "state_space": Kind(StateSpace),
    "minimal_gated": Kind(MinimalGated),
    "slstm": Kind(ScalarLSTM),
    "interleaved": Kind(Interleaved),
    "interleaved_layers": Kind(InterleavedLayers),
    "masked": Kind(Masked),
    "transposed": Kind(Transposed),
    "weight_normed": Kind(WeightNormed),
    "low_rank": Kind(LowRank),
    "fused": Kind(Fused),
    "jitted": Kind(Lifted),
    "rematerialised": Kind(lambda how: Lifted(how, lift=nn.remat)),
    "peephole": Kind(Peephole),
    "traces": Kind(Traces),
    "heads": Kind(Heads),
    "alone": Kind(Alone),
    "mapped": Kind(Mapped),
    "twice": Kind(Twice),
    "namesakes": Kind(Namesakes),
    "tied": Kind(Tied),
    "nnx_raw": Kind(NNXRaw),
    "nnx_mapped": Kind(NNXMapped),
    "resets_before": Kind(ResetsBefore, "layer u is fed by another layer"),
    "normed": Kind(Normed, "reaches other units than its own.* normalisation"),
    "legendre": Kind(Legendre, "fed by another layer|reaches (another's|other units)"),
    "unfolded": Kind(Unfolded, r"layer u \(use 2\) is fed by another layer"),
    "pairwise": Kind(Pairwise, "reaches another's outside any layer"),
}
