"""Using rules: `evaluate` a model, `learn` online inside one jit, `reset_state`."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from localgrad.cells.ptncn import PTNCN
from localgrad.core.contract.checks import positive_integer, require_batch, require_carry
from localgrad.core.contract.objective import Objective, weights_of
from localgrad.core.contract.rule import Batch, LearningRule, Loss
from localgrad.core.contract.state import RESTORE, WithOutputs, fresh, is_restored, is_state
from localgrad.core.model.modules import Module, as_module
from localgrad.core.model.stack import assemble
from localgrad.core.params import Leaves, leaves_of
from localgrad.core.passes.forward import Settle
from localgrad.core.passes.run import run
from localgrad.core.steps import merge_axes, select
from localgrad.rules.fit import require_matching_loss

Metric = Callable[[Any, Any], Any]


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
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    opt_state: Any,
    batch: Batch,
    chunk: int,
    *,
    metric: Metric | None = None,
) -> Any:
    """Learns online: an optimizer update every `chunk` steps of a batch, in one scan.

    Put it under `jax.jit` (`tx` and `chunk` static, or closed over); no step is then dispatched
    from Python.

    With a `metric` it also tells how good each prediction was *before* anything was learnt from
    it, which is what online learning is judged by (prequential evaluation, test then train). The
    outputs are those the rule makes anyway, so that no second pass forward is needed: with
    `chunk=1` each is made by the parameters that all earlier steps have left, else by those of the
    chunk's start. Where a rule adds noise to the one copy of the model that it runs
    (`baseline="running_mean"`), they are the noisy ones.

    Args:
        tx: an `optax.chain` whose first member is a streaming rule.
        params: the model's parameters.
        opt_state: the state of `tx`.
        batch: B streams of T steps.
        chunk: steps between updates; if it does not divide T, the last chunk is shorter.
        metric: `(outputs [B, ...], targets [B, ...]) -> leaves [B, ...]` of one time step;
            `lambda outputs, targets: outputs` keeps the outputs. Masks do not concern it: weight
            what it gives by `batch.mask`.

    Returns:
        The parameters, the state, and the mean loss of each chunk; with a metric also what it
        gives, leaves [B, T, ...].

    Raises:
        ValueError: if `chunk` is no positive integer, the batch's axes do not fit, `tx` is not a
            streaming rule with an optimizer of gradients behind it, and nothing before or around
            it, or `metric` does not give one value an example.

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
        >>> off = lambda outputs, targets: jnp.abs(outputs - targets).max(-1)  # of each prediction
        >>> params, opt_state, losses, errors = localgrad.learn(
        ...     tx, params, opt_state, batch, chunk=1, metric=off
        ... )
        >>> errors.shape
        (4, 10)
    """
    size, steps = require_batch(batch, None)
    if metric is not None and not callable(metric):
        raise ValueError(
            "metric must be a function (outputs [B, ...], targets [B, ...]) -> leaves [B, ...], or "
            f"None; got {metric!r}. Write e.g. metric=lambda outputs, targets: outputs - targets."
        )
    chunk = min(positive_integer("chunk", chunk, "It is counted in time steps."), steps)
    _require_learner(tx, opt_state, size, carries_on=chunk < steps)
    full, rest = divmod(steps, chunk)
    asked = {} if metric is None else {"with_outputs": True}

    def step(so_far: tuple[Any, Any], start: Any, width: int) -> tuple[tuple[Any, Any], Any]:
        params, opt_state = so_far
        piece = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, width, axis=1), batch)
        with _naming_value():
            updates, opt_state = tx.update(None, opt_state, params, batch=piece, **asked)
        params = optax.apply_updates(params, updates)
        measured = None
        if metric is not None:
            opt_state, outputs = _parted(opt_state)
            measured = _measured(metric, outputs, piece.targets)
        return (params, opt_state), (optax.tree.get(opt_state, "loss"), measured)

    (params, opt_state), (losses, measured) = jax.lax.scan(
        lambda so_far, k: step(so_far, k * chunk, chunk), (params, opt_state), jnp.arange(full)
    )
    measured = merge_axes(measured)
    if rest:
        (params, opt_state), (last, more) = step((params, opt_state), full * chunk, rest)
        losses = jnp.append(losses, last)
        measured = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), measured, more)
    if metric is None:
        return params, opt_state, losses
    return params, opt_state, losses, jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), measured)


@contextlib.contextmanager
def _naming_value() -> Iterator[None]:
    """Says what to do about an optimizer that asks for the loss's value, too."""
    try:
        yield
    except TypeError as error:
        if "required keyword-only argument" not in str(error) or "'value'" not in str(error):
            raise
        raise ValueError(
            f"tx holds an optimizer that needs the loss's value beside its gradients ({error}), "
            "such as polyak_sgd, lbfgs, a line search or reduce_on_plateau. A rule gives updates "
            "alone, which need not be the gradients of any value. Use one such as optax.adam."
        ) from error


