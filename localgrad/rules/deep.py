"""e-prop in depth: eligibilities that recurse across layers and time."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.room import GIB, held_bytes, room_of
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, added, placed, under
from localgrad.core.passes.depth import (
    Held,
    deep_rows,
    nothing_held,
    remembered,
    window_of,
)
from localgrad.core.passes.eligibility import (
    learn_units,
    method_of,
    require_units_apart,
    same_time_credit,
)
from localgrad.core.passes.feedback import (
    Feedback,
    Plasticity,
    adapted,
    correlation,
    feedback_fields,
    feedback_settings,
    is_symmetric,
    last_map,
    make_feedback,
    require_feedback,
    send,
)
from localgrad.core.passes.forward import CUT, DIAGONAL
from localgrad.core.passes.rates import (
    FiringRate,
    no_excess,
    rate_settings,
    rate_signals,
    require_rate,
    window_of_rates,
)
from localgrad.core.passes.run import Level, descend
from localgrad.core.windows import Frame, Outcome, Window, outcome_of


class DeepState(NamedTuple):
    """State of `deep_eprop`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        held: a `Held`: the eligibilities of each cell's own parameters, and how each cell responds
            to those below it (streaming); or None.
        feedback: by the cell that receives the error, (N, O), for each output array one; or None
            for symmetric feedback.
        drift: likewise, what adaptive feedback has still to learn; zero between calls.
        excess: by cell, [B, N], by how much each unit's running rate exceeds its target
            (streaming, `FiringRate(decay=...)`), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    held: Any = None
    feedback: Any = None
    drift: Any = None
    excess: Any = None

    outlives = ("feedback", "drift")


class _Deep(NamedTuple):
    """What `deep_eprop` was told.

    Attributes:
        cut: how credit passes recurrent synapses, `CUT` or `DIAGONAL`.
        feedback: how the error reaches the last cells, as the factory was told.
        key: for weights that are drawn.
        plasticity: how adaptive weights learn, or None.
        firing_rate: what every unit is held to, or None.
        spatial: whether credit passes from a cell to those below it.
        temporal: whether it does so through the upper cells' own past.
    """

    cut: str
    feedback: Feedback
    key: jax.Array | None
    plasticity: Plasticity | None
    firing_rate: FiringRate | None
    spatial: bool
    temporal: bool


