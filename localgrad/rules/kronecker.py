"""KF-RTRL and OK: the influence as few Kronecker products, without a bias."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import positive_integer
from localgrad.core.contract.noise import beginning, drawn, require_key, step_keys
from localgrad.core.contract.room import GIB, held_bytes, room_of
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.locality import require_real
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, added
from localgrad.core.passes import influence as exact
from localgrad.core.passes import kronecker as products
from localgrad.core.passes.forward import WHOLE
from localgrad.core.passes.influence import credit_rows, reaching
from localgrad.core.passes.rank_one import own_credit
from localgrad.core.steps import even_window, length
from localgrad.core.windows import Frame, Window, outcome_of


class KroneckerState(NamedTuple):
    """State of `kf_rtrl` and `ok`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        left: by cell, what its layers drive, [B, R, N, D]: N numbers of its carry and those above
            by D drives (streaming).
        right: by cell, what its layers receive and a 1 for biases, [B, R, U] (streaming).
        influence: of the parameters that lie in no such layer, as in `rtrl` (streaming).
        key: what is drawn from.
        clock: how many steps have been seen.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    left: Any = None
    right: Any = None
    influence: Any = None
    key: Any = None
    clock: Any = None

    outlives = ("key", "clock")


class Options(NamedTuple):
    """What the rules differ in, and what they were told.

    Attributes:
        rule: its name.
        rank: R.
        reduce: how terms become R products.
        published: whether a loss credits its own step by way of the products too.
        key: to begin with.
    """

    rule: str
    rank: int
    reduce: products.Reduce
    published: bool
    key: jax.Array


def kf_rtrl(
    model: Any,
    loss: Loss,
    *,
    key: jax.Array,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    max_influence_bytes: int = 4 * GIB,
    example: Any = None,
) -> LearningRule:
    r"""Kronecker-factored RTRL: an influence of one Kronecker product for each cell.

    The layers of a cell, as one matrix, turn all that they receive, `u_t`, into all that they
    drive. The influence of that matrix on the carry is `A (x) u`. At a window's end, with J the
    window's Jacobian, D_t how its last carry depends on the drives of step t, and random signs s::

        A <- s_0 J A / p_0 + sum_t s_t D_t / p_t        p_0 = sqrt(|J A| / |u|)
        u <- s_0 p_0 u     + sum_t s_t p_t u_t          p_t = sqrt(|D_t| / |u_t|)

    Gates stand side by side in A, with one column for drives that are only added. Any `Dense` or
    `Linear` layer of any cell will do, also behind another (a GRU that resets before its layer);
    the rest of the parameters (time constants, peepholes, an encoder) keep their exact influence,
    as in `rtrl`. Within a window credit is exact. `window=1` is the published algorithm, step by
    step, in which a loss credits its own step by way of A and u too (where the outputs are a part
    of the highest cell's carry; else, exactly).

    *Estimates* BPTT's gradient without a bias, of a whole stack too, with parameters that stay
    fixed; an episodic call of one window is exact. What is drawn depends on where windows end, so a
    stream gives the same numbers only if it is split between windows. *Costs* O(N^3) a step and
    example, and N S D + U numbers for each (a window takes W times as many).

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and influence persist from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T. They are
            credited exactly among themselves, and most of the variance goes. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        max_influence_bytes: refuse to allocate more bytes than this for the influence.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `KroneckerState`.

    Raises:
        ValueError: for a key that is none, a cell without layers to tap, if the influence would not
            fit, and as in `rtrl`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.kf_rtrl(model, optax.l2_loss, key=jax.random.key(2), batch_size=4)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.left["cells_0"].shape, state.right["cells_0"].shape  # 4 drives; x, h and 1
        ((4, 1, 8, 32), (4, 1, 12))

    Reference:
        Mujika, Meier and Steger, "Approximating real-time recurrent learning with random Kronecker
        factors", NeurIPS, 2018, https://arxiv.org/abs/1805.10842
    """
    require_key(key)
    options = Options("kf_rtrl", 1, products.by_signs, window == 1, key)
    return _rule(
        model, loss, options, {}, batch_size, window, reduction, max_influence_bytes, example
    )


