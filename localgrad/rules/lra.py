"""`lra`: local representation alignment, by which a P-TNCN learns."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.cells.layers import lower, outer, outers
from localgrad.cells.phases import Errors, Weights
from localgrad.cells.ptncn import PTNCN, PTNCNCarry
from localgrad.core.contract.checks import number
from localgrad.core.contract.objective import Shown
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.contract.state import CarryState
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, accumulator
from localgrad.core.steps import select
from localgrad.core.windows import Frame, Window, even_windows
from localgrad.rules.fit import require_matching_loss, unit_range_inspector


class Options(NamedTuple):
    """What `lra` was told; see there."""

    error_rule: str
    w_error: str
    presynaptic: str
    gamma: float
    update_radius: float | None


CHOICES = {
    "error_rule": ("transpose", "temporal"),
    "w_error": ("residual", "prediction"),
    "presynaptic": ("corrected", "uncorrected"),
}


def lra(
    model: Any,
    loss: Loss,
    *,
    error_rule: str = "transpose",
    w_error: str = "residual",
    presynaptic: str = "corrected",
    gamma: float = 1.0,
    update_radius: float | None = 1.0,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Local representation alignment: each layer of a P-TNCN learns to have been its correction.

    Inputs are frames, targets the frames that follow. In the words of `localgrad.PTNCN`, with
    `r_l = z_l - y_l` how far layer l was corrected, and `y'` the corrected states of the last step,
    the update of a step is, each matrix for itself and summed over examples::

        W_1: C(z_1^T e_0)                   W_l: C(z_l^T r_{l-1})  for l > 1
        M_l: C(y'_{l-1}^T r_l)              V_l: C(y'_l^T r_l)           U_l: C(y'_{l+1}^T r_l)
        E_l: C(gamma (update of W_l)^T)     or, temporal, C(-gamma e_{l-1}^T (r_l - r'_l))

    where `C` scales a matrix down to the Frobenius norm `update_radius`. It is clipped at every
    step, before `reduction` divides; the update of a call is the sum over its steps. Nothing is
    unrolled, no derivative is taken, of no activation and not of the loss, and all layers learn at
    once. Momentum and Adam are Optax's: `optax.chain(lra, optax.sgd(0.075, momentum=0.95,
    nesterov=True))` is how the authors train, with an update every step through `localgrad.learn`.
    They divide by B also where examples are padded: with `reduction="sum"` and `optax.scale(1 / B)`
    their numbers come out under any mask.

    *Estimates* no gradient but for W_1's, which is exact, up to clipping and averaging over the
    frame, if the loss is the one that belongs to the output: categorical cross-entropy under a
    softmax, binary cross-entropy under a sigmoid, squared error under the identity. The loss is
    given the outputs after `output_activation`, probabilities and not logits; it is reported and
    never differentiated. Another one that is least where outputs equal targets is reported as it
    is, and what is learnt stays the same.
    *Costs* the matrix products of one step forward, of its correction and of its updates, O(L H^2)
    a step and example; memory does not grow with T.

    A step whose weight is 0 is not seen: its target neither corrects nor teaches. Other weights
    weigh what is learnt, not the correction.

    What was found about the options (the authors' code is the default, their paper is said to
    differ), in a small study with one seed, H = 64 and 128 and 2,000 sentences of Penn Treebank
    characters: the transposed `error_rule` is the one that learns; with the temporal one as in the
    code the matrices E grow without bound, and with `gamma=-1`, the sign that others give it, they
    decay. `w_error="prediction"`, under which W_2..W_L do predict the layers below, was at least as
    good as the default.

    Args:
        model: a `localgrad.PTNCN`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        error_rule: `"transpose"` lets E_l follow W_l, `"temporal"` the change of the correction.
        w_error: what W_2..W_L learn from: the `"residual"` r_{l-1} of the layer below, or the
            error e_{l-1} of its `"prediction"`.
        presynaptic: whether M_2..M_L, V and U learn from the `"corrected"` states y' of the last
            step, or the `"uncorrected"` z'.
        gamma: how fast E learns beside the others; 0 leaves it as it is.
        update_radius: the Frobenius norm down to which a matrix's update of one step is scaled,
            before `reduction`; None for no limit.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry persists from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Never
            needed: the model tells it.

    Returns:
        A `LearningRule`; its state is a `CarryState`.

    Raises:
        ValueError: if the model is no `localgrad.PTNCN`, an option is none of those above, the loss
            is not least where outputs equal targets (one of Optax's that takes logits, for
            example), targets are no frames, or, outside of `jit`, lie beyond [0, 1] where all
            outputs lie within.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.PTNCN((8, 8), outputs=3)
        >>> x = jax.nn.one_hot(jnp.arange(40).reshape(4, 10) % 3, 3)  # [B, T, D]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.lra(model, localgrad.categorical_cross_entropy, batch_size=4)
        >>> tx = optax.chain(rule, optax.sgd(0.5))
        >>> step = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=1))
        >>> batch = localgrad.Batch(x[:, :-1], x[:, 1:])
        >>> params, state, losses = step(params, tx.init(params), batch)
        >>> bool(losses[-1] < losses[0])
        True

    Reference:
        Ororbia, Mali, Giles and Kifer, "Continual learning of recurrent neural networks by locally
        aligning distributed representations", IEEE Transactions on Neural Networks and Learning
        Systems, 2020, https://doi.org/10.1109/TNNLS.2019.2953622, arXiv:1810.07411
    """
    gamma = number("gamma", gamma, "be finite")
    if update_radius is not None:
        hint = "None sets no limit."
        update_radius = number("update_radius", update_radius, "be positive and finite", hint)
    options = Options(error_rule, w_error, presynaptic, gamma, update_radius)
    _require(model, options)
    if example is None:
        dtype = jnp.result_type(jnp.float32, model.param_dtype)
        example = jax.ShapeDtypeStruct((model.outputs,), dtype)
    recipe = Recipe(
        name="lra",
        state=CarryState,
        process=functools.partial(_process, options, model),
        credits=functools.partial(_credits, options, model),
        settings=options._asdict(),
        default_window=even_windows,
        inspect=unit_range_inspector(model),
        observes=True,
    )
    rule = windowed_rule(
        model,
        loss,
        recipe,
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )
    require_matching_loss(model, loss)
    return rule


