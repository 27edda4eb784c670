"""Rows 1, 2, 8, 9, 15: whole networks against mode equations, invariants, and alignment.

Letters: N units, I inputs, O outputs, E examples, T time steps, M modes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import localgrad
from experiments.linear_dynamics.simulate import (
    BPTT,
    TBPTT,
    Case,
    descend,
    downhill,
    full_batch,
    make_rule,
    rflo,
)
from experiments.linear_dynamics.table import Finding, Row
from localgrad import theory

STEPS, UNITS, INPUTS, OUTPUTS = 8, 6, 4, 3
project_all = jax.jit(jax.vmap(theory.project, (0, None)))


class Problem(NamedTuple):
    """An aligned problem: what is to be learned, from where, and the data."""

    teacher: theory.Modes
    start: theory.Modes
    bases: theory.Bases
    batch: localgrad.Batch


def trajectories(updates: int, seed: int) -> Finding:
    """Rows 1 and 2: a, b, w and the loss of aligned networks under plain gradient steps."""
    eta = 0.02
    times = eta * np.arange(updates + 1)
    drawn = problem(seed)
    feedback = np.random.default_rng(seed).uniform(0.6, 1.1, 3)
    cases = (BPTT, TBPTT, Case("tbptt3", "TBPTT(3)"), rflo(feedback, 0.35))
    found = {case.label: trajectory(case, drawn, times) for case in cases}
    gaps = {
        key: float(np.max([gap[key] for gap, _ in found.values()]))
        for key in ("map", "flow", "leak", "loss")
    }
    rows = [
        Row("1", "networks' a, b, w: 4 rules, 3 modes", "mode map", f"{updates} steps",
            gaps["map"], 1e-10),
        Row("1", "the same in gradient flow", "mode equations", f"t = {times[-1]:g}",
            gaps["flow"], 1e-8),
        Row("1", "entries off the modes stay as they are", "0", f"{gaps['leak']:.1e}",
            gaps["leak"], 1e-10),
        Row("2", "loss staircases", "sum over modes", "networks' loss", gaps["loss"], 1e-10),
    ]  # fmt: skip
    return Finding(
        rows, {"times": times, "runs": {label: run for label, (_, run) in found.items()}}
    )


def problem(seed: int) -> Problem:
    """Drawn strengths, bases, and white inputs with the teacher's outputs."""
    rng = np.random.default_rng(seed)
    teacher = theory.Modes(
        a=np.array([1.5, 1.2, 0.9]) * rng.uniform(0.85, 1.15, 3),
        w=np.array([0.8, 0.5, -0.6]) * rng.uniform(0.8, 1.05, 3),
        b=np.array([0.9, -0.8, 0.7]),
    )
    start = theory.Modes(
        a=np.array([0.3, 0.2, 0.15]) * rng.uniform(0.7, 1.3, 3),
        w=rng.uniform(-0.2, 0.2, 3),
        b=np.array([0.1, -0.25, 0.2]) * rng.uniform(0.7, 1.3, 3),
    )
    keys = jax.random.split(jax.random.key(seed), 2)
    bases = theory.random_bases(keys[0], OUTPUTS, UNITS, INPUTS)
    inputs = theory.white_inputs(keys[1], STEPS * INPUTS + 1, STEPS, INPUTS)
    target = theory.realisable(teacher, STEPS).target
    batch = full_batch(inputs, theory.lagged_targets(inputs, target, bases))
    return Problem(teacher, start, bases, batch)


