"""`RTUCell`: recurrent trace units, pairs of real units that turn by an angle of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from localgrad.cells.diagonal import across, phases, require_ring, ring
from localgrad.core.contract.checks import positive_integer


class RTUCell(nn.RNNCellBase):
    r"""Recurrent trace units: a complex diagonal recurrence in real numbers, with an activation.

    Each unit is a pair (h1, h2), turned by an angle and shrunk. The equations of one step are,
    with f the activation and a product for each unit::

        r = exp(-exp(nu_log))     theta = exp(theta_log)     gamma = sqrt(1 - r^2)
        u1_t = r cos(theta) h1_{t-1} - r sin(theta) h2_{t-1} + gamma (W_1 x_t)
        u2_t = r cos(theta) h2_{t-1} + r sin(theta) h1_{t-1} + gamma (W_2 x_t)
        h_t = f(u_t)              y_t = [h1_t, h2_t]         non-linear units
        h_t = u_t                 y_t = [f(h1_t), f(h2_t)]   if `linear`

    The carry is `(h1, h2)`, two arrays [B, N], and the output `y_t` is [B, 2 N]. No unit feeds
    another, so `rtrl` costs what `eprop` costs: 2 numbers for each parameter and example. On one
    layer `eprop` and `snap` give the same gradient, BPTT's, and `deep_eprop` gives it on stacks of
    any depth. Beside an `LRUCell`, gamma is tied to r, and the activation stands before the
    recurrence closes or right behind it.

    Args:
        features: N, the number of pairs.
        activation: f.
        linear: whether f leaves the recurrence alone.
        r_min: the least modulus r at first, in [0, 1).
        r_max: the largest, in (r_min, 1].
        max_phase: the largest angle theta at first, > 0, in radians.
        kernel_init: initializer of `W_1` and `W_2`.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: unless N is 1 or more, `0 <= r_min < r_max <= 1` and `max_phase > 0`.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.RTUCell(8)
        >>> x = jnp.ones((4, 3))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> params = cell.init(jax.random.key(1), carry, x)["params"]
        >>> (h1, h2), y = cell.apply({"params": params}, carry, x)
        >>> h1.shape, y.shape, sorted(params)
        ((4, 8), (4, 16), ['W_1', 'W_2', 'nu_log', 'theta_log'])

    Reference:
        Elelimy, White, Bowling and White, "Real-time recurrent learning using trace units in
        reinforcement learning", 2024, https://arxiv.org/abs/2409.01449
    """

    features: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    linear: bool = False
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 6.283185307179586
    kernel_init: Callable[..., Any] = initializers.lecun_normal()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        require_ring(self.r_min, self.r_max, self.max_phase)
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
        """One step: `((h1, h2) [B, N], x [B, I]) -> ((h1, h2), y [B, 2 N])`."""
        h1, h2 = carry
        in1, in2 = self._layer("W_1")(x), self._layer("W_2")(x)
        shape, dtype = (self.features,), self.param_dtype
        nu_log = self.param("nu_log", ring(self.r_min, self.r_max), shape, dtype)
        theta_log = self.param("theta_log", phases(self.max_phase), shape, dtype)
        nu, theta = jnp.exp(across(nu_log, in1)), jnp.exp(across(theta_log, in1))
        size, gamma = jnp.exp(-nu), jnp.sqrt(-jnp.expm1(-2 * nu))
        cos, sin = size * jnp.cos(theta), size * jnp.sin(theta)
        u1, u2 = cos * h1 - sin * h2 + gamma * in1, cos * h2 + sin * h1 + gamma * in2
        f1, f2 = self.activation(u1), self.activation(u2)
        return (u1, u2) if self.linear else (f1, f2), jnp.concatenate([f1, f2], axis=-1)

    @nn.nowrap
    def _layer(self, name: str) -> nn.Dense:
        return nn.Dense(
            self.features,
            name=name,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
        )

    @nn.nowrap
    def initialize_carry(
        self, rng: jax.Array, input_shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Units at rest: two arrays of zeros of shape `input_shape[:-1] + (N,)`."""
        del rng
        rest = jnp.zeros((*input_shape[:-1], self.features), self.param_dtype)
        return rest, rest

    @property
    def num_feature_axes(self) -> int:
        """The input has one feature axis."""
        return 1