def ok(
    model: Any,
    loss: Loss,
    *,
    rank: int,
    key: jax.Array,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    max_influence_bytes: int = 4 * GIB,
    example: Any = None,
) -> LearningRule:
    r"""Optimal Kronecker sums: an influence of R Kronecker products for each cell.

    As `kf_rtrl`, with `sum_i A_i (x) u_i`. At a window's end there are R + W products, `J A_i (x)
    u_i` and `D_t (x) u_t`. In their singular directions, the largest are kept as they are and the
    places left drawn from the others, so that R are left, without a bias and with the smallest
    variance that R can have::

        sum_i A_i (x) u_i  <-  sum_{i <= m} d_i l_i (x) r_i + sum_{i drawn} s / (R - m) l_i (x) r_i

    with d the singular values, s the sum of those behind the m-th, and chances (R - m) d_i / s. It
    is exact as long as R is no less than the steps of a sequence, or than the entries of u.

    *Estimates* BPTT's gradient without a bias, of a whole stack too, with parameters that stay
    fixed; the variance falls fast with the rank, and mostly with the window. What is drawn depends
    on where windows end, so a stream gives the same numbers only if it is split between windows.
    *Costs* O(R N^3) a step and example, and the singular directions of R + W products for each
    window, and R (N S D + U) numbers for each example (a window takes W / R times as many).

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        rank: R, products for each cell.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and influence persist from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T. They are
            credited exactly among themselves, and most of the variance goes. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        max_influence_bytes: refuse to allocate more bytes than this for the influence.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `KroneckerState`.

    Raises:
        ValueError: for a rank below 1, and as in `kf_rtrl`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.ok(model, optax.l2_loss, rank=2, key=jax.random.key(2), batch_size=4)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.left["cells_0"].shape, state.right["cells_0"].shape
        ((4, 2, 8, 32), (4, 2, 12))

    Reference:
        Benzing, Gauy, Mujika, Martinsson and Steger, "Optimal Kronecker-sum approximation of real
        time recurrent learning", ICML, 2019, https://arxiv.org/abs/1902.03993
    """
    rank = positive_integer("rank", rank, "It is how many products each cell has; try 4.")
    require_key(key)
    reduce = functools.partial(products.by_sampling, rank)
    options = Options("ok", rank, reduce, window == 1, key)
    told = {"rank": rank}
    return _rule(
        model, loss, options, told, batch_size, window, reduction, max_influence_bytes, example
    )


def _rule(
    model: Any,
    loss: Loss,
    options: Options,
    told: dict[str, Any],
    batch_size: int | None,
    window: int | None,
    reduction: str,
    max_influence_bytes: int,
    example: Any,
) -> LearningRule:
    recipe = Recipe(
        name=options.rule,
        state=KroneckerState,
        process=functools.partial(_process, options),
        credits=functools.partial(_credits, options),
        settings=told | {"max_influence_bytes": max_influence_bytes},
        remember=functools.partial(_nothing_yet, options),
        draw=lambda params: beginning(options.key),
        default_window=lambda stack, params, steps, alone: even_window(steps, 16),
        screen=functools.partial(_screen, options),
        by_synapse=True,
        room=room_of(
            functools.partial(_bytes, options),
            max_influence_bytes,
            f"{options.rule}'s influence, R (N S D + U) numbers and N S for each other parameter,",
            "localgrad.uoro, whose memory is one number a parameter and example",
        ),
        advice="localgrad.uoro keeps one number a parameter and stream",
    )
    common = {"batch_size": batch_size, "window": window, "reduction": reduction}
    return windowed_rule(model, loss, recipe, **common, example=example)