def _require(model: Any, options: Options) -> None:
    """Raises for what this rule cannot train, and for options it does not have."""
    if not isinstance(model, PTNCN):
        raise ValueError(
            f"lra trains a localgrad.PTNCN, whose states are corrected; got "
            f"{type(model).__name__}. Make one by localgrad.PTNCN(features, outputs), without a "
            "Network around it, or take another rule, such as localgrad.eprop."
        )
    for name, choices in CHOICES.items():
        if getattr(options, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}; got {getattr(options, name)!r}.")


def _process(
    options: Options, model: PTNCN, frame: Frame, state: CarryState, window: Window
) -> tuple:
    """One window: each step predicts, is corrected and learns, then the next one."""
    weights = model.gather({path[-1]: leaf for path, leaf in frame.params.items()})
    initial = jax.tree.map(lambda a, b: a.astype(b.dtype), frame.stack.initial[0], state.carry)

    def step(so_far: tuple[PTNCNCarry, Weights], now: Window) -> tuple[Any, jax.Array]:
        carry, total = so_far
        if now.reset is not None:
            carry = select(now.reset, initial, carry)
        after, output = model.advance(weights, carry, now.inputs)
        corrected, errors = model.corrected(weights, after, now.targets)
        if now.weight is not None:
            corrected = select(now.weight != 0, corrected, after)
        found = learned(options, weights, carry, corrected, errors, now)
        corrected = jax.tree.map(lambda a, b: a.astype(b.dtype), corrected, carry)
        return (corrected, jax.tree.map(jnp.add, total, found)), output

    blank = jax.tree.map(lambda w: jnp.zeros(w.shape, accumulator(w)), weights)
    (carry, total), outputs = jax.lax.scan(step, (state.carry, blank), window)
    values = frame.objective.values(outputs, window.targets, window.weight)
    scaled = jax.tree.map(lambda a: a * frame.objective.scale.astype(a.dtype), total)
    grads = {(name,): grad for name, grad in model.scatter(scaled).items()}
    return state._replace(carry=carry), grads, Shown(values, outputs)


