"""How the error reaches the cells of a local rule: through the readout, or by fixed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contract.noise import require_key
from localgrad.core.model.stack import Stack

Feedback = str | Any


def require_feedback(rule: str, feedback: Feedback, key: jax.Array | None) -> None:
    """Raises for a `feedback` or a `key` that no model can make good."""
    if isinstance(feedback, str):
        if feedback not in ("symmetric", "random"):
            raise ValueError(
                f'feedback must be "symmetric", "random", or an array (N, O), or one a cell; got '
                f"{feedback!r}."
            )
        if feedback == "random" and key is None:
            raise ValueError(
                f'{rule}(feedback="random") draws its weights: pass key=jax.random.key(seed).'
            )
    if key is not None:
        require_key(key)


def make_feedback(
    rule: str, feedback: Feedback, key: jax.Array | None, stack: Stack
) -> dict[str, jax.Array] | None:
    """The feedback weights of each cell, (N, O), or None for symmetric feedback.

    Random weights are drawn from N(0, 1 / N).

    Args:
        rule: the rule's name, for messages.
        feedback: as the factory got it.
        key: a typed key, for `"random"`.
        stack: the model, taken apart.

    Returns:
        Weights by the cell's name.
    """
    if isinstance(feedback, str) and feedback == "symmetric":
        return None
    if stack.readout is None:
        raise ValueError(
            f"{rule}: feedback weights send the error of a readout to the cells, but this model "
            "has no readout. Wrap it: localgrad.Network((cell,), readout=nn.Dense(O)), or use "
            'feedback="symmetric".'
        )
    outputs = jax.tree.leaves(stack.outputs)
    if stack.outputs is not outputs[0] or outputs[0].ndim != 2:
        raise ValueError(
            f"{rule}: feedback weights need one output array [B, O]; the model gives "
            f"{jax.tree.map(lambda a: a.shape, stack.outputs)}."
        )
    names = [stack.name(level) for level in range(len(stack.cells))]
    shapes = {
        name: (jax.tree.leaves(carry)[0].shape[-1], outputs[0].shape[-1])
        for name, carry in zip(names, stack.initial, strict=True)
    }
    if isinstance(feedback, str):
        assert key is not None  # require_feedback saw to it
        keys = jax.random.split(key, len(names))
        dtype = jnp.promote_types(outputs[0].dtype, jnp.float32)
        return {
            name: jax.random.normal(k, shapes[name], dtype) / np.sqrt(shapes[name][0])
            for name, k in zip(names, keys, strict=True)
        }
    given = _by_name(rule, feedback, names)
    for name, weights in given.items():
        if jnp.shape(weights) != shapes[name]:
            raise ValueError(
                f"{rule}: feedback of {name} must be (N, O) = {shapes[name]}; "
                f"got shape {jnp.shape(weights)}."
            )
        if not isinstance(weights, jax.core.Tracer) and not np.isfinite(np.asarray(weights)).all():
            raise ValueError(f"{rule}: feedback of {name} holds NaN or infinity.")
    return {name: jnp.asarray(weights) for name, weights in given.items()}


def send(rule: str, name: str, q_out: jax.Array, weights: jax.Array, ys: Any) -> jax.Array:
    """The learning signal of a cell's outputs, B dL/d(output), [W, B, N]."""
    signal = q_out @ weights.astype(q_out.dtype).T
    shapes = jax.tree.map(jnp.shape, ys)
    if shapes != signal.shape:
        raise ValueError(
            f"{rule}: feedback weights of {name} give one number a unit, {signal.shape}, but the "
            f"cell's outputs have shapes {shapes}. Use feedback='symmetric', or a cell whose "
            "output is its units."
        )
    return signal.astype(ys.dtype)


def _by_name(rule: str, feedback: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(feedback, Mapping):
        given = dict(feedback)
    elif isinstance(feedback, Sequence):
        given = dict(zip(names, feedback, strict=False)) if len(feedback) == len(names) else {}
    else:
        given = dict.fromkeys(names[:1], feedback)
    if sorted(given) != sorted(names):
        raise ValueError(
            f"{rule}: feedback must give one array a cell, for {names}; got "
            f"{sorted(given) or type(feedback).__name__}."
        )
    return given
