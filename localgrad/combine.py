"""`mix`: a learning rule for each group of parameters, in one transformation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import require_updates
from localgrad.core.contract.rule import Batch, LearningRule, Select
from localgrad.core.contract.state import Member, WithOutputs, as_member, require_own
from localgrad.core.params import Path, flatten, leaves_of

Labels = Any


class MixState(NamedTuple):
    """State of `mix`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        members: by label, what each rule keeps beside these.
    """

    loss: jax.Array
    carry: Any
    initial_carry: Any
    members: dict[str, Member]

    outlives = ()


def mix(rules: Mapping[str, LearningRule], labels: Labels) -> LearningRule:
    r"""Gives each group of parameters a learning rule of its own.

    Every parameter has one label, and gets the update of the rule of that label. All rules see the
    whole model; what disturbs parameters, or the units that they drive, disturbs those of its own
    label only. So a cell can learn by e-prop while its encoder, which nothing can be propagated
    through, learns by perturbation::

        rule = localgrad.mix(
            {
                "noise": localgrad.node_perturbation(model, loss, key=key, samples=16),
                "local": localgrad.eprop(model, loss),
            },
            {"encoder": "noise", "cells_0": "local", "readout": "local"},
        )

    Credit ends at an encoder whose parameters are another rule's. It is a rule as any other: one
    `loss` and one carry, which are the same for all its members, one state. Behind it,
    `optax.partition` gives the groups learning rates of their own, by the same labels.

    *Estimates*, for each group, what its rule does. *Costs* what its rules cost together; a pass
    forward that two of them make alike, as `decorrelation` and the perturbation rules do, is made
    once. Rules that hold an influence hold it for all parameters.

    Args:
        rules: by label, rules made with the same model, loss, `batch_size` and `reduction` (where
            they have one).
        labels: a tree of labels with the structure of the parameters, or of their upper levels; or
            a function of the parameters that returns one.

    Returns:
        A `LearningRule`; its state is a `MixState`.

    Raises:
        ValueError: for rules that were made differently, labels that are none of theirs, a label
            without parameters, and, once there are parameters, for a rule that leaves some of its
            own as they are.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> noisy = localgrad.node_perturbation(model, optax.l2_loss, key=jax.random.key(2))
        >>> exact = localgrad.readout_only(model, optax.l2_loss)
        >>> rule = localgrad.mix(
        ...     {"noise": noisy, "gradient": exact}, {"cells_0": "noise", "readout": "gradient"}
        ... )
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> whole = localgrad.bptt(model, optax.l2_loss)
        >>> wanted, _ = whole(params, whole.init(params), localgrad.Batch(x, x[..., :2]))
        >>> bool(jnp.allclose(updates["readout"]["kernel"], wanted["readout"]["kernel"], atol=1e-6))
        True
    """
    rules = _alike(rules)
    narrowed = {
        label: rule.narrow(functools.partial(_paths, tuple(rules), labels, label))
        for label, rule in rules.items()
    }
    told = functools.reduce(lambda a, b: {**b, **a}, [rule.settings for rule in rules.values()])
    shared = {name: told[name] for name in ("model", "loss")}
    common = {name: told[name] for name in ("batch_size", "reduction") if name in told}
    advance = jax.jit(functools.partial(_advance, narrowed), static_argnums=3)
    return LearningRule(
        functools.partial(_init, narrowed),
        functools.partial(_update, advance, told["batch_size"]),
        name="mix",
        settings={**shared, "rules": {label: r.name for label, r in rules.items()}, **common},
        credits=functools.partial(_credits, narrowed, labels),
        narrow=_not_within,
        advice=next((rule.advice for rule in rules.values() if rule.advice), ""),
    )


def _not_within(select: Select) -> NoReturn:
    del select
    raise ValueError("mix takes no mix among its rules: list all rules in one.")


COMMON = ("model", "loss", "batch_size", "reduction")


def _alike(given: Any) -> dict[str, LearningRule]:
    """The rules by label; raises unless they were made for the same model and the same calls."""
    if not isinstance(given, Mapping):
        raise ValueError(
            f"rules must map labels to rules, as in {{'noise': ..., 'local': ...}}; got a "
            f"{type(given).__name__}."
        )
    rules = dict(given)
    if len(rules) < 2:
        raise ValueError(f"mix needs two rules or more; got {list(rules)}. One rule goes alone.")
    (one, first), *others = rules.items()
    for label, rule in rules.items():
        if type(rule) is not LearningRule:
            raise ValueError(
                f"rules[{label!r}] must be a localgrad rule; got {type(rule).__name__}. Put "
                "optimizers behind the mix, as in optax.chain(mix, optax.adam(1e-3))."
            )
        if rule.name == "guard":
            raise ValueError(f"rules[{label!r}] is a guard; guard the mix as a whole.")
    for label, rule in others:
        for name in COMMON:
            a, b = (r.settings.get(name) for r in (first, rule))
            told = name in first.settings and name in rule.settings  # `force` has no reduction
            if told and a is not b and a != b:
                raise ValueError(
                    f"the rules of a mix must be made with the same {name}; rules[{one!r}] has "
                    f"{a!r}, rules[{label!r}] has {b!r}."
                )
    return rules


def _labelled(names: tuple[str, ...], labels: Labels, params: Any) -> dict[Path, str]:
    """The label of each parameter."""
    given, _ = flatten(labels(params) if callable(labels) else labels)
    found = {path: _label(given, path) for path in leaves_of(params)}
    for head in given:
        if not any(path[: len(head)] == head for path in found):
            raise ValueError(
                f"labels name {'/'.join(head)}, which is no parameter; the upper level of the "
                f"parameters is {sorted({path[0] for path in found})}."
            )
    for path, label in found.items():
        if not isinstance(label, str) or label not in names:
            raise ValueError(
                f"labels give {'/'.join(path)} the label {label!r}, for which there is no rule; "
                f"rules has {list(names)}."
            )
    for name in names:
        if name not in found.values():
            raise ValueError(f"labels give no parameter the label {name!r}: its rule learns none.")
    return found


def _label(given: dict[Path, Any], path: Path) -> Any:
    """The label of a parameter, or of what it lies in."""
    heads = [path[:n] for n in range(len(path), -1, -1)]
    found = next((given[head] for head in heads if head in given), None)
    if found is None:
        raise ValueError(
            f"labels have none for {'/'.join(path)}. They are a tree of labels, with the structure "
            "of the parameters or of their upper levels, or a function that makes one of them."
        )
    return found


def _paths(names: tuple[str, ...], labels: Labels, label: str, params: Any) -> frozenset[Path]:
    """The parameters of a label."""
    found = _labelled(names, labels, params)
    return frozenset(path for path, own in found.items() if own == label)


def _init(rules: dict[str, LearningRule], params: Any) -> MixState:
    states = {label: rule.init(params) for label, rule in rules.items()}
    first = next(iter(states.values()))
    members = {label: _without(state) for label, state in states.items()}
    return MixState(jnp.zeros_like(first.loss), first.carry, first.initial_carry, members)


def _without(state: Any) -> Member:
    """A rule's state without what all rules have in common."""
    return as_member(state._replace(loss=None, carry=None, initial_carry=None))


