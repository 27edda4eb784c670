"""Rows 6, 7, 13 and 14: plateaus, detours, bias, and the window of stability.

The simulations are networks of one unit under the library's rules, in gradient flow; T = 32 steps
stand for sequences without end unless a row says otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
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


def plateaus(seed: int) -> Finding:
    """Row 6: the time to half the loss from a = b = scale, w = 0."""
    rng = np.random.default_rng(seed)
    teacher, local = draw_teacher(rng), rflo(rng.uniform(0.7, 1.1), rng.uniform(0.3, 0.5))
    scales, wrong = 10.0 ** -np.arange(1, 7), teacher._replace(a=-teacher.a)
    rows, data = [], {"scales": scales, "cases": {}}
    for case in (BPTT, TBPTT, local):
        half = half_times(case, scales, teacher, np.linspace(0, 20, 1001), 1e-8, seed)
        predicted = 0.0 if case.name == "rflo" else 1 / teacher.a
        slope = float(np.polyfit(-np.log(scales[2:]), half[2:], 1)[0])
        rows.append(
            Row("6", f"{case.label}: time to half the loss over ln(1/scale)",
                f"slope {predicted:.4f}", f"slope {slope:.4f}; {several(half[[0, -1]], 3)}",
                abs(slope - predicted), 5e-3)
        )  # fmt: skip
        data["cases"][case.label] = half
    small = 10.0 ** -np.arange(1.5, 3.1, 0.5)  # beside smaller ones rounding is too large
    half = half_times(TBPTT, small, wrong, np.linspace(0, 40, 1001), 1e-13, seed)
    slope, predicted = float(np.polyfit(-np.log(small[1:]), half[1:], 1)[0]), 3 / teacher.a
    rows.append(
        Row("6", "TBPTT(1), balanced at the wrong sign: the same", f"slope {predicted:.4f}",
            f"slope {slope:.4f}; {several(half[[0, -1]], 3)}", abs(slope - predicted), 2e-2)
    )  # fmt: skip
    return Finding(rows, data)


def half_times(
    case: Case,
    scales: np.ndarray,
    teacher: theory.Modes,
    times: np.ndarray,
    tolerance: float,
    seed: int,
) -> np.ndarray:
    """When networks that start at a = b = scale, w = 0 have half the loss left."""
    task, at = theory.realisable(teacher, 32), jnp.asarray(times)
    start, never = theory.Modes(scales, scales * 0, scales), jnp.asarray(jnp.inf)
    path = single_units(case, start, teacher, times, tolerance=tolerance, seed=seed)
    paths = [theory.Trajectory(at, alone(path, k), never) for k in range(len(scales))]
    return np.array([float(theory.half_time(one, task)) for one in paths])


def detours(seed: int) -> Finding:
    """Row 7: RFLO travels to the branch of its feedback's sign; BPTT stays, or never learns."""
    rng = np.random.default_rng(seed)
    teacher = theory.Modes(rng.uniform(0.9, 1.1), rng.uniform(0.7, 0.8), 1.0)
    start = theory.Modes(rng.uniform(0.9, 1.1), rng.uniform(0.5, 0.65), rng.uniform(0.9, 1.1))
    begin = f"from (a, w, b) = ({', '.join(f'{v:.2f}' for v in start)})"
    rows, paths = [], {}
    times = np.linspace(0, 100, 401)
    drawn = [round(float(r), 2) for r in np.array([1.0, 0.5, -1.0, -0.5]) * rng.uniform(0.9, 1.1)]
    for case, strengths in ((BPTT, [None]), (rflo(1.0, 0.5), drawn)):
        together = case if case.r is None else case._replace(r=np.array(strengths))
        at = theory.Modes(*(np.full(len(strengths), v) for v in start))
        path = single_units(together, at, teacher, times, steps=64, seed=seed)
        for k, r in enumerate(strengths):
            label = case.label if r is None else f"{case.label}(r={r})"
            end = theory.endpoint(case._replace(r=r).mode_rule, start, teacher).s
            last = float(path.a[-1, k])
            rows.append(
                Row("7", f"{label}: {begin} to s =", f"{end:.4f}",
                    f"{last:.4f}", abs(last - end), 1e-4)
            )  # fmt: skip
            paths[label] = {"times": times, "path": alone(path, k)}
    wrong = theory.Modes(-rng.uniform(0.9, 1.1), rng.uniform(0.4, 0.6), 1.0)
    size, times = rng.uniform(0.25, 0.35), np.linspace(0, 12, 121)
    start = (size, rng.uniform(0.0, 0.2), size)
    for case in (BPTT, rflo(0.9, 0.4)):
        end = theory.endpoint(case.mode_rule, theory.Modes(*start), wrong).s
        path = single_units(case, one_unit(*start), wrong, times, seed=seed)
        last = float(path.a[-1, 0])
        rows.append(
            Row("7", f"{case.label}, balanced at the wrong sign: s", f"{end:.4f}", f"{last:.4f}",
                abs(last - end), 1e-3)
        )  # fmt: skip
        paths[f"{case.label}, wrong sign"] = {"times": times, "path": alone(path, 0)}
    return Finding(rows, {"paths": paths, "p": (teacher.a, wrong.a)})