def _parted(opt_state: Any) -> tuple[Any, Any]:
    """An optimizer's state as it was before outputs were asked for, and the outputs [B, T, ...]."""
    found = []

    def part(x: Any) -> Any:
        if not isinstance(x, WithOutputs):
            return x
        found.append(x.outputs)
        return x.state

    state = jax.tree.map(part, opt_state, is_leaf=lambda x: isinstance(x, WithOutputs))
    return state, found[0]


def _measured(metric: Metric, outputs: Any, targets: Any) -> Any:
    """The metric of outputs and targets [B, T, ...], leaves [T, B, ...]."""

    def one(outputs: Any, targets: Any) -> Any:
        size, found = jax.tree.leaves(outputs)[0].shape[0], metric(outputs, targets)
        for leaf in jax.tree.leaves(found):
            if jnp.ndim(leaf) < 1 or leaf.shape[0] != size:
                raise ValueError(
                    f"metric(outputs, targets) must give one value an example, [B, ...] with B = "
                    f"{size}; got shape {jnp.shape(leaf)} for outputs and targets "
                    f"{jax.tree.map(jnp.shape, (outputs, targets))}. Do not average over examples."
                )
        return found

    return jax.vmap(one, in_axes=1)(outputs, targets)


def _require_learner(tx: Any, opt_state: Any, size: int, carries_on: bool) -> None:
    """Raises unless `tx` is a rule, a streaming one if it carries on, with something behind it."""
    alone = opt_state
    while type(alone) is tuple and len(alone) == 1:
        (alone,) = alone
    if isinstance(tx, LearningRule) or is_state(alone):
        raise ValueError(
            "tx is a bare rule, whose updates point uphill: put an optimizer behind it, as in "
            "optax.chain(rule, optax.sgd(1e-3))."
        )
    states = [end for end in _require_whole("opt_state", opt_state) if is_state(end)]
    if not states:
        raise ValueError(
            "tx holds no localgrad rule: begin the chain with one, as in "
            "optax.chain(localgrad.eprop(model, loss, batch_size=B), optax.sgd(1e-3))."
        )
    _require_first(opt_state)
    if carries_on and all(s.carry is None for s in states):
        raise ValueError(
            f"tx holds an episodic rule, which would forget everything at each chunk: make the "
            f"rule with batch_size={size}, or learn with chunk=T."
        )


WRAPPERS = {
    optax.ApplyIfFiniteState: "apply_if_finite(...)",
    optax.ConditionallyMaskState: "conditionally_mask(...)",
    optax.ConditionallyTransformState: "conditionally_transform(...)",
    optax.MaskedState: "masked(...)",
    optax.MultiStepsState: "MultiSteps(...).gradient_transformation()",
    optax.transforms.PartitionState: "partition(...)",
}
"""Of optax, by their states, those that need the gradients before what they wrap makes updates."""


def _require_first(state: Any) -> None:
    """Raises if anything comes before a rule in a chain, or around it, as far as states tell."""
    if isinstance(state, collections.OrderedDict):  # of a named_chain
        state = tuple(state.values())
    if is_state(state) or not isinstance(state, tuple):
        return
    if type(state) in WRAPPERS and _holds_rule(state):
        name = WRAPPERS[type(state)]
        raise ValueError(
            f"tx has optax.{name.partition('(')[0]} around a rule: it needs gradients, which only "
            f"the rule will make. Put it behind the rule, as in optax.chain(rule, optax.{name})."
        )
    is_chain = not hasattr(state, "_fields")
    place = next((i for i, member in enumerate(state) if _holds_rule(member)), 0)
    if is_chain and place:
        raise ValueError(
            "tx has a transformation before its rule, which makes updates of its own and takes "
            "none: it would be ignored. A rule comes first, as in "
            "optax.chain(rule, optax.clip_by_global_norm(1.0), optax.adam(1e-3))."
        )
    for member in state:
        _require_first(member)


def _holds_rule(state: Any) -> bool:
    return any(is_state(leaf) for leaf in jax.tree.leaves(state, is_leaf=is_state))


def reset_state(state: Any) -> Any:
    """Fresh carry and influence for every rule in a state; feedback and keys stay.

    Args:
        state: a rule's state, or any optimizer state that holds some.

    Returns:
        The same with each stream at its start.

    Raises:
        ValueError: if a rule's state is a dict, as Orbax restores it without a target.

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
    _require_whole("state", state)
    return jax.tree.map(lambda s: fresh(s) if is_state(s) else s, state, is_leaf=is_state)


def _require_whole(name: str, state: Any) -> list[Any]:
    """What a state holds, with rules' states as they are; raises if one is a dict."""
    ends = jax.tree.leaves(state, is_leaf=lambda x: is_state(x) or is_restored(x))
    if any(is_restored(end) for end in ends):
        raise ValueError(f"{name} holds a rule's state as a dict. {RESTORE}")
    return ends
