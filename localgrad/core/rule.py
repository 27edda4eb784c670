"""The contract: `Batch`, `LearningRule`, and the frame in which every windowed rule runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from localgrad.core.checks import (
    check_batch,
    check_choices,
    check_like,
    check_state,
    check_updates,
    example_spec,
)
from localgrad.core.objective import Objective, weights_of
from localgrad.core.params import Leaves, Path, accumulator, added, flatten, leaves_of
from localgrad.core.stack import Stack, assemble

Loss = Callable[[Any, Any], jax.Array]


class Batch(NamedTuple):
    """Sequences to learn from: B examples, T time steps.

    Attributes:
        inputs: leaves [B, T, ...].
        targets: leaves [B, T, ...].
        mask: [B, T] weight of each step's loss, or None for ones. It weights losses only: the carry
            and the influence advance on every step, also at weight 0.
        reset: [B, T] bool, forget carry and influence *before* this step, or None for never.

    Example:
        >>> import jax.numpy as jnp, localgrad
        >>> batch = localgrad.Batch(inputs=jnp.ones((4, 10, 3)), targets=jnp.ones((4, 10, 2)))
        >>> batch.mask is None
        True
    """

    inputs: Any
    targets: Any
    mask: jax.Array | None = None
    reset: jax.Array | None = None


class LearningRule(optax.GradientTransformationExtraArgs):
    """A learning rule: a pure function of `(params, state, batch)` and an optax transformation.

    `rule.init(params)` makes the state. `rule(params, state, batch)` returns `(updates, state)`;
    the updates are gradient-signed, so that optax's `-learning_rate` descends them. The same rule
    comes first in an `optax.chain`, which hands it `batch` as an extra argument.

    A call compiles itself, so it needs no `jax.jit` around it. Around more than the rule, jit a
    function: `jax.jit(rule)` itself fails, since JAX cannot hold a weak reference to a tuple.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> batch = localgrad.Batch(jnp.ones((4, 10, 3)), jnp.ones((4, 10, 2)))
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
        >>> rule = localgrad.eprop(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), batch)  # pure function
        >>> tx = optax.chain(rule, optax.adam(1e-3))  # native optax
        >>> updates, opt_state = tx.update(None, tx.init(params), params, batch=batch)
        >>> bool(optax.tree.get(opt_state, "loss") == state.loss)
        True
    """

    credits: Callable[[Any], dict[Path, str]] | None = None
    """`params -> {path: how the rule credits that parameter}`; shown by `localgrad.summary`."""

    def __call__(self, params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        """One update: `(params, state, batch) -> (updates, state)`."""
        return self.update(None, state, params, batch=batch)


class Window(NamedTuple):
    """A stretch of W consecutive steps of a batch, time first.

    Attributes:
        inputs: leaves [W, B, ...].
        targets: leaves [W, B, ...].
        weight: [W, B], or None for ones.
        reset: [W, B] bool, or None.
    """

    inputs: Any
    targets: Any
    weight: jax.Array | None
    reset: jax.Array | None


class Frame(NamedTuple):
    """What a rule's process gets beside its state.

    Attributes:
        stack: the model, taken apart for this batch.
        params: its parameters by path.
        objective: the loss with its normaliser.
        closing: whether nothing after this window needs an influence.
        opening: whether no influence enters this window.
    """

    stack: Stack
    params: Leaves
    objective: Objective
    opening: bool
    closing: bool


class Recipe(NamedTuple):
    """What makes one windowed rule different from another.

    Attributes:
        name: the rule's public name.
        begin: `(stack, params, x) -> state` at the start of a stream of B examples, x being one
            step's input.
        process: `(frame, state, window) -> (state, grads, loss sum)` for one window.
        idle: the state of an episodic rule between calls.
        keeps: the state's fields that outlive a sequence.
        prepare: `(stack, params) -> fields` of the state that `init` makes, such as feedback.
        default_window: `(stack, params, T) -> W`.
        needs_example: whether the state of a stream depends on the inputs' dtype.
        screen: `(stack, params)` raises for what the rule cannot credit.
        credits: `(stack, params) -> {path: how the rule credits that parameter}`.
    """

    name: str
    begin: Callable[[Stack, Leaves, Any], Any]
    process: Callable[[Frame, Any, Window], tuple[Any, Leaves, jax.Array]]
    idle: Any
    credits: Callable[[Stack, Leaves], dict[Path, str]]
    keeps: tuple[str, ...] = ()
    prepare: Callable[[Stack, Leaves], dict[str, Any]] | None = None
    default_window: Callable[[Stack, Leaves, int], int] = lambda stack, params, steps: steps
    needs_example: bool = False
    screen: Callable[[Stack, Leaves], None] | None = None


def windowed_rule(
    model: Any,
    loss: Loss,
    recipe: Recipe,
    *,
    batch_size: int | None,
    window: int | None,
    reduction: str,
    example: Any = None,
) -> LearningRule:
    """Builds a rule that goes through a batch window by window.

    Args:
        model: a Flax cell or `Network`.
        loss: `(outputs, targets) -> [B]` or `[B, ...]`, one time step's loss.
        recipe: what the rule does.
        batch_size: B for a streaming rule, None for an episodic one.
        window: steps processed together, or None for the recipe's default.
        reduction: `"mean"` or `"sum"`.
        example: one step's inputs without the batch axis, if the parameters cannot tell.

    Returns:
        The rule.
    """
    check_choices(model, loss, batch_size, window, reduction)

    def taken_apart(leaves: Leaves, needed: bool) -> tuple[Any, Any]:
        """The model's stack and one step's input, or two Nones where only an example could tell."""
        strict = recipe.needs_example and batch_size is not None
        spec = example_spec(
            model, leaves, recipe.name, example, batch_size, needed=needed, strict=strict
        )
        if spec is None:
            return None, None
        stack = assemble(model, leaves, spec)
        if recipe.screen is not None:
            recipe.screen(stack, leaves)
        return stack, spec

    def init(params: Any) -> Any:
        leaves = leaves_of(params)
        needed = batch_size is not None or recipe.prepare is not None
        stack, spec = taken_apart(leaves, needed)
        state = recipe.idle
        if batch_size is not None:
            blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), spec)
            state = recipe.begin(stack, leaves, blank)
        if recipe.prepare is not None:
            state = state._replace(**recipe.prepare(stack, leaves))
        return state

    def credits(params: Any) -> dict[Path, str]:
        leaves = leaves_of(params)
        stack, _ = taken_apart(leaves, needed=True)
        return recipe.credits(stack, leaves)

    @jax.jit
    def advance(params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        leaves = leaves_of(params)
        batch_axis, steps = check_batch(batch, batch_size)
        check_like(recipe.name, state, jax.eval_shape(init, params))
        x = jax.tree.map(lambda a: a[:, 0], batch.inputs)
        stack = assemble(model, leaves, x)
        if recipe.screen is not None:
            recipe.screen(stack, leaves)
        weight, total = weights_of(batch.mask, batch_axis * steps)
        one = jnp.ones_like(total)
        objective = Objective(loss, one / total if reduction == "mean" else one)
        kept = {name: getattr(state, name) for name in recipe.keeps}
        work = state if batch_size is not None else recipe.begin(stack, leaves, x)._replace(**kept)

        size = min(window or recipe.default_window(stack, leaves, steps), steps)

        def body(so_far: tuple, stretch: Window, opening: bool, closing: bool) -> tuple:
            work, grads, loss_sum = so_far
            frame = Frame(stack, leaves, objective, opening, closing)
            work, found, loss_now = recipe.process(frame, work, stretch)
            found = {path: grad.astype(grads[path].dtype) for path, grad in found.items()}
            return work, added(grads, found), loss_sum + loss_now

        grads = {path: jnp.zeros(leaf.shape, accumulator(leaf)) for path, leaf in leaves.items()}
        start = (work, grads, jnp.zeros((), total.dtype))
        work, grads, loss_sum = over_windows(
            body, start, batch, weight, size, alone=batch_size is None
        )
        made = {"loss": (loss_sum / total).astype(state.loss.dtype)}
        kept = {name: getattr(work, name) for name in recipe.keeps}
        state = (work if batch_size is not None else state)._replace(**kept, **made)
        return {path: grads[path].astype(leaf.dtype) for path, leaf in leaves.items()}, state

    def update(
        updates: Any, state: Any, params: Any = None, *, batch: Batch | None = None, **extra: Any
    ) -> Any:
        del extra
        check_updates(recipe.name, updates, params)
        check_state(recipe.name, state, type(recipe.idle), batch_size)
        found, state = advance(params, state, batch)
        return flatten(params)[1](found), state

    rule = LearningRule(init, update)
    rule.credits = credits
    return rule


def even_window(steps: int, most: int = 128) -> int:
    """At most `most` steps; if possible a divisor of `steps`, so that no short window remains."""
    return next((w for w in range(min(most, steps), most // 2, -1) if steps % w == 0), most)


def over_windows(
    body: Callable[..., Any], acc: Any, batch: Batch, weight: Any, size: int, alone: bool
) -> Any:
    """Folds `body(acc, window, opening, closing)` over a batch: full windows, then a shorter one.

    Args:
        body: what to do with one window.
        acc: where to start.
        batch: leaves [B, T, ...].
        weight: [B, T] or None.
        size: W.
        alone: whether the batch neither takes over an influence nor hands one on.

    Returns:
        The last acc.
    """
    arrays = Window(batch.inputs, batch.targets, weight, batch.reset)
    steps = jax.tree.leaves(batch.inputs)[0].shape[1]
    full, rest = divmod(steps, size)

    def cut(start: Any, width: int) -> Window:
        def piece(a: jax.Array) -> jax.Array:
            return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(a, start, width, axis=1), 1, 0)

        return jax.tree.map(piece, arrays)

    if full == 1:
        acc = body(acc, cut(0, size), alone, alone and not rest)
    else:

        def step(acc: Any, k: jax.Array) -> tuple[Any, None]:
            return body(acc, cut(k * size, size), False, False), None

        acc, _ = jax.lax.scan(step, acc, jnp.arange(full))
    if rest:
        acc = body(acc, cut(full * size, rest), False, alone)
    return acc
