"""NNX models: `NNXNetwork`, cells stacked between two layers, and `from_nnx`, the way in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx

from localgrad.core.model.modules import NNXModule, require_cell, split
from localgrad.core.params import Path


class NNXNetwork(nnx.Module):
    """Recurrent NNX cells stacked one on another, with an encoder below and a readout above.

    What `localgrad.Network` is for Linen modules. With `x_t` the input, one step is::

        z^0_t = encoder(x_t)
        c^l_t, z^l_t = cells[l](c^l_{t-1}, z^{l-1}_t)      for l = 1..L
        y_t = readout(z^L_t)

    It is itself an NNX cell, so `nnx.RNN(network)` runs it and `nnx.Optimizer` updates it, and
    every localgrad rule takes what `localgrad.from_nnx` makes of it. Its parameters lie under
    `cells_0`, `cells_1`, ..., `encoder` and `readout`, as those of a `localgrad.Network`.

    Args:
        cells: NNX cells, the lowest first. Each must be an object of its own.
        readout: an NNX module from the last cell's output to the model's output, or None.
        encoder: an NNX module from the input to the first cell's input, or None.

    Raises:
        ValueError: if a cell is listed twice, is no cell, or there is none.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad, optax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> cells = [nnx.GRUCell(3, 8, rngs=rngs), nnx.GRUCell(8, 4, rngs=rngs)]
        >>> network = localgrad.NNXNetwork(cells, readout=nnx.Linear(4, 2, rngs=rngs))
        >>> model, params = localgrad.from_nnx(network)
        >>> rule = localgrad.eprop(model, optax.l2_loss, feedback="random", key=jax.random.key(0))
        >>> batch = localgrad.Batch(jnp.ones((16, 5, 3)), jnp.ones((16, 5, 2)))
        >>> updates, state = rule(params, rule.init(params), batch)
        >>> sorted(updates), state.feedback["cells_0"].shape
        (['cells_0', 'cells_1', 'readout'], (8, 2))
    """

    def __init__(
        self,
        cells: Sequence[nnx.Module],
        readout: nnx.Module | None = None,
        encoder: nnx.Module | None = None,
    ) -> None:
        if isinstance(cells, nnx.Module) and not isinstance(cells, Sequence):
            raise ValueError(
                f"cells must be a sequence of cells; got one {type(cells).__name__}. Write "
                "NNXNetwork(cells=[cell], ...)."
            )
        cells = tuple(cells)
        if not cells:
            raise ValueError("cells is empty; an NNXNetwork needs at least one cell.")
        for module in (*cells, *(m for m in (readout, encoder) if m is not None)):
            if not isinstance(module, nnx.Module):
                raise ValueError(
                    f"an NNXNetwork is made of NNX modules; got {type(module).__name__}. Linen "
                    "modules go into localgrad.Network."
                )
        for cell in cells:
            require_cell(cell)
        if len({id(cell) for cell in cells}) < len(cells):
            raise ValueError(
                "cells holds the same cell object twice, which would share its parameters. Make "
                "one object a layer."
            )
        self.depth = len(cells)
        for name, cell in zip(self.names, cells, strict=True):
            setattr(self, name, cell)
        self.readout, self.encoder = readout, encoder

    @property
    def names(self) -> list[str]:
        """Under which name each cell lies."""
        return [f"cells_{level}" for level in range(self.depth)]

    @property
    def cells(self) -> tuple[Any, ...]:
        """The cells, the lowest first."""
        return tuple(getattr(self, name) for name in self.names)

    def __call__(self, carry: tuple[Any, ...], x: Any) -> tuple[tuple[Any, ...], Any]:
        """One step: `(carries, x [B, ...]) -> (carries, y [B, ...])`."""
        if self.encoder is not None:
            x = self.encoder(x)
        carries = []
        for cell, cell_carry in zip(self.cells, carry, strict=True):
            cell_carry, x = cell(cell_carry, x)
            carries.append(cell_carry)
        return tuple(carries), x if self.readout is None else self.readout(x)

    def initialize_carry(self, input_shape: tuple[int, ...], rngs: Any = None) -> tuple[Any, ...]:
        """The cells' initial carries for inputs of this shape, batch axes first."""
        batch = input_shape[: len(input_shape) - self.num_feature_axes]
        shapes = [batch + (1,) * getattr(cell, "num_feature_axes", 1) for cell in self.cells]
        if self.encoder is None:
            shapes[0] = input_shape
        return tuple(
            cell.initialize_carry(shape, rngs)
            for cell, shape in zip(self.cells, shapes, strict=True)
        )

    @property
    def num_feature_axes(self) -> int:
        """How many trailing axes of the input are features: 0 under an `nnx.Embed` encoder."""
        if self.encoder is None:
            return getattr(self.cells[0], "num_feature_axes", 1)
        return 0 if isinstance(self.encoder, nnx.Embed) else 1


