"""Using rules: `evaluate` a model, `learn` online inside one jit, `reset_state`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from localgrad.cells.ptncn import PTNCN
from localgrad.core.contract.checks import require_batch, require_carry
from localgrad.core.contract.objective import Objective, weights_of
from localgrad.core.contract.rule import Batch, LearningRule, Loss
from localgrad.core.contract.state import fresh, is_state
from localgrad.core.model.modules import Module, as_module
from localgrad.core.model.stack import assemble
from localgrad.core.params import Leaves, leaves_of
from localgrad.core.passes.forward import Settle
from localgrad.core.passes.run import run
from localgrad.core.steps import select
from localgrad.rules.fit import require_matching_loss


def evaluate(
    model: Any, loss: Loss, params: Any, batch: Batch, carry: Any = None
) -> tuple[jax.Array, Any, Any]:
    """Runs a model over a batch without learning.

    A model with a method `observe(carry, target) -> carry`, such as `localgrad.PTNCN`, is shown the
    target of each step after its output is taken, unless the step's weight is 0, and goes on from
    the carry that it returns. No parameter changes.

    Args:
        model: as the rules take it.
        loss: as the rules take it.
        params: the model's parameters.
        batch: B sequences of T steps.
        carry: the model's carry to start from, leaves [B, N]; None for its initial carry.

    Returns:
        The weighted mean loss, the outputs [B, T, ...], and the model's carry after the last step.

    Raises:
        ValueError: for a batch or a carry whose axes do not fit, and for a loss that is not least
            where a `PTNCN`'s outputs equal their targets.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> batch = localgrad.Batch(jnp.ones((4, 10, 3)), jnp.ones((4, 10, 2)))
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
        >>> loss, outputs, carry = localgrad.evaluate(model, optax.l2_loss, params, batch)
        >>> outputs.shape
        (4, 10, 2)
    """
    leaves = leaves_of(params)
    size, steps = require_batch(batch, None)
    if isinstance(model, PTNCN):
        require_matching_loss(model, loss)
    inputs, targets, reset = jax.tree.map(
        lambda a: jnp.moveaxis(a, 1, 0), (batch.inputs, batch.targets, batch.reset)
    )
    stack = assemble(model, leaves, jax.tree.map(lambda a: a[0], inputs))
    if carry is not None:
        require_carry(carry, stack)
    carries = stack.initial if carry is None else stack.unpack(carry)
    carries = jax.tree.map(lambda a, own: jnp.asarray(a, own.dtype), carries, stack.initial)
    weight, total = weights_of(batch.mask, size * steps)
    weight = None if weight is None else weight.T
    settle = _observation(as_module(model), leaves, targets, weight)
    ran = run(stack, stack.see(leaves), carries, inputs, reset, settle=settle)
    values = Objective(loss, jnp.ones_like(total)).values(ran.outputs, targets, weight)
    outputs = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), ran.outputs)
    return values.sum() / total, outputs, stack.pack(ran.carries)


def _observation(
    module: Module, params: Leaves, targets: Any, weight: jax.Array | None
) -> Settle | None:
    """How a model is shown its targets after each step; None if it does not look."""
    if not module.observes:
        return None

    def by(carry: Any, seen: tuple) -> Any:
        target, weight = seen
        corrected = module.observe(params, carry, target)
        return corrected if weight is None else select(weight != 0, corrected, carry)

    return Settle(by, (targets, weight))


def learn(
    tx: optax.GradientTransformationExtraArgs, params: Any, opt_state: Any, batch: Batch, chunk: int
) -> tuple[Any, Any, jax.Array]:
    """Learns online: an optimizer update every `chunk` steps of a batch, in one scan.

    Put it under `jax.jit` (`tx` and `chunk` static, or closed over); no step is then dispatched
    from Python.

    Args:
        tx: an `optax.chain` whose first member is a streaming rule.
        params: the model's parameters.
        opt_state: the state of `tx`.
        batch: B streams of T steps.
        chunk: steps between updates; if it does not divide T, the last chunk is shorter.

    Returns:
        The parameters, the state, and the mean loss of each chunk.

    Raises:
        ValueError: if `chunk` is no positive integer, the batch's axes do not fit, or `tx` is not a
            streaming rule with an optimizer behind it.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> batch = localgrad.Batch(jnp.ones((4, 10, 3)), jnp.ones((4, 10, 2)))
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
        >>> tx = optax.chain(localgrad.eprop(model, optax.l2_loss, batch_size=4), optax.adam(1e-2))
        >>> step = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=1))
        >>> params, opt_state, losses = step(params, tx.init(params), batch)
        >>> losses.shape, bool(losses[-1] < losses[0])
        ((10,), True)
    """
    size, steps = require_batch(batch, None)
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a positive integer, in time steps; got {chunk!r}.")
    chunk = min(chunk, steps)
    _require_learner(tx, opt_state, size, carries_on=chunk < steps)
    full, rest = divmod(steps, chunk)

    def step(so_far: tuple[Any, Any], start: Any, width: int) -> tuple[tuple[Any, Any], jax.Array]:
        params, opt_state = so_far
        piece = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, width, axis=1), batch)
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


def _require_learner(tx: Any, opt_state: Any, size: int, carries_on: bool) -> None:
    """Raises unless `tx` is a rule, a streaming one if it carries on, with something behind it."""
    if isinstance(tx, LearningRule):
        raise ValueError(
            "tx is a bare rule, whose updates point uphill: put an optimizer behind it, as in "
            "optax.chain(rule, optax.sgd(1e-3))."
        )
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    if not states:
        raise ValueError(
            "tx holds no localgrad rule: begin the chain with one, as in "
            "optax.chain(localgrad.eprop(model, loss, batch_size=B), optax.sgd(1e-3))."
        )
    if carries_on and all(s.carry is None for s in states):
        raise ValueError(
            f"tx holds an episodic rule, which would forget everything at each chunk: make the "
            f"rule with batch_size={size}, or learn with chunk=T."
        )


def reset_state(state: Any) -> Any:
    """Fresh carry and influence for every rule in a state; feedback and keys stay.

    Args:
        state: a rule's state, or any optimizer state that holds some.

    Returns:
        The same with each stream at its start.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model, batch = nn.GRUCell(8), localgrad.Batch(jnp.ones((4, 5, 3)), jnp.ones((4, 5, 8)))
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
        >>> rule = localgrad.rtrl(model, optax.l2_loss, batch_size=4)
        >>> _, state = rule(params, rule.init(params), batch)
        >>> bool(jnp.any(state.carry)), bool(jnp.any(localgrad.reset_state(state).carry))
        (True, False)
    """
    return jax.tree.map(lambda s: fresh(s) if is_state(s) else s, state, is_leaf=is_state)
