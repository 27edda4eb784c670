"""The state of a rule: what all states have in common, and how a stream begins anew."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeGuard

import flax
import jax
import jax.numpy as jnp


class RuleState(Protocol):
    """What every rule's state holds; each rule has a NamedTuple of its own.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        outlives: names of the fields that outlive a sequence, such as feedback weights and keys; a
            class attribute. All other fields are zero at a sequence's start.

    Streams are the first axis of all fields but the loss and those that outlive a sequence. Where
    they are another, the class attribute `streams` says which, by field: a number, or a tree of
    them.
    """

    loss: Any
    carry: Any
    initial_carry: Any
    outlives: tuple[str, ...]


class CarryState(NamedTuple):
    """State of a rule that keeps nothing but the model's carry.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None

    outlives = ()


class WithOutputs(NamedTuple):
    """A rule's state after a call that was asked for the model's outputs.

    Attributes:
        state: the state.
        outputs: leaves [B, T, ...], made before the call's update.
    """

    state: Any
    outputs: Any


def is_state(x: Any) -> TypeGuard[Any]:
    """Whether `x` is the state of a rule."""
    return isinstance(x, tuple) and hasattr(x, "outlives")


class Member:
    """The state of a rule inside another's, in whose fields optax does not look for a `loss`."""

    def __init__(self, kind: type, fields: tuple[Any, ...]) -> None:
        self.kind, self.fields = kind, fields

    @property
    def state(self) -> Any:
        """The state."""
        return self.kind(*self.fields)

    def __repr__(self) -> str:
        return f"Member({self.state!r})"


def as_member(state: Any) -> Member:
    """A state as another's member."""
    return Member(type(state), tuple(state))


jax.tree_util.register_pytree_node(
    Member, lambda member: (member.fields, member.kind), lambda kind, fields: Member(kind, fields)
)


flax.serialization.register_serialization_state(
    Member,
    lambda member: flax.serialization.to_state_dict(member.fields),
    lambda member, state: Member(
        member.kind, flax.serialization.from_state_dict(member.fields, state)
    ),
)


def _begun_anew(x: Any) -> Any:
    return as_member(fresh(x.state)) if isinstance(x, Member) else jnp.zeros_like(x)


def fresh(state: Any) -> Any:
    """A rule's state at the start of new sequences; what outlives a sequence stays."""
    kept = {"loss", "carry", "initial_carry", *state.outlives}
    blank = {
        name: jax.tree.map(_begun_anew, value, is_leaf=lambda x: isinstance(x, Member))
        for name, value in state._asdict().items()
        if name not in kept
    }
    # A buffer of its own: a state may be donated, and no buffer can be donated twice.
    return state._replace(carry=jax.tree.map(jnp.copy, state.initial_carry), **blank)


def require_own(rule: str, state: Any, kind: type, batch_size: int | None) -> None:
    """Raises unless a state comes from this rule's `init`, in this rule's mode."""
    made = type(state).__name__
    if isinstance(state, kind) and (state.carry is None) == (batch_size is None):
        return
    if isinstance(state, kind):
        made = f"that of a rule made with{'out' if state.carry is None else ''} batch_size"
    if is_restored(state):
        raise ValueError(f"{rule} got its state as a {made}. {RESTORE}")
    raise ValueError(
        f"{rule} with batch_size={batch_size} got a state that is not its own ({made}); begin with "
        "its own init(params)."
    )


RESTORE = (
    "Orbax gives dicts and lists where it is not told what to restore: pass it a target, as in "
    "checkpointer.restore(path, jax.eval_shape(lambda: (params, tx.init(params))))."
)
"""What to do about a state that was restored without a target."""


def is_restored(x: Any) -> bool:
    """Whether `x` was a rule's state before it was saved, and restored without a target."""
    return isinstance(x, dict) and {"loss", "carry", "initial_carry"} <= x.keys()


def require_like(rule: str, state: Any, own: Any) -> None:
    """Raises unless a state has the structure and the shapes of this rule's own."""

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
            "model, batch_size, feedback, firing_rate, horizon or example; begin with this rule's "
            "own init(params)."
        )