def learned(
    options: Options,
    weights: Weights,
    before: PTNCNCarry,
    now: PTNCNCarry,
    errors: Errors,
    step: Window,
) -> Weights:
    """What each matrix learns from one step, summed over examples and clipped.

    Args:
        options: of the rule.
        weights: the model's, for their dtypes and for which there are.
        before: the carry that entered the step, corrected.
        now: the carry after the correction.
        errors: of the step's predictions.
        step: its input [B, D] and weight [B] or None.

    Returns:
        Of each matrix its update.
    """
    dtype = accumulator(weights.W1)
    one = functools.partial(outer, options.update_radius, dtype=dtype)
    each = functools.partial(outers, options.update_radius, dtype=dtype)
    pre = before.state if options.presynaptic == "corrected" else before.activity
    residual = jax.tree.map(jnp.subtract, now.activity, now.state)
    post = _weighed(residual, step.weight)
    errors = _weighed(errors, step.weight)
    below = lower(post) if options.w_error == "residual" else errors.layers
    W1 = one(now.activity.first, errors.frame)
    W = each(now.activity.rest, below)
    if options.error_rule == "transpose":
        E1 = one(errors.frame, now.activity.first, gain=options.gamma)
        E = each(below, now.activity.rest, gain=options.gamma)
    else:
        last = jax.tree.map(jnp.subtract, before.activity, before.state)
        change = jax.tree.map(lambda a, b: -options.gamma * (a - b.astype(a.dtype)), residual, last)
        E1 = one(errors.frame, change.first)
        E = each(errors.layers, change.rest)
    x = step.inputs.astype(post.first.dtype)
    return Weights(
        W1=W1,
        E1=E1,
        M1=one(x, post.first),
        V1=one(pre.first, post.first),
        W=W,
        E=E,
        M=None if weights.M is None else each(lower(pre), post.rest),
        V=each(pre.rest, post.rest),
        U=None if weights.U is None else each(pre.rest, lower(post)),
    )


def _weighed(tree: Any, weight: jax.Array | None) -> Any:
    """Leaves [B, ...] times the weight [B] of their example; 0 where that is 0, whatever it was."""
    if weight is None:
        return tree

    def weigh(a: jax.Array) -> jax.Array:
        w = weight.astype(a.dtype).reshape(-1, *(1,) * (a.ndim - 1))
        return jnp.where(w != 0, a * w, jnp.zeros_like(a))

    return jax.tree.map(weigh, tree)


def _credits(options: Options, model: PTNCN, stack: Stack, params: Leaves) -> dict[Path, str]:
    """How each parameter is credited, as `localgrad.summary` prints it."""
    del stack
    if not model.beta:
        return _uncorrected(options, params)
    errors = "W's update, transposed" if options.error_rule == "transpose" else "change of residual"
    above = "own layer's residual"
    if options.w_error == "prediction":
        above = "own prediction's error"
    said = {"E": errors, "W": above.replace("own layer's", "layer below's")}
    found = {path: said.get(path[-1][0], "own layer's residual") for path in params}
    return found | {("W1",): "exact, where the loss fits the output"}


def _uncorrected(options: Options, params: Leaves) -> dict[Path, str]:
    """The same of a model with beta = 0, whose states leave no residual."""
    nothing = "nothing: beta=0 corrects no state, and leaves no residual"
    found = dict.fromkeys(params, nothing) | {("W1",): "exact, where the loss fits the output"}
    if options.error_rule == "transpose":
        found |= {("E1",): "W's update, transposed"}
    if options.w_error == "prediction":
        several = [p for p in params if p[-1][0] == "W" and p != ("W1",)]
        found |= dict.fromkeys(several, "own prediction's error")
        if options.error_rule == "transpose":
            feedback = [p for p in params if p[-1][0] == "E"]
            found |= dict.fromkeys(feedback, "W's update, transposed")
    return found
