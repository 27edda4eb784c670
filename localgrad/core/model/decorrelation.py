"""`Decorrelation`: a layer that takes the correlations out of what it is given."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

NAME = "decorrelation"
"""What the layer's one parameter is called."""


class Decorrelation(nn.Module):
    r"""A square matrix D that learns to take the correlations out of what it is given.

    ::

        y = D x

    with D the identity at first, so that nothing changes until it learns: by
    `localgrad.decorrelation`, beside another rule for the weights (`localgrad.mix`). Put it before
    the layers that are to see less correlated inputs, in an encoder, a readout or a cell of yours;
    `localgrad.DecorrelatedCell` puts it around a cell. To every other rule it is a linear layer.

    Its one parameter, named `decorrelation`, is D transposed, [N, N], as the kernel of a Dense is.

    Args:
        dtype: of what is computed, or None for that of inputs and parameter.
        param_dtype: of the parameter.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> layer, x = localgrad.Decorrelation(), jnp.ones((4, 3))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> bool((layer.apply({"params": params}, x) == x).all())
        True

    Reference:
        Ahmad, Schrader and van Gerven, "Constrained parameter inference as a principle for
        learning", Transactions on Machine Learning Research, 2023, https://arxiv.org/abs/2203.13203
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., N] -> y [..., N]`."""
        kernel = self.param(NAME, _identity, (x.shape[-1], x.shape[-1]), self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        return x @ kernel


def _identity(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    del key
    return jnp.eye(shape[0], dtype=dtype)
