"""Sparse recurrent weights: which there are, and whom a unit reaches by them within a few steps.

Letters: N units, R units of a set, D width of a layer's drive, G = D / N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.model.locality import own_entries, tried
from localgrad.core.model.modules import Layer
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import RECURRENT, in_use
from localgrad.core.params import Leaves, Path, flatten, under


class Sparsity(NamedTuple):
    """Which recurrent weights there are, and whom a unit reaches by them.

    Attributes:
        reach: by cell, [N, R], the units that each unit's parameters reach, itself first; N where
            there are fewer.
        kept: by path of a recurrent kernel, which of its entries are weights; bool, as the kernel.
    """

    reach: dict[str, jax.Array]
    kept: Leaves


def sparsity_of(order: int, mask: Any, stack: Stack, params: Leaves) -> Sparsity:
    """Reads a mask or, without one, which weights are zero.

    Args:
        order: how many steps a parameter's reach has; at the first it is its own unit.
        mask: for all recurrent layers, or by layer, (pre, post) units; or None.
        stack: the model, taken apart.
        params: its parameters; with a mask, shapes suffice.

    Returns:
        The sparsity of every cell.
    """
    masks = None if mask is None else _by_layer(mask, stack)
    reach: dict[str, jax.Array] = {}
    kept: Leaves = {}
    for level, prefix in enumerate(stack.prefixes):
        cell, name, own = stack.cells[level], stack.name(level), under(params, prefix)
        units = jax.tree.leaves(stack.initial[level])[0].shape[-1]
        found = tried(cell, own, stack.initial[level], stack.fed[level])
        patterns = []
        for number, (start, _) in own_entries(cell, found, name).items():
            layer = cell.sites[number].layer
            path, leaves = prefix + layer.path, under(own, layer.path)
            rows, shape = slice(start, start + units), leaves["kernel",].shape
            if masks is None:
                pattern = _weights(path, layer, leaves)[rows] != 0
            else:
                pattern = _fitting(path, masks[path], (units, shape[-1]))
            patterns.append(pattern)
            whole = np.ones(shape, bool)
            whole[rows] = pattern
            kept[(*path, "kernel")] = jnp.asarray(whole)
        feeds = _feeds(patterns, units)
        if order > 1 and patterns and feeds.all():
            raise ValueError(
                f"order={order} on {name} ({cell.module.name}), whose recurrent weights are dense: "
                f"each parameter reaches all {units} units within 2 steps, so that it would be "
                "exact RTRL. Use localgrad.rtrl, order=1, or give a mask of the weights there are."
            )
        reach[name] = jnp.asarray(_reached(feeds, order))
    return Sparsity(reach, kept)


def _by_layer(mask: Any, stack: Stack) -> dict[Path, Any]:
    """The mask of each recurrent layer."""
    layers = [
        prefix + site.layer.path
        for cell, prefix in zip(stack.cells, stack.prefixes, strict=True)
        for site in cell.sites
        if site.role == RECURRENT
    ]
    if not isinstance(mask, Mapping):
        return dict.fromkeys(layers, mask)
    named = {"/".join(path): path for path in layers}
    given = {
        "/".join(path).removesuffix("/kernel"): leaf for path, leaf in flatten(mask)[0].items()
    }
    if given.keys() != named.keys():
        raise ValueError(
            f"mask must name the model's recurrent layers, {sorted(named)}; got {sorted(given)}. A "
            "single array stands for all of them."
        )
    return {named[name]: leaf for name, leaf in given.items()}


def _weights(path: Path, layer: Layer, leaves: Leaves) -> np.ndarray:
    """A layer's kernel, 0 where the layer masks it; raises if there are no numbers to read."""
    kernel = leaves["kernel",]
    if not isinstance(kernel, (jax.Array, np.ndarray)) or isinstance(kernel, jax.core.Tracer):
        raise ValueError(
            f"snap without a mask reads which weights of {'/'.join(path)} are zero at init, and "
            f"there are no numbers here (a {type(kernel).__name__} of shape {kernel.shape}), as "
            "inside jit, vmap or eval_shape. Give the factory mask=..., or call init(params) "
            "outside."
        )
    with jax.ensure_compile_time_eval():
        return np.asarray(in_use(layer, leaves, jnp.zeros((1, kernel.shape[0]), kernel.dtype)))


def _fitting(path: Path, mask: Any, shape: tuple[int, int]) -> np.ndarray:
    """A mask (N, N), or (N, D), as (N, D)."""
    units, width = shape
    found = np.asarray(mask) != 0
    if found.shape not in ((units, units), shape):
        wide = f", or {shape}" if width != units else ""
        raise ValueError(
            f"mask of {'/'.join(path)} must be of shape {(units, units)}, (pre, post) units{wide}; "
            f"got {found.shape}."
        )
    return found if found.shape == shape else np.tile(found, (1, width // units))


def _feeds(patterns: list[np.ndarray], units: int) -> np.ndarray:
    """Whether a unit's state reaches another's next one: [N, N], (pre, post)."""
    feeds = np.eye(units, dtype=bool)
    for pattern in patterns:
        feeds |= pattern.reshape(units, -1, units).any(1)
    return feeds


def _reached(feeds: np.ndarray, order: int) -> np.ndarray:
    """The units that each unit's parameters reach within `order` steps: [N, R]."""
    units = len(feeds)
    felt = np.eye(units, dtype=bool)  # [by whom, who]
    for _ in range(min(order, units) - 1):
        felt = felt @ feeds
    sets = [[i, *(k for k in np.flatnonzero(felt[i]) if k != i)] for i in range(units)]
    width = max(len(found) for found in sets)
    return np.asarray([found + [units] * (width - len(found)) for found in sets], np.int32)
