"""Types of units: recurrent weights as far as a pair of types tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.model.locality import own_entries
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import Anatomy, in_use
from localgrad.core.params import Leaves, placed, under
from localgrad.core.passes.eligibility import tried_cell
from localgrad.core.passes.feedback import units_of
from localgrad.core.passes.forward import Entries


def require_types(types: Any) -> None:
    """Raises for what no model can use as the types of its units."""
    every = types.values() if isinstance(types, Mapping) else types
    several = isinstance(types, Mapping | Sequence) and not all(np.ndim(t) == 0 for t in every)
    for labels in every if several else [types]:
        if isinstance(labels, jax.core.Tracer):
            raise ValueError("types must be known when the rule is made; got a traced array.")
        given = np.asarray(labels)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or (given < 0).any():
            raise ValueError(
                "types must be integers of 0 or more, one for each unit, (N,), or such an array "
                f"for each cell; got dtype {given.dtype} and shape {given.shape}."
            )


def types_by_name(rule: str, types: Any, stack: Stack) -> dict[str, np.ndarray]:
    """The types of each cell's units, by its name.

    Args:
        rule: the rule's name, for messages.
        types: one array for a model of one cell, or one a cell, in a sequence or by name.
        stack: the model, taken apart.

    Returns:
        Labels (N,) by name, numbered anew, so that each number is some unit's.
    """
    units = {stack.name(level): units_of(stack, level) for level in stack.levels}
    if isinstance(types, Mapping):
        given = dict(types)
    elif isinstance(types, Sequence) and not all(np.ndim(t) == 0 for t in types):
        given = dict(zip(units, types, strict=False)) if len(types) == len(units) else {}
    else:
        given = dict.fromkeys(list(units)[:1], types)
    shapes = {name: np.shape(labels) for name, labels in given.items()}
    if shapes != {name: (count,) for name, count in units.items()}:
        raise ValueError(
            f"{rule}: types must label every unit of every cell, (N,) = {dict(units)}; got "
            f"shapes {shapes or f'of {len(types)} cells'}."
        )
    return {name: np.unique(labels, return_inverse=True)[1] for name, labels in given.items()}


def entries_of(rule: str, stack: Stack, params: Leaves, level: int) -> Entries:
    """Where a cell's units lie in what its recurrent synapses receive; raises unless in a row."""
    found = tried_cell(stack, params, level)
    return own_entries(stack.cells[level], found, stack.name(level), rule)


def by_types(cell: Anatomy, params: Leaves, types: np.ndarray, entries: Entries) -> Leaves:
    """The parameters, with each recurrent weight replaced by the mean of its pair of types.

    The mean is over the weights of that pair, and gate, that are not zero; those that are stay so.

    Args:
        cell: its anatomy.
        params: its parameters.
        types: (N,).
        entries: where the units lie in the pre of each recurrent synapse.

    Returns:
        The parameters.
    """
    kinds = jax.nn.one_hot(types, int(types.max()) + 1, dtype=jnp.float32)
    found = dict(params)
    for i, (start, units) in entries.items():
        layer = cell.sites[i].layer
        own = under(params, layer.path)
        kernel = in_use(layer, own, jnp.ones((1, own[("kernel",)].shape[0])))
        weights = kernel[start : start + units].reshape(units, -1, units)  # [from, gate, to]
        means = _means(weights, kinds.astype(kernel.dtype))[types][:, :, types]
        means = jnp.where(weights != 0, means, 0).reshape(units, -1)
        found |= placed({("kernel",): kernel.at[start : start + units].set(means)}, layer.path)
    return found


def _means(weights: jax.Array, kinds: jax.Array) -> jax.Array:
    """Means [K, gates, K] of what is not zero in weights [N, gates, N], by kinds [N, K]."""

    def total(a: jax.Array) -> jax.Array:
        return jnp.einsum("pgq,pa,qb->agb", a, kinds, kinds)

    return total(weights) / jnp.maximum(total((weights != 0).astype(weights.dtype)), 1)
