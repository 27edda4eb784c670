"""`ElementwiseLSTMCell`: gated units, each with itself as its only recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from localgrad.cells.diagonal import across
from localgrad.core.contract.checks import positive_integer


class ElementwiseLSTMCell(nn.RNNCellBase):
    r"""An LSTM whose gates see the input, and of the past their own unit alone (eLSTM).

    The equations of one step are, with `*` a product for each unit::

        z_t = tanh(W_z x_t + w_z * c_{t-1} + b_z)
        f_t = sigmoid(W_f x_t + w_f * c_{t-1} + b_f)
        c_t = f_t * c_{t-1} + (1 - f_t) * z_t
        y_t = sigmoid(W_o [x_t, c_t] + b_o) * c_t        without `output_gate`, y_t = c_t

    and the carry is `c_t` [B, N]. The output gate mixes units, but nothing comes back from it. So
    no unit ever feels another's past, and `rtrl` costs what `eprop` costs: one number for each
    parameter and example. On one layer `eprop` and `snap` give the same gradient, BPTT's, and
    `deep_eprop` gives it on stacks of any depth. `z`, `f` and `o` are layers; `w_z` and `w_f` are
    parameters (N,).

    Args:
        features: N, the number of units.
        output_gate: whether there is one.
        kernel_init: initializer of the layers' kernels.
        recurrent_init: initializer of `w_z` and `w_f`.
        bias_init: initializer of the biases.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.ElementwiseLSTMCell(8)
        >>> x = jnp.ones((4, 3))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> params = cell.init(jax.random.key(1), carry, x)["params"]
        >>> carry, y = cell.apply({"params": params}, carry, x)
        >>> y.shape, sorted(params), params["o"]["kernel"].shape
        ((4, 8), ['f', 'o', 'w_f', 'w_z', 'z'], (11, 8))

    Reference:
        Irie, Gopalakrishnan and Schmidhuber, "Exploring the promise and limits of real-time
        recurrent learning", 2023, https://arxiv.org/abs/2305.19044
    """

    features: int
    output_gate: bool = True
    kernel_init: Callable[..., Any] = initializers.lecun_normal()
    recurrent_init: Callable[..., Any] = initializers.normal(0.1)
    bias_init: Callable[..., Any] = initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `(c [B, N], x [B, I]) -> (c, y [B, N])`."""
        z = jnp.tanh(self._layer("z")(x) + self._own("w_z", carry))
        f = jax.nn.sigmoid(self._layer("f")(x) + self._own("w_f", carry))
        carry = f * carry + (1 - f) * z
        if not self.output_gate:
            return carry, carry
        seen = jnp.concatenate([x.astype(carry.dtype), carry], axis=-1)
        return carry, jax.nn.sigmoid(self._layer("o")(seen)) * carry

    @nn.nowrap
    def _own(self, name: str, carry: jax.Array) -> jax.Array:
        """What each unit hears of itself."""
        weights = self.param(name, self.recurrent_init, (self.features,), self.param_dtype)
        return across(weights, carry) * carry

    @nn.nowrap
    def _layer(self, name: str) -> nn.Dense:
        return nn.Dense(
            self.features,
            name=name,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        """Units at rest: zeros of shape `input_shape[:-1] + (N,)`."""
        del rng
        return jnp.zeros((*input_shape[:-1], self.features), self.param_dtype)

    @property
    def num_feature_axes(self) -> int:
        """The input has one feature axis."""
        return 1
