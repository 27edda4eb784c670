"""`dni`: decoupled neural interfaces, a learned prediction of the credit that is still to come."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from localgrad.core.contract.checks import positive_integer, require_choice
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.locality import require_real
from localgrad.core.model.stack import Stack
from localgrad.core.model.wiring import output_leaf
from localgrad.core.params import Leaves, Path, accumulator, under
from localgrad.core.passes.backward import sweep
from localgrad.core.passes.run import Level, descend, learned
from localgrad.core.steps import length, one_row, row, select
from localgrad.core.windows import Frame, Outcome, Window, outcome_of


class SyntheticState(NamedTuple):
    """State of `dni`, with n numbers in the model's carry and O in its output.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        predictor: [n + O + 1, n], what predicts credit from carry, target (or error) and 1.
        held: [n + O + 1, n], the copy of it that makes the targets it learns from.
        optimizer: the state of the predictor's optimizer.
        age: how often the predictor has learnt.
        seen: [B, n + O + 1], what the last prediction was made from, 0 before the first.
        known: [B, n], what the last prediction held that was known then.
        clock: how many steps of its sequence an episodic call has seen.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    predictor: Any = None
    held: Any = None
    optimizer: Any = None
    age: Any = None
    seen: Any = None
    known: Any = None
    clock: Any = None

    outlives = ("predictor", "held", "optimizer", "age")


class Options(NamedTuple):
    """What `dni` was told; see there."""

    predicts: str
    sees: str
    predictor_optimizer: optax.GradientTransformation
    refresh: int


def dni(
    model: Any,
    loss: Loss,
    *,
    horizon: int = 1,
    predicts: str = "future",
    sees: str = "targets",
    predictor_optimizer: optax.GradientTransformation | None = None,
    refresh: int = 5,
    batch_size: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""DNI: truncated backpropagation whose end is given a learned prediction of future credit.

    After every `horizon` = h steps, with `s` the model's whole carry and `y*` the step's target, a
    linear predictor A tells what all later losses will say of s, and backpropagation over the h
    steps begins with that::

        p_t    = [s_t, y*_t, 1] A                        in place of dL_{>t}/ds_t
        update = sum_{k=t-h+1..t} c_k (x) pre_k          c_k from p_t and the losses, backward

    A learns that its last prediction, h steps ago, should have been the credit `c` of the carry
    that entered these h steps, by a copy of A that is renewed every `refresh` predictions::

        A  <-  a step of `predictor_optimizer` on 1/2 |p_{t-h} - c_{t-h}|^2 / B

    and only then makes the new prediction. With `predicts="total"`, `p_t` stands for the credit by
    the loss of step t too, and `c_{t-h}` holds that loss's; so, with `horizon=1` and `optax.sgd`,
    it is the online algorithm of Marschall, Cho and Savin, number by number.

    *Estimates* BPTT's gradient, with a bias: A is linear, is behind what it predicts, and learns
    from its own predictions (bootstrapping), so that nothing bounds the error while it learns. It
    begins at zero, which is BPTT cut every h steps (and with `predicts="total"` and h = 1 no credit
    at all). In `python -m experiments online` (a GRU, N = 32, h = 5) it learns text and
    Mackey-Glass as BPTT does, and fails where a pause that it has not seen before must be bridged.
    While parameters learn, A is behind them. An episodic call knows its end: nothing is
    predicted there, and a call of T <= h steps is BPTT and teaches A nothing. A stream's reset is
    not foreseen; it teaches A that nothing followed. The readout gets its exact gradient. *Costs*
    two backward passes, and O(n^2) numbers and operations for the predictor, whatever the number of
    parameters; memory grows with h.

    Unlike other rules' windows, h changes the numbers: split a stream into multiples of h steps and
    nothing changes but the rounding. The predictor does not depend on `reduction`.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        horizon: h, the time steps that exact credit travels before a prediction takes over.
        predicts: `"future"`, the carry's credit by later losses; or `"total"`, by this step's loss
            too, which needs cells whose output is an array of their carry, as those of Flax.
        sees: beside the carry, `"targets"`: of the outputs' shape, or class ids, seen one-hot; or
            `"error"`, the loss's derivative by the outputs, which works with any targets.
        predictor_optimizer: the optimizer of A, such as `optax.sgd(0.01)`, which is the published
            one and diverges once |[s, y*, 1]|^2 exceeds 200. None for `optax.adam(1e-3)`.
        refresh: how many predictions the copy of A serves; 1 for none but the last A.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and last prediction persist
            from call to call. The predictor always does.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `SyntheticState`.

    Raises:
        ValueError: for arguments it cannot use, targets it cannot see, a cell whose total credit
            it cannot predict, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.dni(model, optax.l2_loss, batch_size=4)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.predictor.shape, int(state.age)  # [n + O + 1, n], a prediction a step
        ((11, 8), 10)

    Reference:
        Jaderberg, Czarnecki, Osindero, Vinyals, Graves, Silver and Kavukcuoglu, "Decoupled neural
        interfaces using synthetic gradients", 2017, https://arxiv.org/abs/1608.05343; online, with
        a linear predictor: Marschall, Cho and Savin, "A unified framework of online learning
        algorithms for training recurrent neural networks", 2020, https://jmlr.org/papers/v21/19-562.html
    """
    horizon = positive_integer("horizon", horizon, "It is a number of time steps.")
    refresh = positive_integer("refresh", refresh, "1 uses the last predictor itself.")
    require_choice("predicts", predicts, ("total", "future"))
    require_choice("sees", sees, ("targets", "error"))
    optimizer = optax.adam(1e-3) if predictor_optimizer is None else predictor_optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            "predictor_optimizer must be an optax transformation, such as optax.sgd(0.01); got "
            f"{optimizer!r}."
        )
    how = Options(predicts, sees, optimizer, refresh)
    recipe = Recipe(
        name="dni",
        state=SyntheticState,
        process=functools.partial(_process, how, batch_size is None),
        credits=_credits,
        by_window=True,
        settings={"horizon": horizon, **how._asdict()},
        remember=_nothing_seen,
        prepare=functools.partial(_untaught, how),
        default_window=lambda stack, params, steps, alone: horizon,
        screen=functools.partial(_screen, how),
    )
    rule = windowed_rule(
        model,
        loss,
        recipe,
        batch_size=batch_size,
        window=None,
        reduction=reduction,
        example=example,
    )
    del rule.settings["window"]  # the frame's: this factory takes none
    return rule


def _sizes(stack: Stack) -> tuple[int, int]:
    """How many numbers one example's carry holds, and its outputs."""
    carry, outputs = (
        sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(tree))
        for tree in (stack.initial, stack.outputs)
    )
    return carry, outputs


