"""Linear networks of the library, trained by its own rules: what the theory is held against.

Letters: M modes or single-unit networks, N units, I inputs, O outputs, E examples, T time steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import localgrad
from localgrad import theory


class Case(NamedTuple):
    """A rule of the library beside the same rule of the theory.

    Attributes:
        name: `"bptt"`, `"tbptt"` (one step), `"tbptt3"`, `"rflo"`, `"eprop"` or `"snap"`.
        label: its name in tables and figures.
        r: feedback strength of each mode, for RFLO.
        rho: decay of the traces of RFLO, e-prop and SnAp-1.
    """

    name: str
    label: str
    r: Any = None
    rho: Any = 0.0

    @property
    def mode_rule(self) -> theory.ModeRule:
        """The rule as a mode sees it; not of e-prop and SnAp-1."""
        if self.name == "rflo":
            return theory.rflo(self.r, self.rho)
        return theory.bptt() if self.name == "bptt" else theory.tbptt(self.horizon)

    @property
    def horizon(self) -> int:
        """How far truncated BPTT looks back."""
        return int(self.name.removeprefix("tbptt") or 1)

    @property
    def alpha(self) -> float:
        """The leak of the units whose traces decay by rho."""
        return 1 - self.rho


BPTT = Case("bptt", "BPTT")
TBPTT = Case("tbptt", "TBPTT(1)")


def rflo(r: Any, rho: Any) -> Case:
    """RFLO with this feedback and trace decay."""
    return Case("rflo", "RFLO", r, rho)


def draw_teacher(rng: np.random.Generator) -> theory.Modes:
    """A teacher of one mode whose responses fade within 32 steps."""
    return theory.Modes(rng.uniform(0.95, 1.35), rng.uniform(0.5, 0.75), 1.0)


def half_square(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the squared error of one step, [B]."""
    return 0.5 * jnp.square(outputs - targets).sum(-1)


def make_rule(
    case: Case, units: int, outputs: int, feedback: Any = None, activation: Any = None
) -> localgrad.LearningRule:
    """The library's rule on a rate network with readout, in float64, losses summed.

    Args:
        case: which rule.
        units: N.
        outputs: O.
        feedback: R [O, N], for RFLO.
        activation: of the units, linear if None.

    Returns:
        The rule.
    """
    cell = localgrad.RateCell(
        units, alpha=case.alpha, activation=activation or (lambda u: u), param_dtype=jnp.float64
    )
    readout = nn.Dense(outputs, use_bias=False, param_dtype=jnp.float64)
    model = localgrad.Network((cell,), readout)
    if case.name == "rflo":
        return localgrad.rflo(model, half_square, feedback=feedback.T, reduction="sum")
    if case.name.startswith("tbptt"):
        return localgrad.tbptt(model, half_square, horizon=case.horizon, reduction="sum")
    return getattr(localgrad, case.name)(model, half_square, reduction="sum")


def full_batch(inputs: jax.Array, targets: jax.Array, loss: str = "final") -> localgrad.Batch:
    """All sequences [E, T, ...] as one batch, whose summed loss is the mean over sequences."""
    examples, steps = inputs.shape[:2]
    weight = np.full((examples, steps), 1 / (examples * steps))
    if loss == "final":
        weight = np.tile(np.arange(steps) == steps - 1, (examples, 1)) / examples
    return localgrad.Batch(inputs, targets, mask=jnp.asarray(weight))


def downhill(
    rule: localgrad.LearningRule, alpha: float, batch: localgrad.Batch
) -> Callable[[theory.Weights], tuple[theory.Weights, jax.Array]]:
    """The direction to subtract from the weights of the network without leak, and the loss.

    Units that leak alpha with weights `(W - (1 - alpha) 1)/alpha` and `B/alpha` are units without
    leak with weights W and B.

    Args:
        rule: of the network with leak.
        alpha: its leak.
        batch: what it learns from.

    Returns:
        `weights -> (direction, loss)`.
    """

    def found(weights: theory.Weights) -> tuple[theory.Weights, jax.Array]:
        eye = jnp.eye(len(weights.W))
        recurrent = (weights.W - (1 - alpha) * eye) / alpha
        leaky = theory.Weights(weights.A, recurrent, weights.B / alpha)
        params = theory.to_params(leaky)
        updates, state = rule(params, rule.init(params), batch)
        down = theory.from_params(updates)
        return theory.Weights(down.A, down.W / alpha, down.B / alpha), state.loss

    return found


def descend(
    down: Callable[[Any], tuple[Any, jax.Array]], weights: Any, eta: float, steps: int
) -> tuple[Any, jax.Array]:
    """Plain gradient steps.

    Args:
        down: `weights -> (direction, loss)`.
        weights: where to start.
        eta: the learning rate.
        steps: how many.

    Returns:
        The weights after each step, leaves [steps + 1, ...], and the loss before each, [steps].
    """

    def step(weights: Any, _: None) -> tuple[Any, tuple]:
        direction, loss = down(weights)
        new = jax.tree.map(lambda v, d: v - eta * d, weights, direction)
        return new, (new, loss)

    @jax.jit
    def run(weights: Any) -> tuple[Any, jax.Array]:
        return jax.lax.scan(step, weights, length=steps)[1]

    after, losses = run(weights)
    joined = jax.tree.map(lambda v, more: jnp.concatenate([v[None], more]), weights, after)
    return joined, losses


def single_units(
    case: Case, start: theory.Modes, teacher: theory.Modes | None, times: Any, **options: Any
) -> theory.Modes:
    """Gradient flow of M networks of one unit each, its velocity made by the library's rule.

    Args:
        case: which rule; r may differ between networks.
        start: strengths [M] each.
        teacher: strengths, numbers or [M]; or None with `target` among the options.
        times: [K].
        **options: `steps` T (32), `target` [M, T] or [T], `tolerance` of the integration (1e-9),
            `seed` of the inputs (0).

    Returns:
        The modes at each time, [K, M].
    """
    steps = options.get("steps", 32)
    inputs = theory.white_inputs(jax.random.key(options.get("seed", 0)), steps + 1, steps, 1)
    target = options.get("target")
    if target is None:
        if teacher is None:
            raise ValueError("give a teacher or a target.")
        target = theory.realisable(teacher, steps).target
    count = len(np.atleast_1d(start.a))
    target = np.broadcast_to(target, (count, np.shape(target)[-1]))
    r = np.broadcast_to(1.0 if case.r is None else case.r, (count,))
    one = theory.Bases(*(jnp.eye(1, dtype=jnp.float64),) * 3)

    def velocity(at: theory.Modes) -> theory.Modes:
        def alone(modes: theory.Modes, target: jax.Array, r: jax.Array) -> theory.Modes:
            outputs = theory.lagged_targets(inputs, target[None], one)
            rule = make_rule(case, 1, 1, r.reshape(1, 1))
            weights = theory.Weights(*(jnp.reshape(v, (1, 1)) for v in (modes.a, modes.w, modes.b)))
            direction, _ = downhill(rule, case.alpha, full_batch(inputs, outputs))(weights)
            return theory.Modes(*(-d.reshape(()) for d in direction))

        return jax.vmap(alone)(at, jnp.asarray(target), jnp.asarray(r))

    start = theory.Modes(*(jnp.broadcast_to(jnp.asarray(v, jnp.float64), (count,)) for v in start))
    tolerance = options.get("tolerance", 1e-9)
    found, _ = theory.solve(velocity, start, times, rtol=tolerance, atol=1e-2 * tolerance)
    return found
