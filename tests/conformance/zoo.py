"""Cells that no library ships, each beside the same equations in plain JAX for the oracles.

`how` says what recurrent layers send back, as in `oracles`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.conformance.oracles import CUT, DIAGONAL, dense, recurrent, sg


class Cell(nn.RNNCellBase):
    """A cell with one carry [B, N] unless it says otherwise."""

    features: int = 4

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        """Away from zero."""
        return jnp.full((*input_shape[: -self.num_feature_axes or None], self.features), 0.3)

    @property
    def num_feature_axes(self) -> int:
        """One axis of features."""
        return 1

    def layer(self, name: str, use_bias: bool = False) -> nn.Dense:
        """A layer onto all units."""
        return nn.Dense(self.features, use_bias=use_bias, name=name)


def leaky(h: jax.Array, drive: jax.Array) -> jax.Array:
    """One step of leaky units."""
    return 0.7 * h + 0.3 * jnp.tanh(drive)


class Concat(Cell):
    """One layer for input and carry together."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("w", use_bias=True)(jnp.concatenate([x, h], axis=-1)))
        return h, h


def concat(p, h, x, how):
    drive = dense(p["w"], jnp.concatenate([x, h if how not in (CUT, DIAGONAL) else sg(h)], -1))
    if how == DIAGONAL:
        drive += (h - sg(h)) * sg(jnp.diagonal(p["w"]["kernel"][x.shape[-1] :]))[None]
    h = leaky(h, drive)
    return h, h


class Skip(Cell):
    """Its output holds its input as it came; a leak a unit and a gain for all."""

    @nn.compact
    def __call__(self, h, x):
        gain = self.param("gain", nn.initializers.constant(0.7), ())
        decay = self.param("decay", nn.initializers.constant(0.6), (self.features,))[None]
        h = decay * h + gain * jnp.tanh(self.layer("i")(x) + self.layer("h")(h))
        return h, h * x


def skip(p, h, x, how):
    drive = dense(p["i"], x) + recurrent(p["h"], h, how)
    h = p["decay"][None] * h + p["gain"] * jnp.tanh(drive)
    return h, h * x


class Reads(Cell):
    """It holds its own output layer, and one layer for input and carry."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("w")(jnp.concatenate([x, h], axis=-1)))
        return h, nn.Dense(5, name="o")(h**2)


def reads(p, h, x, how):
    h, _ = concat(p, h, x, how)
    return h, dense(p["o"], h**2)


class Adaptive(Cell):
    """Two carries that drive each other within a unit."""

    @nn.compact
    def __call__(self, carry, x):
        v, a = carry
        v = 0.6 * v - 0.5 * a + jnp.tanh(self.layer("i")(x) + self.layer("h")(v))
        a = 0.8 * a + 0.3 * v**2
        return (v, a), v * jnp.cos(a)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        v = super().initialize_carry(rng, input_shape)
        return v, v / 2


def adaptive(p, carry, x, how):
    v, a = carry
    v = 0.6 * v - 0.5 * a + jnp.tanh(dense(p["i"], x) + recurrent(p["h"], v, how))
    a = 0.8 * a + 0.3 * v**2
    return (v, a), v * jnp.cos(a)


@jax.custom_vjp
def surrogate(v: jax.Array) -> jax.Array:
    """Tanh, with a derivative of its own for reverse mode alone, as many write spikes."""
    return jnp.tanh(v)


surrogate.defvjp(lambda v: (jnp.tanh(v), v), lambda v, q: (q / (1 + jnp.abs(v)) ** 2,))


class Tuned(Cell):
    """Parameters of the units: of shape (), (N,), and one that reaches the output only."""

    @nn.compact
    def __call__(self, h, x):
        ones = nn.initializers.ones_init()
        fade = jax.nn.sigmoid(self.param("fade", ones, ()))
        slope = self.param("slope", ones, (self.features,))[None]
        scale = self.param("scale", ones, (self.features,))[None]
        drive = self.layer("i")(x) + self.layer("h")(h) + slope * h
        h = fade * h + (1 - fade) * surrogate(drive)
        return h, scale * h**2


def tuned(p, h, x, how):
    fade = jax.nn.sigmoid(p["fade"])
    drive = dense(p["i"], x) + recurrent(p["h"], h, how) + p["slope"][None] * h
    h = fade * h + (1 - fade) * surrogate(drive)
    return h, p["scale"][None] * h**2


@jax.custom_jvp
def bent(v: jax.Array) -> jax.Array:
    """Sine, with a derivative of its own, as surrogate gradients have."""
    return jnp.sin(v)


bent.defjvp(lambda primals, tangents: (bent(*primals), 0.5 * tangents[0]))


class Nested(Cell):
    """Unit dynamics inside jit, custom derivatives, cond, scan and checkpoint."""

    @nn.compact
    def __call__(self, h, x):
        drive = self.layer("i")(x) + self.layer("h")(h)
        fed = jax.jit(lambda h, d: (bent(d), 0.7 * h))
        drive, h = jax.checkpoint(lambda h, d: fed(h, d))(h, drive)
        drive = jax.lax.cond(True, lambda d: 0.4 * d, lambda d: d, drive)
        h, _ = jax.lax.scan(lambda h, _: (0.9 * h + drive, None), h, None, length=3)
        return h, jnp.tanh(h)


def nested(p, h, x, how):
    drive = 0.4 * bent(dense(p["i"], x) + recurrent(p["h"], h, how))
    h = 0.7 * h
    for _ in range(3):
        h = 0.9 * h + drive
    return h, jnp.tanh(h)


class Symbols(Cell):
    """Its input layer is a table of symbols."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, nn.Embed(6, self.features, name="i")(x) + self.layer("h")(h))
        return h, h

    @property
    def num_feature_axes(self) -> int:
        return 0


