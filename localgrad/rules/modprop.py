"""ModProp: e-prop, and credit that cell types pass on by filters over any number of steps."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contract.checks import number
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.program import output_of_state, program_of
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import RECURRENT, in_use
from localgrad.core.params import Leaves, Path, under
from localgrad.core.passes.celltypes import entries_of, require_types, types_by_name
from localgrad.core.passes.eligibility import (
    around_cells,
    default_window,
    require_units_apart,
    same_time_credit,
    silent_cells,
)
from localgrad.core.passes.feedback import units_of
from localgrad.core.passes.forward import CUT, ONCE
from localgrad.core.passes.modulation import Output, Types, learn_types
from localgrad.core.passes.run import Level
from localgrad.core.windows import Frame, Window, cell_by_cell, outcome_of


class ModPropState(NamedTuple):
    """State of `modprop`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        eligibility: by parameter path, [B, K + 1, ...]: how the units of each of K types answer the
            parameter through others, and how its own unit does by itself (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    eligibility: Any = None

    outlives = ()


def modprop(
    model: Any,
    loss: Loss,
    *,
    slope: float,
    types: Any = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
    held_statistics: bool = False,
) -> LearningRule:
    r"""ModProp: e-prop, and credit that cell types pass on by filters over any number of steps.

    Unit p of type b has e-prop's eligibility `e_p,t` of each of its parameters, and beside it how
    the units of type a answer that parameter through recurrent synapses, all alike: by the mean
    weight `w_ab` between the types (zeros count), the number `n_c` of units of a type, one constant
    `slope` in place of each unit's own, and the mean `d_a,t` over the type of what units keep::

        g_ab,t = d_a,t g_ab,t-1 + slope (w_ab e_p,t-1 + sum_c w_ac n_c g_cb,t-1)
        update = sum_t (L_p,t e_p,t + sum_a (sum of L_j,t over j in a) g_ab,t)

    with `L_j,t` what the state of unit j does to the loss of its step. Nothing waits for the
    future, and nothing but the eligibility differs from one synapse of a unit to another. In a
    `localgrad.RateCell(alpha=...)`, `d` is `1 - alpha`, and a slope is alpha times the published
    constant of the activation, such as .25 of a rectifier.

    *Estimates* BPTT's gradient with each passage of a recurrent synapse, but for the parameter's
    own, by the types' mean weight and the slope: biased, with no variance. It is BPTT's gradient
    where each unit is a type of its own, linear, and answers by `slope` (at the cost of RTRL), and
    e-prop's where `slope` is 0. Means tell most where weights have the sign of their unit's type,
    and vanish where signs are mixed. What is passed on grows from step to step, and the update with
    it, where the largest eigenvalue of `d + slope n w` is beyond 1: choose `slope` below that. In a
    stack, lower cells and the encoder are credited as by `eprop`. Readout parameters get their
    exact gradient. Cosine to BPTT in `python -m experiments online` (32 rate units of two types, a
    bit recalled after 5 to 36 steps, three seeds): .69 to .95 in fresh networks, where `eprop` has
    .65 to .93, and .02 to .47 in networks that remember, where it has .03 to .38; with each unit a
    type of its own, or a larger slope, it has more. *Costs* K + 1 numbers for each parameter and
    example, and (K + 2) / 2 times the products of `eprop`; K is 1 for one type.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`. Each unit has one state, of which its output is made, and one
            recurrent drive.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        slope: how far a unit's state moves for a unit of recurrent drive, of which it is a
            constant estimate; 0 or more.
        types: labels (N,) of the units, 0, 1, ..., or such an array a cell (a sequence, or a dict
            by `cells_i`), say 0 for excitatory and 1 for inhibitory ones. None for a single type.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and eligibilities persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.
        held_statistics: whether the statistics of Flax's `LayerNorm`, `RMSNorm`, `GroupNorm` in a
            cell count as constants. A cell with one is refused otherwise; biased as in `eprop`.

    Returns:
        A `LearningRule`; its state is a `ModPropState`.

    Raises:
        ValueError: for a slope that is no number of 0 or more, for types that are not one for each
            unit, by name for a cell it cannot credit (gates, spikes, two states a unit), and as in
            `eprop`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((localgrad.RateCell(8, alpha=0.2),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> ei = jnp.array([0, 0, 0, 0, 0, 0, 1, 1])
        >>> rule = localgrad.modprop(model, optax.l2_loss, slope=0.1, types=ei)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> updates["cells_0"]["h"]["kernel"].shape
        (8, 8)

    Reference:
        Liu, Smith, Mihalas, Shea-Brown and Sümbül, "Biologically-plausible backpropagation through
        arbitrary timespans via local neuromodulators", 2022, https://arxiv.org/abs/2206.01338
    """
    slope = number("slope", slope, "be 0 or more, and finite")
    if types is not None:
        require_types(types)
    recipe = Recipe(
        name="modprop",
        state=ModPropState,
        process=functools.partial(_process, types, slope),
        credits=_credits,
        settings={"slope": slope, "types": types},
        remember=functools.partial(_no_past, types),
        default_window=functools.partial(default_window, ONCE),
        screen=functools.partial(_screen, types),
        by_synapse=True,
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


def _no_past(types: Any, stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    del x
    rows = {name: own.shape[1] + 1 for name, own in _members(types, stack).items()}
    return {"eligibility": silent_cells(stack, params, ONCE, rows)}


def _process(types: Any, slope: float, frame: Frame, state: ModPropState, window: Window) -> tuple:
    seen = outcome_of(frame, state.carry, window, window.reset)
    members = _members(types, frame.stack)

    def visit(at: Level, q_y: Any) -> tuple[Leaves, Leaves, Any]:
        own = members[at.name]
        weights = _mean_weights(frame.stack, frame.params, at.number, own)
        between = Types(jnp.asarray(own), weights, slope)
        held = under(state.eligibility, at.prefix)
        output = _output(frame.stack, frame.params, at.number)
        grads, kept = learn_types(at, q_y, output, held, between, frame.opening, frame.closing)
        return grads, kept, same_time_credit(at, q_y) if at.below else q_y

    state, grads = cell_by_cell(frame, state, seen, visit)
    return state, grads, seen.shown


def _members(types: Any, stack: Stack) -> dict[str, np.ndarray]:
    """Whether each unit is of each type, [N, K], by the cell's name."""
    if types is None:
        return {stack.name(k): np.ones((units_of(stack, k), 1)) for k in stack.levels}
    labels = types_by_name("modprop", types, stack)
    return {name: np.eye(own.max() + 1)[own] for name, own in labels.items()}


def _mean_weights(stack: Stack, params: Leaves, level: int, members: np.ndarray) -> jax.Array:
    """The mean weight from a unit of each type to one of each, [K, K]."""
    cell, own = stack.cells[level], under(params, stack.prefixes[level])
    counts = members.sum(0)
    found = jnp.zeros((len(counts), len(counts)))
    for i, (start, units) in entries_of("modprop", stack, params, level).items():
        layer = cell.sites[i].layer
        leaves = under(own, layer.path)
        kernel = in_use(layer, leaves, jnp.ones((1, leaves[("kernel",)].shape[0])))
        weights = kernel[start : start + units]
        kinds = jnp.asarray(members, weights.dtype)
        found = kinds.T @ weights @ kinds / np.outer(counts, counts)
    return found


def _output(stack: Stack, params: Leaves, level: int) -> Output:
    """How a cell makes its output of its new state; raises unless it does so of that alone."""
    cell, initial = stack.cells[level], stack.initial[level]
    own = under(params, stack.prefixes[level])
    drives = [s.drive.shape[1:] for s in cell.sites if s.role == RECURRENT]
    state = jax.tree.leaves(initial)
    output = output_of_state(program_of(cell.module, own, initial, stack.fed[level]))
    if output is None or drives not in ([], [state[0].shape[1:]]):
        raise ValueError(
            f"modprop cannot credit {stack.name(level)} ({cell.module.name}): each of its units "
            "must have one state, of which alone its output is made, and one recurrent drive, as "
            "in localgrad.RateCell and nn.SimpleCell; here the carry has "
            f"{len(state)} leaves, and the recurrent drives are of shapes {drives}. Use "
            "localgrad.eprop or localgrad.mdgl."
        )
    return output


def _screen(types: Any, stack: Stack, params: Leaves) -> None:
    require_units_apart("modprop", CUT, stack, params)
    for level in stack.levels:
        _output(stack, params, level)
        entries_of("modprop", stack, params, level)
    _members(types, stack)


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    own = "own unit's past (eligibility), and all units as their types tell"
    return dict.fromkeys(params, own) | around_cells(stack, params)
