"""e-prop, RFLO and SnAp-1: credit that stays within a unit, one eligibility a parameter."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contraction import contract, outer, pres
from localgrad.core.credit import assign, input_credit, sweep_units
from localgrad.core.feedback import Feedback, check_feedback, make_feedback, send
from localgrad.core.forward import CUT, DIAGONAL, Entries, Tape
from localgrad.core.locality import (
    own_entries,
    require_constant_leak,
    require_fidelity,
    require_local,
    require_units,
    tried,
)
from localgrad.core.params import Leaves, Path, accumulator, placed, under
from localgrad.core.rule import (
    Frame,
    LearningRule,
    Loss,
    Recipe,
    Window,
    even_window,
    windowed_rule,
)
from localgrad.core.stack import Stack, run
from localgrad.core.steps import examples_first, one_row, over_examples, row
from localgrad.core.synapses import Anatomy


class EligibilityState(NamedTuple):
    """State of `eprop`, `rflo` and `snap`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        start: the model's initial carry (streaming), or None.
        eligibility: by cell and parameter path, [B, S, ...]: how each example's S live state
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
        start = jax.tree.map(jnp.copy, carry)  # a buffer of its own: both may be donated
        return EligibilityState(jnp.zeros(()), carry, start, eligibility)

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
                q_y = send(rule, name, q_out, state.feedback[name], tape.ys)
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
            require_units(cell, stack.initial[level], name, rule)
            found = tried(cell, own, stack.initial[level], stack.fed[level])
            require_fidelity(cell, found, name)
            require_local(cell, own, stack.initial[level], found, name, rule)
            if leaky_only:
                require_constant_leak(cell, found, name, rule)
            if cut == DIAGONAL:
                own_entries(cell, found, name)

    def prepare(stack: Stack, params: Leaves) -> dict[str, Any]:
        del params
        return {"feedback": make_feedback(rule, feedback, key, stack)}

    def credits(stack: Stack, params: Leaves) -> dict[Path, str]:
        found = {}
        for path in params:
            if path[:1] == ("readout",) and stack.readout is not None:
                found[path] = "exact"
            elif path[:1] == ("encoder",) and stack.encoder is not None:
                found[path] = "same time step only"
        for level in stack.levels:
            cell, prefix = stack.cells[level], stack.prefixes[level]
            own = under(params, prefix)
            kept = _silent(cell, own, stack.initial[level], cut)
            for path in own:
                text = "own unit's past (eligibility)" if path in kept else "this step only"
                if isinstance(feedback, str) and feedback == "symmetric":
                    text += ", through the cells above" if level + 1 < len(stack.cells) else ""
                else:
                    text += ", by feedback weights"
                found[prefix + path] = text
            if not _live(cell, cut):
                found |= {
                    prefix + path: f"{found[prefix + path]}: its units keep nothing, as tbptt(1)"
                    for path in own
                }
        return {path: found[path] for path in params}

    symmetric = isinstance(feedback, str) and feedback == "symmetric"
    return Recipe(
        name=rule,
        begin=begin,
        process=process,
        idle=EligibilityState(jnp.zeros(())),
        credits=credits,
        keeps=("feedback",),
        prepare=None if symmetric else prepare,
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
    """Zero eligibilities of every parameter that reaches the new carry: [B, S, ...]."""
    live = _live(cell, cut)
    if not live:
        return {}
    batch, units = jax.tree.leaves(carry)[0].shape
    lead = (batch, len(live))
    zeros = {
        path: jnp.zeros((*lead, units), accumulator(params[path])) for path in cell.others_reach
    }
    for site, reach in zip(cell.sites, cell.drives_reach, strict=True):
        own = under(params, site.layer.path) if reach else {}
        silent = {path: jnp.zeros((*lead, *v.shape), accumulator(v)) for path, v in own.items()}
        zeros |= placed(silent, site.layer.path)
    return zeros


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
        eligibility: before the window, leaves [B, S, ...].
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
    left, entering = sweep_units(cell, params, tape, q_y, live, probes, method.cut, method.entries)
    credit = assign(cell, params, tape, one_row(q_y), left, per_unit=True)
    grads = contract(cell, params, received, row(credit.posts, 0)) | credit.others
    if opening and closing:
        return grads, eligibility

    traces = _Traces(
        held=eligibility,
        entering=[jnp.moveaxis(lam, 1, 0) for lam in entering],
        received=examples_first(received, 1),
        posts=[jnp.moveaxis(post[:, 1:], (2, 1), (0, 1)) for post in credit.posts],
        others={path: jnp.moveaxis(post, 1, 0) for path, post in credit.units.items()},
    )
    learn = functools.partial(_learn_example, cell, params, opening, closing)
    recalled, kept = over_examples(learn, traces)
    for path, grad in recalled.items():
        grads[path] += _to_leaf(grad, params[path]) if path in cell.others else grad
    return grads, eligibility if closing else kept


class _Traces(NamedTuple):
    """What a window tells of the eligibilities; each leaf with the examples first.

    Attributes:
        held: the eligibilities before the window, by path, [B, S, ...].
        entering: credit of the live carry leaves that entered the window, S of [B, 1 + S, N].
        received: pre of each synapse, [B, W, ...].
        posts: credit of each drive for a window's end of ones, [B, S, W, D].
        others: the same of the parameters that no synapse owns, [B, S, N].
    """

    held: Leaves
    entering: list[jax.Array]
    received: list[jax.Array]
    posts: list[jax.Array]
    others: Leaves


def _learn_example(
    cell: Anatomy, params: Leaves, opening: bool, closing: bool, at: _Traces
) -> tuple[Leaves, Leaves]:
    """One example: what its eligibilities add to the gradients, and what they become.

    `e_T = A e_0 + e_window`, with A how each live state component of the entering carry fades into
    each of the leaving one; and the loss's credit of the entering carry, times e_0.
    """
    recalled: Leaves = {}
    if not opening:
        for path, old in at.held.items():
            terms = [_spread(lam[0], old) * old[s] for s, lam in enumerate(at.entering)]
            recalled[path] = functools.reduce(jnp.add, terms)
    if closing:
        return recalled, {}
    # A loop over S, not a vmap: a product with a batch axis of 1 is a third slower on CPU.
    each = [
        outer(cell, params, at.received, [post[s] for post in at.posts])
        for s in range(len(at.entering))
    ]
    window = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) | at.others
    kept: Leaves = {}
    for path, old in at.held.items():
        terms: list[jax.Array] = [window[path].astype(old.dtype)]
        if not opening:
            terms += [_spread(lam[1:], old) * old[s][None] for s, lam in enumerate(at.entering)]
        kept[path] = functools.reduce(jnp.add, terms)
    return recalled, kept


