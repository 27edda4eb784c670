"""Arrays that are spread over devices: what a call makes of meshes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from localgrad.core.params import leaves_of


def require_unchecked(name: str, args: Any) -> None:
    """Raises inside a `jax.shard_map` that checks which values vary over its axes.

    There, what a rule begins with, zeros and the model's initial carry, is alike on all devices,
    and what it becomes is not, which JAX's loops refuse.
    """
    axes = sorted({axis for leaf in jax.tree.leaves(args) for axis in _varying(leaf)})
    if axes:
        raise ValueError(
            f"{name} is called inside jax.shard_map on arrays that vary over the mesh axes {axes}, "
            "with check_vma=True, under which its loops cannot run. Pass check_vma=False to "
            "jax.shard_map, and take the mean of the updates yourself (jax.lax.pmean); or use "
            "plain jax.jit with arrays placed by NamedSharding."
        )


def _varying(leaf: Any) -> Any:
    kind = jax.typeof(leaf)
    found = getattr(kind, "vma", None)  # until jax 0.10.0
    return kind.manual_axis_type.varying if found is None else found


def on_any_mesh(call: Callable[..., tuple], params: Any, state: Any, batch: Any) -> tuple:
    """Makes a call; on a mesh with explicit axes the compiler places what lies within.

    Args:
        call: `(params, state, batch) -> (updates by path, state, outputs)`.
        params: of the model.
        state: of the rule.
        batch: of sequences.

    Returns:
        What the call gives: updates laid out as the parameters are, the state as it was, outputs
        with their examples where the inputs' are.
    """
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves((params, state, batch))]
    mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
    if mesh is None:
        return call(params, state, batch)

    def layout(leaf: Any, axes: int | None = None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*jax.typeof(leaf).sharding.spec[:axes]))

    updates, after = jax.tree.map(layout, (leaves_of(params), state))
    outputs = layout(jax.tree.leaves(batch.inputs)[0], 1)
    placed = jax.sharding.auto_axes(call, out_sharding=(updates, after, outputs))
    return placed(params, state, batch)
