"""Where the flows stop, whether they stay there, how fast they arrive, and at which point.

All rules share the optimal manifold of a realisable teacher, the curve `(s, p*/s, w*)` over s,
with `p* = a* b*`. BPTT and truncated BPTT also stop at `a = b = 0`, any w, a saddle; RFLO does not.
Local rules are biased only where one mode cannot realise its targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq

from localgrad.theory.invariants import conserved
from localgrad.theory.modes import (
    ALIKE,
    Endless,
    ModeRule,
    Modes,
    Task,
    descent,
    float64,
    loss,
    powers,
)


class Verdict(NamedTuple):
    """What becomes of a small displacement from a stationary point.

    Attributes:
        kind: `"stable node"`, `"stable spiral"`, `"saddle"`, `"unstable node"`,
            `"unstable spiral"`, `"centre"` or `"degenerate"`.
        rates: eigenvalues of the Jacobian but the neutral ones, fastest growth first.
    """

    kind: str
    rates: np.ndarray


class Endpoint(NamedTuple):
    """Which point `(s, p*/s, w*)` of the optimal manifold a flow ends at.

    Attributes:
        s: the prediction; 0 if the flow ends in the saddle `a = b = 0`, NaN if the conserved
            quantity does not tell which of the candidates it is.
        candidates: every s that the conserved quantity allows.
    """

    s: float
    candidates: np.ndarray


class Stop(NamedTuple):
    """A stationary point of a task: recurrent strength w, product `p = a b`, and its loss."""

    w: float
    p: float
    loss: float


class Limits(NamedTuple):
    """Feedback strengths r at which RFLO's point `(s, p*/s, w*)` changes its stability.

    Attributes:
        saddle_node: `r s^3 = -p*^2`: a saddle from here to r = 0.
        hopf: where tau changes its sign. If `|hopf| > |saddle_node|`, the point is stable between
            the two; outwards of both it is an unstable spiral or node.
    """

    saddle_node: jax.Array
    hopf: jax.Array


def optimum(s: Any, teacher: Modes) -> Modes:
    """The point of the optimal manifold with readout s: `(s, p*/s, w*)`.

    Args:
        s: readout strength, not zero, [...].
        teacher: the strengths to be learned, [...].

    Returns:
        The modes.

    Example:
        >>> from localgrad import theory
        >>> theory.optimum(2.0, theory.Modes(a=1.0, w=0.5, b=1.0))
        Modes(a=2.0, w=0.5, b=0.5)
    """
    return Modes(s, teacher.w, teacher.a * teacher.b / s)


def jacobian(rule: ModeRule, point: Modes, task: Task | Endless, rates: Modes = ALIKE) -> jax.Array:
    """The Jacobian of one mode's gradient flow, in the order a, w, b.

    Args:
        rule: `bptt()`, `tbptt(K)` or `rflo(r, rho)`.
        point: the strengths, numbers.
        task: what is learned.
        rates: learning rates of a, w and b.

    Returns:
        [3, 3].

    Example:
        >>> from localgrad import theory
        >>> teacher = theory.Modes(1.0, 0.5, 1.0)
        >>> theory.jacobian(theory.bptt(), teacher, theory.Endless(teacher)).shape
        (3, 3)
    """

    def velocity(point: jax.Array) -> jax.Array:
        moved = descent(rule, Modes(*point), task)
        return -jnp.stack([r * d for r, d in zip(rates, moved, strict=True)])

    return jax.jacfwd(velocity)(jnp.stack(float64(*point)))


def verdict(jacobian: Any, *, rtol: float = 1e-6) -> Verdict:
    """What kind of stationary point a Jacobian tells of.

    Args:
        jacobian: [n, n].
        rtol: eigenvalues below this part of the largest count as neutral, and are left out: every
            stationary point of these flows lies on a curve of others. At a saddle-node two are, and
            such a pair is told apart only to the root of the rounding.

    Returns:
        The verdict.

    Example:
        >>> from localgrad import theory
        >>> teacher = theory.Modes(1.0, 0.5, 1.0)
        >>> theory.verdict(theory.jacobian(theory.bptt(), teacher, theory.Endless(teacher))).kind
        'stable node'
    """
    found = np.linalg.eigvals(np.asarray(jacobian, np.float64))
    size = np.abs(found).max()
    kept = found[np.abs(found) > rtol * size]
    kept = kept[np.argsort(-kept.real)]
    turns = bool(np.any(np.abs(kept.imag) > rtol * size))
    grows, fades = (bool(np.any(sign * kept.real > rtol * size)) for sign in (1, -1))
    if not kept.size:
        kind = "degenerate"
    elif grows and fades:
        kind = "saddle"
    elif grows or fades:
        kind = f"{'unstable' if grows else 'stable'} {'spiral' if turns else 'node'}"
    else:
        kind = "centre"
    return Verdict(kind, kept if turns else kept.real)


def characteristic(rule: ModeRule, s: Any, teacher: Modes) -> tuple[jax.Array, jax.Array]:
    """Coefficients of `lambda^2 + tau lambda + D` at a point of the optimal manifold, T = infinity.

    The third eigenvalue is zero, along the manifold. With `q = 1 - w*^2`, `k = 1 - rho w*`,
    `b = p*/s` and `sigma = r s`::

        bptt       tau = (s^2 + b^2)/q + p*^2 (1 + w*^2)/q^3          D = p*^2 (s^2 + b^2)/q^4
        tbptt(1)   tau = b^2/q + s^2 + p*^2/q^2                       D = p*^2 (s^2 + b^2)/q^2
        rflo       tau = b^2/q + sigma/k + sigma b^2 (1 - rho w*^3)/(q k)^2
                   D = sigma b^2 (b^2 + sigma)/(q k)^2

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)`; for other horizons use `jacobian`.
        s: readout strength, [...].
        teacher: the strengths to be learned.

    Returns:
        tau and D, [...].

    Raises:
        ValueError: for `tbptt(K > 1)`.

    Example:
        >>> from localgrad import theory
        >>> tau, det = theory.characteristic(theory.bptt(), 1.0, theory.Modes(1.0, 0.0, 1.0))
        >>> float(tau), float(det)
        (3.0, 2.0)
    """
    s, a_star, w, b_star = float64(s, *teacher)
    p = a_star * b_star
    b2, q = (p / s) ** 2, 1 - w**2
    both = s**2 + b2
    if rule.name == "bptt":
        return both / q + p**2 * (1 + w**2) / q**3, p**2 * both / q**4
    if rule.name == "rflo":
        gain, decay = float64(rule.gain, rule.decay)
        k, sigma = 1 - decay * w, gain * s
        tau = b2 / q + sigma / k + sigma * b2 * (1 - decay * w**3) / (q * k) ** 2
        return tau, sigma * b2 * (b2 + sigma) / (q * k) ** 2
    if rule.horizon != 1:
        raise ValueError(
            f"the closed form holds for tbptt(1), bptt() and rflo(r, rho); got a horizon of "
            f"{rule.horizon}. Take verdict(jacobian(rule, optimum(s, teacher), task)) instead."
        )
    return b2 / q + s**2 + p**2 / q**2, p**2 * both / q**2


def convergence_rate(rule: ModeRule, s: Any, teacher: Modes) -> jax.Array:
    """How fast the slower direction returns to `(s, p*/s, w*)`: minus its eigenvalue's real part.

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)`.
        s: readout strength, [...].
        teacher: the strengths to be learned.

    Returns:
        [...], in units of the learning rate; negative where the point is unstable.

    Example:
        >>> from localgrad import theory
        >>> float(theory.convergence_rate(theory.bptt(), 1.0, theory.Modes(1.0, 0.0, 1.0)))
        1.0
    """
    tau, det = characteristic(rule, s, teacher)
    split = jnp.maximum(tau**2 - 4 * det, 0)
    root = jnp.sqrt(split)
    # Where tau > 0 the difference tau - root would cancel.
    safe = jnp.where(tau > 0, tau + root, 1.0)
    return jnp.where((tau > 0) & (split > 0), 2 * det / safe, (tau - root) / 2)


def limits(s: Any, decay: Any, teacher: Modes) -> Limits:
    """Feedback strengths at which RFLO's optimal point changes its stability, T = infinity.

    Where r and s have the same sign the point is stable. Else, with `sigma = r s`: a saddle as far
    as `sigma = -b^2`; beyond it unstable, but for a window up to the Hopf point
    `sigma = -(b^2/q) / (1/k + b^2 (1 - rho w*^3)/(q k)^2)`, if that lies further out.

    Args:
        s: readout strength, [...].
        decay: rho.
        teacher: the strengths to be learned.

    Returns:
        The two feedback strengths.

    Example:
        >>> from localgrad import theory
        >>> found = theory.limits(1.0, 0.2, theory.Modes(a=0.3, w=0.8, b=1.0))
        >>> [round(float(r), 4) for r in found]
        [-0.09, -0.1205]
    """
    s, decay, a_star, w, b_star = float64(s, decay, *teacher)
    b2, q, k = (a_star * b_star / s) ** 2, 1 - w**2, 1 - decay * w
    far = (b2 / q) / (1 / k + b2 * (1 - decay * w**3) / (q * k) ** 2)
    return Limits(-b2 / s, -far / s)


def endpoint(rule: ModeRule, start: Modes, teacher: Modes) -> Endpoint:
    """Which point of the optimal manifold a flow ends at, from what it conserves.

    The equations, with C the conserved quantity at the start::

        bptt       s^2 = (C + sqrt(C^2 + 4 p*^2))/2
        tbptt(1)   the same with C + w*^2
        rflo       2 r s^3 + k s^2 - p*^2 = 0        k = C - (w* - rho)^2

    RFLO ends at the one root of the sign of r, unless a point of the other sign is stable too (the
    window of `limits`): then the branch is not told. A flow of BPTT keeps the sign of the larger of
    its strengths a and b; started from `|a| = |b|` with the wrong sign of `a b` it ends in the
    saddle. One-step truncated BPTT keeps the sign of a if `a^2 > b^2 + w^2`; else its branch is not
    told.

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)`, r not 0.
        start: the strengths at the start, numbers; learning rates are alike.
        teacher: the strengths to be learned, with `a* b*` not 0.

    Returns:
        The endpoint. That flows do arrive is an observation for RFLO (on sequences without end they
        may leave `|w| < 1` before), not a theorem.

    Raises:
        ValueError: for `tbptt(K > 1)`, which conserves nothing that is known, and if r or `a* b*`
            is zero.

    Example:
        >>> from localgrad import theory
        >>> rule = theory.rflo(feedback=-1.0, decay=0.5)
        >>> start = theory.Modes(a=1.0, w=0.6, b=1.0)
        >>> round(float(theory.endpoint(rule, start, theory.Modes(1.0, 0.8, 1.0)).s), 4)
        -0.5045
    """
    c = float(conserved(rule, start))
    p, w = float(teacher.a * teacher.b), float(teacher.w)
    if p == 0 or (rule.name == "rflo" and float(rule.gain) == 0):
        raise ValueError(
            f"a* b* of the teacher and RFLO's feedback must not be zero; got a* b* = {p}, feedback "
            f"{rule.gain}. Without them no single point of the optimal manifold is selected."
        )
    if rule.name == "rflo":
        gain, decay = float(rule.gain), float(rule.decay)
        roots = np.roots([2 * gain, c - (w - decay) ** 2, 0.0, -(p**2)])
        real = np.sort(roots[np.abs(roots.imag) < 1e-9 * np.abs(roots)].real)
        tau, det = characteristic(rule, real, teacher)
        rivals = (real * gain < 0) & np.asarray((tau > 0) & (det > 0))
        return Endpoint(float("nan") if rivals.any() else float(real[real * gain > 0][0]), real)
    level = c if rule.name == "bptt" else c + w**2
    size = float(np.sqrt((level + np.hypot(level, 2 * p)) / 2))
    a, b = float(start.a), float(start.b)
    if rule.name == "tbptt":
        sign = np.sign(a) if c > 0 else 0.0 if a == b == 0 else np.nan
    elif c != 0:
        sign = np.sign(a) if c > 0 else np.sign(p * b)
    else:
        sign = np.sign(a) if a * b * p > 0 else 0.0
    return Endpoint(float(sign * size), np.array([-size, size]))


def plateau(rule: ModeRule, scale: float, teacher: Modes) -> float:
    """About how long learning takes to begin from `a = b = scale`, w = 0, to leading order.

    BPTT and truncated BPTT leave the saddle at rate `p*`, after `ln(1/scale)/p*`, up to a constant.
    If `p* < 0`, a start with a = b has the wrong sign: BPTT never leaves, one-step truncated BPTT
    after three times as long, `3 ln(1/scale)/|p*|`. RFLO has no plateau: `(2/(r S)^2)^(1/3)` with
    `S = p*/(1 - rho w*)`, at any scale.

    Args:
        rule: `bptt()`, `tbptt(K)` or `rflo(r, rho)`; K of 1 only if `p* < 0`.
        scale: of the initial strengths, in (0, 1).
        teacher: the strengths to be learned.

    Returns:
        A time; infinity if learning never begins.

    Raises:
        ValueError: for a scale outside (0, 1), and for `tbptt(K > 1)` with `p* < 0`.

    Example:
        >>> from localgrad import theory
        >>> theory.plateau(theory.bptt(), 1e-3, theory.Modes(1.0, 0.7, 1.0))
        6.9
    """
    p, w = float(teacher.a * teacher.b), float(teacher.w)
    if not 0 < scale < 1:
        raise ValueError(f"scale must lie inside (0, 1); got {scale!r}.")
    if p == 0 or (rule.name == "rflo" and float(rule.gain) == 0):
        return float("inf")
    if p < 0 and rule.name == "bptt":
        return float("inf")
    if p < 0 and rule.name == "tbptt":
        if rule.horizon != 1:
            raise ValueError(
                f"how long tbptt with a horizon of {rule.horizon} stays at the wrong sign of a b "
                "is not known; integrate its flow."
            )
        return float(3 * np.log(1 / scale) / abs(p))
    if rule.name == "rflo":
        drive = float(rule.gain) * p / (1 - float(rule.decay) * w)
        return float((2 / drive**2) ** (1 / 3))
    return float(np.log(1 / scale) / abs(p))


def stationary_points(rule: ModeRule, task: Task, *, resolution: int = 4001) -> list[Stop]:
    """Where a rule stops on any task of one mode, also one that no mode can realise, `|w| < 1`.

    The conditions, with `E(z) = sum_l omega_l z^l e_l`::

        bptt       E(w) = E'(w) = 0                                   least squares
        tbptt(1)   a b = target_0,  sum_{l>0} omega_l w^(l-1) e_l = 0   lag 0 exactly
        rflo       E(w) = E(rho) = 0                                  r does not matter

    At each of them a and b are free but for `a b = p`. Left out is where a or b is zero: the saddle
    `a = b = 0` of BPTT and truncated BPTT; `b = 0`, any a and w, of one-step truncated BPTT if
    `target_0 = 0` and of RFLO if `sum_l omega_l rho^l target_l = 0`, where they learn nothing; and
    `E(w) = 0` with one of a, b zero. Found are changes of sign, so no double roots.

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)`.
        task: target [L].
        resolution: points of the grid on which sign changes are sought.

    Returns:
        The points, by rising loss.

    Raises:
        ValueError: for `tbptt(K > 1)`: three conditions for two unknowns, no point in general; for
            an `Endless` task, more than one mode, or one lag alone, where any w will do.

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> delay = theory.Task(np.eye(200)[1], theory.lag_weights(200))  # y_t = x_{t-1}
        >>> best = theory.stationary_points(theory.bptt(), delay)[0]
        >>> round(abs(best.w), 4), round(best.loss, 4)  # w and -w do equally well
        (0.7071, 0.375)
    """
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
    plain = rule._replace(gain=1.0)

    @jax.jit
    def product(w: jax.Array) -> jax.Array:  # E(w) = 0, or target_0
        lags, shape = powers(w, len(task.target)), (*w.shape, len(task.target))
        target, weight = (jnp.broadcast_to(float64(v), shape) for v in task)
        if rule.name == "tbptt":
            return target[..., 0]
        return (weight * lags * target).sum(-1) / (weight * lags**2).sum(-1)

    @jax.jit
    def condition(w: jax.Array) -> jax.Array:
        return descent(plain, Modes(product(w), w, 1.0), task).w

    def at(w: float) -> float:
        return float(condition(float64(w)))

    inner = np.linspace(-1, 1, resolution + 2)[1:-1] + 1e-4 / (np.pi * resolution)  # no round w
    grid = np.concatenate([[-1.0], inner, [1.0]])
    values = np.asarray(condition(float64(grid)))
    found = []
    for k in np.flatnonzero(values[:-1] * values[1:] < 0):
        w = float64(brentq(at, grid[k], grid[k + 1], xtol=1e-15, rtol=1e-14))
        point = Modes(product(w), w, 1.0)
        found.append(Stop(float(w), float(point.a), float(loss(point, task))))
    return sorted(found, key=lambda stop: stop.loss)
