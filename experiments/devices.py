"""What lies where on several devices, under plain `jit`: nothing is guessed from names or sizes.

Docs: `docs/devices.md`. The mesh has three axes: `data` over the examples of a batch and all that
is kept for each, `samples` over independent copies (`localgrad.average`), `layers` over a stack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("samples", "layers", "data")


def make_mesh(*, data: int = 1, samples: int = 1, layers: int = 1) -> Mesh:
    """A mesh over the first `data * samples * layers` devices, of all processes.

    Args:
        data: among how many devices examples are divided.
        samples: among how many copies are.
        layers: among how many layers are.

    Returns:
        The mesh, whose axes XLA is free to use (`AxisType.Auto`).
    """
    sizes = {"samples": samples, "layers": layers, "data": data}
    for name, size in sizes.items():
        if type(size) is not int:
            raise ValueError(f"{name} must be an integer; got {size!r}.")
    wanted, found = samples * layers * data, jax.devices()
    if not 1 <= wanted <= len(found):
        raise ValueError(
            f"a mesh of {sizes} takes {wanted} devices; there are {len(found)}. On a CPU more are "
            "made by XLA_FLAGS=--xla_force_host_platform_device_count=8, set before JAX starts."
        )
    grid = np.array(found[:wanted]).reshape([sizes[name] for name in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_of(make: Callable[[int], Any], one: int, other: int) -> Any:
    """Which axis of each leaf counts something: the one whose size differs with it.

    Args:
        make: how many -> a tree of arrays, such as `lambda size: rule(size).init(params)`; only
            its shapes are asked for.
        one: a number of examples, copies or layers.
        other: another.

    Returns:
        A tree like `make(one)`: of each leaf the axis, or -1 where it has none.
    """
    if one == other:
        raise ValueError(f"one and other must differ, for sizes to tell of them; got {one} twice.")

    def axis(a: Any, b: Any) -> int:
        found = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        if len(found) > 1:
            raise ValueError(
                f"of {one} or {other} a leaf has shape {a.shape} or {b.shape}: axes {found} "
                "differ, and only one can be divided. Place that leaf yourself, by jax.device_put."
            )
        return found[0] if found else -1

    return jax.tree.map(axis, *(jax.eval_shape(lambda n=n: make(n)) for n in (one, other)))


def spread(mesh: Mesh, tree: Any, **axes: Any) -> Any:
    """Puts a tree onto a mesh; what no axis of it divides lies whole on every device.

    Args:
        mesh: as of `make_mesh`.
        tree: arrays, typed keys, or `ShapeDtypeStruct`s to compile for; with several processes the
            same values in each. Python's numbers stay as they are.
        **axes: by the mesh axis' name, the axis of each leaf that it divides: a tree as of
            `axis_of`, or one number for all leaves.

    Returns:
        The tree, with its shardings.
    """
    leaves, treedef = jax.tree.flatten(tree)
    each = {
        name: [given] * len(leaves) if isinstance(given, int) else treedef.flatten_up_to(given)
        for name, given in axes.items()
    }
    placed = [
        _placed(mesh, leaf, {name: given[k] for name, given in each.items()})
        for k, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, placed)


def _placed(mesh: Mesh, leaf: Any, axes: dict[str, int]) -> Any:
    """A leaf on a mesh, whose axes divide those of its own that they are given."""
    if not hasattr(leaf, "ndim"):
        return leaf
    spec: list[str | None] = [None] * leaf.ndim
    for name, axis in axes.items():
        if axis >= 0 and (axis >= leaf.ndim or spec[axis] is not None):
            raise ValueError(
                f"{name} cannot divide axis {axis} of a leaf of shape {leaf.shape}, of which "
                f"{dict(axes)} are asked: an axis must be there, and is divided by one alone."
            )
        if axis >= 0:
            spec[axis] = name
    place = NamedSharding(mesh, PartitionSpec(*spec))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # which JAX spreads over one process only
        data = jax.device_put(jax.random.key_data(leaf), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return jax.device_put(leaf, place)


class Collective(NamedTuple):
    """What a compiled program's devices tell each other at one place.

    Attributes:
        operation: `"all-reduce"`, `"all-gather"`, `"all-to-all"`, `"collective-permute"` or
            `"reduce-scatter"`.
        kinds: of what it gives, one an array, such as `"f32"` or `"pred"`.
        bytes: of what it gives, on one device.
        looped: whether it lies in a loop, and so may happen many times a call.
    """

    operation: str
    kinds: tuple[str, ...]
    bytes: int
    looped: bool


_OPERATION = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)|branch_computations=\{(.*?)\}")


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """The collectives of a compiled program, read from its text.

    XLA joins what it reduces at one time: an operation of several arrays counts as one.

    Args:
        program: what `jax.jit(...).lower(...).compile()` gives.

    Returns:
        All of them, each place in the text once.
    """
    bodies: dict[str, list[str]] = {}
    for line in (program.as_text() or "").splitlines():
        if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
            lines = bodies.setdefault(head[1], [])
        elif bodies:
            lines.append(line)
    looped: set[str] = set()
    ahead = re.findall(r" body=%?([\w.-]+)", program.as_text() or "")
    while ahead:
        name = ahead.pop()
        if name not in looped:
            looped.add(name)
            for found in _CALLED.findall("\n".join(bodies.get(name, []))):
                ahead += [called.strip(" %") for called in ",".join(found).split(",") if called]
    found = []
    for name, lines in bodies.items():
        for given, operation in _OPERATION.findall("\n".join(lines)):
            arrays = _ARRAY.findall(given)
            kinds, sizes = tuple(kind for kind, _ in arrays), sum(_size(*a) for a in arrays)
            found.append(Collective(operation, kinds, sizes, name in looped))
    return found


def _size(kind: str, shape: str) -> int:
    """Bytes of an array of this shape, as of `"f32"` and `"8,3"`."""
    bits = re.search(r"\d+", kind)
    return math.prod(int(n) for n in shape.split(",") if n) * (int(bits[0]) if bits else 8) // 8
