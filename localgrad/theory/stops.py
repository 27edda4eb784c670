"""Where a rule stops on any task of one mode, and how far that is from least squares."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq, minimize_scalar

from localgrad.core.contract.checks import positive_integer
from localgrad.theory.modes import (
    Endless,
    ModeRule,
    Modes,
    Task,
    bptt,
    descent,
    loss,
    require_rule,
    require_task,
    rflo,
)
from localgrad.theory.stationary import jacobian, verdict
from localgrad.theory.values import float64, powers, require_not_zero, require_one

NOTHING = 1e-10
"""Products a b below this part of the largest target are zeros, but for rounding."""


class Stop(NamedTuple):
    """A stationary point of a task, and what becomes of a small displacement from it.

    Attributes:
        w: recurrent strength.
        p: product `a b`.
        loss: there.
        s: readout a at which `kind` was found; b is p/s.
        kind: of `Verdict`: stable, a saddle, unstable, which is a source, or degenerate.

    Example:
        >>> from localgrad import theory
        >>> task = theory.realisable(theory.Modes(1.0, 0.5, 1.0), steps=4)
        >>> theory.stationary_points(theory.bptt(), task)[0].kind
        'stable node'
    """

    w: float
    p: float
    loss: float
    s: float
    kind: str


class BestDecay(NamedTuple):
    """The decay of RFLO's traces that leaves the least bias.

    Attributes:
        decay: rho; leaky units have it if they leak `1 - rho`.
        loss: where RFLO then stops, summed over modes.
        least: where BPTT stops.

    Example:
        >>> from localgrad import theory
        >>> task = theory.realisable(theory.Modes(1.0, 0.5, 1.0), steps=4)
        >>> round(theory.suggest_decay(task).decay, 6)
        0.5
    """

    decay: float
    loss: float
    least: float


def stationary_points(
    rule: ModeRule, task: Task, *, s: float | None = None, resolution: int = 4001
) -> list[Stop]:
    """Where a rule stops on any task of one mode, also one that no mode can realise, `|w| < 1`.

    The conditions, with `E(z) = sum_l omega_l z^l e_l`::

        bptt       E(w) = E'(w) = 0                                   least squares
        tbptt(1)   a b = target_0,  sum_{l>0} omega_l w^(l-1) e_l = 0   lag 0 exactly
        rflo       E(w) = E(rho) = 0                                  r does not matter

    At each of them a and b are free but for `a b = p`, and whether the flow stays there, by the
    eigenvalues of its Jacobian, may depend on a, and for RFLO on r. Left out is where a or b is
    zero: the saddle `a = b = 0` of BPTT and truncated BPTT; `b = 0`, any a and w, of RFLO if
    `sum_l omega_l rho^l target_l = 0`, where it learns nothing; and `E(w) = 0` with one of a, b
    zero. Found are changes of sign, so no double roots.

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)`.
        task: target [L].
        s: readout a at which each point is judged; None takes `sqrt(|p|)`, for RFLO with the sign
            of r.
        resolution: points of the grid on which sign changes are sought.

    Returns:
        The points, at least one: first those that are stable, then the others, each by rising loss.

    Raises:
        ValueError: where there is none; for `tbptt(K > 1)`: three conditions for two unknowns, no
            point in general; for an `Endless` task, more than one mode, one lag alone, where any w
            will do, a target that is not finite, s or RFLO's feedback of 0, or a resolution that
            is no positive integer.

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> delay = theory.Task(np.eye(200)[1], theory.lag_weights(200))  # y_t = x_{t-1}
        >>> best = theory.stationary_points(theory.bptt(), delay)[0]
        >>> round(abs(best.w), 4), round(best.loss, 4)  # w and -w do equally well
        (0.7071, 0.375)
    """
    require_rule(rule)
    require_task(task)
    if rule.name == "tbptt" and rule.horizon != 1:
        raise ValueError(
            f"tbptt with a horizon of {rule.horizon} has no stationary point in general: three "
            "conditions for two unknowns. Integrate its flow instead."
        )
    if isinstance(task, Endless) or np.ndim(task.target) != 1 or len(task.target) < 2:
        raise ValueError(
            "task must be a Task of one mode with a target [L] of at least two lags; got "
            f"{type(task).__name__} {np.shape(getattr(task, 'target', ()))}. Endless: see optimum."
        )
    resolution = positive_integer("resolution", resolution)
    if rule.name == "rflo":
        require_one(feedback=rule.gain, decay=rule.decay)
        require_not_zero("feedback", rule.gain, "Without it RFLO trains the readout alone.")
    if s is not None:
        require_one(s=s)
        require_not_zero("s", s, "Where a or b is 0, p is 0.")
    found = _stops(rule, task, s, resolution)
    if not found:
        reason = "where a b = 0, nothing learned, or |w| >= 1 is not listed, nor are double roots"
        if rule.name == "tbptt" and float(task.target[0]) == 0:
            reason = "it fits lag 0 exactly, whose target is 0, so that a b = 0: nothing is learned"
        raise ValueError(f"{rule.name} stops nowhere with |w| < 1 on this task: {reason}.")
    return found


def _stops(rule: ModeRule, task: Task, s: float | None, resolution: int) -> list[Stop]:
    """`stationary_points`, or none."""
    task = Task(*float64(*task))
    if rule.name == "tbptt" and task.target[0] == 0:
        return []
    decay = None if rule.decay is None else float64(rule.decay)

    def at(w: float) -> float:
        return float(_condition(rule.name, decay, float64(w), task)[0])

    inner = np.linspace(-1, 1, resolution + 2)[1:-1] + 1e-4 / (np.pi * resolution)  # no round w
    grid = np.concatenate([[-1.0], inner, [1.0]])
    nothing = NOTHING * float(np.abs(task.target).max())
    values = np.asarray(_condition(rule.name, decay, float64(grid), task)[0])
    found = []
    for k in np.flatnonzero(values[:-1] * values[1:] < 0):
        w = float(brentq(at, grid[k], grid[k + 1], xtol=1e-15, rtol=1e-14))
        p = float(_condition(rule.name, decay, float64(w), task)[1])
        if abs(p) <= nothing:
            continue
        a = s if s is not None else np.sqrt(abs(p))
        if s is None and rule.name == "rflo":
            a *= np.sign(float(rule.gain))
        point = Modes(float(a), w, p / float(a))
        kind = verdict(jacobian(rule, point, task)).kind
        found.append(Stop(w, p, float(loss(point, task)), point.a, kind))
    return sorted(found, key=lambda stop: (not stop.kind.startswith("stable"), stop.loss))


@functools.partial(jax.jit, static_argnames="name")
def _condition(name: str, decay: Any, w: jax.Array, task: Task) -> tuple[jax.Array, jax.Array]:
    """What is zero at a stop, and the product p that goes with each w: E(w) = 0, or target_0."""
    steps = task.target.shape[-1]
    lags, shape = powers(w, steps), (*w.shape, steps)
    target, weight = (jnp.broadcast_to(v, shape) for v in task)
    product = (weight * lags * target).sum(-1) / (weight * lags**2).sum(-1)
    if name == "tbptt":
        product = target[..., 0]
    plain = ModeRule(name, 1.0, decay, 1 if name == "tbptt" else None)
    return descent(plain, Modes(product, w, jnp.ones(())), task).w, product


def suggest_decay(task: Task, *, resolution: int = 1001) -> BestDecay:
    """The decay of RFLO's traces with which it stops nearest to least squares, in [0, 1).

    RFLO's traces see the errors of past inputs only as far as `rho^l` reaches, so that its solution
    is another than BPTT's where the modes cannot realise their targets; of one mode it is the same
    if rho is BPTT's w, where that is a decay. Several modes share one rho, whose losses it trades.

    Args:
        task: target [L], or [M, L] of M modes.
        resolution: points of the grid of w on which stops are sought.

    Returns:
        The decay, RFLO's loss and BPTT's. Where all decays do equally well, as on tasks that the
        modes can realise, it is the first of the modes' own w in [0, 1), or 0 if none is there.

    Raises:
        ValueError: if BPTT stops nowhere with `|w| < 1`, or RFLO with no decay; else as
            `stationary_points`.

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> delay = theory.Task(np.eye(60)[1], theory.lag_weights(60))  # y_t = x_{t-1}
        >>> found = theory.suggest_decay(delay)
        >>> round(found.decay, 4), round(found.loss - found.least, 6)
        (0.7071, 0.0)
    """
    if isinstance(task, Endless):
        raise ValueError("task must be a Task; got Endless, on which no decay is biased.")
    require_task(task)
    modes = [Task(row, task.weight) for row in np.atleast_2d(task.target)]
    full = [stationary_points(bptt(), mode, resolution=resolution) for mode in modes]

    def lost(decay: float) -> float:
        stops = [_stops(rflo(1.0, decay), mode, None, resolution) for mode in modes]
        stable = [[one.loss for one in some if one.kind.startswith("stable")] for some in stops]
        return sum(min(losses, default=np.inf) for losses in stable)

    own = [stop.w for stops in full for stop in stops if 0 <= stop.w < 1]
    tried = np.array([*own, *np.linspace(0, 0.99, 34)])
    losses = np.array([lost(decay) for decay in tried])
    if not np.isfinite(losses).any():
        raise ValueError("RFLO stops nowhere with |w| < 1 on this task, whatever its decay.")
    size = 1e-12 * float(np.square(task.target).sum())
    best = int(np.argmax(losses <= losses.min() + size))
    decay, least = float(tried[best]), sum(stops[0].loss for stops in full)
    if losses[best] > least + size:
        order = np.sort(tried)
        near = order[order < decay][-1:], order[order > decay][:1]
        bounds = [float(one[0]) if len(one) else decay for one in near]
        finer = minimize_scalar(lost, bounds=bounds, method="bounded", options={"xatol": 1e-9})
        if finer.fun < losses[best]:
            return BestDecay(float(finer.x), float(finer.fun), least)
    return BestDecay(decay, float(losses[best]), least)
