"""The frame in which every rule runs: from a batch, window by window, to an update and a state.

A rule is a `Recipe`; `windowed_rule` makes a `LearningRule` of it. A call goes `_update` ->
`_advance` -> the recipe's `process` for each window.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import require_batch, require_choices, require_updates
from localgrad.core.contract.devices import on_any_mesh, require_unchecked
from localgrad.core.contract.objective import Objective, Shown, weights_of
from localgrad.core.contract.room import Room
from localgrad.core.contract.rule import NOTHING, Batch, LearningRule, Loss, Select
from localgrad.core.contract.state import WithOutputs, require_like, require_own
from localgrad.core.model.example import example_spec
from localgrad.core.model.loops import naming_loops
from localgrad.core.model.stack import Stack, assemble, parts, seen_by_weights
from localgrad.core.params import (
    Leaves,
    Path,
    accumulator,
    added,
    flatten,
    leaves_of,
    placed,
    under,
)
from localgrad.core.windows import Frame, Window, over_windows

Process = Callable[[Frame, Any, Window], tuple[Any, Leaves, Shown]]


class Recipe(NamedTuple):
    """What makes one rule different from another.

    Attributes:
        name: the rule's public name.
        state: its state's type, a `RuleState`; `state(loss)` is that of an episodic rule without
            draws.
        process: `(frame, state, window) -> (state, grads, shown)` for one window.
        credits: `(stack, params) -> {path: how the rule credits that parameter}`.
        settings: what its factory was told, beside what all rules are.
        remember: `(stack, params, x) -> fields` of the state that a stream of B examples carries
            beside its carry, at its start; x is one step's input.
        draw: `params -> fields` that outlive a sequence and need the parameters alone, such as a
            key.
        prepare: `(stack, params) -> fields` that outlive a sequence and need the model taken apart,
            such as feedback weights.
        default_window: `(stack, params, T, alone) -> W`; alone says that the T steps are all there
            is, so that a single window needs no influence.
        finish: what is done to the state at the end of a call, such as a step of what learns in it.
        screen: `(stack, params)` raises for what the rule cannot credit.
        room: how much B streams may remember, or None for any amount.
        inspect: `batch` raises for what only numbers tell; numbers may be traced, and then do not.
        advice: which rule takes less memory, if this one takes much.
        observes: whether it corrects the carries of models that look at their targets.
        lone: why its carry is no other rule's, so that it cannot be mixed; or empty.
        by_synapse: whether it credits weights otherwise than other parameters, so that all weights
            must be seen, in layers or not.
        by_window: whether it is exact either way, and faster where weights are seen: what all steps
            of a window receive is then multiplied at once.
        fit: `state -> recipe`, the same rule for states of a size that only their `init` could
            tell; or None.
    """

    name: str
    state: type
    process: Process
    credits: Callable[[Stack, Leaves], dict[Path, str]]
    settings: dict[str, Any] = {}
    remember: Callable[[Stack, Leaves, Any], dict[str, Any]] = lambda stack, params, x: {}
    draw: Callable[[Leaves], dict[str, Any]] = lambda params: {}
    prepare: Callable[[Stack, Leaves], dict[str, Any]] | None = None
    default_window: Callable[[Stack, Leaves, int, bool], int] = lambda stack, params, T, alone: T
    finish: Callable[[Any], Any] = lambda state: state
    screen: Callable[[Stack, Leaves], None] = lambda stack, params: None
    room: Room | None = None
    inspect: Callable[[Any], None] = lambda batch: None
    advice: str = ""
    observes: bool = False
    lone: str = ""
    by_synapse: bool = False
    by_window: bool = False
    fit: Callable[[Any], Recipe] | None = None


class Setup(NamedTuple):
    """A rule with all it was told.

    Attributes:
        model: a Flax cell or `Network`.
        loss: `(outputs, targets) -> [B]` or `[B, ...]`, one time step's loss.
        recipe: what the rule does.
        batch_size: B for a streaming rule, None for an episodic one.
        window: steps processed together, or None for the recipe's default.
        reduction: `"mean"` or `"sum"`.
        example: one step's inputs without the batch axis, or None if the parameters can tell.
        select: the parameters that the rule is for, from all of them; or None for all.
        held_statistics: whether the statistics of normalisations in cells carry no credit.
    """

    model: Any
    loss: Loss
    recipe: Recipe
    batch_size: int | None
    window: int | None
    reduction: str
    example: Any = None
    select: Select | None = None
    held_statistics: bool = False

    @property
    def streaming(self) -> bool:
        """Whether carry and influence persist from call to call."""
        return self.batch_size is not None


NO_MEMORY = (
    "{rule} without batch_size takes each call for whole sequences, and this one has one time step "
    "(T = 1): called in a loop it remembers nothing. Make the rule with batch_size={size} to go on "
    "from call to call; if each call does begin anew, say so by batch.reset, all True."
)
"""What is said once a trace, as nothing in one call tells a stream from sequences of one step."""


def windowed_rule(
    model: Any,
    loss: Loss,
    recipe: Recipe,
    *,
    batch_size: int | None,
    window: int | None,
    reduction: str,
    example: Any = None,
    held_statistics: bool = False,
) -> LearningRule:
    """Makes a rule of a recipe; arguments as of `Setup`."""
    require_choices(loss, batch_size, window, reduction)
    if not isinstance(held_statistics, bool):
        raise ValueError(f"held_statistics must be True or False; got {held_statistics!r}.")
    batch_size, window = (None if n is None else int(n) for n in (batch_size, window))
    if not recipe.observes:
        _require_unobserving(recipe.name, model)
    setup = Setup(model, loss, recipe, batch_size, window, reduction, example)
    return _rule(setup._replace(held_statistics=held_statistics))


def _rule(setup: Setup) -> LearningRule:
    recipe = setup.recipe
    names = ["batch_size", "window", "reduction", *["held_statistics"] * setup.held_statistics]
    common = {name: getattr(setup, name) for name in names}
    # A function of this rule's own: what is compiled for it goes when it goes.
    advance = jax.jit(functools.partial(_advance, setup), static_argnums=3)
    return LearningRule(
        functools.partial(_init, setup),
        functools.partial(_update, setup, advance),
        name=recipe.name,
        settings={"model": setup.model, "loss": setup.loss, **recipe.settings, **common},
        credits=functools.partial(_credits, setup),
        narrow=functools.partial(_narrowed, setup),
        advice=recipe.advice,
        draws="key" in recipe.state.outlives,
    )


def _narrowed(setup: Setup, select: Select) -> LearningRule:
    """The same rule for some parameters alone."""
    if setup.recipe.lone:
        raise ValueError(f"{setup.recipe.name} cannot be mixed: {setup.recipe.lone}")
    return _rule(setup._replace(select=select))


def _require_unobserving(rule: str, model: Any) -> None:
    """Raises for a model with parameters that serve a correction which the rule would not make."""
    for cell in parts(model)[1]:
        if cell.observes:
            raise ValueError(
                f"{rule} cannot train a {cell.name}, whose states are corrected by each target: it "
                "would leave the correction out, and what serves it would never learn. Use "
                "localgrad.lra on the model itself, without a Network around it."
            )


def _init(setup: Setup, params: Any) -> Any:
    """The state before the first call."""
    leaves = leaves_of(params)
    needed = setup.streaming or setup.recipe.prepare is not None
    spec = _spec(setup, leaves, needed)
    stack = None if spec is None else _stack(setup, params, leaves, spec)
    return _begun(setup, stack, leaves, spec)


def _spec(setup: Setup, leaves: Leaves, needed: bool) -> Any:
    """One step's input of B examples, or None where only an example could tell."""
    return example_spec(
        setup.model,
        leaves,
        setup.recipe.name,
        setup.example,
        setup.batch_size,
        needed=needed,
    )