def _spread(per_unit: jax.Array, like: jax.Array) -> jax.Array:
    """[..., N] -> [..., 1, ..., D] beside `like` [S, ..., D]: column d is of unit d modulo N."""
    tiled = jnp.tile(per_unit, like.shape[-1] // per_unit.shape[-1])
    between = (1,) * (like.ndim - 2)  # the leaf's axes but its last
    return tiled.reshape(*tiled.shape[:-1], *between, tiled.shape[-1]).astype(like.dtype)


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
    r"""e-prop: eligibilities of each unit's own dynamics, times an instantaneous learning signal.

    With `s_t` the state of a unit (all that its synapses did not put there at this step), the
    eligibility of a parameter and the update are::

        eps_t = (ds_t/ds_{t-1}) eps_{t-1} + ds_t/dW       the recurrent synapses' path left out
        e_t   = (dy_t/ds_t) eps_t
        update = sum_t L_t e_t                            L_t the learning signal

    It works on any cell whose units touch each other through their recurrent layers only (all of
    Flax's dense cells but the Linen `OptimizedLSTMCell`, which has no layers to tap).

    *Estimates* BPTT's gradient with every path through a recurrent synapse cut, except where it is
    the last; with `feedback="symmetric"` that is exact for the parameters' own unit, and exact BPTT
    where no unit feeds another. In a stack, a lower cell is credited through the cells above at the
    same time step only, and an encoder at the same time step only. Random feedback replaces the
    readout's transpose and keeps its bias. On a tanh `SimpleCell`, whose units keep nothing past
    the cut, it equals `tbptt(horizon=1)`. Readout parameters get their exact gradient.
    *Costs* 0.55 to 1.0 of BPTT's time at N = 128, B = 16 on one CPU core, one eligibility for each
    parameter, example and live state component, memory flat in T.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        feedback: how the error dL/d(output) reaches the cells. `"symmetric"` sends it back through
            the readout and, below the last cell, through the cells above at the same time step.
            `"random"` draws fixed weights from N(0, 1 / N), shape (N, O), for each cell; an array
            (N, O), or one a cell (a sequence, or a dict by `cells_i`), is used as it is.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and eligibilities persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        key: a typed PRNG key, needed for `feedback="random"`; used by `init` alone.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`), needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is an `EligibilityState`.

    Raises:
        ValueError: by name, for a cell whose units it cannot treat one by one, and for feedback,
            key or batch it cannot use.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.LSTMCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.eprop(model, optax.l2_loss, feedback="random", key=jax.random.key(2))
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.feedback["cells_0"].shape
        (8, 2)

    Reference:
        Bellec, Scherr, Subramoney, Hajek, Salaj, Legenstein and Maass, "A solution to the learning
        dilemma for recurrent networks of spiking neurons", Nature Communications, 2020,
        https://doi.org/10.1038/s41467-020-17236-y
    """
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
    r"""RFLO: leaky eligibility traces times a learning signal that arrives by random feedback.

    For the leaky rate unit `a_t = (1 - alpha) a_{t-1} + alpha phi(u_t)` with feedback weights B::

        p_t = (1 - alpha) p_{t-1} + alpha phi'(u_t) (x) pre_t
        update = sum_t (B dL/dy_t) p_t

    The same update as `eprop`, for the cells it was derived for: those in which, past the cut of
    the recurrent layer, a unit's state only fades by a constant factor (`localgrad.RateCell`,
    `SimpleCell`). Gated cells are refused; `eprop` takes them.

    *Estimates* BPTT's gradient without the paths through recurrent synapses, seen through B instead
    of the readout: biased, and no descent direction in general until the readout has aligned with
    B. With `feedback="symmetric"` only the first bias remains. Under plain SGD the change of the
    weights has at most the rank of B; under Adam it has not. Readout parameters get their exact
    gradient. *Costs* what `eprop` costs.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        feedback: how the error dL/d(output) reaches the cells. `"symmetric"` sends it back through
            the readout and, below the last cell, through the cells above at the same time step.
            `"random"`, the default, draws fixed weights from N(0, 1 / N), shape (N, O), for each
            cell; an array (N, O), or one a cell (a sequence, or a dict by `cells_i`), is used as
            it is.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and eligibilities persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        key: a typed PRNG key, needed for `feedback="random"`; used by `init` alone.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`), needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is an `EligibilityState`.

    Raises:
        ValueError: by name, for a cell whose leak is not constant, and as in `eprop`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((localgrad.RateCell(8, alpha=0.2),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.rflo(model, optax.l2_loss, key=jax.random.key(2))
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> updates["cells_0"]["h"]["kernel"].shape
        (8, 8)

    Reference:
        Murray, "Local online learning in recurrent networks with random feedback", eLife, 2019,
        https://doi.org/10.7554/eLife.43299
    """
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
