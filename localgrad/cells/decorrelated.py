"""`DecorrelatedCell`: a cell with decorrelation of its state, and of its input."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from localgrad.core.model.decorrelation import Decorrelation


class DecorrelatedCell(nn.RNNCellBase):
    r"""A cell whose state is decorrelated, and with it what the cell and all above it receive next.

    With `h_t = cell(s_{t-1}, D_0 x_t)` the wrapped cell's new state, one step is::

        s_t = D_1 h_t

    and both the carry and the output are `s_t` [B, N]. D_0 is there with `inputs=True` only. The
    matrices are the identity at first, so that it begins as the cell itself, and learn by
    `localgrad.decorrelation`; `localgrad.mix` puts that beside a rule for the weights.

    Args:
        cell: a Flax Linen cell whose carry is one array [B, N]. What it leaks or keeps of its state
            it keeps of the decorrelated one.
        inputs: whether its input [B, I] is decorrelated too.

    Raises:
        ValueError: for a carry of several arrays, such as an LSTM's.

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

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `(s [B, N], x [B, I]) -> (s, s)`."""
        if self.inputs:
            x = self._layer("input")(x)
        inner: Any = self.cell
        carry, _ = inner(carry, x)
        state = self._layer("state")(carry)
        return state, state

    def _layer(self, name: str) -> Decorrelation:
        """A matrix in the dtypes of the cell's own layers."""
        dtypes = {key: getattr(self.cell, key, None) for key in ("dtype", "param_dtype")}
        given = {key: dtype for key, dtype in dtypes.items() if dtype is not None}
        return Decorrelation(name=name, **given)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        """The wrapped cell's initial carry."""
        inner: Any = self.cell
        carry = inner.initialize_carry(rng, input_shape)
        if not hasattr(carry, "shape"):
            raise ValueError(
                f"cell must have one array as its carry; got {type(inner).__name__}, whose carry "
                f"holds {len(jax.tree.leaves(carry))}. Put a localgrad.Decorrelation where it "
                "belongs in a cell of your own."
            )
        return carry

    @property
    def num_feature_axes(self) -> int:
        """How many trailing axes of the input are features."""
        inner: Any = self.cell
        return inner.num_feature_axes