def _update(
    advance: Callable[..., tuple[Any, MixState]],
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
    require_updates("mix", updates, params)
    require_own("mix", state, MixState, batch_size)
    return advance(params, state, batch, with_outputs)


def _advance(
    rules: dict[str, LearningRule],
    params: Any,
    state: MixState,
    batch: Batch | None,
    with_outputs: bool,
) -> tuple[Any, Any]:
    """One call of every rule, each from the same carry; the outputs are the first one's."""
    common = {"loss": state.loss, "carry": state.carry, "initial_carry": state.initial_carry}
    updates, states = {}, {}
    for label, rule in rules.items():
        own = state.members[label].state._replace(**common)
        updates[label], states[label] = rule.update(
            None, own, params, batch=batch, with_outputs=with_outputs
        )
    outputs = None
    if with_outputs:
        outputs = next(iter(states.values())).outputs
        states = {label: found.state for label, found in states.items()}
    first = next(iter(states.values()))
    members = {label: _without(own) for label, own in states.items()}
    # Each rule gives zeros outside of its group.
    total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), updates.values())
    state = MixState(first.loss, first.carry, first.initial_carry, members)
    return total, WithOutputs(state, outputs) if with_outputs else state


def _credits(rules: dict[str, LearningRule], labels: Labels, params: Any) -> dict[Path, str]:
    """How each parameter is credited, as `localgrad.summary` prints it."""
    found = _labelled(tuple(rules), labels, params)
    each = {label: rule.credits(params) for label, rule in rules.items()}
    return {path: f"{label}: {each[label][path]}" for path, label in found.items()}