@dataclasses.dataclass(frozen=True)
class NNXStack(NNXModule):
    """An `NNXNetwork` as a pure function of flat parameters, and its parts, each by itself."""

    cells: tuple[NNXModule, ...] = ()
    readout: NNXModule | None = None
    encoder: NNXModule | None = None


def from_nnx(module: nnx.Module) -> tuple[NNXModule, nnx.State]:
    """Splits an NNX cell into a model for localgrad's rules and its parameters.

    The module itself is left alone. Copies of its parameters come back as the `nnx.State` of its
    `nnx.Param` variables, so `nnx.Optimizer` and optax take the updates as they are, and
    `nnx.update(module, params)` puts back what was learnt. All else that it holds,
    arrays and variables of other kinds, are constants of the model, as they are now: a mask, a time
    constant, the running averages of a BatchNorm that uses them, random streams that no step draws
    from. A step that writes one of them or draws is refused, by the variable's name, once a rule
    traces it.

    Args:
        module: an NNX cell: `__call__(carry, x) -> (carry, y)` and `initialize_carry`, or a stack
            of cells with encoder and readout, `localgrad.NNXNetwork`, which rules need that treat
            these each in its own way.

    Returns:
        The model, static and hashable (its constants by their values), and its parameters.

    Raises:
        ValueError: if the module is no cell, holds a constant without a value, as inside
            `jax.jit`, or is a network whose parts share parameters.

    Example:
        >>> import jax.numpy as jnp, localgrad, optax
        >>> from flax import nnx
        >>> model, params = localgrad.from_nnx(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
        >>> rule = localgrad.eprop(model, optax.l2_loss)
        >>> batch = localgrad.Batch(jnp.ones((2, 5, 3)), jnp.ones((2, 5, 8)))
        >>> updates, state = rule(params, rule.init(params), batch)
        >>> updates["dense_h"]["kernel"].shape
        (8, 24)
    """
    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"module must be an NNX module; got {type(module).__name__}. A Linen module goes into "
            "a rule as it is."
        )
    require_cell(module)
    whole, params = split(module)
    return (_stack(module, whole) if isinstance(module, NNXNetwork) else whole), params


def _stack(network: NNXNetwork, whole: NNXModule) -> NNXStack:
    def part(module: nnx.Module | None) -> NNXModule | None:
        return None if module is None else split(module)[0]

    cells = {name: split(getattr(network, name))[0] for name in network.names}
    ends = {"readout": part(network.readout), "encoder": part(network.encoder)}
    _require_apart(whole.paths, cells | ends)
    own = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    return NNXStack(**own, **ends, cells=tuple(cells.values()))


def _require_apart(paths: tuple[Path, ...], parts: dict[str, NNXModule | None]) -> None:
    """Raises if a parameter belongs to two parts of a network."""
    for name, part in parts.items():
        for path in () if part is None else part.paths:
            if (name, *path) not in paths:
                raise ValueError(
                    f"{name}/{'/'.join(path)} is a parameter of another part of the network too. "
                    "Give each part its own."
                )
