"""`RateCell`: the leaky rate unit of computational neuroscience."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers

from localgrad.core.contract.checks import positive_integer


class RateCell(nn.RNNCellBase):
    r"""A layer of leaky rate units.

    The equation of one step, with `alpha = dt / tau` the leak of each unit, is::

        a_t = (1 - alpha) a_{t-1} + alpha phi(W_i x_t + b + W_h a_{t-1})

    and both the carry and the output are `a_t` [B, N]. Past the cut of `W_h` its Jacobian is the
    constant leak `1 - alpha`: it is the cell RFLO was made for (Murray, "Local online learning in
    recurrent networks with random feedback", 2019, https://elifesciences.org/articles/43299).

    Args:
        features: N, the number of units.
        alpha: the leak, in (0, 1]: a number, or an array (N,) of one a unit. 1 is a plain RNN.
        learn_alpha: make `alpha` a parameter (N,), started from the value given.
        activation: phi, any elementwise function.
        kernel_init: initializer of `W_i`.
        recurrent_kernel_init: initializer of `W_h`.
        bias_init: initializer of `b`.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: if N is below 1, or `alpha` is an array of another shape than (N,) or lies
            outside (0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.RateCell(8, alpha=0.2)
        >>> x = jnp.ones((4, 3))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> params = cell.init(jax.random.key(1), carry, x)["params"]
        >>> carry, y = cell.apply({"params": params}, carry, x)
        >>> y.shape, sorted(params)
        ((4, 8), ['h', 'i'])
    """

    features: int
    alpha: Any = 1.0
    learn_alpha: bool = False
    activation: Callable[[jax.Array], jax.Array] = jnp.tanh
    kernel_init: Callable[..., Any] = initializers.lecun_normal()
    recurrent_kernel_init: Callable[..., Any] = initializers.orthogonal()
    bias_init: Callable[..., Any] = initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        alpha = np.asarray(self.alpha, np.float64)
        if alpha.shape not in ((), (self.features,)):
            raise ValueError(
                f"alpha must be a number or an array of shape ({self.features},), one leak a unit; "
                f"got shape {alpha.shape}."
            )
        if not np.all((alpha > 0) & (alpha <= 1)):
            raise ValueError(
                f"alpha must lie in (0, 1]; got values from {alpha.min()} to {alpha.max()}. "
                "With a time constant tau and a step dt, alpha = dt / tau."
            )
        self.alpha = tuple(alpha.tolist()) if alpha.ndim else float(alpha)
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `(a [B, N], x [B, I]) -> (a, a)`."""
        drive = nn.Dense(
            self.features,
            name="i",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )(x) + nn.Dense(
            self.features,
            name="h",
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.recurrent_kernel_init,
        )(carry)
        alpha = jnp.broadcast_to(self._leak(drive.dtype), drive.shape)
        carry = (1 - alpha) * carry + alpha * self.activation(drive)
        return carry, carry

    def _leak(self, dtype: Any) -> jax.Array:
        if not self.learn_alpha:
            return jnp.asarray(self.alpha, dtype)

        def init(_, shape, dtype):
            return jnp.broadcast_to(jnp.asarray(self.alpha, dtype), shape)

        return self.param("alpha", init, (self.features,), self.param_dtype).astype(dtype)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        """Units at rest: zeros of shape `input_shape[:-1] + (N,)`."""
        del rng
        return jnp.zeros((*input_shape[:-1], self.features), self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        """The input has one feature axis."""
        return 1
