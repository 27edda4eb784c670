"""e-prop, RFLO and SnAp-1: credit that stays within a unit, one eligibility a parameter."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import positive_integer
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.locality import require_constant_leak
from localgrad.core.model.sparsity import Sparsity, sparsity_of
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, under
from localgrad.core.passes.eligibility import (
    around_cells,
    default_window,
    learn_units,
    live_leaves,
    method_of,
    require_units_apart,
    same_time_credit,
    silent,
    silent_cells,
    tried_cell,
)
from localgrad.core.passes.feedback import (
    Feedback,
    Plasticity,
    adapted,
    cell_shapes,
    correlation,
    feedback_fields,
    feedback_settings,
    is_symmetric,
    make_feedback,
    require_feedback,
    send,
)
from localgrad.core.passes.forward import CUT, DIAGONAL, SETS
from localgrad.core.passes.rates import (
    FiringRate,
    no_excess,
    rate_settings,
    rate_signals,
    require_rate,
    window_of_rates,
)
from localgrad.core.passes.reach import Reach, learn_sets
from localgrad.core.passes.run import Level
from localgrad.core.windows import Frame, Outcome, Window, cell_by_cell, outcome_of


class EligibilityState(NamedTuple):
    """State of `eprop`, `rflo` and `snap`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        eligibility: by parameter path, [B, S, ...]: how the S live state components of each
            example's unit respond to the unit's parameter (streaming), or None.
        feedback: by cell, (N, O), for each output array one; or None for symmetric feedback.
        drift: likewise, what adaptive feedback has still to learn; zero between calls.
        excess: by cell, [B, N], by how much each unit's running rate exceeds its target
            (streaming, `FiringRate(decay=...)`), or None.
        sparsity: whom each unit's parameters reach, and which recurrent weights there are
            (`snap` of sparse weights), or None. S is then R S, the states of the R units reached,
            a parameter's own unit first.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    eligibility: Any = None
    feedback: Any = None
    drift: Any = None
    excess: Any = None
    sparsity: Any = None

    outlives = ("feedback", "drift", "sparsity")


class _Local(NamedTuple):
    """What makes one rule of this family different from another.

    Attributes:
        rule: its name.
        cut: how credit passes recurrent synapses, `CUT`, `DIAGONAL` or `SETS`.
        feedback: how the error reaches the cells, as its factory was told.
        key: for random feedback.
        plasticity: how adaptive feedback learns, or None.
        firing_rate: what every unit is held to, or None.
        leaky_only: whether it refuses cells whose units do more than fade.
        order: for `SETS`, the steps within which a parameter reaches units.
        mask: for `SETS`, which recurrent weights there are, as its factory was told.
        sparsity: what `init` found of it, once there is a state.
    """

    rule: str
    cut: str
    feedback: Feedback = "symmetric"
    key: jax.Array | None = None
    plasticity: Plasticity | None = None
    firing_rate: FiringRate | None = None
    leaky_only: bool = False
    order: int = 1
    mask: Any = None
    sparsity: Sparsity | None = None