def bias(seed: int) -> Finding:
    """Row 13: what no single mode can realise, a delay of one step and a sum of two poles."""
    steps, rng = 48, np.random.default_rng(seed)
    delay = np.eye(steps)[1]
    poles = theory.Modes(np.ones(2), rng.uniform([0.75, -0.6], [0.85, -0.4]), np.array([1.0, 0.6]))
    both = np.stack([delay, np.asarray(theory.realisable(poles, steps).target.sum(0))])
    tasks = [theory.Task(target, theory.lag_weights(steps)) for target in both]
    best = theory.suggest_decay(tasks[1])
    decays = np.array([rng.uniform(0.2, 0.3), 0.5**0.5, rng.uniform(0.8, 0.88), best.decay])
    start = theory.Modes(*rng.uniform(0.35, 0.45, size=(3, 2)))

    def end(case: Case) -> tuple[np.ndarray, np.ndarray]:
        path = single_units(case, start, None, [0.0, 150.0], target=both, steps=steps, seed=seed)
        last = [theory.Modes(*(v[-1, k] for v in path)) for k in range(2)]
        lost = [float(theory.loss(one, task)) for one, task in zip(last, tasks, strict=True)]
        return np.asarray(path.w[-1]), np.array(lost)

    found, losses = (np.array(v) for v in zip(*(end(rflo(0.9, d)) for d in decays), strict=True))
    full, least = end(BPTT)
    delays = (-decays + np.sqrt(decays**2 + 4)) / 2
    stops = [theory.stationary_points(theory.rflo(0.9, d), tasks[1])[0].w for d in decays]
    rows = [
        Row("13", f"RFLO's w on a delay, rho = {several(decays, 2)}", several(delays),
            several(found[:, 0]), float(np.abs(delays - found[:, 0]).max()), 1e-4),
        Row("13", "RFLO's least loss on a delay, at rho = 1/sqrt(2)", "0.375",
            f"{losses[1, 0]:.5f}", abs(losses[1, 0] - 0.375) + losses[1, 0] - losses[:, 0].min(),
            1e-5),
        Row("13", "BPTT's w and loss on a delay", "0.7071, 0.375", f"{full[0]:.4f}, {least[0]:.4f}",
            float(np.abs([full[0] - 0.5**0.5, least[0] - 0.375]).max()), 1e-5),
        Row("13", "RFLO's w on two poles, the same rho", several(stops), several(found[:, 1]),
            float(np.abs(np.array(stops) - found[:, 1]).max()), 1e-4),
        Row("13", f"RFLO at the suggested rho = {best.decay:.3f}: BPTT's loss, less than at others",
            f"{best.least:.5f}", f"{losses[3, 1]:.5f}, others {several(losses[:3, 1])}",
            abs(losses[3, 1] - least[1]) + losses[3, 1] - losses[:, 1].min(), 1e-5),
    ]  # fmt: skip
    data = {"decays": decays, "losses": losses[:, 0], "w": found[:, 0]}
    return Finding(rows, {**data, "bptt": (full[0], least[0])})


def window(seed: int) -> Finding:
    """Row 14: RFLO with feedback of the wrong sign, yet stable, between two limits.

    The starts lie a little off (1, p*, w*) within the plane of the flow that holds this point: on
    another plane the flow would end at another s.
    """
    rng = np.random.default_rng(seed)
    teacher, rho = theory.Modes(rng.uniform(0.28, 0.32), 0.8, 1.0), 0.2
    limits = theory.limits(1.0, rho, teacher)
    low, high = (float(limit) for limit in limits)
    times = np.linspace(0, 1000, 501)
    strengths = np.round([low + (high - low) / 3, 1.08 * high], 4)
    w, b = teacher.w, teacher.a + 0.003
    a = 1 + (b**2 - teacher.a**2) / (2 * strengths)
    start = theory.Modes(a, np.full(2, w), np.full(2, b))
    case = rflo(strengths, rho)
    path = single_units(case, start, teacher, times, steps=48, tolerance=1e-8, seed=seed)
    off = np.abs(np.asarray(path.a) - 1).max(0)
    last = np.asarray(path.a[-1])
    begin = theory.Modes(*(float(v[1]) for v in start))
    end = theory.endpoint(theory.rflo(strengths[1], rho), begin, teacher).s
    inside = f"limits {several(limits, 3)}"
    rows = [
        Row("14", f"r = {strengths[0]:g} ({inside}): returns to s = 1", "1.0000",
            f"{last[0]:.4f}, at most {off[0]:.2g} away", abs(last[0] - 1), 1e-4),
        Row("14", f"r = {strengths[1]:g} ({inside}): leaves s = 1 for the other sign", f"{end:.4f}",
            f"{last[1]:.4f}", abs(last[1] - end), 1e-4),
    ]  # fmt: skip
    paths = {float(r): alone(path, k) for k, r in enumerate(strengths)}
    return Finding(rows, {"limits": limits, "paths": paths, "times": times})


def one_unit(*strengths: float) -> theory.Modes:
    """One network's strengths, [1] each."""
    return theory.Modes(*(np.array([v]) for v in strengths))


def alone(path: theory.Modes, k: int) -> theory.Modes:
    """The k-th network's strengths at each time, [K, 1]."""
    return jax.tree.map(lambda v: v[:, k : k + 1], path)
