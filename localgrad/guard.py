"""`guard`: a stream that went wrong is dropped and begins anew, and the others learn on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.average import AverageState
from localgrad.combine import MixState
from localgrad.core.contract.checks import number, require_batch, require_updates
from localgrad.core.contract.objective import Objective
from localgrad.core.contract.rule import Batch, LearningRule, Loss, Select
from localgrad.core.contract.state import Member, WithOutputs, as_member, fresh, require_own


class GuardState(NamedTuple):
    """State of `guard`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry.
        initial_carry: the model's initial carry.
        member: what the rule keeps beside these.
        norm: [B] norm of what the rule remembers of each stream, its influence or eligibility,
            after the last call and before it was clipped.
        poisoned: [B] int32, calls so far that each stream was dropped from.
        refused: int32, calls so far whose updates were refused.
    """

    loss: jax.Array
    carry: Any
    initial_carry: Any
    member: Member
    norm: jax.Array
    poisoned: jax.Array
    refused: jax.Array

    outlives = ("poisoned", "refused")


def guard(rule: LearningRule, *, max_norm: float | None = None) -> LearningRule:
    r"""Keeps what goes wrong in one stream from the parameters and from the other streams.

    A stream that is shown a NaN or an infinity (in its inputs or its mask, or in a target of weight
    other than 0) is left out of that call, as if all its steps had weight 0, and begins anew after
    it. Where finite numbers led to one that is not, in a carry, an influence, a loss or an update,
    nobody can say what is left of the sum: that call's updates are zeros, what all streams share
    (adaptive feedback, a predictor) stays as it was, and the streams whose carry, influence or loss
    broke begin anew. All others keep their carry and their influence. The state counts both, by
    stream and in all, and shows how large each stream's influence is, which tells of one that
    explodes while it is still finite. A stream that breaks in every call stops all learning: a
    `refused` that grows says so, and `poisoned` says which it is.

    With `max_norm` it is also held there::

        M_b  <-  M_b min(1, max_norm / |M_b|)        |M_b|: over all that is remembered of stream b

    Where an influence is a product of two sides (`uoro`, `kf_rtrl`, `ok`), both are scaled.

    *Estimates* what the rule does, of the streams that are well; clipping makes it biased. *Costs*
    two passes over what the rule remembers, a call: little for calls of many steps, and next to the
    price of the step itself for calls of one; and the loss of its outputs, a second time.

    Args:
        rule: a streaming rule (made with `batch_size`), also an `average` or a `mix`.
        max_norm: the largest norm of what is remembered of a stream, or None.

    Returns:
        A `LearningRule`; its state is a `GuardState`.

    Raises:
        ValueError: for what is no streaming rule, or a `max_norm` that is not above 0.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.guard(localgrad.eprop(model, optax.l2_loss, batch_size=4))
        >>> broken = localgrad.Batch(x.at[2, 5].set(jnp.nan), x[..., :2])
        >>> updates, state = rule(params, rule.init(params), broken)
        >>> bool(jnp.isfinite(updates["readout"]["kernel"]).all()), state.poisoned.tolist()
        (True, [0, 0, 1, 0])
    """
    if type(rule) is not LearningRule or rule.name == "guard":
        given = "a guard" if type(rule) is LearningRule else type(rule).__name__
        raise ValueError(
            f"guard takes a localgrad rule; got {given}. Put optimizers behind it, as in "
            "optax.chain(localgrad.guard(rule), optax.adam(1e-3))."
        )
    if rule.settings["batch_size"] is None:
        raise ValueError(
            f"guard takes a streaming rule; got {rule.name} with batch_size=None, whose sequences "
            "carry nothing on. Give it batch_size, or use optax.apply_if_finite around the chain."
        )
    if max_norm is not None:
        number("max_norm", max_norm, "be positive and finite", "Or None, for no limit.")
    advance = jax.jit(functools.partial(_advance, rule, max_norm), static_argnums=3)
    settings = {name: rule.settings[name] for name in ("model", "loss")}
    settings |= {"rule": rule.name, "max_norm": max_norm} | rule.settings
    return LearningRule(
        functools.partial(_init, rule),
        functools.partial(_update, advance, rule.settings["batch_size"]),
        name="guard",
        settings=settings,
        credits=rule.credits,
        narrow=functools.partial(_narrowed, rule, max_norm),
        advice=rule.advice,
        draws=rule.draws,
    )


def _narrowed(rule: LearningRule, max_norm: float | None, select: Select) -> LearningRule:
    """The same for some parameters alone."""
    return guard(rule.narrow(select), max_norm=max_norm)


def _init(rule: LearningRule, params: Any) -> GuardState:
    size = rule.settings["batch_size"]
    state = rule.init(params)
    none = jnp.zeros(size, jnp.int32)
    return _guarded(state, _norms(state, size), none, jnp.zeros((), jnp.int32))


def _guarded(state: Any, norm: jax.Array, poisoned: jax.Array, refused: jax.Array) -> GuardState:
    """A rule's state with what is said of it."""
    own = as_member(state._replace(loss=None, carry=None, initial_carry=None))
    return GuardState(state.loss, state.carry, state.initial_carry, own, norm, poisoned, refused)


