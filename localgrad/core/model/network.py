"""`Network`: cells stacked between an optional encoder and an optional readout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from localgrad.core.model.faults import begun, unrunnable


class Network(nn.RNNCellBase):
    """Recurrent cells stacked one on another, with an optional encoder below and readout above.

    With `x_t` the input, one step is::

        z^0_t = encoder(x_t)
        c^l_t, z^l_t = cells[l](c^l_{t-1}, z^{l-1}_t)      for l = 1..L
        y_t = readout(z^L_t)

    It is itself a Flax cell, so `nn.RNN(network)` runs it, and every localgrad rule takes it.
    Local rules work through it one cell at a time, which is why they need the structure: a
    hand-written module that hides a stack inside one cell is refused.

    Args:
        cells: Flax Linen cells, the lowest first. Each must be an object of its own.
        readout: a Linen module from the last cell's output to the model's output, or None.
        encoder: a Linen module from the input to the first cell's input, or None.

    Raises:
        ValueError: if a cell is listed twice, is no cell, or there is none, and if one layer is
            both encoder and readout.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad
        >>> network = localgrad.Network((nn.GRUCell(8), nn.GRUCell(4)), readout=nn.Dense(2))
        >>> x = jnp.ones((16, 3))  # [B, I]
        >>> carry = network.initialize_carry(jax.random.key(0), x.shape)
        >>> params = network.init(jax.random.key(1), carry, x)["params"]
        >>> carry, y = network.apply({"params": params}, carry, x)
        >>> y.shape, sorted(params)
        ((16, 2), ['cells_0', 'cells_1', 'readout'])
    """

    cells: Sequence[nn.Module]
    readout: nn.Module | None = None
    encoder: nn.Module | None = None

    def __post_init__(self) -> None:
        if isinstance(self.cells, nn.Module):
            raise ValueError(
                f"cells must be a sequence of cells; got one {type(self.cells).__name__}. "
                "Write Network(cells=(cell,), ...)."
            )
        self.cells = tuple(self.cells)
        if not self.cells:
            raise ValueError("cells is empty; a Network needs at least one cell.")
        given = [*self.cells, *(m for m in (self.readout, self.encoder) if m is not None)]
        for module in given:
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"a Network is made of Linen modules; got {type(module).__name__}. Stack NNX "
                    "modules by model, params = localgrad.from_nnx(localgrad.NNXNetwork([cell], "
                    "readout=..., encoder=...))."
                )
        for cell in self.cells:
            if not hasattr(cell, "initialize_carry"):
                raise ValueError(
                    f"cells holds {type(cell).__name__}, which has no initialize_carry: put layers "
                    "without a carry into readout or encoder."
                )
            if not _tells_axes(cell):
                raise ValueError(
                    f"cells holds {type(cell).__name__}, which has no num_feature_axes: how many "
                    "axes of its input are features. Give it the property, as nn.RNNCellBase "
                    "asks for: `num_feature_axes = property(lambda self: 1)`."
                )
        if len({id(cell) for cell in self.cells}) < len(self.cells):
            raise ValueError(
                "cells holds the same cell object twice, so Flax would share its parameters. "
                "Make one object a layer: Network(cells=(nn.GRUCell(8), nn.GRUCell(8)))."
            )
        if self.encoder is not None and self.encoder is self.readout:
            raise ValueError(
                f"encoder and readout are the same {type(self.readout).__name__} object, of which "
                "Flax would keep one set of parameters. Make one object each. To tie them, write "
                "a cell that holds the layer and uses it twice: bptt, tbptt and rtrl take it."
            )
        super().__post_init__()

    def __call__(self, carry: tuple[Any, ...], x: Any) -> tuple[tuple[Any, ...], Any]:
        """One step: `(carries, x [B, ...]) -> (carries, y [B, ...])`."""
        if self.encoder is not None:
            x = self.encoder(x)
        carries = []
        for cell, cell_carry in zip(self.cells, carry, strict=True):
            cell_carry, x = _stepped(cell, cell_carry, x)
            carries.append(cell_carry)
        return tuple(carries), x if self.readout is None else self.readout(x)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple[Any, ...]:
        """The cells' initial carries for inputs of this shape, batch axes first."""
        batch = input_shape[: len(input_shape) - self.num_feature_axes]
        keys = jax.random.split(rng, len(self.cells))
        shapes = [batch + (1,) * cell.num_feature_axes for cell in self.cells]
        if self.encoder is None:
            shapes[0] = input_shape
        return tuple(
            begun(type(cell).__name__, shape, functools.partial(cell.initialize_carry, key, shape))
            for cell, key, shape in zip(self.cells, keys, shapes, strict=True)
        )

    @property
    def num_feature_axes(self) -> int:
        """How many trailing axes of the input are features: 0 under an `nn.Embed` encoder."""
        if self.encoder is None:
            return self.cells[0].num_feature_axes
        return 0 if isinstance(self.encoder, nn.Embed) else 1


def _stepped(cell: Any, carry: Any, x: Any) -> tuple[Any, Any]:
    """One step of a cell, or an error that names it."""
    try:
        return cell(carry, x)
    except jax.errors.JAXTypeError:  # of a transformation, not of what the cell was given
        raise
    except (TypeError, ValueError) as error:
        raise unrunnable(type(cell).__name__, carry, x, error) from error


def _tells_axes(cell: Any) -> bool:
    try:
        return hasattr(cell, "num_feature_axes")
    except NotImplementedError:  # what nn.RNNCellBase itself raises
        return False
