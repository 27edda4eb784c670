"""MDGL: e-prop, and credit that units tell those that they hear from, one step back."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax

from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, under
from localgrad.core.passes.celltypes import by_types, entries_of, require_types, types_by_name
from localgrad.core.passes.eligibility import (
    around_cells,
    default_window,
    learn_units,
    require_units_apart,
    same_time_credit,
    silent_cells,
)
from localgrad.core.passes.forward import ONCE, Method
from localgrad.core.passes.run import Level
from localgrad.core.windows import Frame, Window, cell_by_cell, outcome_of


class ModulatedState(NamedTuple):
    """State of `mdgl`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        initial_carry: the model's initial carry (streaming), or None.
        eligibility: by parameter path, [B, S, ...]: how the S state components of each example's
            unit respond to the unit's parameter (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    initial_carry: Any = None
    eligibility: Any = None

    outlives = ()


def mdgl(
    model: Any,
    loss: Loss,
    *,
    types: Any = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
    held_statistics: bool = False,
) -> LearningRule:
    r"""MDGL (multidigraph learning): e-prop, and credit of those units that a unit talks to.

    With e-prop's eligibilities `e_t` of the outputs of unit p, its learning signals `L_t`, and
    `h_j,t` how the output of unit j responds to its recurrent drive, each unit tells those that it
    hears from what it did to the loss, by the weight `w_jp` or its mean over units of both types::

        G_p,t  = sum_j w_jp h_j,t+1 L_j,t+1
        update = sum_t (L_p,t + G_p,t) e_p,t

    What is told at t + 1 meets the eligibility of t, which is kept: nothing waits for the future.

    *Estimates* BPTT's gradient with every path through recurrent synapses cut but those through a
    single one, after the parameter's own, in the step of the loss: biased, with no variance; with
    `types`, also by how weights differ within a pair of types. Units that keep nothing are credited
    as by `tbptt(horizon=2)`. Cosine to BPTT in `python -m experiments online` (a GRU, N = 32, a bit
    recalled after 5 to 36 steps, three seeds): .89 to .95 in fresh networks, where `eprop` has .82
    to .91, and .65 to .85 in networks that remember, where it has .37 to .58. Types tell most where
    the weights of a unit have its type's sign; where signs are mixed, their means vanish. In a
    stack, lower cells and the encoder are credited as by `eprop`. Readout parameters
    get their exact gradient. *Costs* what `snap` costs (one eligibility for each parameter, example
    and state component), and a product with the recurrent weights.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        types: labels (N,) of the units, 0, 1, ..., or such an array a cell (a sequence, or a dict
            by `cells_i`): credit then passes by the mean weight of each pair of types (and gate),
            over the weights that are not zero, as by neuromodulators. None for the weights
            themselves.
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
        A `LearningRule`; its state is a `ModulatedState`.

    Raises:
        ValueError: for types that are not one for each unit, by name for a cell it cannot credit,
            and as in `eprop`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((localgrad.RateCell(8, alpha=0.2),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.mdgl(model, optax.l2_loss, types=jnp.arange(8) % 2)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> updates["cells_0"]["h"]["kernel"].shape
        (8, 8)

    Reference:
        Liu, Smith, Mihalas, Shea-Brown and Sümbül, "Cell-type-specific neuromodulation guides
        synaptic credit assignment in a spiking neural network", PNAS 118, 2021,
        https://doi.org/10.1073/pnas.2111821118
    """
    if types is not None:
        require_types(types)
    recipe = Recipe(
        name="mdgl",
        state=ModulatedState,
        process=functools.partial(_process, types),
        credits=_credits,
        settings={"types": types},
        remember=_no_past,
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


def _no_past(stack: Stack, params: Leaves, x: Any) -> dict[str, Any]:
    del x
    return {"eligibility": silent_cells(stack, params, ONCE)}


def _process(types: Any, frame: Frame, state: ModulatedState, window: Window) -> tuple:
    seen = outcome_of(frame, state.carry, window, window.reset)
    visit = functools.partial(_visit, types, frame, state)
    state, grads = cell_by_cell(frame, state, seen, visit)
    return state, grads, seen.shown


def _visit(
    types: Any, frame: Frame, state: ModulatedState, at: Level, q_y: Any
) -> tuple[Leaves, Leaves, Any]:
    """One cell: its gradients, its eligibilities, and the same-time credit of its input."""
    by = at.params
    if types is not None:
        labels = types_by_name("mdgl", types, frame.stack)[at.name]
        entries = entries_of("mdgl", frame.stack, frame.params, at.number)
        by = by_types(at.cell, at.params, labels, entries)
    held = under(state.eligibility, at.prefix)
    method = Method(ONCE, {}, by)
    grads, kept = learn_units(at, q_y, held, method, frame.opening, frame.closing)
    return grads, kept, same_time_credit(at, q_y) if at.below else q_y


def _screen(types: Any, stack: Stack, params: Leaves) -> None:
    require_units_apart("mdgl", ONCE, stack, params)
    if types is not None:
        types_by_name("mdgl", types, stack)
        for level in stack.levels:
            entries_of("mdgl", stack, params, level)


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    own = "own unit's past (eligibility), also by the units it talks to"
    return dict.fromkeys(params, own) | around_cells(stack, params)