def symbols(p, h, x, how):
    h = leaky(h, p["i"]["embedding"][x] + recurrent(p["h"], h, how))
    return h, h


class General(Cell):
    """Its layers are a `DenseGeneral` and an `Einsum`."""

    @nn.compact
    def __call__(self, h, x):
        drive = nn.DenseGeneral(self.features, name="i")(x)
        drive += nn.Einsum((self.features,) * 2, "bi,ij->bj", use_bias=False, name="h")(h)
        h = leaky(h, drive)
        return h, h


def general(p, h, x, how):
    h = leaky(h, dense(p["i"], x) + recurrent(p["h"], h, how))
    return h, h


class Late(Cell):
    """An output layer reads the carry that entered the step, which alone keeps it alive."""

    @nn.compact
    def __call__(self, h, x):
        new = jnp.tanh(self.layer("i", use_bias=True)(x) + self.layer("h")(h))
        return new, nn.Dense(2, name="o")(h)


def late(p, h, x, how):
    new = jnp.tanh(dense(p["i"], x) + recurrent(p["h"], h, how))
    return new, dense(p["o"], h)


class LeakyReads(Cell):
    """Unit parameters below an output layer as wide as the units."""

    @nn.compact
    def __call__(self, h, x):
        fade = self.param("fade", nn.initializers.constant(0.6), (self.features,))[None]
        scale = self.param("scale", nn.initializers.ones_init(), ())
        h = fade * h + jnp.tanh(self.layer("i")(x) + self.layer("h")(h)) * scale
        return h, self.layer("o")(h)


def leaky_reads(p, h, x, how):
    h = p["fade"][None] * h + jnp.tanh(dense(p["i"], x) + recurrent(p["h"], h, how)) * p["scale"]
    return h, dense(p["o"], h)


LOCAL = {
    f.__name__: (cell, f)
    for cell, f in (
        (Concat, concat),
        (Skip, skip),
        (Reads, reads),
        (Adaptive, adaptive),
        (Tuned, tuned),
        (Nested, nested),
        (Symbols, symbols),
        (General, general),
        (Late, late),
        (LeakyReads, leaky_reads),
    )
}
"""Cells that local rules take."""

NO_DIAGONAL = {"general": r"layer h \(Einsum\) .* Use localgrad\.eprop"}
"""Those in which no unit's weight on itself can be told, and the message of rules that need it."""


# ------------------------------------------------------------------------------------------------
# Cells that local rules refuse.


class ResetsBefore(Cell):
    """A GRU whose reset gate comes before its recurrent layer, so that units meet in one step."""

    @nn.compact
    def __call__(self, h, x):
        r = jax.nn.sigmoid(self.layer("ir")(x) + self.layer("hr")(h))
        n = jnp.tanh(self.layer("in")(x) + self.layer("hn")(r * h))
        h = 0.5 * h + 0.5 * n
        return h, h


class Normed(Cell):
    """LayerNorm over all drives."""

    @nn.compact
    def __call__(self, h, x):
        drive = self.layer("i")(x) + self.layer("h")(h)
        h = leaky(h, nn.LayerNorm(name="norm")(drive))
        return h, h


class Twice(Cell):
    """One layer, called for the input and for the carry."""

    @nn.compact
    def __call__(self, h, x):
        layer = self.layer("w")
        h = leaky(h, layer(h) + layer(jnp.pad(x, ((0, 0), (0, self.features - x.shape[-1])))))
        return h, h


