"""A model taken apart: encoder, cells and readout."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from localgrad.core.model.coded import CodedModule, coded
from localgrad.core.model.constants import Constants, ImpureStep, LinenModel
from localgrad.core.model.faults import begun, unrunnable
from localgrad.core.model.isolation import require_apart
from localgrad.core.model.modules import (
    LinenModule,
    Module,
    NNXModule,
    as_module,
    impure,
)
from localgrad.core.model.network import Network
from localgrad.core.model.nnx_network import NNXStack
from localgrad.core.model.synapses import Anatomy, dissect, is_unit
from localgrad.core.model.virtual import VirtualModule, virtual
from localgrad.core.model.wrapped import HeldModule
from localgrad.core.ownership.reach import dependencies
from localgrad.core.params import Leaves, Path, placed, under

OTHERWISE = (VirtualModule, CodedModule)
"""Modules whose carry is not quite the cell's own."""


class Stack(NamedTuple):
    """A model taken apart for B examples.

    Attributes:
        encoder: the memoryless module below the cells, or None.
        cells: the cells' anatomies, the lowest first.
        prefixes: where each cell's parameters lie: `('cells_0',)`, or `()` for a bare cell.
        readout: the memoryless module above the cells, or None.
        initial: each cell's initial carry, leaves [B, N].
        fed: shape and dtype of each cell's input for one step.
        outputs: shape and dtype of the model's output for one step.
        learning: the parameters that a rule is for, or None for all.
    """

    encoder: Any
    cells: tuple[Anatomy, ...]
    prefixes: tuple[Path, ...]
    readout: Module | None
    initial: tuple[Any, ...]
    fed: tuple[Any, ...]
    outputs: Any
    learning: frozenset[Path] | None = None

    def name(self, level: int) -> str:
        """How messages and states call a cell."""
        return "/".join(self.prefixes[level]) or "cell"

    def asks(self, head: Path) -> bool:
        """Whether a rule is for a parameter, or for any of those below a path."""
        return self.learning is None or any(path[: len(head)] == head for path in self.learning)

    def narrowed(self, learning: frozenset[Path]) -> Stack:
        """The same for a rule that is for these parameters alone, or what is made of them."""
        made = {path for path, origin in self.origins.items() if learning.intersection(origin)}
        stack = self._replace(learning=learning | made)
        if stack.encoder is None or stack.asks(("encoder",)):
            return stack
        return stack._replace(encoder=HeldModule(stack.encoder))

    @property
    def by_weights(self) -> list[tuple[Path, VirtualModule]]:
        """The cells that are seen by their weights, and where their parameters lie."""
        modules = [cell.module for cell in self.cells]
        each = zip(self.prefixes, modules, strict=True)
        return [(prefix, module) for prefix, module in each if isinstance(module, VirtualModule)]

    @property
    def origins(self) -> dict[Path, list[Path]]:
        """The parameters of which each virtual leaf of its cells is made."""
        return {
            prefix + path: [prefix + own for own in origin]
            for prefix, module in self.by_weights
            for path, origin in module.origins().items()
        }

    def see(self, params: Leaves) -> Leaves:
        """What its cells take for parameters: of those seen by their weights, the virtual leaves.

        Args:
            params: the model's own; shapes suffice.

        Returns:
            The leaves that the cells' anatomies speak of.
        """
        if not self.by_weights:
            return params
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in params.values()):
            return jax.eval_shape(self._seen, params)
        return self._seen(params)

    def _seen(self, params: Leaves) -> Leaves:
        found = dict(params)
        for prefix, module in self.by_weights:
            own = under(params, prefix)
            found = {path: v for path, v in found.items() if path not in placed(own, prefix)}
            found |= placed(module.see(own), prefix)
        return found

    def gave(self, params: Leaves, grads: Leaves) -> Leaves:
        """Gradients of what `see` gives as gradients of the parameters themselves."""
        if not self.by_weights:
            return grads
        seen, pull = jax.vjp(self._seen, params)
        return pull({path: grads[path].astype(leaf.dtype) for path, leaf in seen.items()})[0]

    @property
    def levels(self) -> range:
        """The cells' numbers, the lowest first."""
        return range(len(self.cells))

    def below(self, params: Leaves, level: int) -> list[Path]:
        """The paths of the parameters below a cell: of the encoder, and of the lower cells."""
        found = [path for path in params if path[:1] == ("encoder",) and self.encoder is not None]
        for prefix in self.prefixes[:level]:
            found += [path for path in params if path[: len(prefix)] == prefix]
        return found

    def pack(self, carries: Any) -> Any:
        """The cells' carries as the model's own carry."""
        own = tuple(
            cell.module.own_carry(carry) if isinstance(cell.module, OTHERWISE) else carry
            for cell, carry in zip(self.cells, carries, strict=True)
        )
        return own[0] if self.prefixes[0] == () else own

    def unpack(self, carry: Any) -> tuple[Any, ...]:
        """The model's own carry as the cells' carries."""
        each = (carry,) if self.prefixes[0] == () else tuple(carry)
        return tuple(
            cell.module.enter_carry(own) if isinstance(cell.module, OTHERWISE) else own
            for cell, own in zip(self.cells, each, strict=True)
        )


