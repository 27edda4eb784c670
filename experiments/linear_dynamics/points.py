"""Rows 3, 4 and 5: where flows stop, how fast they arrive, and at which point.

The simulations are networks of one unit under the library's rules, in gradient flow; T = 32 steps
stand for sequences without end unless a row says otherwise.
"""

from __future__ import annotations

import numpy as np

from experiments.linear_dynamics.simulate import BPTT, TBPTT, Case, rflo, single_units
from experiments.linear_dynamics.table import Finding, Row, several
from localgrad import theory

TEACHER = theory.Modes(1.2, 0.7, 1.0)


def saddle() -> Finding:
    """Row 3: BPTT and truncated BPTT stop at a = b = 0, RFLO does not."""
    teacher, at = theory.Modes(1.2, 0.7, 1.0), theory.Modes(0.0, 0.3, 0.0)
    rows = []
    for case in (BPTT, TBPTT, rflo(0.9, 0.4)):
        # The velocity of b by a short flow; b moves linearly out of the point.
        moved = single_units(case, theory.Modes(*np.array(at)[:, None]), teacher, [0.0, 1e-4])
        speed = float(moved.b[-1, 0]) / 1e-4
        predicted = 0.0 if case.name != "rflo" else 0.9 * 1.2 / (1 - 0.4 * 0.7)
        rows.append(
            Row("3", f"{case.label}: speed at a = b = 0", f"{predicted:.4f}", f"{speed:.4f}",
                abs(speed - predicted), 1e-3)
        )  # fmt: skip
    return Finding(rows, {"teacher": teacher})


def rates() -> Finding:
    """Row 4: the rate of the last approach to (s, p*/s, w*), as a function of s."""
    cases = (BPTT, TBPTT, rflo(0.9, 0.4))
    sizes = np.geomspace(0.3, 4.0, 9)
    rows, data = [], {"teacher": TEACHER, "cases": {}}
    for case in cases:
        predicted = np.asarray(theory.convergence_rate(case.mode_rule, sizes, TEACHER))
        measured = late_rates(case, sizes)
        error = float(np.abs(measured / predicted - 1).max())
        rows.append(
            Row("4", f"{case.label}: late rate at s = {sizes[0]:.1f} .. {sizes[-1]:.1f}",
                several(predicted[[0, 4, -1]]), several(measured[[0, 4, -1]]), error, 1e-2)
        )  # fmt: skip
        data["cases"][case.label] = {"s": sizes, "measured": measured, "rule": case.mode_rule}
    fine = np.geomspace(0.05, 20, 20001)
    slowest = fine[np.argmin(theory.convergence_rate(BPTT.mode_rule, fine, TEACHER))]
    simulated = sizes[np.argmin(data["cases"]["BPTT"]["measured"])]
    rows.append(
        Row("4", "BPTT is slowest at s = sqrt(p*)", f"{np.sqrt(1.2):.4f}",
            f"{slowest:.4f} (grid of networks: {simulated:.2f})",
            abs(slowest - np.sqrt(1.2)), 2e-3)
    )  # fmt: skip
    wrong = np.array([-0.5, -1.0])  # feedback of the other sign; a saddle before r s^3 = -p*^2
    limit = -((1.44 / 0.9) ** (1 / 3))
    within, beyond = (kind_of(cases[2], share * limit) for share in (0.98, 1.02))
    rows.append(
        Row("4", "RFLO, wrong sign: saddle as far as r s^3 = -p*^2", f"s = {limit:.3f}",
            f"at .98 s {within}, at 1.02 s {beyond}",
            0.0 if within == "saddle" != beyond else 1.0, 0.5)
    )  # fmt: skip
    grown = growth(cases[2], wrong)
    predicted = -np.asarray(theory.convergence_rate(cases[2].mode_rule, wrong, TEACHER))
    rows.append(
        Row("4", "RFLO leaves wrong-sign points s = -.5, -1 at rate", several(predicted),
            several(grown), float(np.abs(grown / predicted - 1).max()), 2e-2)
    )  # fmt: skip
    return Finding(rows, data)


def kind_of(case: Case, s: float) -> str:
    """What kind of stationary point (s, p*/s, w*) is."""
    at = theory.optimum(s, TEACHER)
    return theory.verdict(theory.jacobian(case.mode_rule, at, theory.Endless(TEACHER))).kind


def displaced(sizes: np.ndarray, distance: float) -> theory.Modes:
    """Points of the optimal manifold, moved off it a little."""
    return theory.Modes(
        sizes, np.full_like(sizes, TEACHER.w) - distance, (1.2 + 0.5 * distance) / sizes
    )


def late_rates(case: Case, sizes: np.ndarray) -> np.ndarray:
    """How fast networks of one unit come back, from how the gap in w shrinks late."""
    slow = float(np.min(theory.convergence_rate(case.mode_rule, sizes, TEACHER)))
    times = np.linspace(0, 12 / slow, 241)
    path = single_units(case, displaced(sizes, 1e-3), TEACHER, times, tolerance=1e-12)
    gap = np.hypot(path.w - TEACHER.w, path.a * path.b - 1.2)
    found = []
    for k in range(len(sizes)):
        # Late, but above the rounding: from a thousandth to a millionth of the first gap.
        ratio = np.asarray(gap[:, k] / gap[0, k])
        late = (ratio < 1e-3) & (ratio > 1e-6)
        found.append(-np.polyfit(times[late], np.log(ratio[late]), 1)[0])
    return np.array(found)


def growth(case: Case, sizes: np.ndarray) -> np.ndarray:
    """How fast networks of one unit leave unstable points, pushed where they leave fastest."""
    speeds, starts = [], []
    for s in sizes:
        at = theory.optimum(s, TEACHER)
        jacobian = theory.jacobian(case.mode_rule, at, theory.Endless(TEACHER))
        values, vectors = np.linalg.eig(np.asarray(jacobian))
        speeds.append(values.real.max())
        starts.append(np.array(at) + 1e-6 * vectors[:, np.argmax(values.real)].real)
    start, times = theory.Modes(*np.transpose(starts)), [0.0, 2.0 / max(speeds)]
    path = single_units(case, start, TEACHER, times, steps=48, tolerance=1e-12)
    gap = np.abs(np.asarray(path.a) - sizes)
    return np.log(gap[1] / gap[0]) / times[1]


def selection(count: int, seed: int = 0) -> Finding:
    """Row 5: which point of the manifold random starts end at.

    T = 6: the end points are the same for any T, but in longer sequences flows that pass through
    `|w| > 1` on their way, as many of RFLO's do, become very stiff.
    """
    steps = 6
    start = theory.Modes(*(0.6 * np.random.default_rng(seed).normal(size=(3, count))))
    task = theory.realisable(TEACHER, steps)
    rows, data = [], {}
    for case in (BPTT, TBPTT, rflo(0.9, 0.4), rflo(-0.9, 0.4)):
        path = single_units(case, start, TEACHER, [0.0, 100.0], steps=steps, tolerance=1e-8)
        last = theory.Modes(*(np.asarray(v[-1]) for v in path))
        ends = [
            theory.endpoint(case.mode_rule, theory.Modes(*one), TEACHER)
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
