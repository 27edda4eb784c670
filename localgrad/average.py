"""`average`: independent copies of a rule that draws, and the mean of their updates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import positive_integer, require_updates
from localgrad.core.contract.rule import Batch, LearningRule, Select
from localgrad.core.contract.state import Member, WithOutputs, as_member, require_own


class AverageState(NamedTuple):
    """State of `average`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        copies: what each copy keeps beside these, leaves [K, ...].
    """

    loss: jax.Array
    carry: Any
    initial_carry: Any
    copies: Member

    outlives = ()


def average(rule: LearningRule, *, samples: int) -> LearningRule:
    r"""Runs K independent copies of a rule that draws, and averages their updates.

    Each copy has a key of its own, split from the rule's, and an influence of its own; the model
    runs once for all of them, and so does what they do alike. The copies are the first axis of
    `state.copies`, which can be sharded: each device then does its copies' share, and the mean is
    one all-reduce::

        dW = sum_k dW_k / K

    *Estimates* what the rule does, with its variance divided by K. *Costs* K times what the rule
    draws and keeps, but one pass forward.

    Args:
        rule: one whose state holds a key, such as `uoro`, `kf_rtrl` or `ok`. The perturbation rules
            have `samples` of their own, which costs less.
        samples: K, how many copies.

    Returns:
        A `LearningRule`; its state is an `AverageState`.

    Raises:
        ValueError: for a rule that draws nothing, or samples below 1.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> one = localgrad.uoro(model, optax.l2_loss, key=jax.random.key(2), batch_size=4)
        >>> rule = localgrad.average(one, samples=8)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.copies.state.left["cells_0"].shape  # [K, B, N]
        (8, 4, 8)

    Reference:
        Mean of independent samples; for UORO: Cooijmans and Martens, "On the variance of unbiased
        online recurrent optimization", 2019, https://arxiv.org/abs/1902.02405
    """
    samples = positive_integer("samples", samples, "It is how many copies to average; try 8.")
    if type(rule) is not LearningRule:
        raise ValueError(
            f"rule must be a localgrad rule; got {type(rule).__name__}. Put optimizers behind the "
            "average, as in optax.chain(average, optax.adam(1e-3))."
        )
    if rule.name in ("average", "mix", "guard"):
        raise ValueError(
            f"average takes a rule itself; got {rule.name}. Average the rules of a mix one by one, "
            "give an average more samples, and guard an average as a whole."
        )
    if not rule.draws:
        raise ValueError(
            f"average needs a rule that draws from a key at each update; {rule.name} gives the "
            f"same updates in all {samples} samples. Use {rule.name} alone, or one such as "
            "localgrad.uoro."
        )
    advance = jax.jit(functools.partial(_advance, rule), static_argnums=3)
    settings = {name: rule.settings[name] for name in ("model", "loss")}
    settings |= {"rule": rule.name, "samples": samples} | rule.settings
    return LearningRule(
        functools.partial(_init, rule, samples),
        functools.partial(_update, advance, rule.settings["batch_size"]),
        name="average",
        settings=settings,
        credits=rule.credits,
        narrow=functools.partial(_narrowed, rule, samples),
        advice=rule.advice,
        draws=True,
    )


def _narrowed(rule: LearningRule, samples: int, select: Select) -> LearningRule:
    """The same for some parameters alone."""
    return average(rule.narrow(select), samples=samples)


def _init(rule: LearningRule, samples: int, params: Any) -> AverageState:
    one = rule.init(params)
    own = _without(one)._replace(key=None)
    copies = jax.tree.map(lambda a: jnp.repeat(a[None], samples, axis=0), own)
    copies = copies._replace(key=jax.random.split(one.key, samples))
    return AverageState(one.loss, one.carry, one.initial_carry, as_member(copies))


def _without(state: Any) -> Any:
    """A rule's state without what all copies have in common."""
    return state._replace(loss=None, carry=None, initial_carry=None)


def _update(
    advance: Callable[..., tuple[Any, AverageState]],
    batch_size: int | None,
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
    require_updates("average", updates, params)
    require_own("average", state, AverageState, batch_size)
    return advance(params, state, batch, with_outputs)


def _advance(
    rule: LearningRule, params: Any, state: AverageState, batch: Batch | None, with_outputs: bool
) -> tuple[Any, Any]:
    """One call of every copy, all from the same carry."""
    common = {"loss": state.loss, "carry": state.carry, "initial_carry": state.initial_carry}

    def one(copy: Any) -> tuple[Any, Any, Any]:
        own = copy._replace(**common)
        updates, after = rule.update(None, own, params, batch=batch, with_outputs=with_outputs)
        after, outputs = after if with_outputs else (after, None)
        alike = (after.loss, after.carry, after.initial_carry, outputs)
        return updates, alike, _without(after)

    # Loss, carry and outputs depend on no draw, which `out_axes=None` has JAX make sure of.
    updates, alike, copies = jax.vmap(one, out_axes=(0, None, 0))(state.copies.state)
    loss, carry, initial_carry, outputs = alike
    mean = jax.tree.map(lambda a: a.mean(0), updates)
    state = AverageState(loss, carry, initial_carry, as_member(copies))
    return mean, WithOutputs(state, outputs) if with_outputs else state
