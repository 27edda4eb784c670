"""Parameters as a flat dict, the same for Linen dicts, boxed Linen dicts and NNX states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Path = tuple[str, ...]
Leaves = dict[Path, jax.Array]


def flatten(tree: Any) -> tuple[Leaves, Callable[[dict[Path, Any]], Any]]:
    """Flattens `tree` to `{path: leaf}` and returns the way back.

    A box or an NNX variable (whose key is the attribute `value`) adds nothing to the path.

    Args:
        tree: a pytree of parameters.

    Returns:
        The leaves by path, and a function that puts such leaves back into the tree's structure.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [_names(keys) for keys, _ in entries]
    leaves = dict(zip(paths, (leaf for _, leaf in entries), strict=True))
    if len(leaves) != len(paths):
        raise ValueError(f"params hold two leaves of one path: {sorted(paths)}.")
    return leaves, lambda new: jax.tree.unflatten(treedef, [new[path] for path in paths])


def leaves_of(params: Any) -> Leaves:
    """The parameters by path, out of any boxes; raises for a leaf that is not real-valued."""
    _require_tree(params)
    leaves, _ = flatten(nn.meta.unbox(params))
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"params {'/'.join(path)} must be floating point; got dtype {leaf.dtype}. Pass "
                "trainable parameters only."
            )
    return leaves


def _require_tree(params: Any) -> None:
    """Raises for what wrappers of optax make of parameters."""
    if hasattr(params, "dtype"):
        raise ValueError(
            f"params are one array of shape {params.shape}, not the tree of this model's "
            "parameters. optax.flatten goes behind the rule, as in "
            "optax.chain(rule, optax.flatten(optax.adam(1e-3)))."
        )
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked):
        if _is_masked(leaf):
            raise ValueError(
                f"params hold optax.MaskedNode in place of {'/'.join(_names(keys))}: a rule needs "
                "all parameters of its model. Put optax.masked, optax.partition and "
                "optax.multi_transform behind the rule, as in "
                "optax.chain(rule, optax.partition(...)); localgrad.mix gives groups of "
                "parameters rules of their own."
            )


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _names(keys: tuple[Any, ...]) -> Path:
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in keys)


def under(leaves: Leaves, prefix: Path) -> Leaves:
    """The leaves below `prefix`, with the prefix taken off their paths."""
    n = len(prefix)
    return {path[n:]: leaf for path, leaf in leaves.items() if path[:n] == prefix}


def placed(leaves: Leaves, prefix: Path) -> Leaves:
    """The leaves with `prefix` put before their paths: the inverse of `under`."""
    return {prefix + path: leaf for path, leaf in leaves.items()}


def accumulator(leaf: Any) -> jnp.dtype:
    """The dtype in which a leaf's influence and update are summed: at least float32."""
    return jnp.promote_types(leaf.dtype, jnp.float32)


def added(a: Leaves, b: Leaves) -> Leaves:
    """The sum of two sets of leaves; a path in only one of them is taken as it is."""
    return {
        path: a[path] + b[path] if path in a and path in b else (a if path in a else b)[path]
        for path in a | b
    }