def _update(
    advance: Callable[..., tuple[Any, Any]],
    batch_size: int,
    updates: Any,
    state: Any,
    params: Any = None,
    *,
    batch: Batch | None = None,
    with_outputs: bool = False,
    **extra: Any,
) -> tuple[Any, Any]:
    """Optax's side of a call."""
    del extra
    require_updates("guard", updates, params)
    require_own("guard", state, GuardState, batch_size)
    return advance(params, state, batch, with_outputs)


def _advance(
    rule: LearningRule,
    max_norm: float | None,
    params: Any,
    state: GuardState,
    batch: Batch,
    with_outputs: bool,
) -> tuple[Any, Any]:
    """One call, without the streams that are ill before or after it."""
    size, steps = require_batch(batch, rule.settings["batch_size"])
    ill = _ill(batch)
    common = {"loss": state.loss, "carry": state.carry, "initial_carry": state.initial_carry}
    before = state.member.state._replace(**common)
    batch = _without(batch, ill, (size, steps))
    updates, (after, outputs) = rule.update(None, before, params, batch=batch, with_outputs=True)
    norm = _norms(after, size)
    lost = _lost(rule.settings["loss"], outputs, batch)
    ill |= ~jnp.isfinite(norm) | ~_finite_rows(after.carry, size) | ~jnp.isfinite(lost)
    whole, kept = _kept(after, before)
    fine = whole & _all_finite(updates)
    updates = jax.tree.map(lambda u: jnp.where(fine, u, jnp.zeros_like(u)), updates)
    after = jax.tree.map(functools.partial(_chosen, fine), after, kept)
    if max_norm is not None:
        after = _scaled(after, max_norm / jnp.maximum(norm, max_norm))
    after = _begun_anew(after, ill)
    state = _guarded(after, norm, state.poisoned + ill, state.refused + ~fine)
    return updates, WithOutputs(state, outputs) if with_outputs else state


def _lost(loss: Loss, outputs: Any, batch: Batch) -> jax.Array:
    """[B] the loss of each stream."""
    ahead = lambda tree: jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tree)  # noqa: E731
    each = Objective(loss, jnp.ones(()))
    return each.values(ahead(outputs), ahead(batch.targets), ahead(batch.mask)).sum(0)