def _process(options: Options, frame: Frame, state: KroneckerState, window: Window) -> tuple:
    """One window: its own credit, what the influence recalls, and the influence after it."""
    stack, params, steps = frame.stack, frame.params, length(window.inputs)
    seen = outcome_of(frame, state.carry, window, window.reset)
    own = own_credit(stack, params, seen.q_y) if options.published else None
    q_y = seen.q_y if own is None else jax.tree.map(jnp.zeros_like, seen.q_y)
    last = frame.closing and own is None
    methods = [WHOLE] * len(stack.levels)
    grads, rows = credit_rows(stack, params, seen.ran, q_y, methods, last)
    grads |= seen.grads
    factors, influence = products.Factors(state.left, state.right), state.influence
    if not frame.opening and own is None:
        grads = added(grads, _recalled(stack, params, factors, influence, rows.loss_credit()))
    if not last:
        key = step_keys(state.key, state.clock, steps)[-1]
        draws = draws_for(options.rule, stack, key, factors, steps)
        factors = products.reduced(stack, params, factors, rows, draws, options.reduce, grads)
        influence = exact.carried(stack, params, influence, rows, window.inputs, grads)
    if own is not None:
        grads = added(grads, _recalled(stack, params, factors, influence, own))
    state = state._replace(
        carry=stack.pack(seen.ran.carries),
        **factors._asdict(),
        influence=influence,
        clock=state.clock + jnp.asarray(steps, state.clock.dtype),
    )
    return state, grads, seen.shown


def _recalled(
    stack: Stack, params: Leaves, factors: products.Factors, influence: Any, credits: list
) -> Leaves:
    """What credit of each cell's carry, [B, n], adds by way of the influence."""
    found = products.recalled(stack, params, factors, credits)
    return found | exact.recalled(stack, influence, credits)


def draws_for(
    rule: str, stack: Stack, key: jax.Array, factors: products.Factors, steps: int
) -> dict[str, jax.Array]:
    """For each cell and example: signs of the old product and of the new, [B, 1 + W]; or a place.

    The place, [B], is a number from [0, 1).
    """
    batch = length(stack.initial)
    keys = {stack.name(level): jax.random.fold_in(key, level) for level in stack.levels}
    found = {}
    for name, left in factors.left.items():
        if rule == "kf_rtrl":
            found[name] = drawn(keys[name], (batch, 1 + steps), "rademacher", left.dtype)
        else:
            found[name] = jax.random.uniform(keys[name], (batch,), left.dtype)
    return found


def _nothing_yet(options: Options, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What a stream carries at its start: products, and an influence, of zeros."""
    return _nothing(options, stack, params, length(x))


def _bytes(options: Options, stack: Stack, params: Leaves, batch: int) -> int:
    return held_bytes(lambda: _nothing(options, stack, params, batch))


def _nothing(options: Options, stack: Stack, params: Leaves, batch: int) -> dict[str, Any]:
    factors = products.no_factors(stack, params, options.rank, batch)
    rest = exact.no_influence(stack, params, batch, products.factored(stack, params))
    return {**factors._asdict(), "influence": rest}


def _screen(options: Options, stack: Stack, params: Leaves) -> None:
    del params
    for level in stack.levels:
        cell, name = stack.cells[level], stack.name(level)
        require_real(cell, stack.initial[level], name, options.rule)


def _credits(options: Options, stack: Stack, params: Leaves) -> dict[Path, str]:
    few = products.factored(stack, params)
    all_ = {path for level in stack.levels for path in reaching(stack, params, level)}
    said = dict.fromkeys(params, "exact, no memory needed")
    said |= dict.fromkeys(all_, "exact, whole past (influence)")
    times = "1 Kronecker product" if options.rank == 1 else f"{options.rank} Kronecker products"
    return said | dict.fromkeys(few, f"exact on average, whole past ({times})")
