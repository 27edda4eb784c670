"""Rows 6, 7, 13 and 14: plateaus, detours, the bias on a delay, and the window of stability.

The simulations are networks of one unit under the library's rules, in gradient flow; T = 32 steps
stand for sequences without end unless a row says otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.linear_dynamics.simulate import BPTT, TBPTT, Case, rflo, single_units
from experiments.linear_dynamics.table import Finding, Row, several
from localgrad import theory


def plateaus() -> Finding:
    """Row 6: the time to half the loss from a = b = scale, w = 0."""
    teacher = theory.Modes(1.0, 0.7, 1.0)
    scales = 10.0 ** -np.arange(1, 7)
    times = np.linspace(0, 16, 801)
    task = theory.realisable(teacher, 32)
    at, never = jnp.asarray(times), jnp.asarray(jnp.inf)
    rows, data = [], {"scales": scales, "cases": {}}
    for case in (BPTT, TBPTT, rflo(0.9, 0.4)):
        start = theory.Modes(scales, scales * 0, scales)
        path = single_units(case, start, teacher, times, tolerance=1e-8)
        half = np.array(
            [
                float(theory.half_time(theory.Trajectory(at, one, never), task))
                for one in (alone(path, k) for k in range(len(scales)))
            ]
        )
        slope = float(np.polyfit(-np.log(scales[2:]), half[2:], 1)[0])
        predicted = 0.0 if case.name == "rflo" else 1.0
        rows.append(
            Row("6", f"{case.label}: time to half the loss over ln(1/scale)",
                f"slope {predicted:.0f}", f"slope {slope:.4f}; {several(half[[0, -1]], 3)}",
                abs(slope - predicted), 5e-3)
        )  # fmt: skip
        data["cases"][case.label] = half
    return Finding(rows, data)


def detours() -> Finding:
    """Row 7: RFLO travels to the branch of its feedback's sign; BPTT stays, or never learns."""
    teacher, start = theory.Modes(1.0, 0.8, 1.0), theory.Modes(1.0, 0.6, 1.0)
    rows, paths = [], {}
    times = np.linspace(0, 100, 401)
    for case, strengths in ((BPTT, [None]), (rflo(1.0, 0.5), [1.0, 0.5, -1.0, -0.5])):
        together = case if case.r is None else case._replace(r=np.array(strengths))
        at = theory.Modes(*(np.full(len(strengths), v) for v in start))
        path = single_units(together, at, teacher, times, steps=64)
        for k, r in enumerate(strengths):
            label = case.label if r is None else f"{case.label}(r={r})"
            end = theory.endpoint(case._replace(r=r).mode_rule, start, teacher).s
            last = float(path.a[-1, k])
            rows.append(
                Row("7", f"{label}: from (a, w, b) = (1, .6, 1) to s =", f"{end:.4f}",
                    f"{last:.4f}", abs(last - end), 1e-4)
            )  # fmt: skip
            paths[label] = {"times": times, "path": alone(path, k)}
    teacher, start, times = theory.Modes(-1.0, 0.5, 1.0), (0.3, 0.1, 0.3), np.linspace(0, 12, 121)
    for case in (BPTT, rflo(0.9, 0.4)):
        end = theory.endpoint(case.mode_rule, theory.Modes(*start), teacher).s
        path = single_units(case, one_unit(*start), teacher, times)
        last = float(path.a[-1, 0])
        bar = 1e-3 if case.name == "bptt" else 1e-4
        rows.append(
            Row("7", f"{case.label}, balanced at the wrong sign: s", f"{end:.4f}", f"{last:.4f}",
                abs(last - end), bar)
        )  # fmt: skip
        paths[f"{case.label}, wrong sign"] = {"times": times, "path": alone(path, 0)}
    return Finding(rows, {"paths": paths})


def bias() -> Finding:
    """Row 13: a delay of one step, which no single mode can realise."""
    steps = 48
    delay = np.eye(steps)[1]
    task = theory.Task(delay, theory.lag_weights(steps))

    def end(case: Case) -> tuple[float, float]:
        start = one_unit(0.4, 0.4, 0.4)
        path = single_units(case, start, None, [0.0, 150.0], target=delay, steps=steps)
        last = theory.Modes(*(v[-1, 0] for v in path))
        return float(last.w), float(theory.loss(last, task))

    decays = np.array([0.2, 0.5, 0.5**0.5, 0.85])
    found, losses = np.transpose([end(rflo(0.9, rho)) for rho in decays])
    predicted = (-decays + np.sqrt(decays**2 + 4)) / 2
    best, loss = end(BPTT)
    rows = [
        Row("13", f"RFLO's w on a delay, rho = {several(decays, 2)}", several(predicted),
            several(found), float(np.abs(predicted - found).max()), 1e-4),
        Row("13", "RFLO's least loss, at rho = 1/sqrt(2)", "0.375", f"{losses[2]:.5f}",
            abs(losses[2] - 0.375) + losses[2] - losses.min(), 1e-5),
        Row("13", "BPTT's w and loss on a delay", "0.7071, 0.375", f"{best:.4f}, {loss:.4f}",
            float(np.abs([best - 0.5**0.5, loss - 0.375]).max()), 1e-5),
    ]  # fmt: skip
    return Finding(rows, {"decays": decays, "losses": losses, "w": found, "bptt": (best, loss)})


def window() -> Finding:
    """Row 14: RFLO with feedback of the wrong sign, yet stable, between -.0900 and -.1205.

    The starts lie a little off (1, p*, w*) within the plane of the flow that holds this point: on
    another plane the flow would end at another s.
    """
    teacher = theory.Modes(0.3, 0.8, 1.0)
    limits = theory.limits(1.0, 0.2, teacher)
    times = np.linspace(0, 1000, 501)
    strengths = np.array([-0.10, -0.13])
    w, b = 0.8, 0.3 + 0.003
    a = 1 + (b**2 - 0.3**2) / (2 * strengths)
    start = theory.Modes(a, np.full(2, w), np.full(2, b))
    path = single_units(rflo(strengths, 0.2), start, teacher, times, steps=48, tolerance=1e-8)
    off = np.abs(np.asarray(path.a) - 1).max(0)
    last = np.asarray(path.a[-1])
    begin = theory.Modes(*(float(v[1]) for v in start))
    end = theory.endpoint(rflo(-0.13, 0.2).mode_rule, begin, teacher).s
    inside = f"limits {several(limits, 3)}"
    rows = [
        Row("14", f"r = -0.1 ({inside}): returns to s = 1", "1.0000",
            f"{last[0]:.4f}, at most {off[0]:.2g} away", abs(last[0] - 1), 1e-4),
        Row("14", f"r = -0.13 ({inside}): leaves s = 1 for the other sign", f"{end:.4f}",
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