def _chosen(fine: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if new is old else jnp.where(fine, new, old)


def _ill(batch: Batch) -> jax.Array:
    """[B] whether a stream is shown what is not finite."""
    counts = True if batch.mask is None else batch.mask != 0

    def rows(leaf: Any, counts: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return False
        wrong = ~jnp.isfinite(leaf).reshape(*leaf.shape[:2], -1).all(-1)
        return (wrong & counts).any(1)

    shown = [rows(leaf, True) for leaf in jax.tree.leaves((batch.inputs, batch.mask))]
    asked = [rows(leaf, counts) for leaf in jax.tree.leaves(batch.targets)]
    none = jnp.zeros(len(jax.tree.leaves(batch.inputs)[0]), bool)
    return functools.reduce(jnp.logical_or, [*shown, *asked], none)


def _without(batch: Batch, ill: jax.Array, shape: tuple[int, int]) -> Batch:
    """A batch whose ill streams see zeros, and are asked for nothing."""
    inputs, targets = (_rows(ill, 0.0, tree) for tree in (batch.inputs, batch.targets))
    mask = jnp.ones(shape) if batch.mask is None else batch.mask
    return batch._replace(inputs=inputs, targets=targets, mask=_rows(ill, 0, mask))


def _rows(where: jax.Array, value: float, tree: Any) -> Any:
    """A tree with a number in place of some rows of its leaves [B, ...]."""
    return jax.tree.map(
        lambda a: jnp.where(_beside(where, a, 0), jnp.asarray(value, a.dtype), a), tree
    )


def _beside(rows: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
    """Numbers of streams, [B], along an axis of a leaf."""
    return rows.reshape([-1 if k == axis else 1 for k in range(leaf.ndim)])


def _scaled(state: Any, scale: jax.Array) -> Any:
    """A state in which what is remembered of each stream is scaled."""

    def one(axis: int, leaf: jax.Array) -> jax.Array:
        if axis < 0 or not _real(leaf):
            return leaf
        return leaf * _beside(scale, leaf, axis).astype(leaf.dtype)

    memory = jax.tree.map(one, _memory(_axes(state)), _memory(state))
    return memory._replace(carry=state.carry, initial_carry=state.initial_carry)


def _begun_anew(state: Any, ill: jax.Array) -> Any:
    """A state in which some streams begin anew."""

    def one(axis: int, leaf: jax.Array, clean: jax.Array) -> jax.Array:
        return leaf if axis < 0 else jnp.where(_beside(ill, leaf, axis), clean, leaf)

    return jax.tree.map(one, _axes(state), state, fresh(state))


def _finite_rows(tree: Any, size: int) -> jax.Array:
    """[B] whether all numbers of a stream are finite, in leaves [B, ...]."""
    found = [
        jnp.isfinite(leaf).reshape(size, -1).all(1) for leaf in jax.tree.leaves(tree) if _real(leaf)
    ]
    return functools.reduce(jnp.logical_and, found, jnp.ones(size, bool))


def _axes(state: Any, axis: int = 0) -> Any:
    """A tree like a rule's state: the axis of streams of each leaf, or -1 of what they share."""
    within = axis + isinstance(state, AverageState)  # whose copies come before streams
    elsewhere = getattr(state, "streams", {})

    def of_field(name: str, value: Any) -> Any:
        if isinstance(state, AverageState | MixState) and name in ("copies", "members"):
            own = lambda member: as_member(_axes(member.state, within))  # noqa: E731
            return jax.tree.map(own, value, is_leaf=lambda x: isinstance(x, Member))
        if value is None or name == "loss" or name in state.outlives:
            return jax.tree.map(lambda _: -1, value)
        places = jax.tree.broadcast(elsewhere.get(name, 0), value)
        # A number of all streams, such as a clock, has no axis for them.
        return jax.tree.map(lambda leaf, k: axis + k if leaf.ndim > axis + k else -1, value, places)

    return state._replace(**{k: of_field(k, v) for k, v in state._asdict().items()})


def _memory(state: Any) -> Any:
    """A rule's state without what is the model's."""
    return state._replace(carry=None, initial_carry=None)


def _real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _norms(state: Any, size: int) -> jax.Array:
    """[B] norm of what is remembered of each stream; not finite if a number of it is not."""
    memory, found = _memory(state), [jnp.zeros(size)]
    for axis, leaf in zip(jax.tree.leaves(_axes(memory)), jax.tree.leaves(memory), strict=True):
        if axis >= 0 and _real(leaf):
            found.append(_norm(jnp.moveaxis(leaf, axis, 0).reshape(size, -1)))
    return _norm(jnp.stack(found, 1))


def _norm(rows: jax.Array) -> jax.Array:
    """[B] norm of each row, at least float32, which no square of a finite number makes infinite."""
    rows = jnp.abs(rows).astype(jnp.promote_types(rows.real.dtype, jnp.float32))
    most = rows.max(1, keepdims=True, initial=0)
    scale = jnp.where(most > 0, most, 1)
    return scale[:, 0] * jnp.sqrt(jnp.square(rows / scale).sum(1))


def _all_finite(tree: Any) -> jax.Array:
    found = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if _real(leaf)]
    return functools.reduce(jnp.logical_and, found, jnp.array(True))


def _kept(state: Any, before: Any) -> tuple[jax.Array, Any]:
    """Whether what all streams share is finite; and a state in which it is as it was before."""
    shared = [
        leaf
        for axis, leaf in zip(jax.tree.leaves(_axes(state)), jax.tree.leaves(state), strict=True)
        if axis < 0
    ]
    kept = jax.tree.map(
        lambda axis, new, old: old if axis < 0 and _real(new) else new,
        _axes(state),
        state,
        before,
    )
    return _all_finite(shared), kept._replace(loss=state.loss)
