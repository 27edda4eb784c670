"""`LeakyCell`: a linear layer followed by a low-pass filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from localgrad.cells.arguments import each, numbers
from localgrad.core.contract.checks import positive_integer


class LeakyCell(nn.RNNCellBase):
    r"""A layer of leaky linear units that do not feed each other.

    The equation of one step, with `kappa` the decay, is::

        y_t = kappa y_{t-1} + scale (W x_t + b)

    and both the carry and the output are `y_t` [B, N]. As the last cell of a `localgrad.Network`
    without a readout it is the leaky readout of a spiking network. `localgrad.deep_eprop` then
    holds the filtered eligibilities of e-prop, `ebar_t = kappa ebar_{t-1} + scale e_t`, each times
    the readout's weight; `localgrad.eprop` credits the cells below at the same step alone.

    Args:
        features: N, the number of units.
        decay: kappa, exp(-dt / tau), in [0, 1]: a number, or an array (N,) of one a unit.
        scale: what the drive is multiplied by, >= 0: a number or (N,). 1 - decay makes y an
            average.
        use_bias: whether there is a bias b.
        kernel_init: initializer of `W`.
        bias_init: initializer of `b`.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: if `decay` or `scale` is an array of another shape than (N,), or out of range.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.LeakyCell(2, decay=0.9, scale=0.1)
        >>> x = jnp.ones((4, 3))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> params = cell.init(jax.random.key(1), carry, x)["params"]
        >>> carry, y = cell.apply({"params": params}, carry, x)
        >>> y.shape, sorted(params)
        ((4, 2), ['i'])
    """

    features: int
    decay: Any
    scale: Any = 1.0
    use_bias: bool = True
    kernel_init: Callable[..., Any] = initializers.lecun_normal()
    bias_init: Callable[..., Any] = initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        hint = "With a time constant tau > 0 and a step dt, it is exp(-dt / tau)."
        self.decay = numbers("decay", self.decay, self.features, "lie in [0, 1]", hint)
        hint = "Let the kernel bear the sign."
        self.scale = numbers("scale", self.scale, self.features, "be 0 or more, and finite", hint)
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `(y [B, N], x [B, I]) -> (y, y)`."""
        drive = nn.Dense(
            self.features,
            name="i",
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )(x)
        carry = each(self.decay, carry) * carry + each(self.scale, drive) * drive
        return carry, carry

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        """Units at rest: zeros of shape `input_shape[:-1] + (N,)`."""
        del rng
        return jnp.zeros((*input_shape[:-1], self.features), self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        """The input has one feature axis."""
        return 1