class Mixed(Cell):
    """Units that meet outside any layer."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(jnp.roll(h, 1, axis=-1), self.layer("i")(x) + self.layer("h")(h))
        return h, h


class Stacked(Cell):
    """Two cells hidden in one."""

    @nn.compact
    def __call__(self, carry, x):
        below, x = nn.SimpleCell(self.features, name="below")(carry[0], x)
        above, x = nn.SimpleCell(self.features, name="above")(carry[1], x)
        return (below, above), x

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        h = super().initialize_carry(rng, input_shape)
        return h, h


class Matrix(Cell):
    """A bare matrix that no layer holds."""

    @nn.compact
    def __call__(self, h, x):
        kernel = self.param("kernel", nn.initializers.orthogonal(), (self.features,) * 2)
        h = leaky(h, self.layer("i")(x) + h @ kernel)
        return h, h


class WeightNormed(Cell):
    """A layer whose weights are normalised on the way."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("i")(x) + nn.WeightNorm(self.layer("h"))(h))
        return h, h


class Rematerialised(Cell):
    """A layer inside a lifted `nn.remat`."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("i")(x) + nn.remat(nn.Dense)(self.features, name="h")(h))
        return h, h


class Jitted(Cell):
    """A layer inside a lifted `nn.jit`."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("i")(x) + nn.jit(nn.Dense)(self.features, name="h")(h))
        return h, h


class InputGain(Cell):
    """A parameter on what its input layer receives."""

    @nn.compact
    def __call__(self, h, x):
        gain = self.param("gain", nn.initializers.ones_init(), ())
        h = leaky(h, self.layer("i")(gain * x) + self.layer("h")(h))
        return h, h


class NormedInput(Cell):
    """LayerNorm before its input layer."""

    @nn.compact
    def __call__(self, h, x):
        x = nn.LayerNorm(name="norm")(x)
        h = leaky(h, self.layer("i")(x) + self.layer("h")(h))
        return h, h


class RecurrentGain(Cell):
    """A parameter a unit, on what its recurrent layer receives."""

    @nn.compact
    def __call__(self, h, x):
        gain = self.param("gain", nn.initializers.ones_init(), (self.features,))[None]
        h = leaky(h, self.layer("i")(x) + self.layer("h")(gain * h))
        return h, h


class Clipped(Cell):
    """Units that meet only where their state is large."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("i")(x) + self.layer("h")(h))
        size = jnp.sqrt((h**2).sum(-1, keepdims=True))
        return h * jnp.minimum(1.0, 4.0 / size), h


class Tied(Cell):
    """One table of symbols for input and output."""

    def setup(self):
        self.e, self.h = nn.Embed(6, self.features), nn.Dense(self.features)

    def __call__(self, h, x):
        h = leaky(h, self.e(x) + self.h(h))
        return h, self.e.attend(h)

    @property
    def num_feature_axes(self) -> int:
        return 0


class Untied(Cell):
    """The same with a table for each."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, nn.Embed(6, self.features, name="e")(x) + nn.Dense(self.features, name="h")(h))
        return h, nn.Dense(6, use_bias=False, name="o")(h)

    @property
    def num_feature_axes(self) -> int:
        return 0


class WithoutAutapses(Cell):
    """Its recurrent kernel is also read directly."""

    @nn.compact
    def __call__(self, h, x):
        layer = self.layer("h")
        drive = self.layer("i")(x) + layer(h)
        h = leaky(h, drive - h * jnp.diagonal(layer.variables["params"]["kernel"])[None])
        return h, h


REFUSED = {
    InputGain: "parameter gain works on what layer i receives",
    NormedInput: "parameter norm/(bias|scale) works on what layer i receives",
    RecurrentGain: "parameter gain works on what layer h receives",
    Clipped: "outside any layer|reaches other units than its own",
    ResetsBefore: r"eprop cannot credit cell \(ResetsBefore\): layer hn is fed by another layer",
    Normed: r"layer i reaches other units than its own .* normalisation",
    Mixed: "the state of one unit reaches another's outside any layer",
    Stacked: r"is fed by another layer .*localgrad\.Network",
}
"""Cells that local rules refuse, and a pattern of the message."""

UNSEEN = (Matrix, WeightNormed, Rematerialised, Jitted, Twice, Tied, WithoutAutapses)
"""Cells with weights that no tap of a layer sees, or not all of; what local rules make of them is
asked of the like in `kinds.py`."""


class Counts(Cell):
    """A step count that all examples share."""

    @nn.compact
    def __call__(self, carry, x):
        h, count = carry
        h = leaky(h, self.layer("i")(x) + self.layer("h")(h) / count)
        return (h, count + 1), h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return super().initialize_carry(rng, input_shape), jnp.ones(())


class Complex(Cell):
    """A complex state."""

    @nn.compact
    def __call__(self, h, x):
        h = 0.9j * h + self.layer("i")(x)
        return h, h.real

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return super().initialize_carry(rng, input_shape).astype(complex)


class Dropped(Cell):
    """Dropout in the step."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("i")(x) + self.layer("h")(h))
        return h, nn.Dropout(0.5, deterministic=False)(h)


class BatchNormed(Cell):
    """Statistics that a step updates."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("i")(x) + self.layer("h")(h))
        return h, nn.BatchNorm(use_running_average=False)(h)
