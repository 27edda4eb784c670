"""Where a flow ends, told from where it starts, and how long it waits before anything happens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from localgrad.theory.invariants import conserved
from localgrad.theory.modes import ModeRule, Modes, require_fading, require_rule
from localgrad.theory.stationary import characteristic
from localgrad.theory.values import require_modes, require_one


class Endpoint(NamedTuple):
    """Which point `(s, p*/s, w*)` of the optimal manifold a flow ends at.

    Attributes:
        s: the prediction; 0 if the flow ends in the saddle `a = b = 0`, NaN if the conserved
            quantity does not tell which of the candidates it is.
        candidates: every s that the conserved quantity allows.

    Example:
        >>> from localgrad import theory
        >>> start, teacher = theory.Modes(0.6, 0.0, 0.1), theory.Modes(1.0, 0.5, 1.0)
        >>> theory.endpoint(theory.bptt(), start, teacher).candidates.round(2).tolist()
        [-1.09, 1.09]
    """

    s: float
    candidates: np.ndarray


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
        ValueError: for `tbptt(K > 1)`, which conserves nothing that is known, if r or `a* b*` is
            zero, `|w*| >= 1`, or the start is not finite or not of one mode.

    Example:
        >>> from localgrad import theory
        >>> rule = theory.rflo(feedback=-1.0, decay=0.5)
        >>> start = theory.Modes(a=1.0, w=0.6, b=1.0)
        >>> round(float(theory.endpoint(rule, start, theory.Modes(1.0, 0.8, 1.0)).s), 4)
        -0.5045
    """
    require_rule(rule)
    require_modes("start", start)
    require_fading(teacher)
    _require_one_mode(start=start, teacher=teacher)
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
    If `p* < 0`, a start with a = b has the wrong sign, and BPTT never leaves. One-step truncated
    BPTT does: its w, which grows by `scale^2 w*`, upsets the balance of a and b by `scale^3 w*^2`,
    so that it leaves after `(3 ln(1/scale) + 2 ln(1/|w*|))/|p*|`, and never if `w* = 0`. RFLO has
    no plateau: `(2/(r S)^2)^(1/3)` with `S = p*/(1 - rho w*)`, at any scale.

    Args:
        rule: `bptt()`, `tbptt(K)` or `rflo(r, rho)`; K of 1 only if `p* < 0`.
        scale: of the initial strengths, in (0, 1).
        teacher: the strengths to be learned.

    Returns:
        A time; infinity if learning never begins.

    Raises:
        ValueError: for a scale outside (0, 1), `|w*| >= 1`, and `tbptt(K > 1)` with `p* < 0`.

    Example:
        >>> from localgrad import theory
        >>> theory.plateau(theory.bptt(), 1e-3, theory.Modes(1.0, 0.7, 1.0))
        6.9
    """
    require_rule(rule)
    require_fading(teacher)
    _require_one_mode(teacher=teacher)
    require_one(scale=scale)
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
        if w == 0:
            return float("inf")
        return float((3 * np.log(1 / scale) + 2 * np.log(1 / abs(w))) / abs(p))
    if rule.name == "rflo":
        drive = float(rule.gain) * p / (1 - float(rule.decay) * w)
        return float((2 / drive**2) ** (1 / 3))
    return float(np.log(1 / scale) / abs(p))


def _require_one_mode(**named: Modes) -> None:
    """Raises unless all strengths are numbers, of one mode."""
    for name, modes in named.items():
        require_one(**{f"{name}.{part}": value for part, value in modes._asdict().items()})
