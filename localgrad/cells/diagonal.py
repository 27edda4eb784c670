"""`LRUCell`: the linear recurrent unit, a complex diagonal recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers

from localgrad.core.contract.checks import positive_integer


class LRUCell(nn.RNNCellBase):
    r"""A linear recurrent unit: complex units, each with itself as its only recurrence.

    The equations of one step are, with a product for each unit and h complex::

        lambda = exp(-exp(nu_log) + i exp(theta_log))
        h_t = lambda h_{t-1} + exp(gamma_log) ((B_re + i B_im) x_t)
        y_t = Re((C_re + i C_im) h_t) + D x_t

    The carry is `(Re h, Im h)`, two real arrays [B, N], and the output `y_t` is [B, O]. No unit
    feeds another within the cell, so the local rules are exact: on one layer `eprop`, `snap` and
    `rtrl` give BPTT's gradient, and `deep_eprop` gives it on stacks of any depth. `B` and `C` are
    layers; `nu_log`, `theta_log` and `gamma_log` are parameters (N,).

    The moduli of lambda begin uniform over the area of the ring from `r_min` to `r_max`, its
    phases uniform up to `max_phase`, and gamma at sqrt(1 - |lambda|^2), which keeps the size of h
    for inputs that are white in time.

    Args:
        features: N, the number of complex units.
        outputs: O, the size of y; None for N.
        skip: whether y has the term D x.
        r_min: the least modulus of lambda at first, in [0, 1).
        r_max: the largest, in (r_min, 1].
        max_phase: the largest phase of lambda at first, > 0, in radians.
        kernel_init: initializer of `B_re` and `B_im`; None for variance 1 / (2 fan-in).
        output_kernel_init: initializer of `C_re` and `C_im`.
        skip_kernel_init: initializer of `D`.
        dtype: dtype of the computation, real; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters, real.

    Raises:
        ValueError: unless N is 1 or more, `0 <= r_min < r_max <= 1` and `max_phase > 0`.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.LRUCell(8, outputs=5, r_min=0.5, r_max=0.99)
        >>> x = jnp.ones((4, 3))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> params = cell.init(jax.random.key(1), carry, x)["params"]
        >>> (re, im), y = cell.apply({"params": params}, carry, x)
        >>> re.shape, y.shape, params["nu_log"].shape
        ((4, 8), (4, 5), (8,))

    Reference:
        Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu and De, "Resurrecting recurrent neural
        networks for long sequences", 2023, https://arxiv.org/abs/2303.06349. Learnt online by
        Zucchet, Meier, Schug, Mujika and Sacramento, "Online learning of long-range dependencies",
        2023, https://arxiv.org/abs/2305.15947
    """

    features: int
    outputs: int | None = None
    skip: bool = True
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 6.283185307179586
    kernel_init: Callable[..., Any] = initializers.variance_scaling(0.5, "fan_in", "normal")
    output_kernel_init: Callable[..., Any] = initializers.lecun_normal()
    skip_kernel_init: Callable[..., Any] = initializers.lecun_normal()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        require_ring(self.r_min, self.r_max, self.max_phase)
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
        """One step: `((re, im) [B, N], x [B, I]) -> ((re, im), y [B, O])`."""
        re, im = carry
        in_re, in_im = self._layer("B_re", x), self._layer("B_im", x)
        nu_log = self.param(
            "nu_log", ring(self.r_min, self.r_max), (self.features,), self.param_dtype
        )
        theta_log = self.param(
            "theta_log", phases(self.max_phase), (self.features,), self.param_dtype
        )
        gamma_log = self.param("gamma_log", lambda *_: _gamma_log(nu_log))
        size = jnp.exp(-jnp.exp(across(nu_log, in_re)))
        phase, gamma = jnp.exp(across(theta_log, in_re)), jnp.exp(across(gamma_log, in_re))
        turn_re, turn_im = size * jnp.cos(phase), size * jnp.sin(phase)
        re, im = (
            turn_re * re - turn_im * im + gamma * in_re,
            turn_re * im + turn_im * re + gamma * in_im,
        )
        y = self._layer("C_re", re) - self._layer("C_im", im)
        return (re, im), y + self._layer("D", x) if self.skip else y

    @nn.nowrap
    def _layer(self, name: str, x: jax.Array) -> jax.Array:
        """One of the real maps that the complex ones are made of."""
        outputs = self.features if self.outputs is None else self.outputs
        inits = {"B": self.kernel_init, "C": self.output_kernel_init, "D": self.skip_kernel_init}
        return nn.Dense(
            self.features if name[0] == "B" else outputs,
            name=name,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=inits[name[0]],
        )(x)

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


def require_ring(r_min: float, r_max: float, max_phase: float) -> None:
    """Raises unless the eigenvalues have a place to begin in."""
    if not 0 <= r_min < r_max <= 1:
        raise ValueError(
            "the moduli of lambda must lie in a ring, 0 <= r_min < r_max <= 1; got "
            f"r_min={r_min} and r_max={r_max}."
        )
    if not 0 < max_phase < np.inf:
        raise ValueError(f"max_phase must be positive; got {max_phase}. 2 pi is the whole ring.")


def ring(r_min: float, r_max: float) -> Callable[..., jax.Array]:
    """An initializer of `nu_log`: moduli exp(-exp(nu_log)), uniform over the area of a ring."""
    least = max(r_min, 1e-3)  # a modulus of 0 has no logarithm
    most = min(r_max, 1 - 1e-5)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        square = jax.random.uniform(key, shape, jnp.float32, least**2, most**2)
        return jnp.log(-0.5 * jnp.log(square)).astype(dtype)

    return init


def phases(max_phase: float) -> Callable[..., jax.Array]:
    """An initializer of `theta_log`: phases exp(theta_log), uniform up to `max_phase`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        phase = max_phase * jax.random.uniform(key, shape, jnp.float32, 1e-4, 1.0)
        return jnp.log(phase).astype(dtype)

    return init


def _gamma_log(nu_log: jax.Array) -> jax.Array:
    """The log of sqrt(1 - |lambda|^2), of units with these moduli."""
    square = jnp.exp(-2 * jnp.exp(nu_log.astype(jnp.float32)))
    return (0.5 * jnp.log1p(-square)).astype(nu_log.dtype)


def across(leaf: jax.Array, like: jax.Array) -> jax.Array:
    """A parameter (N,) for each example of `like` [B, N]."""
    return jnp.broadcast_to(leaf.astype(like.dtype), like.shape)