def _stack(setup: Setup, params: Any, leaves: Leaves, x: Any) -> Stack:
    """The model taken apart for one step's input; raises for what the rule cannot credit."""
    stack = assemble(setup.model, leaves, x, setup.held_statistics)
    if setup.recipe.by_synapse:
        stack = seen_by_weights(stack, leaves)
    if setup.recipe.by_window:
        with contextlib.suppress(ValueError):
            stack = seen_by_weights(stack, leaves)
    try:
        return _screened(setup, params, leaves, stack)
    except ValueError as refusal:
        if not setup.recipe.by_synapse:
            raise
        try:
            return _screened(setup, params, leaves, seen_by_weights(stack, leaves, every=True))
        except ValueError:
            raise refusal from None


def _screened(setup: Setup, params: Any, leaves: Leaves, stack: Stack) -> Stack:
    """The stack, for those parameters that the rule is for."""
    if setup.select is not None:
        stack = stack.narrowed(setup.select(params))
    seen = stack.see(leaves)
    with naming_loops(setup.recipe.name, stack, seen):
        setup.recipe.screen(stack, seen)
    _require_credited(setup.recipe, stack, leaves)
    if setup.recipe.room is not None and setup.batch_size is not None:
        setup.recipe.room.require(stack, seen, setup.batch_size, episodic=False)
    return stack


