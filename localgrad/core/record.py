"""A tree as a record tells it: its leaves by path, what they are, and a sum of their bits."""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST = 60
"""Leaves that a message lists."""


def record_of(tree: Any) -> dict[str, str]:
    """Of each leaf dtype, shape and digest, such as `float32[3,4] 00c0ffee`, by its path."""
    return {path: f"{_kind(a)} {_digest(a):08x}" for path, a in leaves_by_path(tree).items()}


def check_of(record: dict[str, str]) -> int:
    """A sum of a record itself, by which damage of it is no other model."""
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def require_same(directory: Any, step: int, record: dict[str, str], target: Any) -> None:
    """Raises for leaves that are not on both sides, or of other shapes or dtypes."""
    saved = {path: said.partition(" ")[0] for path, said in record.items()}
    wanted = {path: _kind(leaf) for path, leaf in leaves_by_path(target).items()}
    gaps = [
        f"  {path}: {saved.get(path, 'nothing')} saved, {wanted.get(path, 'nothing')} in target"
        for path in wanted | saved
        if saved.get(path) != wanted.get(path)
    ]
    if gaps:
        shown = gaps[:MOST] + [f"  and {len(gaps) - MOST} more"] * (len(gaps) > MOST)
        listed = "\n".join(shown)
        raise ValueError(
            f"step {step} in {directory} holds the tree of another model, rule or optimizer than "
            f"target:\n{listed}\nMake target by the calls that made what was saved, or begin in "
            "another directory."
        )


def require_divisible(target: Any) -> None:
    """Raises for leaves that cannot be divided as their shardings say."""
    for path, leaf in leaves_by_path(target).items():
        place = _where(leaf)
        if place is not None:
            try:
                place.shard_shape(leaf.shape)
            except ValueError as error:
                raise ValueError(
                    f"target{path} cannot be divided as its sharding says: {error}"
                ) from error


def require_savable(tree: Any) -> None:
    """Raises for what Orbax would refuse without saying which leaf it is, or save as another."""
    found = leaves_by_path(tree)
    if not found or list(found) == [""]:
        raise ValueError(f"tree must be a dict or tuple that holds arrays; got {tree!r}.")
    for path, leaf in found.items():
        reason = _unsavable(leaf)
        if reason is not None:
            raise ValueError(
                f"tree{path} {reason}; only arrays, typed keys and Python's numbers are saved."
            )


def _unsavable(leaf: Any) -> str | None:
    """Why a leaf cannot be saved; None if it can."""
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return "was donated to a jitted function and is deleted: save what that function gave"
    if not isinstance(leaf, int | float | np.ndarray | np.generic | jax.Array):
        return f"is {leaf!r}"
    if isinstance(leaf, int | float):
        fits = isinstance(leaf, float) or -(2**63) <= leaf < 2**63
        return None if fits else f"is {leaf}, beyond 64 bits"
    if leaf.size == 0:
        return f"is empty, of shape {leaf.shape}"
    if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return None
    whole = jnp.issubdtype(leaf.dtype, jnp.number) and jax.dtypes.itemsize_bits(leaf.dtype) >= 8
    return None if whole else f"has dtype {leaf.dtype}"


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves by their paths."""
    return {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(tree)}


def _kind(leaf: Any) -> str:
    """Dtype and shape, such as `float32[3,4]`."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _digest(leaf: Any) -> int:
    """A sum of all bits, the same on any devices, which another word of 32 bits changes."""
    with jax.enable_x64(True):
        return int(_sum(leaf if hasattr(leaf, "dtype") else np.asarray(leaf)))


@jax.jit
def _sum(a: jax.Array) -> jax.Array:
    """The sum over all words of 32 bits, each scrambled together with its place."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    if jnp.iscomplexobj(a):
        a = jnp.stack([a.real, a.imag], -1)
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    width = min(a.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(a, f"uint{8 * width}").astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return _scrambled(words ^ _scrambled(place)).sum(dtype=jnp.uint32)


def _scrambled(a: jax.Array) -> jax.Array:
    """One to one, and nearly random: the last steps of MurmurHash3 (Appleby, 2011)."""
    a = (a ^ (a >> 16)) * jnp.uint32(0x85EBCA6B)
    a = (a ^ (a >> 13)) * jnp.uint32(0xC2B2AE35)
    return a ^ (a >> 16)


def _where(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf of the target must lie; None if it may follow what it meets."""
    free = isinstance(leaf, jax.Array) and not leaf.committed
    return None if free else getattr(leaf, "sharding", None)


def asked_for(leaf: Any) -> Any:
    """What Orbax is asked for: arrays that are bound to no device as NumPy's."""
    if not hasattr(leaf, "dtype"):
        return leaf
    place = _where(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and place is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if place is None:
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def placed_as(leaf: Any, found: Any) -> Any:
    """What was found as the target's leaf is: of its kind, and bound to devices only if it is."""
    if not hasattr(leaf, "dtype") or isinstance(leaf, np.generic):
        return type(leaf)(found)
    if isinstance(leaf, np.ndarray) or _where(leaf) is not None:
        return found
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.asarray(found)
    data = jnp.asarray(np.asarray(jax.random.key_data(found)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(found))
