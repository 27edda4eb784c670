"""Rows 3, 4 and 5: where flows stop, how fast they arrive or leave, and at which point.

The simulations are networks of one unit under the library's rules, in gradient flow; T = 32 steps
stand for sequences without end unless a row says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.linear_dynamics.simulate import (
    BPTT,
    TBPTT,
    Case,
    draw_teacher,
    rflo,
    single_units,
)
from experiments.linear_dynamics.table import Finding, Row, several
from localgrad import theory

SHARES = np.array([0.43, 0.86])  # of the readout at which feedback of the wrong sign has a saddle


def saddle(seed: int) -> Finding:
    """Row 3: BPTT and truncated BPTT have a saddle at a = b = 0, RFLO does not stop there."""
    rng = np.random.default_rng(seed)
    teacher, w = draw_teacher(rng), rng.uniform(-0.3, 0.4)
    r, rho = rng.uniform(0.6, 1.1), rng.uniform(0.2, 0.5)
    rows = []
    for case in (BPTT, TBPTT):
        at = theory.Modes(0.0, w, 0.0)
        found = eigen(case, at, teacher)
        away, back = int(np.argmax(found.values)), int(np.argmin(found.values))
        predicted = found.values[[away, back]]
        measured = moved([found, found], [away, back], [at, at], case, teacher, seed)
        rows.append(
            Row("3", f"{case.label}: rates away from and back to a = b = 0", several(predicted),
                several(measured), float(np.abs(measured / predicted - 1).max()), 1e-3)
        )  # fmt: skip
    # The velocity of b by a short flow; b moves linearly out of the point.
    start = theory.Modes(*(np.array([v]) for v in (0.0, w, 0.0)))
    path = single_units(rflo(r, rho), start, teacher, [0.0, 1e-4], seed=seed)
    speed, predicted = float(path.b[-1, 0]) / 1e-4, r * teacher.a / (1 - rho * teacher.w)
    rows.append(
        Row("3", "RFLO: speed of b at a = b = 0", f"{predicted:.4f}", f"{speed:.4f}",
            abs(speed - predicted), 1e-3)
    )  # fmt: skip
    return Finding(rows, {"teacher": teacher, "r": r, "rho": rho})


def rates(seed: int) -> Finding:
    """Row 4: the rate of the last approach to (s, p*/s, w*), as a function of s."""
    rng = np.random.default_rng(seed)
    teacher, local = draw_teacher(rng), rflo(rng.uniform(0.7, 1.1), rng.uniform(0.3, 0.5))
    sizes = np.geomspace(0.3, 4.0, 9)
    rows, data = [], {"teacher": teacher, "cases": {}}
    for case in (BPTT, TBPTT, local):
        predicted = np.asarray(theory.convergence_rate(case.mode_rule, sizes, teacher))
        measured = late_rates(case, sizes, teacher, seed)
        error = float(np.abs(measured / predicted - 1).max())
        rows.append(
            Row("4", f"{case.label}: late rate at s = {sizes[0]:.1f} .. {sizes[-1]:.1f}",
                several(predicted[[0, 4, -1]]), several(measured[[0, 4, -1]]), error, 1e-2)
        )  # fmt: skip
        data["cases"][case.label] = {"s": sizes, "measured": measured, "rule": case.mode_rule}
    root, least = np.sqrt(teacher.a), slowest(sizes, data["cases"]["BPTT"]["measured"])
    rows.append(
        Row("4", "BPTT is slowest at s = sqrt(p*)", f"{root:.4f}", f"{least:.4f}",
            abs(least / root - 1), 5e-3)
    )  # fmt: skip
    rows += wrong_sign(local, teacher, seed)
    return Finding(rows, data)


def wrong_sign(case: Case, teacher: theory.Modes, seed: int) -> list[Row]:
    """Where feedback has the other sign than s: how fast networks leave, and where saddles end."""
    limit = -float(np.cbrt(teacher.a**2 / case.r))
    near = np.array([0.95, 1.05])
    points = [theory.optimum(s, teacher) for s in limit * np.concatenate([SHARES, near])]
    found = [eigen(case, point, teacher) for point in points]
    fastest = [int(np.argmax(one.values.real)) for one in found]
    along = [int(np.argmax(np.abs(one.vectors.T @ tangent(point, teacher))))
             for one, point in zip(found, points, strict=True)]  # fmt: skip
    second = [3 - one - other for one, other in zip(fastest, along, strict=True)]
    which = [*fastest[:2], *second[2:]]
    predicted = np.array([one.values[k].real for one, k in zip(found, which, strict=True)])
    measured = moved(found, which, points, case, teacher, seed)
    crossing = limit * (near[0] - measured[2] * np.diff(near)[0] / (measured[3] - measured[2]))
    at = several(limit * SHARES, 2)
    return [
        Row("4", f"RFLO leaves wrong-sign points s = {at} at rate", several(predicted[:2]),
            several(measured[:2]), float(np.abs(measured / predicted - 1)[:2].max()), 2e-2),
        Row("4", "RFLO, wrong sign: one direction returns as far as r s^3 = -p*^2",
            f"s = {limit:.4f}", f"s = {crossing:.4f}, by rates {several(measured[2:], 2)} near it",
            abs(crossing / limit - 1), 1e-2),
    ]  # fmt: skip


class Eigen(NamedTuple):
    """Eigenvalues of a Jacobian, and its eigenvectors in columns."""

    values: np.ndarray
    vectors: np.ndarray


def eigen(case: Case, at: theory.Modes, teacher: theory.Modes) -> Eigen:
    """How the theory says that small displacements from a point grow."""
    jacobian = theory.jacobian(case.mode_rule, at, theory.Endless(teacher))
    return Eigen(*np.linalg.eig(np.asarray(jacobian)))


def tangent(at: theory.Modes, teacher: theory.Modes) -> np.ndarray:
    """Along the optimal manifold, in the order a, w, b."""
    found = np.array([1.0, 0.0, -teacher.a / at.a**2])
    return found / np.linalg.norm(found)


def moved(
    found: list[Eigen],
    which: list[int],
    points: list[theory.Modes],
    case: Case,
    teacher: theory.Modes,
    seed: int,
) -> np.ndarray:
    """The rates at which networks pushed along an eigenvector each move along it."""
    starts = [
        np.array(point) + 1e-6 * one.vectors[:, k].real
        for one, k, point in zip(found, which, points, strict=True)
    ]
    time = 0.5 / max(np.abs(one.values).max() for one in found)
    path = single_units(
        case, theory.Modes(*np.transpose(starts)), teacher, [0.0, time],
        steps=48, tolerance=1e-13, seed=seed,
    )  # fmt: skip
    gaps = np.array(path) - np.transpose(points)[:, None]  # [3, 2, M]
    rates = []
    for j, (one, k) in enumerate(zip(found, which, strict=True)):
        part = np.linalg.inv(one.vectors)[k] @ gaps[:, :, j]
        rates.append(np.log((part[1] / part[0]).real) / time)
    return np.array(rates)


def slowest(sizes: np.ndarray, rates: np.ndarray) -> float:
    """Where rates over log sizes are least, by a quartic through the five around the least."""
    middle = int(np.clip(np.argmin(rates), 2, len(sizes) - 3))
    near = slice(middle - 2, middle + 3)
    curve = np.polynomial.Polynomial.fit(np.log(sizes[near]), rates[near], 4)
    fine = np.linspace(np.log(sizes[near][0]), np.log(sizes[near][-1]), 4001)
    return float(np.exp(fine[np.argmin(curve(fine))]))


def displaced(sizes: np.ndarray, distance: float, teacher: theory.Modes) -> theory.Modes:
    """Points of the optimal manifold, moved off it a little."""
    return theory.Modes(
        sizes,
        np.full_like(sizes, teacher.w) - distance,
        (teacher.a + 0.5 * distance) / sizes,
    )


def late_rates(case: Case, sizes: np.ndarray, teacher: theory.Modes, seed: int) -> np.ndarray:
    """How fast networks of one unit come back, from how the gap in w shrinks late."""
    slow = float(np.min(theory.convergence_rate(case.mode_rule, sizes, teacher)))
    times = np.linspace(0, 12 / slow, 241)
    start = displaced(sizes, 1e-3, teacher)
    path = single_units(case, start, teacher, times, tolerance=1e-12, seed=seed)
    gap = np.hypot(path.w - teacher.w, path.a * path.b - teacher.a)
    found = []
    for k in range(len(sizes)):
        # Late, but above the rounding: from a thousandth to a millionth of the first gap.
        ratio = np.asarray(gap[:, k] / gap[0, k])
        late = (ratio < 1e-3) & (ratio > 1e-6)
        found.append(-np.polyfit(times[late], np.log(ratio[late]), 1)[0])
    return np.array(found)


def selection(count: int, seed: int) -> Finding:
    """Row 5: which point of the manifold random starts end at.

    T = 6: the end points are the same for any T, but in longer sequences flows that pass through
    `|w| > 1` on their way, as many of RFLO's do, become very stiff.
    """
    steps = 6
    rng = np.random.default_rng(seed)
    (a, b), w = 0.6 * rng.normal(size=(2, count)), rng.uniform(-0.9, 0.9, count)
    start, teacher = theory.Modes(a, w, b), draw_teacher(rng)
    task = theory.realisable(teacher, steps)
    rows, data = [], {}
    for case in (BPTT, TBPTT, rflo(0.9, 0.4), rflo(-0.9, 0.4)):
        path = single_units(
            case, start, teacher, [0.0, 100.0], steps=steps, tolerance=1e-8, seed=seed
        )
        last = theory.Modes(*(np.asarray(v[-1]) for v in path))
        ends = [
            theory.endpoint(case.mode_rule, theory.Modes(*one), teacher)
            for one in np.transpose(start)
        ]
        gaps = np.array([distance(end, s) for end, s in zip(ends, last.a, strict=True)])
        arrived = np.asarray(theory.loss(last, task)) < 1e-12
        told = sum(not np.isnan(end.s) for end in ends)
        label = f"{case.label}(r={case.r})" if case.name == "rflo" else case.label
        rows.append(
            Row("5", f"{label}: final s of {count} random starts, T = {steps}",
                f"one s for {told}" + (f", +-s for {count - told}" if told < count else ""),
                f"{arrived.sum()} arrive, {(last.a > 0).sum()} at s > 0",
                float(gaps.max()) if arrived.all() else None, 1e-5)
        )  # fmt: skip
        predicted = np.array([end.s for end in ends])
        data[label] = {"predicted": predicted, "last": last.a, "arrived": arrived}
    return Finding(rows, data)


def distance(end: theory.Endpoint, s: float) -> float:
    """How far s is from the prediction, or from the nearest candidate where it is not told."""
    return float(np.abs(end.candidates - s).min()) if np.isnan(end.s) else abs(end.s - s)