def eprop(
    model: Any,
    loss: Loss,
    *,
    feedback: Feedback = "symmetric",
    feedback_rate: float | None = None,
    feedback_decay: float = 0.0,
    firing_rate: FiringRate | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    key: jax.Array | None = None,
    example: Any = None,
    held_statistics: bool = False,
) -> LearningRule:
    r"""e-prop: eligibilities of each unit's own dynamics, times an instantaneous learning signal.

    With `s_t` the state of a unit (all that its synapses did not put there at this step), the
    eligibility of a parameter and the update are::

        eps_t = (ds_t/ds_{t-1}) eps_{t-1} + ds_t/dW       the recurrent synapses' path left out
        e_t   = (dy_t/ds_t) eps_t
        update = sum_t L_t e_t                            L_t the learning signal

    It works on any cell whose units touch each other through their recurrent weights only (all of
    Flax's dense cells among them). A synapse is a product with a parameter, in a Flax layer or bare
    (`h @ w`), also where the parameter is masked, transposed, joined with others or normalised on
    the way: the rule then works on what the step makes of the parameters, and its updates go back
    to them by the chain rule.

    *Estimates* BPTT's gradient with every path through a recurrent synapse cut, except where it is
    the last; with `feedback="symmetric"` that is exact for the parameters' own unit, and exact BPTT
    where units have no recurrent synapses. In a stack, a lower cell is credited through the cells
    above at the same time step only, and an encoder at the same time step only: below a leaky
    readout that is a cell (`LeakyCell`) the filter's memory is left out, and `deep_eprop` is
    e-prop's own rule there. Random feedback
    replaces the readout's transpose and keeps its bias. On a tanh `SimpleCell`, whose units keep
    nothing past the cut, it equals `tbptt(horizon=1)`. Readout parameters get their exact gradient.
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
            (N, O), or one a cell (a sequence, or a dict by `cells_i`), is used as it is. Of a model
            with several output arrays each has weights of its own, in the structure of the outputs.
            `"adaptive"` begins as random weights, which learn (Kolen and Pollack): after each call
            they move down the gradient of a readout of that cell, `feedback_rate` times it, and
            so towards the readout's own weights, the more so if both decay.
        feedback_rate: learning rate of adaptive weights, such as that of the readout.
        feedback_decay: weight decay of adaptive weights; give the readout the same, for instance by
            `optax.add_decayed_weights`.
        firing_rate: a `localgrad.FiringRate` that units are held to beside their task, or None.
            Credit for a cell's rates goes to it directly, and on to those below if feedback is
            symmetric. Without a decay, a call is one window.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and eligibilities persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        key: a typed PRNG key. Needed for random and adaptive feedback; used by `init` alone.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.
        held_statistics: whether the statistics of Flax's `LayerNorm`, `RMSNorm`, `GroupNorm` in a
            cell count as constants. They join the units, so such a cell is refused otherwise.
            Their Jacobian is left out, here and in what passes to the cells below: the update then
            also pushes where the normalisation undoes it, along the mean and the scale of what is
            normalised. Gain and bias are credited as parameters of their units. By itself that kept
            a cosine of 0.90 to 0.98 to the gradient in a LayerNorm GRU of 16 to 256 units.

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
    plasticity = require_feedback("eprop", feedback, key, feedback_rate, feedback_decay)
    firing_rate = require_rate(firing_rate)
    return windowed_rule(
        model,
        loss,
        _recipe(_Local("eprop", CUT, feedback, key, plasticity, firing_rate)),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
        held_statistics=held_statistics,
    )


def rflo(
    model: Any,
    loss: Loss,
    *,
    feedback: Feedback = "random",
    feedback_rate: float | None = None,
    feedback_decay: float = 0.0,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    key: jax.Array | None = None,
    example: Any = None,
    held_statistics: bool = False,
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
            it is; `"adaptive"` weights learn, as in `eprop`.
        feedback_rate: learning rate of adaptive weights, such as that of the readout.
        feedback_decay: weight decay of adaptive weights; give the readout the same, for instance by
            `optax.add_decayed_weights`.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and eligibilities persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        key: a typed PRNG key. Needed for random and adaptive feedback; used by `init` alone.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.
        held_statistics: whether the statistics of Flax's `LayerNorm`, `RMSNorm`, `GroupNorm` in a
            cell count as constants. A cell with one is refused otherwise; biased as in `eprop`.

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
    plasticity = require_feedback("rflo", feedback, key, feedback_rate, feedback_decay)
    return windowed_rule(
        model,
        loss,
        _recipe(_Local("rflo", CUT, feedback, key, plasticity, leaky_only=True)),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
        held_statistics=held_statistics,
    )


def snap(
    model: Any,
    loss: Loss,
    *,
    order: int = 1,
    mask: Any = None,
    feedback: Feedback = "symmetric",
    feedback_rate: float | None = None,
    feedback_decay: float = 0.0,
    firing_rate: FiringRate | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    key: jax.Array | None = None,
    example: Any = None,
    held_statistics: bool = False,
) -> LearningRule:
    r"""SnAp-n: RTRL's influence, kept where a parameter's effect arrives within n steps.

    For a parameter of unit i, with `J_t` the full Jacobian of the step and R the units that i
    reaches within n - 1 synapses, itself among them::

        m_t = J_t[R, R] m_{t-1} + ds_{t,R}/dW             update = sum_t (dL_t/ds_{t,R}) m_t

    At order 1, R is i alone. `J_t[i, i]` holds the unit's own dynamics, as in `eprop`, and the
    unit's synapse onto itself: the diagonal of each recurrent kernel. In an LSTM that makes the
    trace of h live. Two things differ from the published mask, the entries of m that one step
    fills. All of a unit's state is kept: of the weights of an LSTM's output gate, which fill h
    alone, also what h's weight on itself makes of c a step later. And where one number serves all
    units (a shared leak or gain), each unit's share of it counts as that unit's own parameter, and
    the shares' credit is added up; the mask, which such a number fills, would keep what it does by
    way of other units too. Higher orders are for sparse recurrent weights; dense ones reach every
    unit at order 2, which is `rtrl`, and are refused.

    *Estimates* BPTT's gradient without the paths that leave R: biased, with no variance; exact
    where the recurrent kernels are diagonal, or R holds all that i ever reaches, and the feedback
    is symmetric. In a stack, lower cells and the encoder are credited as by `eprop`. Readout
    parameters get their exact gradient. *Costs* at order 1 what `eprop` costs (one eligibility for
    each parameter, example and state component). Beyond, with R the size of the largest set: R
    eligibilities in place of one, of kernels with their missing weights, and O(N R^3) + O(R P) a
    step and example: with 3 weights a unit and N = 128, SnAp-2 took 8 times as long as SnAp-1, and
    1/25 of `rtrl`'s time and 1/40 of its memory. The weights that are not there get zero updates.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        order: n, 1 or more.
        mask: which recurrent weights there are: an array (N, N), (pre, post) units, or as wide as
            the layer's gates, for all recurrent layers; or a dict of them by layer, nested as the
            parameters or by `"cells_0/h"`. None reads the exact zeros of the kernels at `init` if
            `order` is 2 or more, which must then see numbers and no shapes.
        feedback: how the error dL/d(output) reaches the cells. `"symmetric"`, `"random"`,
            `"adaptive"` or arrays (N, O), as in `eprop`.
        feedback_rate: learning rate of adaptive weights, such as that of the readout.
        feedback_decay: weight decay of adaptive weights; give the readout the same, for instance by
            `optax.add_decayed_weights`.
        firing_rate: a `localgrad.FiringRate` that units are held to beside their task, or None.
            Credited as in `eprop`.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and influence persist from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        key: a typed PRNG key. Needed for random and adaptive feedback; used by `init` alone.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.
        held_statistics: whether the statistics of Flax's `LayerNorm`, `RMSNorm`, `GroupNorm` in a
            cell count as constants. A cell with one is refused otherwise; biased as in `eprop`.

    Returns:
        A `LearningRule`; its state is an `EligibilityState`.

    Raises:
        ValueError: for an `order` below 1, or above on dense weights, a mask of another shape, by
            name for a cell it cannot credit, and as in `eprop`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.snap(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> updates["cells_0"]["hn"]["kernel"].shape
        (8, 8)
        >>> ring = jnp.eye(8) + jnp.eye(8, k=1)  # each unit feeds itself and the next
        >>> rule = localgrad.snap(model, optax.l2_loss, order=3, mask=ring, batch_size=4)
        >>> rule.init(params).eligibility["cells_0", "hn", "kernel"].shape  # 3 units reached
        (4, 3, 8, 8)

    Reference:
        Menick, Elsen, Evci, Osindero, Simonyan and Graves, "A practical sparse approximation for
        real time recurrent learning", 2020, https://arxiv.org/abs/2006.07232
    """
    order = positive_integer("order", order)
    cut = DIAGONAL if order == 1 and mask is None else SETS
    plasticity = require_feedback("snap", feedback, key, feedback_rate, feedback_decay)
    firing_rate = require_rate(firing_rate)
    return windowed_rule(
        model,
        loss,
        _recipe(
            _Local("snap", cut, feedback, key, plasticity, firing_rate, order=order, mask=mask)
        ),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
        held_statistics=held_statistics,
    )


def _recipe(how: _Local) -> Recipe:
    return Recipe(
        name=how.rule,
        state=EligibilityState,
        process=functools.partial(_process, how),
        credits=functools.partial(_credits, how),
        settings=_settings(how),
        remember=functools.partial(_no_past, how),
        prepare=functools.partial(_prepared, how)
        if how.cut == SETS or not is_symmetric(how.feedback)
        else None,
        finish=functools.partial(adapted, how.plasticity),
        default_window=window_of_rates(how.firing_rate, functools.partial(default_window, how.cut)),
        screen=functools.partial(_screen, how),
        by_synapse=True,
        fit=functools.partial(_fitted, how) if how.cut == SETS else None,
    )


def _fitted(how: _Local, state: EligibilityState) -> Recipe:
    """The recipe for a state, which knows whom its units reach."""
    return _recipe(how._replace(sparsity=state.sparsity))


def _sparsity(how: _Local, stack: Stack, params: Leaves) -> Sparsity | None:
    if how.cut != SETS or how.sparsity is not None:
        return how.sparsity
    return sparsity_of(how.order, how.mask, stack, params)


def _settings(how: _Local) -> dict[str, Any]:
    order = {} if how.cut == CUT else {"order": how.order, "mask": how.mask}
    feedback = feedback_settings(how.feedback, how.plasticity)
    return order | feedback | rate_settings(how.firing_rate)


def _no_past(how: _Local, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    del x
    sparsity = _sparsity(how, stack, params)
    reach = None if sparsity is None else {k: v.shape[1] for k, v in sparsity.reach.items()}
    eligibility = silent_cells(stack, params, how.cut, reach)
    return {"eligibility": eligibility} | no_excess(how.rule, how.firing_rate, stack)


def _prepared(how: _Local, stack: Stack, params: Leaves) -> dict[str, Any]:
    """What outlives a sequence: whom units reach, and feedback weights."""
    sparsity = {"sparsity": _sparsity(how, stack, params)}
    return sparsity if is_symmetric(how.feedback) else sparsity | _feedback(how, stack)


def _feedback(how: _Local, stack: Stack) -> dict[str, Any]:
    weights = make_feedback(how.rule, how.feedback, how.key, cell_shapes(how.rule, stack))
    return feedback_fields(weights, how.plasticity)


def _process(how: _Local, frame: Frame, state: EligibilityState, window: Window) -> tuple:
    """One window: each cell by itself, from the highest down."""
    stack = frame.stack
    seen = outcome_of(frame, state.carry, window, window.reset)
    tapes, steps, share = seen.ran.tapes, frame.steps, frame.share
    signals, state = rate_signals(how.rule, how.firing_rate, stack, tapes, state, steps, share)
    visit = functools.partial(_visit, how, frame, state, seen.q_out, signals)
    state, grads = cell_by_cell(frame, state, seen, visit)
    if how.plasticity is not None:
        state = state._replace(drift=_drifted(state.drift, seen, stack))
    return state, grads, seen.shown


def _drifted(drift: dict[str, Any], seen: Outcome, stack: Stack) -> dict[str, Any]:
    """What each cell's feedback weights learn of a window, added to what they did before."""
    outputs = {stack.name(level): seen.ran.tapes[level].ys for level in stack.levels}
    learned = {name: correlation(outputs[name], seen.q_out, d) for name, d in drift.items()}
    return jax.tree.map(jnp.add, drift, learned)


def _visit(
    how: _Local, frame: Frame, state: EligibilityState, q_out: Any, rates: dict, at: Level, q_y: Any
) -> tuple[Leaves, Leaves, Any]:
    """One cell: its gradients, its eligibilities, and the same-time credit of its input."""
    if state.feedback is not None:
        q_y = send(how.rule, at.name, q_out, state.feedback[at.name], at.tape.ys)
    if at.name in rates:
        q_y = q_y + rates[at.name]
    method = method_of(how.cut, frame.stack, frame.params, at.number)
    held = under(state.eligibility, at.prefix)
    if how.cut == SETS:
        method = method._replace(reach=_reach(state.sparsity, at))
    learn = learn_sets if how.cut == SETS else learn_units
    grads, kept = learn(at, q_y, held, method, frame.opening, frame.closing)
    if at.number == 0 and not at.below or at.number > 0 and state.feedback is not None:
        return grads, kept, q_y  # what is below needs nothing from here
    return grads, kept, same_time_credit(at, q_y)


def _reach(sparsity: Sparsity, at: Level) -> Reach:
    return Reach(sparsity.reach[at.name], under(sparsity.kept, at.prefix))


def _screen(how: _Local, stack: Stack, params: Leaves) -> None:
    require_units_apart(how.rule, how.cut, stack, params)
    if how.leaky_only:
        for level, cell in enumerate(stack.cells):
            found = tried_cell(stack, params, level)
            require_constant_leak(cell, found, stack.name(level), how.rule)


def _credits(how: _Local, stack: Stack, params: Leaves) -> dict[Path, str]:
    found = around_cells(stack, params)
    for level in stack.levels:
        cell, prefix = stack.cells[level], stack.prefixes[level]
        own = under(params, prefix)
        kept = silent(cell, own, stack.initial[level], how.cut)
        way = ", through the cells above" if level + 1 < len(stack.cells) else ""
        way = way if is_symmetric(how.feedback) else ", by feedback weights"
        if not live_leaves(cell, how.cut):
            way += ": its units keep nothing, as tbptt(1)"
        for path in own:
            past = f"past of the units within {how.order - 1} synapses"
            past = "own unit's past" if how.order == 1 else past
            held = f"{past} (eligibility)" if path in kept else "this step only"
            found[prefix + path] = held + way
    return {path: found[path] for path in params}
