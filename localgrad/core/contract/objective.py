"""The loss of a window, its credit, and how steps are weighted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.ownership.reach import calls_out, dependencies
from localgrad.core.steps import as_rows, from_rows


class Shown(NamedTuple):
    """What a window's forward pass shows.

    Attributes:
        values: the weighted losses [W, B].
        outputs: the model's outputs, leaves [W, B, ...].
    """

    values: jax.Array
    outputs: Any


class Objective(NamedTuple):
    """A loss of one time step, and what its credit is scaled by.

    Attributes:
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`; called on all steps and
            examples of a window at once, as rows that know nothing of each other.
        scale: 1 over the call's total weight for `"mean"`, 1 for `"sum"`.
    """

    loss: Callable[[Any, Any], jax.Array]
    scale: jax.Array

    def values(self, outputs: Any, targets: Any, weight: jax.Array | None) -> jax.Array:
        """The weighted loss of each step and example, [W, B], at least float32.

        Args:
            outputs: leaves [W, B, ...].
            targets: leaves [W, B, ...].
            weight: [W, B], or None for ones.

        Returns:
            The values; nothing is differentiated.
        """
        steps, batch = jax.tree.leaves(outputs)[0].shape[:2]
        flat = self._each(as_rows(outputs), as_rows(targets), steps * batch)
        return from_rows(_weighted(flat, _counts(weight, flat)), steps)

    def credit(self, outputs: Any, targets: Any, weight: jax.Array | None) -> tuple[jax.Array, Any]:
        """The weighted losses, and the scaled credit of a window's outputs.

        Args:
            outputs: leaves [W, B, ...].
            targets: leaves [W, B, ...].
            weight: [W, B], or None for ones.

        Returns:
            The values [W, B] as of `values`, and dL/d(outputs), leaves [W, B, ...].
        """
        steps, batch = jax.tree.leaves(outputs)[0].shape[:2]
        flat_targets = as_rows(targets)
        flat, pull = jax.vjp(
            lambda flat: self._each(flat, flat_targets, steps * batch), as_rows(outputs)
        )
        counts = _counts(weight, flat)
        (q,) = pull((counts * self.scale).astype(flat.dtype))
        if weight is not None:
            q = jax.tree.map(lambda a: _kept(counts, a), q)
        return from_rows((_weighted(flat, counts), q), steps)

    def _each(self, outputs: Any, targets: Any, rows: int) -> jax.Array:
        """The loss of each row, [rows]."""
        return _losses(self.loss, outputs, targets, rows).reshape(rows, -1).mean(1)


def _counts(weight: jax.Array | None, values: jax.Array) -> jax.Array:
    """How much each row counts, [rows], at least float32."""
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    return jnp.ones(values.shape, dtype) if weight is None else as_rows(weight).astype(dtype)


def _weighted(values: jax.Array, counts: jax.Array) -> jax.Array:
    """Values by their weight, 0 where that is 0, whatever the value."""
    return _kept(counts, values.astype(counts.dtype) * counts)


def _losses(loss: Callable[[Any, Any], jax.Array], outputs: Any, targets: Any, rows: int) -> Any:
    """The losses [rows, ...]; raises unless each row has its own."""
    shapes = jax.tree.map(jnp.shape, (outputs, targets))
    seen = (
        f"for outputs {shapes[0]} and targets {shapes[1]}, the {rows} rows (steps x examples) of a "
        "window at once"
    )
    try:
        found = loss(outputs, targets)
    except Exception as error:
        raise ValueError(
            f"loss(outputs, targets) failed {seen}: {error} Check batch.targets, and that the loss "
            "takes any number of rows."
        ) from error
    if getattr(found, "ndim", 0) < 1 or found.shape[0] != rows:
        raise ValueError(
            f"loss(outputs, targets) must give one value a row: [B] or [B, ...] with B = {rows}; "
            f"got {getattr(found, 'shape', type(found).__name__)} {seen}. Do not average over the "
            "batch."
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"loss(outputs, targets) must be a floating number; got dtype {found.dtype}, which has "
            "no gradient."
        )
    if _depends_on_count(loss, outputs, targets, found.shape) or _unpaired(loss, outputs, targets):
        raise ValueError(
            f"loss(outputs, targets) compares rows with each other: got shape {found.shape} {seen}."
            " Do batch.targets lack the outputs' last axis? Give them [B, T, O]."
        )
    return found


def _depends_on_count(loss: Any, outputs: Any, targets: Any, shape: tuple[int, ...]) -> bool:
    """Whether the axes of a loss but the first grow with the number of rows, by broadcasting."""

    def longer(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((a.shape[0] + 1, *a.shape[1:]), a.dtype)

    try:
        found = jax.eval_shape(loss, *jax.tree.map(longer, (outputs, targets)))
    except Exception:  # it takes this number of rows only, as a loss with weights [B] does
        return False
    return found.shape[1:] != shape[1:]


def _unpaired(loss: Any, outputs: Any, targets: Any) -> bool:
    """Whether it makes do with more targets than outputs, as where one broadcasts over the other.

    A program that calls out of JAX cannot be told from one that does, nor one without targets.
    """

    def longer(tree: Any, rows: int) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((a.shape[0] + rows, *a.shape[1:]), a.dtype), tree
        )

    try:
        program = jax.make_jaxpr(loss)(longer(outputs, 2), longer(targets, 3))
    except Exception:
        return False
    count = len(jax.tree.leaves(outputs))
    uses_targets = any(i >= count for out in dependencies(program.jaxpr) for i in out)
    return uses_targets and not calls_out(program.jaxpr)


def _kept(counts: jax.Array, a: jax.Array) -> jax.Array:
    """`a` where its step counts, 0 where it does not, whatever `a` holds there."""
    return jnp.where(counts.reshape(-1, *(1,) * (a.ndim - 1)) != 0, a, jnp.zeros_like(a))


def weights_of(mask: jax.Array | None, count: int) -> tuple[jax.Array | None, jax.Array]:
    """The weight of each step, or None for ones, and their total (1 where that is 0)."""
    dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
    if mask is None:
        return None, jnp.asarray(count, dtype)
    weight = mask.astype(dtype)
    total = weight.sum()
    return weight, jnp.where(total == 0, jnp.ones_like(total), total)
