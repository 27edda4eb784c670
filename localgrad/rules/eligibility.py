"""e-prop, RFLO and SnAp-1: credit that stays within a unit, one eligibility a parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.feedback import Feedback, check_feedback, make_feedback
from localgrad.core.locality import (
    own_entries,
    require_constant_leak,
    require_fidelity,
    require_local,
    tried,
)
from localgrad.core.params import Leaves, accumulator, added, placed, under
from localgrad.core.passes import (
    CUT,
    DIAGONAL,
    Entries,
    Tape,
    assign,
    contract,
    contract_each,
    input_credit,
    one_row,
    pres,
    row,
    sweep_units,
)
from localgrad.core.rule import Frame, LearningRule, Loss, Recipe, Window, even_window, windowed_rule
from localgrad.core.stack import Stack, run
from localgrad.core.synapses import Anatomy


class EligibilityState(NamedTuple):
    """State of `eprop`, `rflo` and `snap`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        start: the model's initial carry (streaming), or None.
        eligibility: by cell and parameter path, [S, B, ...]: how each example's S live state
            components respond to the parameter (streaming), or None.
        feedback: by cell, (N, O), or None for symmetric feedback.
    """

    loss: jax.Array
    carry: Any = None
    start: Any = None
    eligibility: Any = None
    feedback: Any = None

    def fresh(self) -> EligibilityState:
        """The state at the start of new sequences."""
        zeros = jax.tree.map(jnp.zeros_like, self.eligibility)
        return self._replace(carry=self.start, eligibility=zeros)


def local_recipe(
    rule: str, cut: str, feedback: Feedback, key: jax.Array | None, leaky_only: bool = False
) -> Recipe:
    """The recipe shared by the rules that keep credit within a unit."""
    check_feedback(rule, feedback, key)

    def begin(stack: Stack, params: Leaves, x: Any) -> EligibilityState:
        del x
        carry = stack.pack(stack.initial)
        eligibility = {
            stack.name(level): _silent(
                stack.cells[level], under(params, stack.prefixes[level]), stack.initial[level], cut
            )
            for level in stack.levels
        }
        return EligibilityState(jnp.zeros(()), carry, carry, eligibility)

    def process(frame: Frame, state: EligibilityState, window: Window) -> tuple:
        stack, params = frame.stack, frame.params
        ran = run(stack, params, stack.unpack(state.carry), window.inputs, window.reset)
        loss, q_out = frame.objective.credit(ran.outputs, window.targets, window.weight)
        grads, q_y = ran.read(q_out)
        eligibility = dict(state.eligibility)
        for level in reversed(stack.levels):
            cell, prefix, name = stack.cells[level], stack.prefixes[level], stack.name(level)
            own, tape = under(params, prefix), ran.tapes[level]
            if state.feedback is not None:
                q_y = q_out @ state.feedback[name].astype(q_out.dtype).T
            method = _Method(cut, _entries(stack, params, level) if cut == DIAGONAL else {})
            found, eligibility[name] = _learn_cell(
                cell, own, tape, q_y, eligibility[name], method, frame.opening, frame.closing
            )
            grads |= placed(found, prefix)
            if (level > 0 and state.feedback is None) or (level == 0 and stack.encoder is not None):
                spatial = assign(cell, own, tape, one_row(q_y))
                q_y = row(input_credit(cell, own, tape, spatial), 0)
        grads |= ran.encode(q_y)
        return state._replace(carry=stack.pack(ran.carries), eligibility=eligibility), grads, loss

    def screen(stack: Stack, params: Leaves) -> None:
        for level, cell in enumerate(stack.cells):
            own, name = under(params, stack.prefixes[level]), stack.name(level)
            found = tried(cell, own, stack.initial[level], stack.fed[level])
            require_fidelity(cell, found, name)
            require_local(cell, own, found, name, rule)
            if leaky_only:
                require_constant_leak(cell, found, name, rule)
            if cut == DIAGONAL:
                own_entries(cell, found, name)

    def prepare(stack: Stack, params: Leaves) -> dict[str, Any]:
        del params
        return {"feedback": make_feedback(rule, feedback, key, stack)}

    return Recipe(
        name=rule,
        begin=begin,
        process=process,
        idle=EligibilityState(jnp.zeros(())),
        keeps=("feedback",),
        prepare=prepare,
        default_window=lambda stack, params, steps: even_window(steps),
        screen=screen,
    )


class _Method(NamedTuple):
    """How credit passes the recurrent synapses: `CUT`, or `DIAGONAL` with each unit's entries."""

    cut: str
    entries: Entries


def _entries(stack: Stack, params: Leaves, level: int) -> Entries:
    cell = stack.cells[level]
    own = under(params, stack.prefixes[level])
    found = tried(cell, own, stack.initial[level], stack.fed[level])
    return own_entries(cell, found, stack.name(level))


def _live(cell: Anatomy, cut: str) -> list[int]:
    """The carry leaves whose past a parameter's eligibility must remember."""
    return [k for k, alive in enumerate(cell.live) if alive or cut == DIAGONAL]


