"""Whether flows stay at a point where they stop, and how fast they arrive there.

All rules share the optimal manifold of a realisable teacher, the curve `(s, p*/s, w*)` over s,
with `p* = a* b*`. BPTT and truncated BPTT also stop at `a = b = 0`, any w, a saddle; RFLO does not.
Local rules are biased only where one mode cannot realise its targets: see `stationary_points`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.theory.modes import (
    ALIKE,
    Endless,
    ModeRule,
    Modes,
    Task,
    descent,
    require_fading,
    require_rule,
    require_task,
)
from localgrad.theory.values import (
    alike,
    float64,
    require_inside,
    require_modes,
    require_not_zero,
    require_numbers,
    shape_of,
)

NO_POINT = "At every point of the optimal manifold the readout s is of some size: a b = p*."


class Verdict(NamedTuple):
    """What becomes of a small displacement from a stationary point.

    Attributes:
        kind: `"stable node"`, `"stable spiral"`, `"saddle"`, `"unstable node"`,
            `"unstable spiral"` or `"centre"`; or `"degenerate"`, of which the Jacobian does not
            tell: more than one of its eigenvalues is neutral, or all are.
        rates: eigenvalues of the Jacobian but the neutral ones, fastest growth first.

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> theory.verdict(np.diag([0.0, -1.0, 2.0])).kind
        'saddle'
    """

    kind: str
    rates: np.ndarray


class Limits(NamedTuple):
    """Feedback strengths r at which RFLO's point `(s, p*/s, w*)` changes its stability.

    Attributes:
        saddle_node: `r s^3 = -p*^2`: a saddle from here to r = 0.
        hopf: where tau changes its sign. If `|hopf| > |saddle_node|`, the point is stable between
            the two; outwards of both it is an unstable spiral or node.

    Example:
        >>> from localgrad import theory
        >>> float(theory.limits(s=1.0, decay=0.0, teacher=theory.Modes(2.0, 0.5, 1.0)).saddle_node)
        -4.0
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

    Raises:
        ValueError: if some s is 0, where `a b` cannot be `p*`, or for shapes that do not broadcast.

    Example:
        >>> from localgrad import theory
        >>> theory.optimum(2.0, theory.Modes(a=1.0, w=0.5, b=1.0))
        Modes(a=2.0, w=0.5, b=0.5)
    """
    require_not_zero("s", s, NO_POINT)
    require_modes("teacher", teacher)
    shape_of(s=s, **{"a*": teacher.a, "w*": teacher.w, "b*": teacher.b})
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

    Raises:
        ValueError: if the point or the task is not finite, or without 64-bit numbers.

    Example:
        >>> from localgrad import theory
        >>> teacher = theory.Modes(1.0, 0.5, 1.0)
        >>> theory.jacobian(theory.bptt(), teacher, theory.Endless(teacher)).shape
        (3, 3)
    """
    require_rule(rule)
    require_modes("point", point)
    require_task(task)
    named = rule.name, rule.horizon
    return _jacobian(named, rule.gain, rule.decay, Modes(*float64(*point)), task, rates)


@functools.partial(jax.jit, static_argnames="named")
def _jacobian(
    named: tuple[str, int | None],
    gain: Any,
    decay: Any,
    point: Modes,
    task: Task | Endless,
    rates: Modes,
) -> jax.Array:
    """`jacobian`, compiled once for each rule and shape."""
    name, horizon = named
    rule = ModeRule(name, gain, decay, horizon)

    def velocity(point: jax.Array) -> jax.Array:
        moved = descent(rule, Modes(*point), task)
        return -jnp.stack([r * d for r, d in zip(rates, moved, strict=True)])

    return jax.jacfwd(velocity)(jnp.stack(point))