def parts(model: Any) -> tuple[Module | None, list[Module], list[Path], Module | None]:
    """Encoder, cells, the cells' prefixes in params, and readout."""
    module = as_module(model)
    network, fixed = model, None
    if isinstance(model, LinenModel):
        network, fixed = model.module, model.constants
    if not isinstance(network, Network | NNXStack):
        return None, [module], [()], None
    names: list[Path] = [(f"cells_{i}",) for i in range(len(network.cells))]
    if isinstance(network, NNXStack):
        return network.encoder, list(network.cells), names, network.readout
    named = zip(network.cells, names, strict=True)
    cells: list[Module] = [_free(cell, fixed, *name) for cell, name in named]
    encoder = _free(network.encoder, fixed, "encoder")
    return encoder, cells, names, _free(network.readout, fixed, "readout")


def require_fit(model: Any, params: Leaves) -> None:
    """Raises unless the parameters are those of the model, as far as their paths tell."""
    encoder, cells, prefixes, readout = parts(model)
    tops = {path[0] for path in params}
    if isinstance(model, NNXModule):
        expected, found = set(model.paths), set(params)
    elif prefixes[0]:
        expected, found = {prefix[0] for prefix in prefixes}, set(tops)
        found -= {name for name, module in _ends(encoder, readout) if module}
    else:
        expected, found = set(), tops & {"params"}  # the one sign of a whole variables dict
    if not params or expected != found:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise ValueError(
            f"params do not fit {cells[0].name if not prefixes[0] else 'this Network'}: their top "
            f"level is {sorted(tops)}, missing are {missing}, unknown are {unknown}. Pass the "
            "'params' entry of this model's variables: model.init(key, carry, x)['params'], or "
            "what localgrad.from_nnx returned."
        )


def _free(module: Any, fixed: Constants | None, name: str) -> Any:
    """A part of a network by itself, with its own constants."""
    if module is None:
        return None
    own = None if fixed is None else fixed.under(name)
    return LinenModule(module.clone(parent=None, name=None), own)


def assemble(model: Any, params: Leaves, x: Any, held_statistics: bool = False) -> Stack:
    """Takes a model apart.

    Args:
        model: a Flax cell or `Network`.
        params: its parameters; shapes suffice.
        x: one step's input of B examples, leaves [B, ...]; shapes suffice.
        held_statistics: whether the statistics of normalisations in cells carry no credit.

    Returns:
        The stack.
    """
    encoder, cells, prefixes, readout = parts(model)
    if held_statistics:
        cells = [dataclasses.replace(cell, held_statistics=True) for cell in cells]
    require_fit(model, params)
    z = x if encoder is None else _emits("encoder", encoder, under(params, ("encoder",)), x)
    anatomies, initial, fed = [], [], []
    keys = jax.random.split(jax.random.key(0), len(cells))  # as Network.initialize_carry does
    for cell, prefix, key in zip(cells, prefixes, keys, strict=True):
        own = under(params, prefix)
        cell, carry, z_next = _settled(cell, own, z, key if prefix else jax.random.key(0))
        anatomy, carry = _taken_apart(cell, own, carry, z)
        anatomies.append(anatomy)
        initial.append(carry)
        fed.append(z)
        z = z_next
    outputs = z if readout is None else _emits("readout", readout, under(params, ("readout",)), z)
    return Stack(
        encoder,
        tuple(anatomies),
        tuple(prefixes),
        readout,
        tuple(initial),
        tuple(fed),
        outputs,
    )


def _taken_apart(cell: Module, params: Leaves, carry: Any, x: Any) -> tuple[Anatomy, Any]:
    """A cell by its layers; by its weights, where its layers cannot be told. And its carry."""
    try:
        return dissect(cell, params, carry, x), carry
    except ValueError as refusal:
        try:
            return _by_weights(virtual(cell, params, carry, x), params, carry, x)
        except ValueError:
            raise refusal from None


def _by_weights(module: Any, params: Leaves, carry: Any, x: Any) -> tuple[Anatomy, Any]:
    carry = module.units.split(carry)
    return dissect(module, jax.eval_shape(module.see, params), carry, x), carry