def deep_eprop(
    model: Any,
    loss: Loss,
    *,
    feedback: Feedback = "symmetric",
    feedback_rate: float | None = None,
    feedback_decay: float = 0.0,
    firing_rate: FiringRate | None = None,
    autapses: bool = False,
    spatial: bool = True,
    temporal: bool = True,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    key: jax.Array | None = None,
    max_influence_bytes: int = 4 * GIB,
    example: Any = None,
    held_statistics: bool = False,
) -> LearningRule:
    r"""e-prop in depth: eligibilities that recurse across the layers of a stack as well as in time.

    With `s^l_t` the states of the units of layer l, `D^l_t` how each depends on its own unit's past
    (recurrent synapses left out) and `G^l_t` how it depends on the layer below at the same step::

        e^{k<-k}_t = D^k_t e^{k<-k}_{t-1} + ds^k_t/dW^k                     own layer
        e^{l<-k}_t = D^l_t e^{l<-k}_{t-1} + G^l_t e^{l-1<-k}_t              l > k
        update of W^k = sum_t sum_l (dL_t/ds^l_t) e^{l<-k}_t

    Within a window this is reverse mode with every recurrent synapse cut and all upward paths kept
    through time; between windows the eligibilities are carried. `eprop` leaves out the time
    recursion of the upper layers: it credits a lower layer through those above at the same step.

    *Estimates* BPTT's gradient with every path through a recurrent synapse cut: exact in stacks of
    any depth whose units have no recurrent synapses (`LRUCell`), and with `autapses` where those
    send nothing but to their own unit. Equal to `eprop` on one layer, and with `autapses` to
    `snap`. Where the units of the upper layers keep nothing past the cut (a tanh `SimpleCell`) it
    equals `eprop` too. Encoder and lower layers are credited through time. Readout parameters get
    their exact gradient. *Costs* memory first: layer l keeps N_l S numbers for every parameter
    below it and every example, so that a few hundred units a layer take gigabytes; `summary` prints
    it for a stream. An episodic call of several windows holds as much while it runs, one of a
    single window none of it. `init`, or such a call, refuses above `max_influence_bytes`. In time,
    streams of two to four layers of 32 rate units took 5 to 25 times as long as BPTT, and a single
    episodic window less than BPTT.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        feedback: how the error dL/d(output) reaches the cells. `"symmetric"` sends it back through
            the model. `"random"` draws fixed weights from N(0, 1 / N), shape (N, O), which stand in
            for the transpose of the last map: the readout, or, where there is none, the input layer
            of the last cell (a `LeakyCell`). With several output arrays each has weights of its
            own, in the structure of the outputs. An array (N, O) is used as it is; `"adaptive"`
            weights learn, as in `eprop`. Below them credit takes the model's own way.
        feedback_rate: learning rate of adaptive weights, such as that of the readout.
        feedback_decay: weight decay of adaptive weights; give the readout the same, for instance by
            `optax.add_decayed_weights`.
        firing_rate: a `localgrad.FiringRate` that units are held to beside their task, or None.
            Credit for a cell's rates goes to it and to all cells below. Without a decay, a call is
            one window.
        autapses: also keep what each unit sends to itself through its recurrent synapses (the
            diagonal of their kernels), as `snap` does.
        spatial: False stops credit between layers: only the last cell and the readout learn, and
            each cell its own firing rate. With a `LeakyCell` for a readout, that is the last cell.
        temporal: False stops the recursion in time of the upper layers: `eprop`'s credit.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and eligibilities persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        key: a typed PRNG key. Needed for random and adaptive feedback; used by `init` alone.
        max_influence_bytes: refuse to allocate more bytes than this for the eligibilities.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.
        held_statistics: whether the statistics of Flax's `LayerNorm`, `RMSNorm`, `GroupNorm` in a
            cell count as constants. A cell with one is refused otherwise; biased as in `eprop`.

    Returns:
        A `LearningRule`; its state is a `DeepState`.

    Raises:
        ValueError: by name, for a cell whose units it cannot treat one by one, and if the
            eligibilities would not fit.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> cells = (localgrad.RateCell(6, alpha=0.2), localgrad.RateCell(4, alpha=0.1))
        >>> model = localgrad.Network(cells, readout=nn.Dense(2))
        >>> x = jnp.ones((3, 10, 5))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (3, 5))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.deep_eprop(model, optax.l2_loss, batch_size=3)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.held.influence["cells_1"][("cells_0", "i", "kernel")].shape  # [B, N_1, I, N_0]
        (3, 4, 5, 6)

    Reference:
        Millidge, "Generalising E-prop to Deep Networks", 2025, https://arxiv.org/abs/2512.24506
    """
    for name, value in (("autapses", autapses), ("spatial", spatial), ("temporal", temporal)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False; got {value!r}.")
    plasticity = require_feedback("deep_eprop", feedback, key, feedback_rate, feedback_decay)
    firing_rate = require_rate(firing_rate)
    how = _Deep(
        cut=DIAGONAL if autapses else CUT,
        feedback=feedback,
        key=key,
        plasticity=plasticity,
        firing_rate=firing_rate,
        spatial=spatial,
        temporal=temporal,
    )
    room = room_of(
        lambda stack, params, batch: held_bytes(lambda: _nothing(how, stack, params, batch)),
        max_influence_bytes,
        "deep_eprop's eligibilities e^(l<-k), N_l S numbers for every parameter below layer l,",
        "localgrad.eprop, whose memory is one number a parameter and stream",
    )
    recipe = Recipe(
        name="deep_eprop",
        state=DeepState,
        process=functools.partial(_process if spatial and temporal else _process_ablated, how),
        credits=functools.partial(_credits, how),
        settings={
            **feedback_settings(feedback, plasticity),
            **rate_settings(firing_rate),
            "autapses": autapses,
            "spatial": spatial,
            "temporal": temporal,
            "max_influence_bytes": max_influence_bytes,
        },
        remember=functools.partial(_no_past, how),
        prepare=None if is_symmetric(how.feedback) else functools.partial(_feedback, how),
        finish=functools.partial(adapted, how.plasticity),
        default_window=window_of_rates(firing_rate, functools.partial(window_of, how.cut)),
        screen=functools.partial(_screen, how),
        by_synapse=True,
        room=room,
        advice="localgrad.eprop keeps one number a parameter and stream, and credits lower layers "
        "through those above at the same time step only"
        if spatial and temporal
        else "",
    )
    return windowed_rule(
        model,
        loss,
        recipe,
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
        held_statistics=held_statistics,
    )


def _feedback(how: _Deep, stack: Stack, params: Leaves) -> dict[str, Any]:
    found = last_map("deep_eprop", stack, params)
    weights = make_feedback("deep_eprop", how.feedback, how.key, {found.receiver: found.like})
    return feedback_fields(weights, how.plasticity)


def _no_past(how: _Deep, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    held = _nothing(how, stack, params, jax.tree.leaves(x)[0].shape[0])
    return {"held": held} | no_excess("deep_eprop", how.firing_rate, stack)


def _nothing(how: _Deep, stack: Stack, params: Leaves, batch: int) -> Held:
    return nothing_held(stack, params, how.cut, batch, across=how.spatial and how.temporal)


def _process(how: _Deep, frame: Frame, state: DeepState, window: Window) -> tuple:
    """One window: its own credit through all layers, and what is held of the past."""
    stack, params = frame.stack, frame.params
    seen = outcome_of(frame, state.carry, window, window.reset)
    methods = [method_of(how.cut, stack, params, level) for level in stack.levels]
    q_y, sent = _sent(state.feedback, seen, stack, params)
    signals, state = _signals(how, frame, seen, state)
    grads, rows = deep_rows(stack, params, seen.ran, q_y, methods, frame.closing, sent, signals)
    grads |= seen.grads
    held = state.held
    if not (frame.opening and frame.closing):
        found, held = remembered(
            stack, params, held, rows, window.inputs, frame.opening, frame.closing
        )
        grads = added(grads, found)
    state = _drifted(how, state, grads, seen, stack, params)
    return state._replace(carry=stack.pack(seen.ran.carries), held=held), grads, seen.shown


def _signals(how: _Deep, frame: Frame, seen: Outcome, state: DeepState) -> tuple[dict, DeepState]:
    """What each cell's rates add to its learning signal, and the state with them."""
    tapes, steps, share = seen.ran.tapes, frame.steps, frame.share
    return rate_signals("deep_eprop", how.firing_rate, frame.stack, tapes, state, steps, share)


def _drifted(
    how: _Deep, state: DeepState, grads: Leaves, seen: Outcome, stack: Stack, params: Leaves
) -> DeepState:
    """What adaptive feedback learns of a window: what the weights it stands in for do."""
    if how.plasticity is None:
        return state
    ((name, drift),) = state.drift.items()
    kernel = last_map("deep_eprop", stack, params).kernel
    if kernel is None:
        learned = correlation(seen.ran.tapes[-1].ys, seen.q_out, drift)
    else:
        learned = jax.tree.map(lambda d: grads[kernel].astype(d.dtype), drift)
    return state._replace(drift={name: jax.tree.map(jnp.add, drift, learned)})


def _sent(feedback: Any, seen: Outcome, stack: Stack, params: Leaves) -> tuple[Any, Any]:
    """Credit of the last cell's outputs, and the weights that bring it down from there, if any."""
    if feedback is None:
        return seen.q_y, None
    ((name, weights),) = feedback.items()
    site = last_map("deep_eprop", stack, params).site
    if site is not None:
        (weights,) = jax.tree.leaves(weights)
        return seen.q_y, {site: weights}
    return send("deep_eprop", name, seen.q_out, weights, seen.ran.tapes[-1].ys), None


def _process_ablated(how: _Deep, frame: Frame, state: DeepState, window: Window) -> tuple:
    """One window without credit between layers, or with credit of the same step alone."""
    stack = frame.stack
    seen = outcome_of(frame, state.carry, window, window.reset)
    q_y, sent = _sent(state.feedback, seen, stack, frame.params)
    signals, state = _signals(how, frame, seen, state)
    visit = functools.partial(_visit_ablated, how, frame, state.held.eligibility, sent, signals)
    grads, kept, q_x = descend(stack, frame.params, seen.ran.tapes, q_y, visit)
    grads |= seen.grads | seen.ran.encode(q_x)
    eligibility = functools.reduce(operator.or_, map(placed, kept, stack.prefixes))
    held = state.held._replace(eligibility=eligibility)
    state = _drifted(how, state, grads, seen, stack, frame.params)
    return state._replace(carry=stack.pack(seen.ran.carries), held=held), grads, seen.shown


def _visit_ablated(
    how: _Deep, frame: Frame, eligibility: Leaves, sent: Any, signals: dict, at: Level, q_y: Any
) -> tuple[Leaves, Leaves, Any]:
    if at.name in signals:
        q_y = q_y + signals[at.name]
    method = method_of(how.cut, frame.stack, frame.params, at.number)
    held = under(eligibility, at.prefix)
    grads, kept = learn_units(at, q_y, held, method, frame.opening, frame.closing)
    if not at.below:
        return grads, kept, q_y
    q_x = same_time_credit(at, q_y, sent if at.number + 1 == len(frame.stack.cells) else None)
    return grads, kept, q_x if how.spatial else jax.tree.map(jnp.zeros_like, q_x)


def _screen(how: _Deep, stack: Stack, params: Leaves) -> None:
    require_units_apart("deep_eprop", how.cut, stack, params)


def _credits(how: _Deep, stack: Stack, params: Leaves) -> dict[Path, str]:
    found = {}
    past = jax.eval_shape(lambda: _nothing(how, stack, params, 1))
    crossed = {path for block in past.influence.values() for path in block}
    top = stack.prefixes[-1]
    for path in params:
        ways = ["own unit's past"] if path in past.eligibility else []
        ways += ["the past of units above"] if path in crossed else []
        if path[:1] == ("readout",) and stack.readout is not None:
            found[path] = "exact"
        elif not how.spatial and path[: len(top)] != top:
            held = how.firing_rate is not None and path[:1] != ("encoder",)
            what = "its own firing rate" if held else "nothing"
            found[path] = f"{what}: credit between layers is ablated"
        else:
            found[path] = f"{' and '.join(ways)} (eligibility)" if ways else "this step only"
    return found
