"""UORO: the influence at rank one, without a bias."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import require_choice
from localgrad.core.contract.noise import NOISES, beginning, require_key, step_keys
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.locality import require_real
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, added
from localgrad.core.passes.forward import WHOLE
from localgrad.core.passes.influence import credit_rows, reaching
from localgrad.core.passes.rank_one import (
    as_carry,
    no_sides,
    noise_for,
    own_credit,
    recalled,
    reduced,
)
from localgrad.core.steps import length
from localgrad.core.windows import Frame, Window, even_windows, outcome_of


class UOROState(NamedTuple):
    """State of `uoro`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        left: A, by cell, one number for each of its carry's, flattened, [B, N S] (streaming).
        right: B, by parameter path, [B, ...] (streaming).
        key: what noise is drawn from.
        clock: how many steps have been seen.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    left: Any = None
    right: Any = None
    key: Any = None
    clock: Any = None

    outlives = ("key", "clock")


class Options(NamedTuple):
    """What the rule was told.

    Attributes:
        noise: `"rademacher"` or `"gaussian"`.
        published: whether a loss credits its own step by way of A and B too.
        key: to begin with.
    """

    noise: str
    published: bool
    key: jax.Array


def uoro(
    model: Any,
    loss: Loss,
    *,
    key: jax.Array,
    noise: str = "rademacher",
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Unbiased online recurrent optimisation: RTRL with an influence of rank one.

    The influence of all parameters on the model's whole carry is `A (x) B`, one number for each of
    the carry's and one for each parameter. At a window's end, with J the window's Jacobian, M what
    the window itself adds to the influence, and noise nu of each example::

        A <- p0 J A + p1 nu        B <- B / p0 + nu M / p1
        p0 = sqrt(|B| / |J A|)     p1 = sqrt(|nu M| / sqrt(N))

    `J A` is one tangent forward, `nu M` one row of credit backward. Within a window credit is
    exact; with `c_0` that of the carry which entered it, `(c_0 A) B` is added. `window=1` is the
    published algorithm, step by step, in which a loss credits its own step by way of A and B too
    (where the outputs are a part of the highest cell's carry; else, exactly). A and B are zero at
    first.

    *Estimates* BPTT's gradient without a bias, of a whole stack as of one cell, with parameters
    that stay fixed; an episodic call of one window is exact. The variance grows with the size of
    the carry. What is drawn depends on where windows end, so a stream gives the same numbers only
    if it is split between windows. *Costs* two passes forward and two backward, with a gradient of
    the weights for each example, and N S + P numbers for each.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        noise: `"rademacher"` or `"gaussian"`, what nu is drawn from.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and influence persist from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T. They are
            credited exactly among themselves, and most of the variance goes. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `UOROState`.

    Raises:
        ValueError: for a key that is none, and as in `rtrl`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.uoro(model, optax.l2_loss, key=jax.random.key(2), batch_size=4)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.left["cells_0"].shape, state.right["cells_0", "hn", "kernel"].shape
        ((4, 8), (4, 8, 8))

    Reference:
        Tallec and Ollivier, "Unbiased online recurrent optimization", ICLR, 2018,
        https://arxiv.org/abs/1702.05043
    """
    require_choice("noise", noise, NOISES)
    require_key(key)
    options = Options(noise, window == 1, key)
    recipe = Recipe(
        name="uoro",
        state=UOROState,
        process=functools.partial(_process, options),
        credits=_credits,
        settings={"noise": noise},
        remember=_nothing_yet,
        draw=lambda params: beginning(key),
        default_window=even_windows,
        screen=_screen,
    )
    common = {"batch_size": batch_size, "window": window, "reduction": reduction}
    return windowed_rule(model, loss, recipe, **common, example=example)


def _process(options: Options, frame: Frame, state: UOROState, window: Window) -> tuple:
    """One window: its own credit, what the influence recalls, and the influence after it."""
    stack, params, steps = frame.stack, frame.params, length(window.inputs)
    seen = outcome_of(frame, state.carry, window, window.reset)
    own = own_credit(stack, params, seen.q_y) if options.published else None
    q_y = seen.q_y if own is None else jax.tree.map(jnp.zeros_like, seen.q_y)
    last = frame.closing and own is None
    key = step_keys(state.key, state.clock, steps)[-1]
    noise = noise_for(stack, key, options.noise)
    probes = [as_carry(stack, level, noise[level]) for level in stack.levels]
    methods = [WHOLE] * len(stack.levels)
    grads, rows = credit_rows(stack, params, seen.ran, q_y, methods, last, probes)
    grads |= seen.grads
    sides = state.left, state.right
    if not frame.opening and own is None:
        grads = added(grads, recalled(stack, sides, rows.loss_credit()))
    if not last:
        sides = reduced(stack, params, sides, seen.ran, rows, noise, window.inputs, grads)
    if own is not None:
        grads = added(grads, recalled(stack, sides, own))
    state = state._replace(
        carry=stack.pack(seen.ran.carries),
        left=sides[0],
        right=sides[1],
        clock=state.clock + jnp.asarray(steps, state.clock.dtype),
    )
    return state, grads, seen.shown


def _nothing_yet(stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    """What a stream carries at its start: A and B of zeros."""
    left, right = no_sides(stack, params, x)
    return {"left": left, "right": right}


def _screen(stack: Stack, params: Leaves) -> None:
    del params
    for level in stack.levels:
        require_real(stack.cells[level], stack.initial[level], stack.name(level), "uoro")


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    remembered = {path for level in stack.levels for path in reaching(stack, params, level)}
    return {
        path: "exact on average, whole past (influence of rank one)"
        if path in remembered
        else "exact, no memory needed"
        for path in params
    }
