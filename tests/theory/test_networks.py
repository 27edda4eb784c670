"""The library's own rules on a linear network against the theory and against numbers from outside.

`linear_theory.npz` was made by an independent NumPy and SciPy program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localgrad import theory
from localgrad.theory.flow import solve
from tests.theory.problems import RULES, batch_of, direction, golden, linear, mode_rule


@pytest.mark.parametrize("loss", ["final", "per_step"])
@pytest.mark.parametrize("rule", ["bptt", "tbptt1", "tbptt3", "rflo_rho0.3"])
@pytest.mark.few(2)
def test_one_update(rule, loss):
    at = golden("unit/")
    found = golden(f"unit/{loss}/{rule}/")
    weights = theory.Weights(at["A"], at["W"], at["B"])
    alpha = 1.0
    if rule == "rflo_rho0.3":  # traces that decay by rho belong to units that leak 1 - rho
        alpha = 0.7
        weights = theory.Weights(at["A"], (at["W"] - 0.3 * np.eye(6)) / alpha, at["B"] / alpha)
    learner = linear(rule.split("_")[0], at["R"], 6, 2, alpha)
    got = direction(learner, weights, batch_of(at["X"], at["Y"], loss))
    got = theory.Weights(got.A, got.W / alpha, got.B / alpha)
    for name, value in zip("AWB", got, strict=True):
        np.testing.assert_allclose(value, found[f"D{name}"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["final", "per_step"])
@pytest.mark.parametrize("rule", ["bptt", "rflo"])
def test_one_update_of_leaky_units(rule, loss):
    at, found = golden("unit/"), golden(f"unit/{loss}/{rule}_leaky_alpha0.4/")
    weights = theory.Weights(at["A"], at["W"], at["B"])
    learner = linear(rule, at["R"], 6, 2, alpha=0.4)
    got = direction(learner, weights, batch_of(at["X"], at["Y"], loss))
    for name, value in zip("AWB", got, strict=True):
        np.testing.assert_allclose(value, found[f"D{name}"], rtol=0, atol=1e-12)


def aligned_start(alpha: float = 1.0) -> tuple:
    at = golden("aligned/")
    bases = theory.Bases(at["U"], at["P"], at["V"])
    modes = theory.Modes(at["a0"], at["w0"], at["b0"])
    return at, bases, modes


@pytest.mark.slow
def test_aligned_problem():
    at, bases, modes = aligned_start()
    weights = theory.aligned(modes, bases, others=at["w_extra"])
    for name, value in zip(("A0", "W0", "B0"), weights, strict=True):
        np.testing.assert_allclose(value, at[name], rtol=0, atol=1e-12)
    back, leak = theory.project(weights, bases)
    for one, other in zip(back, modes, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    assert leak < 1e-12
    silent = theory.Modes(at["r"], np.zeros(3), np.zeros(3))
    np.testing.assert_allclose(theory.aligned(silent, bases).A, at["R"], rtol=0, atol=1e-12)
    teacher = theory.Modes(at["a_star"], at["w_star"], at["b_star"])
    target = theory.realisable(teacher, steps=8).target
    np.testing.assert_allclose(target, at["s"], rtol=0, atol=1e-12)
    outputs = theory.lagged_targets(at["X"], target, bases)
    last = at["Y"] if at["Y"].ndim == 2 else at["Y"][:, -1]
    np.testing.assert_allclose(outputs[:, -1], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.few(1)
def test_gradient_steps_follow_the_mode_map(rule):
    """1000 plain gradient steps of the network, of the modes, and of the outside program."""
    at, bases, modes = aligned_start()
    found = golden(f"aligned/gd_eta0.02/{rule}/")
    rho, eta = float(at["rho"]), 0.02
    alpha = 1 - rho if rule == "rflo" else 1.0
    learner = linear(rule, at["R"], 6, 3, alpha)
    batch = batch_of(at["X"], at["Y"], "final")
    task = theory.Task(at["s"], theory.lag_weights(8))
    moves = mode_rule(rule, at["r"], rho)

    @jax.jit
    def train(weights, modes):
        def step(so_far, _):
            weights, modes = so_far
            leaky = theory.Weights(
                weights.A, (weights.W - (1 - alpha) * jnp.eye(6)) / alpha, weights.B / alpha
            )
            down = direction(learner, leaky, batch)
            down = theory.Weights(down.A, down.W / alpha, down.B / alpha)
            new = jax.tree.map(lambda v, d: v - eta * d, weights, down)
            along = theory.descent(moves, modes, task)
            moved = jax.tree.map(lambda v, d: v - eta * d, modes, along)
            return (new, moved), (new, moved)

        return jax.lax.scan(step, (weights, modes), length=1000)[1]

    start = theory.Weights(*(jnp.asarray(at[name]) for name in ("A0", "W0", "B0")))
    weights, path = train(start, jax.tree.map(jnp.asarray, modes))
    np.testing.assert_allclose(weights.A[-1], found["A_final"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(weights.W[-1], found["W_final"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(weights.B[-1], found["B_final"], rtol=0, atol=1e-10)
    last, leak = theory.project(jax.tree.map(lambda v: v[-1], weights), bases)
    assert leak < 1e-12
    for got, want in zip(last, path, strict=True):
        np.testing.assert_allclose(got, want[-1], rtol=0, atol=1e-10)
    rows = jnp.stack([path.a, path.b, path.w], 1)[49::50]  # found has modes in order a, b, w
    np.testing.assert_allclose(rows, found["modes_abw"][1:], rtol=0, atol=1e-10)


SLOW_FLOWS = [(n, loss) for n in RULES for loss in ("final", "per_step")]
SLOW_FLOWS.remove(("rflo", "final"))


@pytest.mark.parametrize(
    "rule, loss",
    [("rflo", "final"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_FLOWS)],
)
@pytest.mark.slow
def test_the_rules_flow_follows_the_mode_equations(rule, loss):
    """Gradient flow of a whole network, its velocity made by the library's rule."""
    bases = theory.random_bases(jax.random.key(0), outputs=3, units=5, inputs=2)
    teacher = theory.Modes(np.array([1.5, 1.2]), np.array([0.7, -0.5]), np.array([0.9, -0.8]))
    start = theory.Modes(np.array([0.3, 0.2]), np.array([0.1, -0.1]), np.array([0.1, -0.25]))
    task = theory.realisable(teacher, steps=5, loss=loss)
    inputs = theory.white_inputs(jax.random.key(1), examples=11, steps=5, inputs=2)
    batch = batch_of(inputs, theory.lagged_targets(inputs, task.target, bases), loss)
    r, alpha = np.array([0.8, 1.1]), 0.6
    feedback = theory.aligned(theory.Modes(r, r * 0, r * 0), bases).A
    learner = linear(rule, feedback, 5, 3, alpha)
    times = np.linspace(0.0, 10.0, 6)

    weights, _ = solve(
        lambda weights: jax.tree.map(jnp.negative, direction(learner, weights, batch)),
        theory.aligned(start, bases, others=0.2),
        times,
        rtol=1e-9,
        atol=1e-11,
    )
    unleaky, rates = theory.unleaky(start, alpha)
    predicted = theory.integrate(
        mode_rule(rule, r, 1 - alpha), unleaky, task, times, rates=rates
    ).modes
    predicted = theory.leaky(predicted, alpha)
    for k in range(len(times)):
        got, leak = theory.project(jax.tree.map(lambda v, k=k: v[k], weights), bases)
        assert leak < 0.21  # the direction without a mode stays where it was
        for name in "awb":
            want = getattr(predicted, name)[k]
            np.testing.assert_allclose(getattr(got, name), want, rtol=0, atol=1e-6)


def test_white_inputs_refuse_too_few():
    with pytest.raises(ValueError, match="steps \\* inputs = 12"):
        theory.white_inputs(jax.random.key(0), examples=11, steps=4, inputs=3)


def test_too_many_modes():
    bases = theory.random_bases(jax.random.key(0), outputs=1, units=5, inputs=2)
    with pytest.raises(ValueError, match="2 modes do not fit"):
        theory.aligned(theory.Modes(np.ones(2), np.zeros(2), np.ones(2)), bases)
