"""Rows 10, 11 and 12: of what rank weights change, and what that lets a network learn.

Nothing is aligned here. Letters: N units, I inputs, O outputs, E examples, T time steps, U updates.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.linear_dynamics.simulate import (
    BPTT,
    TBPTT,
    Case,
    downhill,
    full_batch,
    make_rule,
    rflo,
)
from experiments.linear_dynamics.table import Finding, Row, several
from localgrad import theory

UNITS, INPUTS, OUTPUTS = 30, 3, 2
COUNTS = (1, 2, 5, 12, 30)  # numbers of units of row 12
LEAKS = np.repeat([0.3, 0.6, 0.9], UNITS // 3)  # M = 3 time constants
STEP, SETTLED = 0.05, 6000  # row 12: the learning rate, and after how many updates all is still
EPROP, SNAP = Case("eprop", "e-prop", rho=0.5), Case("snap", "SnAp-1", rho=0.5)
OPTIMIZERS = {
    "SGD": optax.sgd(0.02),
    "momentum": optax.sgd(0.004, momentum=0.9),
    "Adam": optax.adam(0.003),
}


class Problem(NamedTuple):
    """Something to learn, nothing of it aligned.

    Attributes:
        start: the weights before.
        feedback: R [O, N].
        batches: inputs [U, E, T, I] and targets [U, E, T, O].
    """

    start: theory.Weights
    feedback: jax.Array
    batches: tuple[jax.Array, jax.Array]


def low_rank(updates: int, seed: int) -> Finding:
    """Row 10: singular values of what weights have changed by, `[W - W_0, B - B_0]`."""
    drawn = problem(updates, seed)
    plain, leaky = rflo(1.0, 0.5), rflo(1.0, 1 - LEAKS)
    frozen = optax.partition(
        {"train": OPTIMIZERS["SGD"], "freeze": optax.set_to_zero()},
        {"cells_0": "train", "readout": "freeze"},
    )
    runs: list[tuple[str, Case, Any, int | None]] = [
        ("RFLO, SGD", plain, OPTIMIZERS["SGD"], theory.rank_bound("rflo", OUTPUTS, UNITS)),
        ("RFLO, momentum", plain, OPTIMIZERS["momentum"], OUTPUTS),
        ("RFLO, SGD, 3 time constants", leaky, OPTIMIZERS["SGD"],
         theory.rank_bound("rflo", OUTPUTS, UNITS, time_constants=3)),
        ("TBPTT(1), SGD, frozen readout", TBPTT, frozen, OUTPUTS),
        ("e-prop, SGD, frozen readout", EPROP, frozen, OUTPUTS),
        ("RFLO, Adam", plain, OPTIMIZERS["Adam"], None),
        *((f"{case.label}, SGD", case, OPTIMIZERS["SGD"], None)
          for case in (TBPTT, EPROP, SNAP, BPTT)),
        ("BPTT, Adam", BPTT, OPTIMIZERS["Adam"], None),
    ]  # fmt: skip
    rows, data = [], {"units": UNITS, "outputs": OUTPUTS, "bounds": {}, "spectra": {}}
    for label, case, tx, bound in runs:
        row, values = trained_rank(label, case, tx, bound, drawn)
        rows.append(row)
        data["spectra"][label], data["bounds"][label] = values, bound
    one = problem(updates, seed, outputs=1)
    single = "RFLO, Adam of epsilon 0, one output"
    rows.append(trained_rank(single, plain, optax.adam(0.003, eps=1e-30), 1, one)[0])
    nothing = drawn._replace(start=drawn.start._replace(W=drawn.start.W * 0, B=drawn.start.B * 0))
    rows.append(state_row(plain, nothing))
    rows += [from_small(case, seed) for case in (TBPTT, EPROP)]
    return Finding(rows, data)


def trained_rank(
    label: str, case: Case, tx: Any, bound: int | None, drawn: Problem
) -> tuple[Row, np.ndarray]:
    """Of what rank weights changed, beside the bound if there is one, and the singular values."""
    outputs = len(drawn.start.A)
    rule = make_rule(case, UNITS, outputs, drawn.feedback)
    last, losses = jax.jit(functools.partial(learn, rule, tx))(drawn.start, drawn.batches)
    found = change(drawn.start, last)
    values = found.singular_values
    after = outputs if bound is None else bound
    next_one = float(values[after] / values[0])
    fill = [theory.state_dimension(states(case, w, drawn)) for w in (drawn.start, last)]
    told = f"rank {found.rank}, participation {theory.participation_ratio(values):.1f}, "
    told += f"s_{after + 1}/s_1 {next_one:.0e}, states {fill[0]:.1f} -> {fill[1]:.1f}, "
    told += f"loss {losses[:20].mean():.2f} -> {losses[-20:].mean():.2f}"
    if bound is None:
        return Row("10", f"{label}: rank of the change", "no bound", told), values
    error = next_one if found.rank == bound else 1.0
    return Row("10", f"{label}: rank of the change", f"{bound}", told, error, 1e-12), values


def state_row(case: Case, drawn: Problem) -> Row:
    """The claim that RFLO from W = B = 0 has hidden states of O dimensions, all along R^T."""
    rule = make_rule(case, UNITS, OUTPUTS, drawn.feedback)
    tx = OPTIMIZERS["SGD"]
    last, losses = jax.jit(functools.partial(learn, rule, tx))(drawn.start, drawn.batches)
    found = states(case, last, drawn)
    values = np.linalg.svd(found - found.mean(0), compute_uv=False)
    beyond = float(values[OUTPUTS] / values[0])
    return Row("10", "RFLO from W = B = 0: dimensions of hidden states", f"{OUTPUTS}",
               f"participation {theory.state_dimension(found):.2f}, s_3/s_1 {beyond:.0e}, "
               f"loss {losses[:20].mean():.2f} -> {losses[-20:].mean():.2f}",
               beyond if values[OUTPUTS - 1] > 1e-3 * values[0] else 1.0, 1e-12)  # fmt: skip


def states(case: Case, weights: theory.Weights, drawn: Problem) -> np.ndarray:
    """Hidden states of the network on the last batch, [E T, N]."""
    cell = localgrad.RateCell(
        UNITS, alpha=case.alpha, activation=lambda u: u, param_dtype=jnp.float64
    )
    params = {"params": {"cell": theory.to_params(weights)["cells_0"]}}
    return np.asarray(nn.RNN(cell).apply(params, drawn.batches[0][-1])).reshape(-1, UNITS)


def from_small(case: Case, seed: int) -> Row:
    """The claim that what is beyond rank O falls as the initial weights do.

    Gradient flow conserves `A^T A - (W - rho)(W - rho)^T - B B^T` under TBPTT(1) (rho = 0) and
    e-prop, so that `[W - rho, B]` is as A, of rank O, but for what the start has of it.
    """
    rng, units, rho = np.random.default_rng(seed), 8, case.rho
    inputs = jnp.asarray(np.cumsum(rng.normal(size=(8, 6, 3)), axis=1) / 2)
    kernel = rng.normal(size=(3, OUTPUTS))
    targets = jnp.asarray(np.cumsum(np.asarray(inputs), axis=1) @ kernel / 3)
    down = downhill(
        make_rule(case, units, OUTPUTS), case.alpha, full_batch(inputs, targets, "per_step")
    )
    shapes = [(OUTPUTS, units), (units, units), (units, 3)]
    drawn = theory.Weights(*(jnp.asarray(rng.normal(size=s) / units**0.5) for s in shapes))
    sizes = np.array([0.003, 0.01, 0.03])

    def begin(size: jax.Array) -> theory.Weights:
        small = jax.tree.map(lambda v: size * v, drawn)
        return small._replace(W=small.W + rho * jnp.eye(units))

    def velocity(weights: theory.Weights) -> theory.Weights:
        return jax.vmap(lambda one: jax.tree.map(jnp.negative, down(one)[0]))(weights)

    start = jax.vmap(begin)(jnp.asarray(sizes))
    path, _ = theory.solve(velocity, start, [0.0, 40.0], rtol=1e-8, atol=1e-10)
    last = [jax.tree.map(lambda v, k=k: np.asarray(v[-1, k]), path) for k in range(len(sizes))]
    joint = [np.hstack([one.W - rho * np.eye(units), one.B]) for one in last]
    values = np.array([np.linalg.svd(one, compute_uv=False) for one in joint])
    slope = float(np.polyfit(np.log(sizes), np.log(values[:, OUTPUTS]), 1)[0])
    name = "[W, B]" if rho == 0 else "[W - rho, B]"
    return Row("10", f"{case.label} from small weights: s_3 of {name} over their scale", "slope 1",
               f"slope {slope:.4f}; s_2, s_3 {several(values[1, 1:3], 2)}",
               abs(slope - 1) if values[:, 1].min() > 0.1 else 1.0, 0.05)  # fmt: skip


def nonlinearity(updates: int, seed: int) -> Finding:
    """Row 11: tanh units break the low rank, by the square of the amplitude.

    Inputs and targets are scaled by the amplitude, the learning rate by one over its square:
    linear networks would learn the same at any amplitude.
    """
    amplitudes = np.array([0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    start, feedback, batches = problem(updates, seed)
    data: dict[str, Any] = {"amplitudes": amplitudes, "ratio": {}, "participation": {}}
    for label, activation in (("tanh", jnp.tanh), ("tanh, slopes left out", ungated)):
        rule = make_rule(rflo(1.0, 0.5), UNITS, OUTPUTS, feedback, activation)

        def at(amplitude: jax.Array, rule: localgrad.LearningRule = rule) -> theory.Weights:
            scaled = tuple(amplitude * part for part in batches)
            return learn(rule, optax.sgd(0.02 / amplitude**2), start, scaled)[0]

        last = jax.jit(jax.vmap(at))(jnp.asarray(amplitudes))
        found = [
            change(start, jax.tree.map(lambda v, k=k: v[k], last)).singular_values
            for k in range(len(amplitudes))
        ]
        data["ratio"][label] = np.array([values[OUTPUTS] / values[0] for values in found])
        data["participation"][label] = np.array([theory.participation_ratio(v) for v in found])
    gated, straight = data["ratio"].values()
    slope = float(np.log(gated[1] / gated[0]) / np.log(amplitudes[1] / amplitudes[0]))
    rows = [
        Row("11", "RFLO, tanh: s_3/s_1 over amplitude, .003 to .01", "slope 2",
            f"slope {slope:.4f}", abs(slope - 2), 0.05),
        Row("11", "RFLO, tanh, slopes left out of the traces: s_3/s_1", "0",
            f"at most {straight.max():.0e}", float(straight.max()), 1e-12),
        Row("11", "RFLO, tanh at amplitude 1: s_3/s_1 and participation", "not predicted",
            f"{gated[-1]:.2g} and {data['participation']['tanh'][-1]:.2f}"),
    ]  # fmt: skip
    return Finding(rows, data)


def sizes(counts: tuple[int, ...], seed: int) -> Finding:
    """Row 12: what more units are worth, on a target of two poles with one input and one output.

    RFLO from W = B = 0 stays a network of one mode at any size, with feedback |R|.
    """
    steps, rho, rng = 12, 0.5, np.random.default_rng(seed)
    poles = rng.uniform([0.76, -0.55], [0.84, -0.45])
    teacher = theory.Modes(np.ones(2), poles, np.array([1.0, 0.8]))
    target = np.asarray(theory.realisable(teacher, steps).target.sum(0))
    task = theory.Task(target, theory.lag_weights(steps))
    floor = theory.stationary_points(theory.bptt(), task)[0].loss
    losses: dict[str, list[float]] = {"RFLO": [], "BPTT": []}
    predicted = []
    for units in counts:
        readout, feedback = (
            v / np.linalg.norm(v) * size
            for v, size in zip(rng.normal(size=(2, 1, units)), (0.3, 0.9), strict=True)
        )
        nothing = theory.Weights(readout, jnp.zeros((units, units)), jnp.zeros((units, 1)))
        small = (0.1 / np.sqrt(units) * rng.normal(size=m.shape) for m in nothing)
        along = float((readout * feedback).sum() / 0.9)
        predicted.append(theory.Modes(along, 0.0, 0.0))
        for case, start in ((rflo(0.9, rho), nothing), (BPTT, theory.Weights(*small))):
            loss = settle(case, start, target, feedback, seed)
            losses[case.label].append(loss)
    start = theory.Modes(*np.transpose(predicted))
    path = theory.integrate(theory.rflo(0.9, rho), start, task, np.linspace(0, 400, 3))
    modes = np.asarray(theory.loss(path.modes, task)[-1])
    return sizes_found(counts, losses, modes, floor)


def sizes_found(
    counts: tuple[int, ...], losses: dict[str, list[float]], modes: np.ndarray, floor: float
) -> Finding:
    """The rows of `sizes`."""
    local, full = np.array(losses["RFLO"]), np.array(losses["BPTT"])
    told = f"N = {', '.join(map(str, counts))}"
    rows = [
        Row("12", f"RFLO from zero, {told}: loss", several(modes), several(local),
            float(np.abs(local - modes).max()), 1e-6),
        Row("12", "BPTT with one unit: one pole's least loss", f"{floor:.4f}", f"{full[0]:.4f}",
            abs(full[0] - floor), 1e-6),
        Row("12", f"BPTT from small weights, {told}: loss", "0 for N > 1", several(full, 2),
            float(full[1:].max()), 1e-4),
    ]  # fmt: skip
    return Finding(rows, {"units": np.array(counts), "rflo": local, "bptt": full, "mode": modes,
                          "floor": floor})  # fmt: skip


def settle(
    case: Case, start: theory.Weights, target: np.ndarray, feedback: np.ndarray, seed: int
) -> float:
    """The loss at the last step of sequences, after many plain gradient steps on all of them."""
    steps, one = len(target), theory.Bases(*(jnp.eye(1, dtype=jnp.float64),) * 3)
    inputs = theory.white_inputs(jax.random.key(seed), steps + 1, steps, 1)
    batch = full_batch(inputs, theory.lagged_targets(inputs, target[None], one))
    down = downhill(make_rule(case, len(start.W), 1, feedback), case.alpha, batch)

    @jax.jit
    def run(weights: theory.Weights) -> jax.Array:
        def step(_: jax.Array, weights: theory.Weights) -> theory.Weights:
            return jax.tree.map(lambda v, d: v - STEP * d, weights, down(weights)[0])

        return down(jax.lax.fori_loop(0, SETTLED, step, weights))[1]

    return float(run(theory.Weights(*(jnp.asarray(m) for m in start))))


def problem(updates: int, seed: int, outputs: int = OUTPUTS) -> Problem:
    """Random weights, feedback and minibatches: coloured inputs through a random filter."""
    rng, examples, steps = np.random.default_rng(seed), 8, 10
    shapes = [(outputs, UNITS), (UNITS, UNITS), (UNITS, INPUTS), (outputs, UNITS)]
    *start, feedback = (0.5 * rng.normal(size=s) / np.sqrt(s[1]) for s in shapes)
    noise = rng.normal(size=(steps, updates, examples, INPUTS))
    inputs = [noise[0]]
    for fresh in noise[1:]:
        inputs.append(0.8 * inputs[-1] + 0.6 * fresh)  # coloured in time, of variance 1
    mixed = np.stack(inputs, 2) @ rng.normal(size=(INPUTS, INPUTS))  # and across channels
    kernels = rng.normal(size=(4, INPUTS, outputs)) / 4
    targets = sum(
        np.pad(mixed, ((0, 0), (0, 0), (lag, 0), (0, 0)))[:, :, :steps] @ kernel
        for lag, kernel in enumerate(kernels)
    )
    weights = theory.Weights(*(jnp.asarray(m) for m in start))
    return Problem(weights, jnp.asarray(feedback), (jnp.asarray(mixed), jnp.asarray(targets)))


def learn(
    rule: localgrad.LearningRule, tx: Any, start: theory.Weights, batches: Any
) -> tuple[theory.Weights, jax.Array]:
    """Trains on each minibatch once; the weights after, and the losses [U]."""
    chain = optax.chain(rule, tx)
    params = theory.to_params(start)
    first = (params, chain.init(params))

    def step(at: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, state = at
        inputs, targets = batch
        weight = jnp.full(inputs.shape[:2], 1 / (inputs.shape[0] * inputs.shape[1]))
        given = localgrad.Batch(inputs, targets, mask=weight)
        updates, state = chain.update(None, state, params, batch=given)
        updates = theory.to_params(theory.from_params(updates))  # biases stay at zero
        return (optax.apply_updates(params, updates), state), state[0].loss

    (last, _), losses = jax.lax.scan(step, first, batches)
    return theory.from_params(last), losses


def change(start: theory.Weights, last: theory.Weights) -> Any:
    """The rank and singular values of `[W - W_0, B - B_0]`."""
    before, after = ({"h": weights.W.T, "i": weights.B.T} for weights in (start, last))
    return theory.weight_change_rank(before, after, joint=True)["joint"]


@jax.custom_jvp
def ungated(u: jax.Array) -> jax.Array:
    """Tanh, whose slope every derivative takes for 1."""
    return jnp.tanh(u)


@ungated.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return jnp.tanh(primals[0]), tangents[0]
