"""`force`: recursive least squares on a linear readout."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import number
from localgrad.core.contract.objective import Shown
from localgrad.core.contract.rule import NOTHING, LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, accumulator
from localgrad.core.passes.regression import (
    KERNEL,
    as_readout,
    regressors,
    require_linear,
    require_ridge,
    shape_of,
)
from localgrad.core.passes.run import run
from localgrad.core.steps import even_window, merge_axes
from localgrad.core.windows import Frame, Window


class ForceState(NamedTuple):
    """State of `force`, with M regressors: the highest cell's outputs, and 1 for a bias.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        root: [M, M], a square root of the inverse correlation, `P = root root^T`.
        learnt: [M, O], what the call has learnt so far; zero between calls (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    root: Any = None
    learnt: Any = None

    outlives = ("root",)


class Options(NamedTuple):
    """What `force` was told; see there."""

    forgetting: float
    ridge: float


def force(
    model: Any,
    loss: Loss,
    *,
    forgetting: float = 1.0,
    ridge: float = 1.0,
    batch_size: int | None = None,
    window: int | None = None,
    example: Any = None,
) -> LearningRule:
    r"""FORCE: recursive least squares on the readout, with all other parameters as they are.

    With `x_t` [B, M] the highest cell's outputs and a 1 for the bias, `e_t` [B, O] the derivative
    of the loss by the outputs, `D_t` the weights of the examples and `P_0 = I / ridge`, the update
    of a step is the last line of::

        P_t = (forgetting P_{t-1}^{-1} + x_t^T D_t x_t)^{-1}
        P_t x_t^T D_t e_t

    and `optax.chain(force, optax.sgd(1.0))` is exact if the loss is `optax.l2_loss`. After t steps
    the readout W is then the one that minimizes::

        sum_s forgetting^(t-s) |x_s W - y_s|^2 + forgetting^t ridge |W - W_0|^2

    A call of T steps gives at once what T calls of one step would, with the errors that the readout
    of the call's start makes. `localgrad.learn` with `chunk=1` is the online algorithm. Where the
    model's inputs are its own outputs, as in FORCE proper, call it step by step and feed them back.

    `P` holds what was learnt of the readout's inputs, so it outlives sequences, resets and
    `localgrad.reset_state`, which touch the carry alone. A new `init` forgets it.

    *Estimates* Newton's step on the readout: exact for half the squared error. Of another loss it
    is the gradient with the same P before it, without the loss's own curvature, and the length of
    calls then matters. The scale of a step is P's: for the update a loss [B, ...] is summed over
    its trailing axes, not averaged, there is no `reduction`, and the learning rate is 1. *Costs* a
    forward pass, M^2 numbers of memory, and O(M^2) operations a step and example; memory does not
    grow with T.

    A square root of P is what is kept, so that in float32 P stays symmetric and positive. With
    `forgetting` < 1 it grows without bound where inputs no longer go, and their return moves W far,
    known as wind-up: let 1 / (1 - forgetting) be many times the inputs' period, or add noise. A
    regressor that stays silent grows until rounding is reached, and does not overflow.

    A step that weighs 0 for all examples is not seen: nothing is learnt from it, and nothing is
    forgotten. Weights are >= 0; a negative one makes the update NaN.

    Args:
        model: a `localgrad.Network` whose readout is an `nn.Dense`, or a `localgrad.NNXNetwork`,
            through `localgrad.from_nnx`, whose readout is an `nnx.Linear`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        forgetting: how much a step counts when the next is seen, in (0, 1]. 1 never forgets.
        ridge: what `|W - W_0|^2` counts at the start, > 0, biases included; the error of one step
            and example counts 1.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry persists from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `ForceState`.

    Raises:
        ValueError: if the model has no readout or one that is not linear, if `forgetting`
            lies outside (0, 1] or `ridge` is not positive, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((localgrad.ReservoirCell(50),), readout=nn.Dense(1))
        >>> x = jnp.sin(0.3 * jnp.arange(201.0)).reshape(1, -1, 1)  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (1, 1))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.force(model, optax.l2_loss, ridge=0.01, batch_size=1)
        >>> tx = optax.chain(rule, optax.sgd(1.0))
        >>> step = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=1))
        >>> batch = localgrad.Batch(x[:, :-1], x[:, 1:])
        >>> params, state, losses = step(params, tx.init(params), batch)
        >>> bool(losses[-50:].max() < 1e-4)
        True

    Reference:
        Sussillo and Abbott, "Generating coherent patterns of activity from chaotic neural
        networks", Neuron 63, 2009, https://doi.org/10.1016/j.neuron.2009.07.018. Recursive least
        squares on echo states: Jaeger, "Adaptive nonlinear system identification with echo state
        networks", 2002,
        https://proceedings.neurips.cc/paper_files/paper/2002/hash/426f990b332ef8193a61cc90516c1245-Abstract.html
    """
    hint = "1 counts all steps alike, 0.99 the last 100 or so."
    forgetting = number("forgetting", forgetting, "lie in (0, 1]", hint)
    options = Options(forgetting, require_ridge(ridge))
    rule = windowed_rule(
        model,
        loss,
        Recipe(
            name="force",
            state=ForceState,
            process=functools.partial(_process, options),
            credits=_credits,
            settings=options._asdict(),
            remember=lambda stack, params, x: {"learnt": _blank(params)},
            prepare=functools.partial(_prepare, options),
            default_window=_default_window,
            finish=lambda state: state._replace(learnt=jnp.zeros_like(state.learnt)),
            screen=lambda stack, params: require_linear("force", stack.readout, params),
        ),
        batch_size=batch_size,
        window=window,
        reduction="sum",
        example=example,
    )
    del rule.settings["reduction"]  # the frame's: this factory takes none
    return rule


def _prepare(options: Options, stack: Stack, params: Leaves) -> dict[str, Any]:
    """A root of `P_0 = I / ridge`."""
    del stack
    size, _ = shape_of(params)
    return {"root": jnp.eye(size, dtype=accumulator(params[KERNEL])) * options.ridge**-0.5}


def _blank(params: Leaves) -> jax.Array:
    return jnp.zeros(shape_of(params), accumulator(params[KERNEL]))


def _default_window(stack: Stack, params: Leaves, steps: int, alone: bool) -> int:
    """Some fewer rows than regressors: more cost more than they save."""
    del alone
    examples = jax.tree.leaves(stack.initial)[0].shape[0]
    return even_window(steps, min(128, max(1, shape_of(params)[0] // (4 * examples))))


def _process(options: Options, frame: Frame, state: ForceState, window: Window) -> tuple:
    """One window: its steps and examples enter the regression as a block of rows."""
    stack, dtype = frame.stack, state.root.dtype
    ran = run(stack, frame.params, stack.unpack(state.carry), window.inputs, window.reset)
    values = frame.objective.values(ran.outputs, window.targets, window.weight)
    summed = frame.objective._replace(loss=_summed(frame.objective.loss))
    seen = None if window.weight is None else window.weight != 0
    _, errors = summed.credit(ran.outputs, window.targets, seen)

    xs = regressors("force", frame.params, ran.tapes[-1].ys, dtype)
    counts, kept = _counts(options.forgetting, window.weight, xs)
    root = _faded(options.ridge, state.root, kept)
    made = jnp.matmul(xs, state.learnt, precision="highest")
    owed = counts[..., None] * (errors.astype(dtype) - made)
    root, change = absorbed(root, merge_axes(counts[..., None] * xs), merge_axes(owed))
    state = state._replace(carry=stack.pack(ran.carries), root=root, learnt=state.learnt + change)
    return state, as_readout(frame.params, change), Shown(values, ran.outputs)


def _summed(loss: Loss) -> Loss:
    """A loss [B, ...] summed over its trailing axes."""

    def total(outputs: Any, targets: Any) -> jax.Array:
        values = loss(outputs, targets)
        return values.reshape(values.shape[0], -1).sum(1)

    return total


def _counts(
    forgetting: float, weight: jax.Array | None, xs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The root of what each row counts at the window's end [W, B], and how much the past does."""
    weight = jnp.ones(xs.shape[:2], xs.dtype) if weight is None else weight.astype(xs.dtype)
    seen = jnp.cumsum(jnp.any(weight != 0, axis=1)).astype(xs.dtype)
    left = jnp.asarray(forgetting, xs.dtype) ** (seen[-1] - seen)
    return jnp.sqrt(left[:, None] * weight), jnp.asarray(forgetting, xs.dtype) ** seen[-1]


def _faded(ridge: float, root: jax.Array, kept: jax.Array) -> jax.Array:
    """The root when the past counts less; no row grows beyond its first size over the rounding."""
    most = ridge**-0.5 / jnp.finfo(root.dtype).eps
    size = jnp.sqrt(jnp.sum(root * root, axis=1, keepdims=True))
    return root * jnp.minimum(1 / jnp.sqrt(kept), most / size)


def absorbed(root: jax.Array, rows: jax.Array, owed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A regression after another block of rows.

    With `P = S S^T` and `[S^T A^T; I] = Q R`, whose halves are `Q_1` and `Q_2`, the gain is
    `P' A^T = S Q_1 Q_2^T`, and a root of `P' = (P^-1 + A^T A)^-1` is
    `S - S Q_1 (I - (I + R^T)^-1) Q_1^T`. Nothing is squared, inverted or subtracted that is not of
    order 1, as in the root filters of Potter and Andrews.

    Args:
        root: S, [M, M].
        rows: A, [R, M].
        owed: [R, O], what the rows' outputs are wrong by.

    Returns:
        The new root [M, M], and `P' A^T owed` [M, O].
    """
    size, count = root.shape[0], rows.shape[0]
    one = jnp.eye(count, dtype=root.dtype)
    with jax.default_matmul_precision("highest"):
        q, r = jnp.linalg.qr(jnp.concatenate([root.T @ rows.T, one]))
        sign = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(root.dtype)
        q, r = q * sign[None], r * sign[:, None]
        first = q[:size]
        gain = root @ first
        rest = jax.scipy.linalg.solve_triangular(one + r.T, first.T, lower=True)
        return root - gain @ (first.T - rest), gain @ (q[size:].T @ owed)


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    del stack
    return {
        path: "recursive least squares" if path[:1] == ("readout",) else NOTHING for path in params
    }
