"""What one time step's input looks like: given by an example, or told by the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp

from localgrad.core.model.decorrelation import NAME, Decorrelation
from localgrad.core.model.modules import Layer, Module
from localgrad.core.model.stack import parts, require_fit
from localgrad.core.params import Leaves, under


def example_spec(
    model: Any,
    params: Leaves,
    rule: str,
    example: Any,
    batch_size: int | None,
    *,
    needed: bool,
) -> Any:
    """One step's input with its batch axis, from `example` or from the parameters' shapes.

    Args:
        model: the user's model.
        params: its parameters; shapes suffice.
        rule: the rule's name, for messages.
        example: what the user gave, without the batch axis, or None.
        batch_size: B, or None (then 1).
        needed: raise if nothing tells the shape; else return None.

    Returns:
        Leaves `ShapeDtypeStruct` [B, ...], or None.
    """
    batch = batch_size or 1
    if example is not None:
        for leaf in jax.tree.leaves(example):
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise ValueError(
                    "example must hold arrays or jax.ShapeDtypeStruct, one time step's inputs "
                    f"without the batch axis; got {example!r}. Try example=batch.inputs[0, 0]."
                )
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((batch, *jnp.shape(a)), jnp.result_type(a)), example
        )
    spec = infer_example(model, params, batch)
    if spec is None and needed:
        raise ValueError(
            f"{rule} needs example=..., one time step's inputs without the batch axis, such as "
            "jax.tree.map(lambda a: a[0, 0], batch.inputs): no Dense or Embed layer takes them as "
            "they are, or joined to the carry, and the parameters fit inputs of several widths or "
            "of none. (If one should, check that the params are this model's.)"
        )
    return spec


def infer_example(model: Any, params: Leaves, batch: int) -> Any:
    """One step's input of `batch` examples as the model's first layer tells it, or None."""
    encoder, cells, prefixes, _ = parts(model)
    require_fit(model, params)
    if isinstance(model, nn.RNNCellBase) and model.num_feature_axes > 1:
        return None
    if encoder is not None:
        return infer_input(encoder, under(params, ("encoder",)), batch, is_cell=False)
    return infer_input(cells[0], under(params, prefixes[0]), batch, is_cell=True)


KERNELS = {"Dense": "kernel", "Linear": "kernel", Decorrelation.__name__: NAME}
"""Layers whose kernel tells how many features they take."""


class _Found(Exception):
    """Carries the shape of an input out of a half-run step."""

    def __init__(self, key: Any, spec: Any) -> None:
        super().__init__()
        self.key, self.spec = key, spec


class _Asked(dict):
    """A dict of inputs that makes each when it is asked for."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make

    @property
    def shape(self) -> NoReturn:
        """Raises where it is taken for an array, which JAX would only warn of."""
        raise TypeError("inputs by name are no array")

    ndim = size = dtype = shape

    def __missing__(self, key: Any) -> Any:
        self[key] = self.make(key)
        return self[key]


class _Cell(NamedTuple):
    """A module whose inputs are sought.

    Attributes:
        module: a cell, or a memoryless module called on x alone.
        params: its parameters; shapes suffice.
        batch: B.
        dtype: of inputs that are no symbols.
        is_cell: whether it takes a carry before x.
        by_name: whether x is a dict of arrays, and not one.
    """

    module: Module
    params: Leaves
    batch: int
    dtype: Any
    is_cell: bool
    by_name: bool

    def carry(self) -> list[Any]:
        """What it takes before x."""
        return [self.module.initialize_carry((self.batch, 1))] if self.is_cell else []

    def spec(self, width: int) -> jax.ShapeDtypeStruct:
        """An input of so many features."""
        return jax.ShapeDtypeStruct((self.batch, width), self.dtype)


