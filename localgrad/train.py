"""Using rules: `evaluate` a model, `learn` online inside one jit, `reset` a state."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from localgrad.core.checks import check_batch
from localgrad.core.objective import Objective, weights_of
from localgrad.core.params import flatten
from localgrad.core.rule import Batch, Loss
from localgrad.core.stack import assemble, run


def evaluate(
    model: Any, loss: Loss, params: Any, batch: Batch, carry: Any = None
) -> tuple[jax.Array, Any, Any]:
    """Runs a model over a batch without learning."""
    leaves, _ = flatten(nn.meta.unbox(params))
    size, steps = check_batch(batch, None)
    inputs, targets, reset = jax.tree.map(
        lambda a: jnp.moveaxis(a, 1, 0), (batch.inputs, batch.targets, batch.reset)
    )
    stack = assemble(model, leaves, jax.tree.map(lambda a: a[0], inputs))
    carries = stack.initial if carry is None else stack.unpack(carry)
    ran = run(stack, leaves, carries, inputs, reset)
    weight, total = weights_of(batch.mask, size * steps)
    weight = None if weight is None else weight.T
    summed, _ = Objective(loss, jnp.ones_like(total)).credit(ran.outputs, targets, weight)
    outputs = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), ran.outputs)
    return summed / total, outputs, stack.pack(ran.carries)


def learn(
    tx: optax.GradientTransformationExtraArgs, params: Any, opt_state: Any, batch: Batch, chunk: int
) -> tuple[Any, Any, jax.Array]:
    """Learns online: an optimizer update every `chunk` steps, inside one jit."""
    size, steps = check_batch(batch, None)
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a positive integer, in time steps; got {chunk!r}.")
    full, rest = divmod(steps, chunk)

    def step(so_far: tuple[Any, Any], start: Any, width: int) -> tuple[tuple[Any, Any], jax.Array]:
        params, opt_state = so_far
        piece = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, start, width, axis=1), batch
        )
        updates, opt_state = tx.update(None, opt_state, params, batch=piece)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), optax.tree.get(opt_state, "loss")

    (params, opt_state), losses = jax.lax.scan(
        lambda so_far, k: step(so_far, k * chunk, chunk), (params, opt_state), jnp.arange(full)
    )
    if rest:
        (params, opt_state), last = step((params, opt_state), full * chunk, rest)
        losses = jnp.append(losses, last)
    return params, opt_state, losses


def reset(state: Any) -> Any:
    """Fresh carry and influence for every rule in a state; feedback and keys stay."""
    return jax.tree.map(
        lambda s: s.fresh() if hasattr(s, "fresh") else s,
        state,
        is_leaf=lambda s: hasattr(s, "fresh"),
    )
