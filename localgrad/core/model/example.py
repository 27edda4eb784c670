"""What one time step's input looks like: given by an example, or told by the parameters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from localgrad.core.model.decorrelation import NAME, Decorrelation
from localgrad.core.model.modules import Layer, Module
from localgrad.core.model.stack import parts, require_fit
from localgrad.core.params import Leaves, under


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
                else "no Dense or Embed layer takes the input as it is, and the parameters fit "
                "inputs of several widths or of none. (Check that the params are this model's.)"
            )
        )
    return spec


def infer_example(model: Any, params: Leaves, batch: int) -> Any:
    """One step's input of `batch` examples as the model's first layer tells it, or None."""
    encoder, cells, prefixes, _ = parts(model)
    require_fit(model, params)
    if isinstance(model, nn.RNNCellBase) and model.num_feature_axes > 1:
        return None
    if encoder is not None:
        return infer_input(encoder, under(params, ("encoder",)), batch, is_cell=False)
    return infer_input(cells[0], under(params, prefixes[0]), batch, is_cell=True)


KERNELS = {"Dense": "kernel", "Linear": "kernel", Decorrelation.__name__: NAME}
"""Layers whose kernel tells how many features they take."""


class _Found(Exception):
    """Carries the input's shape out of a half-run step."""


def infer_input(module: Module, params: Leaves, batch: int, is_cell: bool) -> Any:
    """One step's input of `batch` examples, as far as a layer that takes x itself tells it.

    Args:
        module: a cell, or a memoryless module called on x alone.
        params: its parameters; shapes suffice.
        batch: B.
        is_cell: whether it takes a carry before x.

    Returns:
        A `ShapeDtypeStruct`: what a Dense or Embed layer that takes x as it is says of it, or the
        one width that fits the parameters. None if neither tells.
    """
    dtype = jnp.result_type(jnp.float32, *params.values())

    def step(x: Any) -> Any:
        def tap(layer: Layer, pre: Any) -> Any:
            own = under(params, layer.path)
            if pre is x and layer.kind in KERNELS:
                kernel = own[(KERNELS[layer.kind],)]
                raise _Found(jax.ShapeDtypeStruct((batch, kernel.shape[0]), dtype))
            if pre is x and layer.kind == "Embed":
                raise _Found(jax.ShapeDtypeStruct((batch,), jnp.int32))
            return jnp.zeros((*pre.shape[:-1], jax.tree.leaves(own)[0].shape[-1]), dtype)

        carry = [module.initialize_carry(x.shape)] if is_cell else []
        return module.tapped(params, tap, *carry, x)

    try:
        jax.eval_shape(step, jax.ShapeDtypeStruct((batch, 1), dtype))
    except _Found as found:
        return found.args[0]
    except Exception:  # whatever a made-up input breaks, another width may not
        pass
    return _fitting(module, params, batch, is_cell, dtype)


def _fitting(module: Module, params: Leaves, batch: int, is_cell: bool, dtype: Any) -> Any:
    """The one width of x, among the parameters' axes and their differences, that a module takes.

    One wider than all axes is tried too: a module that takes it takes any.
    """
    sizes = {size for leaf in params.values() for size in leaf.shape}
    widths = sizes | {a - b for a in sizes for b in sizes if a > b} | {max(sizes, default=0) + 1}
    found = []
    for width in sorted(widths):
        x = jax.ShapeDtypeStruct((batch, width), dtype)

        def step(params: Leaves, x: Any) -> Any:
            carry = [module.initialize_carry(x.shape)] if is_cell else []
            return carry, module.apply(params, *carry, x)

        try:
            carry, out = jax.eval_shape(step, params, x)
        except Exception:  # it does not fit
            continue
        kept = not is_cell or jax.tree.map(jnp.shape, carry[0]) == jax.tree.map(jnp.shape, out[0])
        found += [x] if kept else []
    return found[0] if len(found) == 1 else None