def _silent(cell: Anatomy, params: Leaves, carry: Any, cut: str) -> Leaves:
    """Zero eligibilities of every parameter that reaches the new carry: [S, B, ...]."""
    live = _live(cell, cut)
    if not live:
        return {}
    batch, units = jax.tree.leaves(carry)[0].shape
    shapes = {path: (units,) for path in cell.others_reach}
    for site, reach in zip(cell.sites, cell.drives_reach, strict=True):
        if reach:
            own = under(params, site.layer.path)
            shapes |= placed({path: leaf.shape for path, leaf in own.items()}, site.layer.path)
    return {
        path: jnp.zeros((len(live), batch, *shape), accumulator(params[path]))
        for path, shape in shapes.items()
    }


def _learn_cell(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_y: Any,
    eligibility: Leaves,
    method: _Method,
    opening: bool,
    closing: bool,
) -> tuple[Leaves, Leaves]:
    """The gradient estimate of one cell for a window, and its eligibilities after it.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_y: learning signal of its outputs, leaves [W, B, N].
        eligibility: before the window, leaves [S, B, ...].
        method: how credit passes the recurrent synapses.
        opening: the eligibilities before the window are known to be zero.
        closing: those after it are not needed.

    Returns:
        The gradients and the new eligibilities.
    """
    received = pres(cell, params, tape)
    live = _live(cell, method.cut)
    if not live:
        credit = assign(cell, params, tape, one_row(q_y))
        return contract(cell, params, received, row(credit.posts, 0)) | credit.others, eligibility

    probes = 0 if closing else len(live)
    left, entering = sweep_units(
        cell, params, tape, q_y, live, probes, method.cut, method.entries
    )
    credit = assign(cell, params, tape, one_row(q_y), left, per_unit=True)
    grads = contract(cell, params, received, row(credit.posts, 0))
    for path, post in credit.others.items():
        grads[path] = _to_leaf(post[0].sum(0), params[path])
    if not opening:
        grads = added(grads, _recalled(eligibility, [lam[0] for lam in entering], cell, params))
    if closing:
        return grads, eligibility

    window = contract_each(cell, params, received, [post[:, 1:] for post in credit.posts])
    window |= {path: post[1:] for path, post in credit.others.items()}
    passed = [lam[1:] for lam in entering]  # S of [S, B, N]: how the old state fades into the new
    return grads, {
        path: _faded(old, passed) + window[path].astype(old.dtype)
        for path, old in eligibility.items()
    }


def _spread(per_unit: jax.Array, like: jax.Array) -> jax.Array:
    """[..., B, N] -> [..., B, 1, ..., D]: the unit of a column is the column's number modulo N."""
    tiled = jnp.tile(per_unit, like.shape[-1] // per_unit.shape[-1])
    between = (1,) * (like.ndim - 3)  # the leaf's axes but its last; like is [S, B, ...]
    return tiled.reshape(*tiled.shape[:-1], *between, tiled.shape[-1]).astype(like.dtype)


def _faded(old: jax.Array, passed: list[jax.Array]) -> jax.Array:
    """Old eligibilities [S, B, ...] carried through the window's unit dynamics."""
    return sum(_spread(lam, old) * old[s][None] for s, lam in enumerate(passed))


def _recalled(
    eligibility: Leaves, credit: list[jax.Array], cell: Anatomy, params: Leaves
) -> Leaves:
    """What credit [B, N] of the entering carry adds to the gradients by way of the eligibilities."""
    found = {}
    for path, old in eligibility.items():
        grad = _summed(sum(_spread(lam, old) * old[s] for s, lam in enumerate(credit)))
        found[path] = _to_leaf(grad, params[path]) if path in cell.others else grad
    return found


def _summed(each: jax.Array) -> jax.Array:
    """Sum over the leading axis by halves: XLA's own reduction of a product is 40x slower on CPU."""
    while (count := each.shape[0]) > 1:
        half = count // 2
        pairs = each[:half] + each[half : 2 * half]
        each = pairs if count % 2 == 0 else jnp.concatenate([pairs, each[2 * half :]])
    return each[0]


def _to_leaf(per_unit: jax.Array, leaf: jax.Array) -> jax.Array:
    """Credit of the units [N] as credit of a unit parameter: one number a unit, or one for all."""
    return (per_unit.sum() if leaf.size == 1 else per_unit).reshape(leaf.shape)


def eprop(
    model: Any,
    loss: Loss,
    *,
    feedback: Feedback = "symmetric",
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    key: jax.Array | None = None,
    example: Any = None,
) -> LearningRule:
    """e-prop."""
    recipe = local_recipe("eprop", CUT, feedback, key)
    return windowed_rule(
        model,
        loss,
        recipe,
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


def rflo(
    model: Any,
    loss: Loss,
    *,
    feedback: Feedback = "random",
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    key: jax.Array | None = None,
    example: Any = None,
) -> LearningRule:
    """RFLO."""
    recipe = local_recipe("rflo", CUT, feedback, key, leaky_only=True)
    return windowed_rule(
        model,
        loss,
        recipe,
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )
