"""Errors that speak: what a user passes is checked before anything is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves
from localgrad.core.stack import infer_example, parts


def check_choices(
    model: Any, loss: Any, batch_size: int | None, window: int | None, reduction: str
) -> None:
    """Checks what every factory takes."""
    parts(model)
    if not callable(loss):
        raise ValueError(
            f"loss must be a function (outputs [B, ...], targets [B, ...]) -> [B]; got {loss!r}. "
            "Any optax loss of one time step will do, e.g. optax.l2_loss."
        )
    for name, value in (("batch_size", batch_size), ("window", window)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer or None; got {value!r}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum"; got {reduction!r}.')


def check_updates(rule: str, updates: Any, params: Any) -> None:
    """Checks that a rule comes first in its chain and is given params."""
    if jax.tree.leaves(updates):
        raise ValueError(
            f"{rule} got updates from outside: a rule comes first in its chain and takes no "
            "gradients: pass None. To combine two rules, do not chain them."
        )
    if params is None:
        raise ValueError(
            f"{rule} needs the parameters: call tx.update(None, state, params, batch=batch)."
        )


def check_state(rule: str, state: Any, kind: type, batch_size: int | None) -> None:
    """Checks that a state comes from this rule's `init`, in this rule's mode."""
    made = type(state).__name__
    if isinstance(state, kind) and (state.carry is None) == (batch_size is None):
        return
    if isinstance(state, kind):
        made = f"that of a rule made with{'out' if state.carry is None else ''} batch_size"
    raise ValueError(
        f"{rule} with batch_size={batch_size} got a state that is not its own ({made}); begin with "
        "its own init(params)."
    )


def check_like(rule: str, state: Any, own: Any) -> None:
    """Checks that a state has the structure and the shapes of this rule's own."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        found = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in found}

    given, wanted = shapes(state), shapes(own)
    gaps = [name for name in given.keys() | wanted.keys() if given.get(name) != wanted.get(name)]
    if gaps:
        name = min(gaps)
        raise ValueError(
            f"{rule} got a state that is not its own: state{name} has shape {given.get(name)}, but "
            f"that of its init(params) {wanted.get(name)}. It comes from a rule with another "
            "model, batch_size, feedback or horizon; begin with this rule's own init(params)."
        )


def check_carry(carry: Any, stack: Any) -> None:
    """Checks that a carry is one of this model and batch."""
    own = stack.pack(stack.initial)
    given, wanted = (jax.tree.map(jnp.shape, tree) for tree in (carry, own))
    if jax.tree.structure(carry) != jax.tree.structure(own) or given != wanted:
        raise ValueError(
            f"carry has shapes {given}, but this model and batch need {wanted}: start from "
            "model.initialize_carry(key, inputs[:, 0].shape), or from what an earlier call with "
            "as many examples returned."
        )


def check_batch(batch: Any, batch_size: int | None) -> tuple[int, int]:
    """Checks a batch's axes and dtypes; returns B and T."""
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


def example_spec(
    model: Any,
    params: Leaves,
    rule: str,
    example: Any,
    batch_size: int | None,
    *,
    needed: bool,
    strict: bool,
) -> Any:
    """One step's input with its batch axis, from `example` or from the parameters' shapes.

    Args:
        model: the user's model.
        params: its parameters; shapes suffice.
        rule: the rule's name, for messages.
        example: what the user gave, without the batch axis, or None.
        batch_size: B, or None (then 1).
        needed: raise if nothing tells the shape; else return None.
        strict: raise if there is no example, whatever the parameters tell.

    Returns:
        Leaves `ShapeDtypeStruct` [B, ...], or None.
    """
    batch = batch_size or 1
    if example is not None:
        for leaf in jax.tree.leaves(example):
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise ValueError(
                    "example must hold arrays or jax.ShapeDtypeStruct, one time step's inputs "
                    f"without the batch axis; got {example!r}. Try example=batch.inputs[0, 0]."
                )
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((batch, *jnp.shape(a)), jnp.result_type(a)), example
        )
    spec = None if strict else infer_example(model, params, batch)
    if spec is None and needed:
        raise ValueError(
            f"{rule} needs example=..., one time step's inputs without the batch axis (an array or "
            "jax.ShapeDtypeStruct): "
            + (
                "its streaming state buffers inputs."
                if strict
                else "no Dense or Embed layer takes the input as it is, so the parameters do not "
                "tell its shape. (If one should, check that the params are this model's.)"
            )
        )
    return spec
