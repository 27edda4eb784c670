"""Do the examples of a batch know nothing of each other? Tried on concrete numbers, never assumed.

Every rule runs a module on all steps of a window at once where order does not matter, so a module
that mixes the examples of a batch would mix time steps too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.model.modules import Module
from localgrad.core.model.trial import Draws, apart, memoised
from localgrad.core.params import Leaves

ROWS = 3


def require_apart(label: str, module: Module, params: Leaves, *args: Any) -> None:
    """Raises if what a module gives for one example depends on another.

    Args:
        label: what to call it.
        module: a cell, an encoder or a readout.
        params: its parameters; shapes suffice.
        *args: what it is called with, batch axis first; shapes suffice.
    """
    flat, treedef = jax.tree.flatten(args)
    shapes = tuple((a.shape[1:], jnp.dtype(a.dtype).name) for a in flat)
    leaves = tuple((path, leaf.shape, jnp.dtype(leaf.dtype).name) for path, leaf in params.items())
    if memoised(_mixes)(module, leaves, shapes, treedef):
        raise ValueError(
            f"{label} ({module.name}) mixes the examples of a batch: what it gives for one depends "
            "on another, as with a mean over axis 0. Rules treat every example by itself; let it "
            "work on the last axes only."
        )


def _mixes(module: Module, leaves: tuple, shapes: tuple, treedef: Any) -> bool:
    draw = Draws()
    params = {path: draw.weights(shape, dtype) for path, shape, dtype in leaves}
    one = [draw.values((ROWS, *shape), dtype) for shape, dtype in shapes]
    other = [np.concatenate([draw.values((1, *a.shape[1:]), a.dtype), a[1:]]) for a in one]

    def both(params: Leaves, one: list, other: list) -> Any:
        return [
            jax.tree.leaves(module.apply(params, *jax.tree.unflatten(treedef, given)))
            for given in (one, other)
        ]

    try:
        first, second = apart(both, params, one, other)
    except jax.errors.UnexpectedTracerError:  # it closes over a traced value: nothing to try
        return False
    pairs = [(np.asarray(a)[1:], np.asarray(b)[1:]) for a, b in zip(first, second, strict=True)]
    return any(_differ(a, b) for a, b in pairs)


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return bool((a != b).any())
    kind = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(kind), b.astype(kind)
    size = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    return not np.allclose(a, b, rtol=0, atol=1e-3 * size, equal_nan=True)
