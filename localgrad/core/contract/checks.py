"""Errors that speak: what a user passes is checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEGAL: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lie in [0, 1]": lambda a: (a >= 0) & (a <= 1),
    "lie in (0, 1]": lambda a: (a > 0) & (a <= 1),
    "be finite": np.isfinite,
    "be 0 or more, and finite": lambda a: (a >= 0) & (a < np.inf),
    "be positive and finite": lambda a: (a > 0) & (a < np.inf),
}
"""What may be asked of numbers, in the words of the message."""


def number(name: str, value: Any, must: str, hint: str = "") -> float:
    """A plain number that is what it must be, one of `LEGAL`; raises for any other."""
    real = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    if not real or not LEGAL[must](np.asarray(value, np.float64)):
        raise ValueError(
            f"{name} must be a Python number and {must}; got {value!r}. {hint}".strip()
        )
    return float(value)


def is_integer(value: Any, least: int) -> bool:
    """Whether it is an integer, NumPy's too but no bool, and not below the least."""
    whole = isinstance(value, Integral) and not isinstance(value, bool | np.bool_)
    return whole and int(value) >= least


def positive_integer(name: str, value: Any, hint: str = "") -> int:
    """A positive integer as Python's own; raises for anything else."""
    if not is_integer(value, 1):
        raise ValueError(f"{name} must be a positive integer; got {value!r}. {hint}".strip())
    return int(value)


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless a value is one of those there are."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.")


def require_choices(loss: Any, batch_size: int | None, window: int | None, reduction: str) -> None:
    """Raises for what no factory can use."""
    if not callable(loss):
        raise ValueError(
            f"loss must be a function (outputs [B, ...], targets [B, ...]) -> [B]; got {loss!r}. "
            "Any optax loss of one time step will do, e.g. optax.l2_loss."
        )
    for name, value in (("batch_size", batch_size), ("window", window)):
        if value is not None and not is_integer(value, 1):
            raise ValueError(f"{name} must be a positive integer or None; got {value!r}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum"; got {reduction!r}.')


def require_updates(rule: str, updates: Any, params: Any) -> None:
    """Raises unless a rule comes first in its chain and is given params."""
    if jax.tree.leaves(updates):
        raise ValueError(
            f"{rule} got updates from outside: a rule comes first in its chain and takes no "
            "gradients: pass None. To combine rules, use localgrad.mix."
        )
    if params is None:
        raise ValueError(
            f"{rule} needs the parameters: call tx.update(None, state, params, batch=batch)."
        )


def require_carry(carry: Any, stack: Any) -> None:
    """Raises unless a carry is one of this model and batch."""
    own = stack.pack(stack.initial)
    given, wanted = (jax.tree.map(jnp.shape, tree) for tree in (carry, own))
    if jax.tree.structure(carry) != jax.tree.structure(own) or given != wanted:
        raise ValueError(
            f"carry has shapes {given}, but this model and batch need {wanted}: start from "
            "model.initialize_carry(key, inputs[:, 0].shape), or from what an earlier call with "
            "as many examples returned."
        )


def require_batch(batch: Any, batch_size: int | None) -> tuple[int, int]:
    """Raises for a batch whose axes or dtypes do not fit; returns B and T."""
    if batch is None:
        raise ValueError(
            "batch is missing: call rule(params, state, batch), or "
            "tx.update(None, state, params, batch=batch). Helpers that do not hand it on, such as "
            "TrainState.apply_gradients, cannot be used."
        )
    for name in ("inputs", "targets", "mask", "reset"):
        if not hasattr(batch, name):
            raise ValueError(
                f"batch must be a localgrad.Batch(inputs, targets); got {type(batch).__name__}."
            )
    leaves = jax.tree.leaves(batch.inputs)
    if not leaves:
        raise ValueError("batch.inputs holds no array.")
    for leaf in leaves:
        if jnp.ndim(leaf) < 2:
            raise ValueError(
                f"batch.inputs must be [B, T, ...]; got shape {jnp.shape(leaf)}. Add the batch "
                "axis first and the time axis second."
            )
    size, steps = leaves[0].shape[:2]
    if size < 1 or steps < 1:
        raise ValueError(f"batch.inputs has shape {leaves[0].shape}: B and T must be at least 1.")
    for name in ("inputs", "targets"):
        for leaf in jax.tree.leaves(getattr(batch, name)):
            if jnp.ndim(leaf) < 2 or leaf.shape[:2] != (size, steps):
                raise ValueError(
                    f"batch.{name} must be [B, T, ...] with B = {size}, T = {steps} as in "
                    f"batch.inputs; got shape {jnp.shape(leaf)}."
                )
    for name in ("mask", "reset"):
        value = getattr(batch, name)
        if value is not None and getattr(value, "shape", None) != (size, steps):
            raise ValueError(
                f"batch.{name} must be an array [B, T] = {(size, steps)} as in batch.inputs; "
                f"got {getattr(value, 'shape', type(value).__name__)}."
            )
    if batch.mask is not None and jnp.issubdtype(batch.mask.dtype, jnp.complexfloating):
        raise ValueError(f"batch.mask must be real; got dtype {batch.mask.dtype}.")
    if batch.reset is not None and batch.reset.dtype != jnp.bool_:
        raise ValueError(
            f"batch.reset must be bool; got dtype {batch.reset.dtype}. Write e.g. reset == 1."
        )
    if batch_size is not None and size != batch_size:
        raise ValueError(
            f"batch.inputs holds B = {size} streams but the rule was made with "
            f"batch_size={batch_size}. Pass that many, or make the rule with batch_size={size}."
        )
    return size, steps