def trajectory(
    case: Case, drawn: Problem, times: np.ndarray
) -> tuple[dict[str, float], dict[str, Any]]:
    """One rule's network beside its modes: how far apart they come, and both of them."""
    teacher, begin, bases, batch = drawn
    eta, updates = float(times[1]), len(times) - 1
    task = theory.realisable(teacher, STEPS)
    r = np.zeros(3) if case.r is None else case.r
    feedback = theory.aligned(theory.Modes(r, r * 0, r * 0), bases).A
    down = downhill(make_rule(case, UNITS, OUTPUTS, feedback), case.alpha, batch)
    start = theory.aligned(begin, bases, others=jnp.array([0.3, -0.2, 0.1]))
    weights, losses = descend(down, start, eta, updates)
    modes, leak = project_all(weights, bases)
    steps = mode_steps(case.mode_rule, begin, task, eta, updates)
    flow = theory.integrate(case.mode_rule, begin, task, times).modes
    few = slice(None, None, max(updates // 4, 1))
    followed, _ = theory.solve(
        lambda weights: jax.tree.map(jnp.negative, down(weights)[0]), start, times[few]
    )
    at_modes, _ = project_all(followed, bases)
    gaps = {
        "map": apart(modes, steps),
        "loss": apart(losses, theory.loss(steps, task).sum(-1)[:-1]),
        "flow": apart(at_modes, jax.tree.map(lambda v: v[few], flow)),
        "leak": float(jnp.ptp(leak)),
    }
    flow_loss = theory.loss(flow, task).sum(-1)
    return gaps, {"modes": modes, "flow": flow, "losses": losses, "flow_loss": flow_loss}


def mode_steps(
    rule: theory.ModeRule, begin: theory.Modes, task: theory.Task, eta: float, updates: int
) -> theory.Modes:
    """Plain gradient steps of the modes, [updates + 1, M]."""

    def step(modes: theory.Modes, _: None) -> tuple[theory.Modes, theory.Modes]:
        down = theory.descent(rule, modes, task)
        new = jax.tree.map(lambda v, d: v - eta * d, modes, down)
        return new, new

    start = jax.tree.map(jnp.asarray, begin)
    after = jax.jit(lambda modes: jax.lax.scan(step, modes, length=updates)[1])(start)
    return jax.tree.map(lambda v, more: jnp.concatenate([v[None], more]), start, after)


def invariants(updates: int, seed: int) -> Finding:
    """Rows 8 and 9: what any linear network conserves; nothing is aligned, inputs are coloured."""
    rng = np.random.default_rng(seed)
    inputs = np.cumsum(rng.normal(size=(12, 6, 3)), axis=1) / 2
    batch = full_batch(jnp.asarray(inputs), jnp.asarray(rng.normal(size=(12, 6, 2))), "per_step")
    feedback = jnp.asarray(rng.normal(size=(2, 8)))
    shapes = [(2, 8), (8, 8), (8, 3)]
    start = theory.Weights(*(jnp.asarray(0.3 * rng.normal(size=s)) for s in shapes))
    rows, data = [], {}
    for case in (BPTT, TBPTT, rflo(1.0, 0.35)):
        down = downhill(make_rule(case, 8, 2, feedback), case.alpha, batch)
        drift = []
        for eta in (0.005, 0.0025):
            count = round(updates * 0.02 / eta)
            weights, _ = descend(down, start, eta, count)
            constants = jax.vmap(
                lambda w, case=case: theory.conserved_matrix(case.mode_rule, w, feedback)
            )(weights)
            drift.append(float(jnp.abs(constants - constants[:1]).max()))
            data[f"{case.label}, eta={eta}"] = {
                "times": eta * np.arange(count + 1),
                "drift": jnp.abs(constants - constants[:1]).max((1, 2)),
            }
        moved = float(jnp.abs(weights.W[-1] - weights.W[0]).max())
        rows.append(
            Row("8", f"{case.label}: what is conserved drifts by O(eta) only",
                "half of it at eta/2", f"{drift[0] / drift[1]:.3f} (W moved {moved:.2f})",
                abs(drift[0] / drift[1] - 2), 0.1)
        )  # fmt: skip
    aligned = (feedback[None] * weights.A).sum((1, 2))
    shifted = weights.W - 0.35 * jnp.eye(8)[None]
    grown = 0.5 * ((shifted**2).sum((1, 2)) + (weights.B**2).sum((1, 2)))
    slope = float(np.polyfit(grown - grown[0], aligned - aligned[0], 1)[0])
    rows.append(
        Row("9", "<R, A> grows with (|W - rho|^2 + |B|^2)/2", "slope 1", f"{slope:.4f}",
            abs(slope - 1), 0.02)
    )  # fmt: skip
    data["alignment"] = {"aligned": aligned - aligned[0], "grown": grown - grown[0]}
    return Finding(rows, data)


def unaligned(updates: int, seed: int) -> Finding:
    """Row 15: do networks that start from small random weights align by themselves?"""
    eta, outputs, units, inputs_ = 0.01, 4, 16, 4
    rng = np.random.default_rng(seed)
    teacher = theory.Modes(
        np.array([2.0, 1.5, 1.2, 0.9]) * rng.uniform(0.9, 1.1, 4),
        np.array([0.8, 0.6, -0.5, 0.3]),
        np.ones(4),
    )
    keys = jax.random.split(jax.random.key(seed), 6)
    bases = theory.random_bases(keys[4], outputs, units, inputs_)
    inputs = theory.white_inputs(keys[5], 33, 8, inputs_)
    target = theory.realisable(teacher, 8).target
    targets = theory.lagged_targets(inputs, target, bases)
    batch = full_batch(inputs, targets)
    data_ = theory.lagged_correlations(inputs, targets, 4)
    shapes = [(outputs, units), (units, units), (units, inputs_), (outputs, units)]
    *small, feedback = (
        0.05 * jax.random.normal(key, shape, jnp.float64)
        for key, shape in zip(keys[:4], shapes, strict=True)
    )
    feedback = feedback * 6
    rows, data = [], {}
    for case in (BPTT, TBPTT, rflo(1.0, 0.35)):
        down = downhill(make_rule(case, units, outputs, feedback), case.alpha, batch)
        weights, losses = descend(down, theory.Weights(*small), eta, updates)
        few = jax.tree.map(lambda v: v[:: max(updates // 100, 1)], weights)
        found = jax.vmap(theory.alignment, (0, None))(few, data_)
        # Which share of A W^l B lies on the modes of the data: 1 once aligned.
        share = jax.vmap(on_the_modes, (0, None))(few, bases)
        told = {"of the map on the data's modes": share, "A and B with the data": found.weights,
                "W with itself, A and B": found.recurrence}  # fmt: skip
        said = [f"{name} {v[0]:.2f} -> {v[-1]:.3f}" for name, v in told.items()]
        rows.append(
            Row("15", f"{case.label}: alignment, from small random weights", "not predicted",
                f"{'; '.join(said)}; loss {losses[-1]:.1e}")
        )  # fmt: skip
        times = eta * max(updates // 100, 1) * np.arange(len(share))
        data[case.label] = {"times": times, "alignment": told,
                            "losses": losses[:: max(updates // 100, 1)]}  # fmt: skip
    return Finding(rows, data)


def on_the_modes(weights: theory.Weights, bases: theory.Bases) -> jax.Array:
    """The share of the network's map over lags 0, 1, 2 that is diagonal in the data's bases."""
    power = weights.B
    diagonal, whole = jnp.zeros(()), jnp.zeros(())
    for _ in range(3):
        inside = bases.U.T @ (weights.A @ power) @ bases.V
        diagonal += (jnp.diagonal(inside) ** 2).sum()
        whole += (inside**2).sum()
        power = weights.W @ power
    return diagonal / whole


def apart(one: Any, other: Any) -> float:
    """The largest difference of two pytrees."""
    gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), one, other)
    return float(np.max(jax.tree.leaves(gaps)))  # NaN if any is
