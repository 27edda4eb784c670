"""What a module holds beside its parameters: arrays that no step may change."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from localgrad.core.model.calls import opened


class Constants:
    """Arrays of a module that are no parameters, such as masks and time constants.

    Equal and hashed by their values, so that a model that holds them is static: two models with
    equal constants share what is compiled and tried.

    Args:
        state: all that the module holds but its parameters: an `nnx.State`, or collections.
        name: the module's class, for messages.

    Raises:
        ValueError: if an array has no value yet, as inside `jax.jit` or `jax.eval_shape`.
    """

    def __init__(self, state: Any, name: str) -> None:
        self._name = name
        entries, self._treedef = jax.tree_util.tree_flatten_with_path(state)
        self._leaves = [_owned(leaf) for _, leaf in entries]
        shown = [_value_of(leaf, f"{name}{jax.tree_util.keystr(path)}") for path, leaf in entries]
        self._value = (self._treedef, *shown)

    def state(self) -> Any:
        """The arrays, as they were given."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    def under(self, name: str) -> Constants:
        """Of the collections of a Linen network, those of the part of this name."""
        every = self.state().items()
        own = {collection: tree[name] for collection, tree in every if name in tree}
        return Constants(own, self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)


@dataclasses.dataclass(frozen=True)
class LinenModel:
    """A Linen cell or `Network` with its constants, static; made by `localgrad.from_linen`."""

    module: nn.Module
    constants: Constants


def _owned(leaf: Any) -> Any:
    """The array, copied if its owner could change it."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _value_of(leaf: Any, label: str) -> Hashable:
    """What tells an array's value and type from all others'."""
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise ValueError(
            f"{label} holds {leaf}, which has no value here. Make the model outside of jax.jit, "
            "jax.vmap and jax.eval_shape, from a module with numbers."
        )
    keyed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    numbers = np.asarray(jax.random.key_data(leaf) if keyed else leaf)
    digest = hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).digest()
    return isinstance(leaf, np.ndarray), str(leaf.dtype), leaf.shape, digest


Step = Callable[[nnx.Module], Any]


class ImpureStep(ValueError):
    """A step that changes or draws from what its module holds."""


def held_by(module: nnx.Module) -> dict[tuple, tuple[str, Any]]:
    """The kind and the array of all that a module holds, but for what it shows of its inside."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if not isinstance(variable, nnx.Intermediate):
            kind = type(variable).__name__ if isinstance(variable, nnx.Variable) else "array"
            found[path] = kind, nnx.as_pure(variable)
    return found


def require_unchanged(name: str, module: nnx.Module, held: dict, step: Step) -> None:
    """Raises `ImpureStep` if a step changed what its module holds.

    An array that is no longer the same object may have been handed back by `nnx.remat` or
    `nnx.jit`, which the program of the step tells.

    Args:
        name: the module's class.
        module: the module, before the step.
        held: `held_by` of it after the step.
        step: calls a module such as this one.
    """
    before = held_by(module)
    other = [path for path, (_, leaf) in held.items() if leaf is not before.get(path, (0, None))[1]]
    if other:
        same = _handed_back(module, step)
        other = [path for path in other if path not in same]
    for path in other:
        kind, label = held[path][0], "/".join(map(str, path))
        does = "draws from" if kind in ("RngCount", "RngKey") else "changes"
        raise ImpureStep(
            f"{name} {does} {label} ({kind}) in its step, which must be a pure function of "
            "parameters. Keep what changes in the carry, draw noise outside and feed it as a "
            "part of the input, let BatchNorm use_running_average, make Dropout deterministic."
        )


def _handed_back(module: nnx.Module, step: Step) -> set[tuple]:
    """The paths of what a module holds that come out of its step as they went in."""
    graphdef, state = nnx.split(module)
    paths: list[tuple] = []

    def after(state: Any) -> list:
        module = nnx.merge(graphdef, state)
        step(module)
        held = held_by(module)
        paths[:] = held
        return [leaf for _, leaf in held.values()]

    places = [path for path, _ in nnx.to_flat_state(state)]
    program = opened(jax.make_jaxpr(after)(state)).jaxpr
    came = dict(zip(places, program.invars, strict=True))
    return {p for p, out in zip(paths, program.outvars, strict=True) if out is came.get(p)}