def _require_credited(recipe: Recipe, stack: Stack, leaves: Leaves) -> None:
    """Raises if the rule was picked for parameters that it leaves as they are."""
    if stack.learning is None:
        return
    credits = _credited(recipe, stack, leaves)
    idle = [path for path in leaves if path in stack.learning and credits[path] == NOTHING]
    if idle:
        raise ValueError(
            f"{recipe.name} is to learn {'/'.join(idle[0])}, which it leaves as it is. Give that "
            "parameter the label of a rule that credits it: localgrad.summary shows what does."
        )


def _credited(recipe: Recipe, stack: Stack, leaves: Leaves) -> dict[Path, str]:
    """How a rule credits each of the model's own parameters."""
    found = recipe.credits(stack, stack.see(leaves))
    ways = {path: [found[path]] if path in found else [] for path in leaves}
    for path, origin in stack.origins.items():
        for own in origin:
            ways[own] += [found[path]] if found[path] not in ways[own] else []
    return {path: "; ".join(each) for path, each in ways.items()}


def _begun(setup: Setup, stack: Any, leaves: Leaves, x: Any) -> Any:
    """A state at the start of all."""
    recipe = setup.recipe
    state = recipe.state(jnp.zeros(()))
    seen = leaves if stack is None else stack.see(leaves)
    if setup.streaming:
        state = _at_start(recipe, state, stack, seen, x)
    prepared = {} if recipe.prepare is None else recipe.prepare(stack, seen)
    return state._replace(**recipe.draw(leaves), **prepared)


def _at_start(recipe: Recipe, state: Any, stack: Any, leaves: Leaves, x: Any) -> Any:
    """A state with the carry and the memory of sequences that begin."""
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), x)
    carry = stack.pack(stack.initial)
    # The copy is a buffer of its own, so that the state can be donated.
    state = state._replace(carry=carry, initial_carry=jax.tree.map(jnp.copy, carry))
    return state._replace(**recipe.remember(stack, leaves, blank))


def _credits(setup: Setup, params: Any) -> dict[Path, str]:
    """How the rule credits each parameter."""
    leaves = leaves_of(params)
    stack = _stack(setup, params, leaves, _spec(setup, leaves, needed=True))
    credits = _credited(setup.recipe, stack, leaves)
    for path in _beside_held(stack, leaves) if setup.held_statistics else ():
        credits[path] += ", statistics held"
    return credits


def _beside_held(stack: Stack, leaves: Leaves) -> list[Path]:
    """The parameters of cells that hold a normalisation."""
    found = []
    for cell, prefix, carry, x in zip(
        stack.cells, stack.prefixes, stack.initial, stack.fed, strict=True
    ):
        own = under(leaves, prefix)
        if cell.module.normalises(own, carry, x):
            found += placed(own, prefix)
    return found