def _untaught(how: Options, stack: Stack, params: Leaves) -> dict[str, Any]:
    """A predictor of no credit."""
    del params
    carry, outputs = _sizes(stack)
    blank = jnp.zeros((carry + outputs + 1, carry), _dtype(stack))
    state = how.predictor_optimizer.init(blank)
    age = jnp.zeros((), jnp.int32)
    # Buffers of their own, so that the state can be donated.
    return {"predictor": blank, "held": jnp.copy(blank), "optimizer": state, "age": age}


def _nothing_seen(stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What a stream carries at its start; a prediction from zeros alone teaches nothing."""
    del params
    (carry, outputs), batch, dtype = _sizes(stack), length(x), _dtype(stack)
    return {
        "seen": jnp.zeros((batch, carry + outputs + 1), dtype),
        "known": jnp.zeros((batch, carry), dtype),
        "clock": jnp.zeros((), jnp.int32),
    }


def _dtype(stack: Stack) -> Any:
    """Of a predictor: as wide as the carry, at least float32."""
    return functools.reduce(jnp.promote_types, map(accumulator, jax.tree.leaves(stack.initial)))


def _process(
    how: Options, alone: bool, frame: Frame, state: SyntheticState, window: Window
) -> tuple:
    """One window: what it says of the last prediction, and its gradients up to the next one."""
    scale = frame.objective.scale
    # The predictor is of credit as it is; only what is learnt of it is divided by the weights.
    frame = frame._replace(objective=frame.objective._replace(scale=jnp.ones_like(scale)))
    seen = outcome_of(frame, state.carry, window, window.reset)
    clock = state.clock + length(window.inputs)
    is_end = alone & (clock == frame.steps)
    features = _features(how, frame.stack, seen, window).astype(state.seen.dtype)

    entered = _back(how, frame, seen, features @ state.held, is_end)[1].entering
    state = _taught(how, state, state.known + entered)
    grads, ends = _back(how, frame, seen, features @ state.predictor, is_end)
    state = state._replace(
        carry=frame.stack.pack(seen.ran.carries), seen=features, known=ends.known, clock=clock
    )
    return state, {path: g * scale.astype(g.dtype) for path, g in grads.items()}, seen.shown


def _features(how: Options, stack: Stack, seen: Outcome, window: Window) -> jax.Array:
    """What a prediction is made from at a window's end: carry, target or error, and 1."""
    last = functools.partial(jax.tree.map, lambda a: a[-1])
    told = seen.q_out if how.sees == "error" else _targets(stack, window.targets)
    told = _flat(last(told))
    if window.weight is not None:  # a step that does not count may have any target
        told = jnp.where(window.weight[-1][:, None] != 0, told, 0)
    return jnp.concatenate([_flat(seen.ran.carries), told, jnp.ones_like(told[:, :1])], axis=1)


def _targets(stack: Stack, targets: Any) -> Any:
    """Targets [W, B, ...] as numbers of the outputs' shape; raises for others."""
    outputs = jax.tree.leaves(stack.outputs)
    leaves = jax.tree.leaves(targets)
    shapes = [leaf.shape[2:] for leaf in leaves], [leaf.shape[1:] for leaf in outputs]
    floating = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
    if floating and shapes[0] == shapes[1]:
        return targets
    one = len(leaves) == len(outputs) == 1
    ids = one and jnp.issubdtype(leaves[0].dtype, jnp.integer)
    if ids and outputs[0].ndim > 1 and (*shapes[0][0], outputs[0].shape[-1]) == shapes[1][0]:
        return jax.nn.one_hot(leaves[0], outputs[0].shape[-1], dtype=outputs[0].dtype)
    raise ValueError(
        f'dni(sees="targets") takes floating targets of the outputs\' shapes {shapes[1]}, or class '
        f"ids for outputs (..., O); got shapes {shapes[0]} of dtypes "
        f'{[leaf.dtype.name for leaf in leaves]}. Use sees="error".'
    )


class _Ends(NamedTuple):
    """What a window's credit is at its two ends.

    Attributes:
        entering: credit of the carry that entered, [B, n].
        known: of the credit of the carry that leaves, what a prediction need not have said, [B, n].
    """

    entering: jax.Array
    known: jax.Array


def _back(
    how: Options, frame: Frame, seen: Outcome, predicted: jax.Array, is_end: jax.Array
) -> tuple[Leaves, _Ends]:
    """Sends the window's losses, and a prediction at its end, back through it.

    Args:
        how: what `dni` was told.
        frame: as of a recipe's process.
        seen: the window, run forward.
        predicted: the credit of the carry that leaves it, [B, n].
        is_end: whether nothing follows, which leaves no room for a prediction.

    Returns:
        The gradients, and the credit at both ends.
    """
    stack, params = frame.stack, frame.params
    parted = _shaped(predicted, tuple(seen.ran.carries))
    visit = functools.partial(_visit, how, parted, is_end)
    grads, ends, q_x = descend(stack, params, seen.ran.tapes, one_row(seen.q_y), visit)
    grads |= seen.grads | seen.ran.encode(row(q_x, 0))
    entering, known = (_flat(tuple(each)) for each in zip(*ends, strict=True))
    return grads, _Ends(entering.astype(predicted.dtype), known.astype(predicted.dtype))


def _visit(
    how: Options, predicted: tuple, is_end: jax.Array, at: Level, q_y: Any
) -> tuple[Leaves, tuple, Any]:
    """One cell: its gradients, the credit of its carry at the window's ends, and of its input."""
    cell, own, tape = at.cell, at.params, at.tape
    end = predicted[at.number]
    known = jax.tree.map(jnp.zeros_like, end)
    if how.predicts == "total":
        leaves, treedef = jax.tree.flatten(known)
        step = jax.tree.map(lambda a: a[0], (tape.carries, tape.xs))
        place = output_leaf(cell, own, *step)
        assert place is not None  # or the rule would have refused the cell
        leaves[place] = q_y[-1, 0].astype(leaves[place].dtype)
        known = jax.tree.unflatten(treedef, leaves)
        end = jax.tree.map(jnp.subtract, end, known)
    end = jax.tree.map(lambda q: jnp.where(is_end, 0, q)[None], end)
    left, q_start = sweep(cell, own, tape, q_y, end)
    grads, q_x = learned(at, q_y, left)
    return grads, (jax.tree.map(lambda q: q[0], q_start), known), q_x


def _taught(how: Options, state: SyntheticState, target: jax.Array) -> SyntheticState:
    """The predictor after it has seen what its last prediction should have been, [B, n]."""
    error = state.seen @ state.predictor - target
    grad = state.seen.T @ error / len(target)
    change, optimizer = how.predictor_optimizer.update(grad, state.optimizer, state.predictor)
    predictor = optax.apply_updates(state.predictor, change)
    age = state.age + 1
    held = select(age % how.refresh == 0, predictor, state.held)
    return state._replace(predictor=predictor, held=held, optimizer=optimizer, age=age)


def _flat(tree: Any) -> jax.Array:
    """Leaves [B, ...] side by side, [B, n]."""
    return jax.vmap(lambda one: ravel_pytree(one)[0])(tree)


def _shaped(flat: jax.Array, like: Any) -> Any:
    """[B, n] as leaves [B, ...] like others."""
    first, unravel = ravel_pytree(jax.tree.map(lambda a: a[0], like))
    return jax.vmap(unravel)(flat.astype(first.dtype))


def _screen(how: Options, stack: Stack, params: Leaves) -> None:
    for level, cell in enumerate(stack.cells):
        name, carry = stack.name(level), stack.initial[level]
        require_real(cell, carry, name, "dni")
        own = under(params, stack.prefixes[level])
        place = output_leaf(cell, own, carry, stack.fed[level])
        if how.predicts == "total" and place is None:
            raise ValueError(
                f"dni cannot predict all the credit of {name} ({cell.module.name}): its output is "
                "no array of its carry, so what a step's own loss says of the carry is not known. "
                'Use predicts="future".'
            )


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    way = "exact up to a window's end, predicted from there on"
    readout = stack.readout is not None
    return {path: "exact" if readout and path[:1] == ("readout",) else way for path in params}