def seen_by_weights(stack: Stack, params: Leaves, *, every: bool = False) -> Stack:
    """The same model with cells seen by their weights.

    Args:
        stack: the model, taken apart.
        params: its parameters; shapes suffice.
        every: all cells, not only those with parameters that no layer holds and that are weights,
            or more than one number a unit.

    Returns:
        The stack, the same if there is no such cell.
    """
    cells, initial = list(stack.cells), list(stack.initial)
    for level, prefix in enumerate(stack.prefixes):
        cell, own = cells[level], under(params, prefix)
        if isinstance(cell.module, VirtualModule) or not (every or cell.unowned):
            continue
        at = own, initial[level], stack.fed[level]
        module = virtual(cell.module, *at)
        if (
            every
            or module.weighs(cell.unowned)
            or not all(is_unit(own[path], module.units.count) for path in cell.unowned_reach)
        ):
            cells[level], initial[level] = _by_weights(module, *at)
    return stack._replace(cells=tuple(cells), initial=tuple(initial))


def _ends(encoder: Any, readout: Any) -> list[tuple[str, Any]]:
    return [("encoder", encoder), ("readout", readout)]


def _emits(label: str, module: Module, params: Leaves, x: Any) -> Any:
    try:
        out = jax.eval_shape(module.apply, params, x)
    except Exception as error:
        if not params and isinstance(error, flax.errors.FlaxError):
            raise ValueError(
                f"params hold nothing for the {label} ({module.name}). Pass all of this model's "
                "params."
            ) from error
        raise impure(error, module.name) or error from error
    _require_floating(module, out)
    _require_used(label, module, params, x)
    require_apart(label, module, params, x)
    return out


def _settled(cell: Any, params: Leaves, x: Any, key: jax.Array) -> tuple[Any, Any, Any]:
    """A cell of a floating carry, the initial one in the dtype its step keeps, and its output."""
    _require_rank(cell, x)
    shape = jax.tree.leaves(x)[0].shape
    carry = begun(cell.name, shape, lambda: cell.initialize_carry(shape, key))
    _require_carry(cell, carry, shape[0])
    cell, carry = coded(cell, carry)
    for _ in range(3):
        try:
            new, y = jax.eval_shape(cell.apply, params, carry, x)
        except ImpureStep:
            raise
        except Exception as error:
            raise impure(error, cell.name) or unrunnable(cell.name, carry, x, error) from error
        if jax.tree.structure(new) != jax.tree.structure(carry) or any(
            a.shape != b.shape
            for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(carry), strict=True)
        ):
            shapes = jax.tree.map(lambda a: a.shape, (carry, new))
            raise ValueError(
                f"{cell.name} turns a carry of shapes {shapes[0]} into one of shapes {shapes[1]}; "
                "a recurrent step must keep them."
            )
        carry = jax.tree.map(lambda a, b: a.astype(jnp.promote_types(a.dtype, b.dtype)), carry, new)
    _require_floating(cell, y)
    if not cell.observes:
        _require_used("the cell", cell, params, carry, x)
    require_apart(cell.name, cell, params, carry, x)
    return cell, carry, y


def _require_used(label: str, module: Module, params: Leaves, *args: Any) -> None:
    """Raises for parameters that no output depends on, which no rule would ever change."""
    program = jax.make_jaxpr(module.apply)(params, *args)
    used = set().union(*dependencies(program.jaxpr))
    numbers = jax.tree.unflatten(jax.tree.structure(params), range(len(params)))
    for path in params:
        if numbers[path] not in used:
            raise ValueError(
                f"params hold {'/'.join(path)}, which {label} ({module.name}) does not use: it "
                "would never learn. Are they another model's, or of other settings?"
            )


def _require_carry(cell: Module, carry: Any, batch: int) -> None:
    """Raises unless the carry holds something of each example."""
    leaves = jax.tree.leaves(carry)
    if not leaves:
        raise ValueError(f"{cell.name} has an empty carry: it is a layer, not a recurrent cell.")
    for leaf in leaves:
        if leaf.ndim < 1 or leaf.shape[0] != batch:
            raise ValueError(
                f"{cell.name} keeps a carry of shape {leaf.shape}; each array of it must begin "
                f"with the batch axis, B = {batch}. Keep a counter as one number an example; a "
                "cell written for a single example needs nn.vmap around it."
            )


def _require_floating(module: Module, y: Any) -> None:
    """Raises if an output holds numbers that cannot carry credit."""
    if not all(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(y)):
        dtypes = jax.tree.map(lambda leaf: leaf.dtype.name, y)
        raise ValueError(
            f"{module.name} gives outputs of dtypes {dtypes}; all must be floating point. Compute "
            "what is integer from them outside the model."
        )


def _require_rank(cell: Module, x: Any) -> None:
    """Raises if one step's input has other axes than the cell says it takes."""
    axes = getattr(cell.module, "num_feature_axes", None) if isinstance(cell, LinenModule) else None
    shape = jax.tree.leaves(x)[0].shape
    if axes is not None and len(shape) != 1 + axes:
        raise ValueError(
            f"{cell.name} takes a batch axis and {axes} feature axes at each time step; it is fed "
            f"shape {shape}. Check the axes of batch.inputs [B, T, ...], of example (one step "
            "without the batch axis), and of what an encoder makes of them."
        )