def infer_input(module: Module, params: Leaves, batch: int, is_cell: bool) -> Any:
    """One step's input of `batch` examples, an array or a dict of them, as far as layers tell it.

    A layer with a kernel that takes an input as it is tells its size, and an `Embed` that it is a
    symbol. If one input is left that nothing takes so, say because it is joined to the carry
    first, what layers receive is compared between two sizes of it. Where no layer is seen, the
    rows of the parameters are tried as sizes.

    Args:
        module: a cell, or a memoryless module called on x alone.
        params: its parameters; shapes suffice.
        batch: B.
        is_cell: whether it takes a carry before x.

    Returns:
        Leaves `ShapeDtypeStruct`, or None if the layers do not tell.
    """
    dtype = jnp.result_type(jnp.float32, *params.values())
    for find, by_name in ((_told, False), (_told, True), (_fitting, False)):
        try:
            return find(_Cell(module, params, batch, dtype, is_cell, by_name))
        except Exception:  # whatever a made-up input breaks, only an example can tell the shape
            continue
    return None


def _fitting(cell: _Cell) -> Any:
    """The one width of x, among the parameters' axes and their differences, that a module takes.

    One wider than all axes is tried too: a module that takes it takes any.
    """
    sizes = {size for leaf in cell.params.values() for size in leaf.shape}
    widths = sizes | {a - b for a in sizes for b in sizes if a > b} | {max(sizes, default=0) + 1}
    (found,) = (spec for spec in map(cell.spec, sorted(widths)) if _runs(cell, spec))
    return found


def _runs(cell: _Cell, x: Any) -> bool:
    def step(params: Leaves, x: Any) -> Any:
        carry = [cell.module.initialize_carry(x.shape)] if cell.is_cell else []
        return carry, cell.module.apply(params, *carry, x)

    try:
        carry, out = jax.eval_shape(step, cell.params, x)
    except Exception:  # it does not fit
        return False
    return not cell.is_cell or jax.tree.map(jnp.shape, carry[0]) == jax.tree.map(jnp.shape, out[0])


def _told(cell: _Cell) -> Any:
    known: dict[Any, Any] = {}
    while True:
        try:
            asked, narrow = _run(cell, known)
            break
        except _Found as found:
            known[found.key] = found.spec
            if not cell.by_name:
                return found.spec
    unknown = [key for key in asked if key not in known]
    if unknown:
        (key,) = unknown  # two inputs side by side could have any sizes of the same sum
        _, wide = _run(cell, known, key)
        known[key] = cell.spec(_width(narrow, wide))
        x = known if cell.by_name else known[key]
        jax.eval_shape(cell.module.apply, cell.params, *cell.carry(), x)
    return known if cell.by_name else known[None]


def _run(cell: _Cell, known: dict[Any, Any], wide: Any = "") -> tuple[list[Any], list[Any]]:
    """One step, with a single feature for what is not known and two for what is to be wide.

    Returns:
        The inputs' names, and of each layer with a kernel its rows and how many features it
        received.
    """
    made: dict[Any, jax.Array] = {}
    received: list[tuple[int, int]] = []

    def make(key: Any) -> jax.Array:
        spec = known.get(key, cell.spec(2 if key == wide else 1))
        made[key] = jnp.zeros(spec.shape, spec.dtype)
        return made[key]

    def tap(layer: Layer, pre: Any) -> Any:
        own = under(cell.params, layer.path)
        key = next((key for key, x in made.items() if x is pre and key not in known), "")
        features = jax.tree.leaves(own)[0].shape[-1]
        if layer.kind == "Embed":
            if key != "":
                raise _Found(key, jax.ShapeDtypeStruct((cell.batch,), jnp.int32))
            return jnp.zeros((*pre.shape, features), cell.dtype)
        if layer.kind in KERNELS:
            rows = own[(KERNELS[layer.kind],)].shape[0]
            if key != "":
                raise _Found(key, cell.spec(rows))
            received.append((rows, pre.shape[-1]))
        return jnp.zeros((*pre.shape[:-1], features), cell.dtype)

    def step() -> Any:
        x = _Asked(make) if cell.by_name else make(None)
        return cell.module.tapped(cell.params, tap, *cell.carry(), x)

    jax.eval_shape(step)
    return list(made), received


def _width(narrow: list[tuple[int, int]], wide: list[tuple[int, int]]) -> int:
    """The size with which the first layer that an input reaches gets as much as it takes."""
    for (rows, one), (_, two) in zip(narrow, wide, strict=True):
        if one != two:
            more, rest = divmod(rows - one, two - one)
            if more >= 0 and not rest:
                return 1 + more
    raise ValueError("no layer tells the size of this input")