def verdict(jacobian: Any, *, rtol: float = 1e-6) -> Verdict:
    """What kind of stationary point a Jacobian tells of.

    Args:
        jacobian: [n, n], of one mode.
        rtol: eigenvalues below this part of the largest count as neutral, and are left out: every
            stationary point of these flows lies on a curve of others. At a saddle-node two are, and
            such a pair is told apart only to the root of the rounding.

    Returns:
        The verdict.

    Raises:
        ValueError: for a Jacobian that is not square or not finite.

    Example:
        >>> from localgrad import theory
        >>> teacher = theory.Modes(1.0, 0.5, 1.0)
        >>> theory.verdict(theory.jacobian(theory.bptt(), teacher, theory.Endless(teacher))).kind
        'stable node'
    """
    require_numbers(jacobian=jacobian)
    shape = np.shape(jacobian)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"jacobian must be [n, n]; got shape {shape}.")
    found = np.linalg.eigvals(np.asarray(jacobian, np.float64))
    size = np.abs(found).max()
    kept = found[np.abs(found) > rtol * size]
    kept = kept[np.argsort(-kept.real)]
    turns = bool(np.any(np.abs(kept.imag) > rtol * size))
    grows, fades = (bool(np.any(sign * kept.real > rtol * size)) for sign in (1, -1))
    if not kept.size or found.size - kept.size > 1:
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
        ValueError: for `tbptt(K > 1)`, if some s is 0 or `|w*| >= 1`, or for shapes that do not
            broadcast.

    Example:
        >>> from localgrad import theory
        >>> tau, det = theory.characteristic(theory.bptt(), 1.0, theory.Modes(1.0, 0.0, 1.0))
        >>> float(tau), float(det)
        (3.0, 2.0)
    """
    require_rule(rule)
    if rule.name == "tbptt" and rule.horizon != 1:
        raise ValueError(
            f"the closed form holds for tbptt(1), bptt() and rflo(r, rho); got a horizon of "
            f"{rule.horizon}. Take verdict(jacobian(rule, optimum(s, teacher), task)) instead."
        )
    require_not_zero("s", s, NO_POINT)
    require_fading(teacher)
    given = dict(zip(("s", "a*", "w*", "b*"), float64(s, *teacher), strict=True))
    if rule.name == "rflo":
        require_inside("decay", rule.decay, "or traces would grow")
        given["feedback"], given["decay"] = float64(rule.gain, rule.decay)
    s, a_star, w, b_star, *seen = alike(**given)
    p = a_star * b_star
    b2, q = (p / s) ** 2, 1 - w**2
    both = s**2 + b2
    if rule.name == "bptt":
        return both / q + p**2 * (1 + w**2) / q**3, p**2 * both / q**4
    if rule.name == "rflo":
        gain, decay = seen
        k, sigma = 1 - decay * w, gain * s
        tau = b2 / q + sigma / k + sigma * b2 * (1 - decay * w**3) / (q * k) ** 2
        return tau, sigma * b2 * (b2 + sigma) / (q * k) ** 2
    return b2 / q + s**2 + p**2 / q**2, p**2 * both / q**2


def convergence_rate(rule: ModeRule, s: Any, teacher: Modes) -> jax.Array:
    """How fast the slower direction returns to `(s, p*/s, w*)`: minus its eigenvalue's real part.

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)`.
        s: readout strength, [...].
        teacher: the strengths to be learned.

    Returns:
        [...], in units of the learning rate; negative where the point is unstable.

    Raises:
        ValueError: as `characteristic` does.

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

    Raises:
        ValueError: if some s is 0, `|decay| >= 1` or `|w*| >= 1`, or for shapes that do not
            broadcast.

    Example:
        >>> from localgrad import theory
        >>> found = theory.limits(1.0, 0.2, theory.Modes(a=0.3, w=0.8, b=1.0))
        >>> [round(float(r), 4) for r in found]
        [-0.09, -0.1205]
    """
    require_not_zero("s", s, NO_POINT)
    require_inside("decay", decay, "or traces would grow")
    require_fading(teacher)
    names = "s", "decay", "a*", "w*", "b*"
    given = zip(names, float64(s, decay, *teacher), strict=True)
    s, decay, a_star, w, b_star = alike(**dict(given))
    b2, q, k = (a_star * b_star / s) ** 2, 1 - w**2, 1 - decay * w
    far = (b2 / q) / (1 / k + b2 * (1 - decay * w**3) / (q * k) ** 2)
    return Limits(-b2 / s, -far / s)