def _update(
    setup: Setup,
    advance: Callable[..., tuple[Leaves, Any, Any]],
    updates: Any,
    state: Any,
    params: Any = None,
    *,
    batch: Batch | None = None,
    with_outputs: bool = False,
    **extra: Any,
) -> tuple[Any, Any]:
    """Optax's side of a call: what can be checked without looking at numbers or shapes.

    With outputs the state comes back beside those that the model gave, as `learn` asks for.
    """
    del extra
    require_updates(setup.recipe.name, updates, params)
    require_own(setup.recipe.name, state, setup.recipe.state, setup.batch_size)
    setup.recipe.inspect(batch)
    found, state, outputs = advance(params, state, batch, with_outputs)
    return flatten(params)[1](found), WithOutputs(state, outputs) if with_outputs else state


def _advance(
    setup: Setup, params: Any, state: Any, batch: Batch, with_outputs: bool
) -> tuple[Leaves, Any, Any]:
    """One call, wherever its arrays lie: updates, state, and outputs [B, T, ...] or None."""
    require_unchecked(setup.recipe.name, (params, state, batch))
    call = functools.partial(_all_windows, setup, with_outputs)
    return on_any_mesh(call, params, state, batch)


def _all_windows(
    setup: Setup, with_outputs: bool, params: Any, state: Any, batch: Batch
) -> tuple[Leaves, Any, Any]:
    """One call: all windows of a batch."""
    if setup.recipe.fit is not None:
        setup = setup._replace(recipe=setup.recipe.fit(state))
    recipe, leaves = setup.recipe, leaves_of(params)
    batch_axis, steps = require_batch(batch, setup.batch_size)
    if not setup.streaming and steps == 1 and batch.reset is None:
        warnings.warn(NO_MEMORY.format(rule=recipe.name, size=batch_axis), stacklevel=2)
    x = jax.tree.map(lambda a: a[:, 0], batch.inputs)
    stack = _stack(setup, params, leaves, x)
    spec = x if setup.example is None else _spec(setup, leaves, needed=True)
    own = jax.eval_shape(lambda: _begun(setup, stack, leaves, spec))
    require_like(recipe.name, state, own)

    seen = stack.see(leaves)
    weight, total = weights_of(batch.mask, batch_axis * steps)
    one = jnp.ones_like(total)
    objective = Objective(setup.loss, one / total if setup.reduction == "mean" else one)
    share = 1 / (batch_axis * steps) if setup.reduction == "mean" else 1.0

    def body(so_far: tuple, stretch: Window, opening: bool, closing: bool) -> tuple[tuple, Any]:
        work, grads, loss = so_far
        frame = Frame(stack, seen, objective, steps, share, opening, closing)
        with naming_loops(recipe.name, stack, seen):
            work, found, shown = recipe.process(frame, work, stretch)
        found = {path: grad.astype(grads[path].dtype) for path, grad in found.items()}
        loss += shown.values.sum().astype(loss.dtype)
        return (work, added(grads, found), loss), shown.outputs if with_outputs else None

    alone = not setup.streaming
    size = setup.window or recipe.default_window(stack, seen, steps, alone)
    if recipe.room is not None and alone and size < steps:
        recipe.room.require(stack, seen, batch_axis, episodic=True)
    work = _at_start(recipe, state, stack, seen, x) if alone else state
    grads = {path: jnp.zeros(leaf.shape, accumulator(leaf)) for path, leaf in seen.items()}
    (work, grads, loss), outputs = over_windows(
        body, (work, grads, jnp.zeros((), total.dtype)), batch, weight, min(size, steps), alone
    )
    work = recipe.finish(work)
    after = {name: getattr(work, name) for name in recipe.state.outlives}
    state = (state if alone else work)._replace(
        **after, loss=(loss / total).astype(state.loss.dtype)
    )
    grads = stack.gave(leaves, grads)
    updates = {path: grads[path].astype(leaf.dtype) for path, leaf in leaves.items()}
    updates = {p: u if stack.asks(p) else jnp.zeros_like(u) for p, u in updates.items()}
    return updates, state, outputs
