"""Firing rates held to a target: a learning signal of every unit's own, beside the task's.

Letters: B batch, W steps of the window, T steps of the call, N units.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves
from localgrad.core.passes.forward import Tape
from localgrad.core.steps import length, select

DefaultWindow = Callable[[Stack, Leaves, int, bool], int]


class FiringRate(NamedTuple):
    r"""A rate that the units of `eprop`, `deep_eprop` and `snap` are held to, beside their task.

    The objective of a call gains a term for each unit j of each cell, with `z_t` its output and
    `f` the mean of that over the B examples and T steps of the call::

        cost / 2 sum_j (f_j - target)^2            and so dL/dz_t gains cost (f - target) / (B T)

    That is one more learning signal of every output, which the rule credits as it credits all
    others: from a cell to those below it too, unless each has feedback weights of its own. As f is
    known at the end only, the call must be one window, and memory grows with T.

    With a `decay`, a running mean of each example takes the place of f. It looks at the past alone,
    and the state carries it, so that windows and calls may be short::

        r_t = decay r_{t-1} + (1 - decay) z_t            r = target before a sequence's first step
        the learning signal of z_t gains cost (r_t - target) / (B T)

    That one is no gradient: what an output adds to later r is not credited to it.

    `reduction="sum"` leaves out the division by B T. `Batch.mask` weights the task's losses; a rate
    counts every step. So under the mean the task is divided by the weight of this call's steps and
    the rate by all of them: where few steps are scored, calls that are cut shorter shift the
    balance, and `cost` belongs to a length of calls. Without a decay, a stream's rate is that of
    each call by itself, be it one step. The loss that a rule reports is the task's alone. Readouts
    learn the task alone, and so does the last cell of a model without a readout (an LSNN's
    `LeakyCell`), whose outputs are the model's.

    Attributes:
        target: the rate aimed at, 0 or more: outputs (spikes) a step.
        cost: what the deviation costs beside the task's loss, > 0.
        decay: None for the rate of the call, or that of the running mean, in (0, 1). With a time
            constant tau and a step dt, it is exp(-dt / tau).

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((localgrad.LIFCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> sparse = localgrad.FiringRate(0.02, cost=0.5, decay=0.99)
        >>> rule = localgrad.eprop(model, optax.l2_loss, firing_rate=sparse, batch_size=4)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.excess["cells_0"].shape  # r - target, [B, N]
        (4, 8)

    Reference:
        Bellec, Scherr, Subramoney, Hajek, Salaj, Legenstein and Maass, "A solution to the learning
        dilemma for recurrent networks of spiking neurons", Nature Communications, 2020,
        https://doi.org/10.1038/s41467-020-17236-y
    """

    target: float
    cost: float = 1.0
    decay: float | None = None


def require_rate(firing_rate: Any) -> FiringRate | None:
    """Raises for a firing rate that no unit can be held to; returns it in plain numbers."""
    if firing_rate is None:
        return None
    if not isinstance(firing_rate, FiringRate):
        raise ValueError(
            f"firing_rate must be a localgrad.FiringRate(target) or None; got {firing_rate!r}."
        )
    target, cost, decay = firing_rate
    if not (isinstance(target, Real) and 0 <= target < np.inf):
        raise ValueError(
            f"the target of FiringRate must be a Python number, finite and 0 or more; got "
            f"{target!r}. It is the mean output of a unit: spikes a step."
        )
    if not (isinstance(cost, Real) and 0 < cost < np.inf):
        raise ValueError(
            f"the cost of FiringRate must be a Python number, finite and > 0; got {cost!r}. Use "
            "firing_rate=None for none."
        )
    if decay is not None and not (isinstance(decay, Real) and 0 < decay < 1):
        raise ValueError(
            f"the decay of FiringRate must be None, for the rate of a call, or lie in (0, 1); got "
            f"{decay!r}. With a time constant tau and a step dt, it is exp(-dt / tau)."
        )
    return FiringRate(float(target), float(cost), None if decay is None else float(decay))


def rate_settings(firing_rate: FiringRate | None) -> dict[str, Any]:
    """What a rule says of the rate its units are held to."""
    return {} if firing_rate is None else {"firing_rate": firing_rate}


def window_of_rates(firing_rate: FiringRate | None, otherwise: DefaultWindow) -> DefaultWindow:
    """A recipe's default window: the whole call, where a rate is that of the call."""
    if firing_rate is None or firing_rate.decay is not None:
        return otherwise
    return lambda stack, params, steps, alone: steps


def no_excess(rule: str, firing_rate: FiringRate | None, stack: Stack) -> dict[str, Any]:
    """The field of a state that holds running means, less their target: zero at a start."""
    if firing_rate is None:
        return {}
    levels = _held(rule, stack)
    if firing_rate.decay is None:
        return {}
    return {"excess": {stack.name(level): _blank(stack, level) for level in levels}}


def rate_signals(
    rule: str,
    firing_rate: FiringRate | None,
    stack: Stack,
    tapes: list[Tape],
    state: Any,
    steps: int,
    share: float,
) -> tuple[dict[str, jax.Array], Any]:
    """What rates add to the learning signal of a window's outputs.

    Args:
        rule: its name, for messages.
        firing_rate: what each unit is held to, or None.
        stack: the model, taken apart.
        tapes: of the forward pass, one a cell.
        state: of the rule before the window; its `excess` holds, by cell, running means less their
            target, [B, N], or is None.
        steps: T.
        share: what a step of an example counts in a mean over the call.

    Returns:
        By cell [W, B, N], none without a firing rate; and the state with the excess after it.
    """
    if firing_rate is None:
        return {}, state
    target, cost, decay = firing_rate
    signals, after = {}, {}
    for level in _held(rule, stack):
        name, tape = stack.name(level), tapes[level]
        ys = _units(rule, stack, level, tape)
        above = ys.astype(jnp.promote_types(ys.dtype, jnp.float32)) - target
        if decay is None:
            _require_whole(rule, length(ys), steps)
            above = jnp.broadcast_to(above.mean((0, 1), keepdims=True), above.shape)
        else:
            after[name], above = _running(decay, state.excess[name], above, tape.reset)
        signals[name] = (cost * share * above).astype(ys.dtype)
    return signals, state if decay is None else state._replace(excess=after)


def _held(rule: str, stack: Stack) -> range:
    """The levels of the cells that are held to a rate: those whose outputs are not the model's."""
    levels = stack.levels if stack.readout is not None else stack.levels[:-1]
    if not levels:
        raise ValueError(
            f"{rule}: firing_rate holds the cells below a readout to a rate, but this model is one "
            "cell whose outputs are the model's. Wrap it: localgrad.Network((cell,), "
            "readout=nn.Dense(O)) (NNX: localgrad.NNXNetwork)."
        )
    return levels


def _blank(stack: Stack, level: int) -> jax.Array:
    carry = jax.tree.leaves(stack.initial[level])[0]
    return jnp.zeros(carry.shape, jnp.promote_types(carry.dtype, jnp.float32))


def _units(rule: str, stack: Stack, level: int, tape: Tape) -> jax.Array:
    """A cell's outputs, [W, B, N]; raises for others."""
    shapes, wanted = jax.tree.map(jnp.shape, tape.ys), jax.tree.leaves(tape.carries)[0].shape
    if shapes != wanted:
        raise ValueError(
            f"{rule}: firing_rate holds each unit's output to a rate, one number a unit, {wanted}, "
            f"but the outputs of {stack.name(level)} have shapes {shapes}. Use a cell whose output "
            "is its units, or firing_rate=None."
        )
    return tape.ys


def _require_whole(rule: str, window: int, steps: int) -> None:
    if window < steps:
        raise ValueError(
            f"{rule}: FiringRate(decay=None) takes the rate of a whole call, here T = {steps} "
            f"steps, which must be one window; got window={window}. Leave out window, or use "
            "FiringRate(decay=...), whose running mean passes from window to window."
        )


def _running(
    decay: float, before: jax.Array, above: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """A running mean [B, N] after a window, and at each of its steps, [W, B, N]."""

    def step(mean: jax.Array, now: tuple) -> tuple[jax.Array, jax.Array]:
        value, reset_t = now
        if reset_t is not None:
            mean = select(reset_t, jnp.zeros_like(mean), mean)
        mean = decay * mean + (1 - decay) * value
        return mean, mean

    return jax.lax.scan(step, before, (above.astype(before.dtype), reset))
