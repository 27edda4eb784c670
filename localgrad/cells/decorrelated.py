"""`DecorrelatedCell`: a cell with decorrelation of its state, and of its input."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from localgrad.core.model.decorrelation import Decorrelation


class DecorrelatedCell(nn.RNNCellBase):
    r"""A cell whose state is decorrelated, and with it what the cell and all above it receive next.

    With `h_t = cell(s_{t-1}, D_0 x_t)` the wrapped cell's new state, one step is::

        s_t = D_1 h_t

    and both the carry and the output are `s_t` [B, N]. D_0 is there with `inputs=True` only. The
    matrices are the identity at first, so that it begins as the cell itself, and learn by
    `localgrad.decorrelation`; `localgrad.mix` puts that beside a rule for the weights.

    Args:
        cell: a Flax Linen cell whose carry is one array [B, N], which is its output too. What it
            leaks or keeps of its state it keeps of the decorrelated one.
        inputs: whether its input [B, I] is decorrelated too.

    Raises:
        ValueError: for what is no Linen cell, for a carry of several arrays, such as an LSTM's, and
            for an output that is not the carry.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.DecorrelatedCell(nn.SimpleCell(8))
        >>> x = jnp.ones((4, 3))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> params = cell.init(jax.random.key(1), carry, x)["params"]
        >>> sorted(params), params["state"]["decorrelation"].shape
        (['cell', 'state'], (8, 8))

    Reference:
        Fernandez, Keemink and van Gerven, "Gradient-free training of recurrent neural networks
        using random perturbations", Frontiers in Neuroscience, 2024,
        https://doi.org/10.3389/fnins.2024.1439155
    """

    cell: nn.Module
    inputs: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.cell, nn.Module) or not hasattr(self.cell, "initialize_carry"):
            raise ValueError(
                f"cell must be a Flax Linen cell; got {type(self.cell).__name__}. A layer without "
                "a carry, or an NNX module, takes a matrix of its own in your code."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `(s [B, N], x [B, I]) -> (s, s)`."""
        if self.inputs:
            x = self._layer("input")(x)
        inner: Any = self.cell
        carry, y = inner(carry, x)
        if y is not carry:
            raise ValueError(
                f"cell must give its carry as its output; {type(inner).__name__} gives another, "
                "which would be lost. Put a localgrad.Decorrelation where it belongs in a cell of "
                "your own."
            )
        state = self._layer("state")(carry).astype(carry.dtype)
        return state, state

    def _layer(self, name: str) -> Decorrelation:
        """A matrix in the dtype of the cell's own parameters."""
        return Decorrelation(name=name, param_dtype=getattr(self.cell, "param_dtype", jnp.float32))

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        """The wrapped cell's initial carry."""
        inner: Any = self.cell
        carry = inner.initialize_carry(rng, input_shape)
        if not hasattr(carry, "shape"):
            raise ValueError(
                f"cell must have one array as its carry; that of {type(inner).__name__} is a "
                f"{type(carry).__name__} of {len(jax.tree.leaves(carry))}. Put a "
                "localgrad.Decorrelation where it belongs in a cell of your own."
            )
        return carry

    @property
    def num_feature_axes(self) -> int:
        """How many trailing axes of the input are features."""
        inner: Any = self.cell
        return inner.num_feature_axes
