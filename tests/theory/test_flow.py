"""Flows of the modes against an independent integration, and against laws of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localgrad import theory
from tests.theory.problems import RULES, golden, mode_rule


def aligned_problem() -> tuple:
    at = golden("aligned/")
    modes = theory.Modes(at["a0"], at["w0"], at["b0"])
    return at, modes, theory.Task(at["s"], theory.lag_weights(8))


@pytest.mark.parametrize(
    "rule", ["bptt", "rflo", *(pytest.param(n, marks=pytest.mark.slow) for n in RULES[1:3])]
)
@pytest.mark.slow
def test_finite_sequences(rule):
    at, start, task = aligned_problem()
    found = golden(f"aligned/final/{rule}/")
    path = theory.integrate(mode_rule(rule, at["r"], float(at["rho"])), start, task, at["tgrid"])
    rows = np.stack([path.modes.a, path.modes.b, path.modes.w], 1)
    np.testing.assert_allclose(rows, found["modes_abw"], rtol=0, atol=1e-8)
    loss = theory.loss(path.modes, task).sum(-1)
    np.testing.assert_allclose(loss, found["loss"], rtol=0, atol=1e-10)
    assert np.isinf(path.stopped)


def test_leaky_units():
    at, start, task = aligned_problem()
    start, rates = theory.unleaky(start, 0.4)
    rule = theory.rflo(at["r"], 1 - 0.4)
    path = theory.integrate(rule, start, task, at["tgrid"], rates=rates)
    rows = np.stack([path.modes.a, path.modes.b, path.modes.w], 1)
    np.testing.assert_allclose(rows, at["final/rflo_leaky0.4/a_beta_m"], rtol=0, atol=1e-8)


ENDLESS = {
    "bptt_r_rho": theory.bptt(),
    "tbptt1_r_rho": theory.tbptt(1),
    **{
        f"rflo_r{r}_rho{rho}": theory.rflo(r, rho)
        for r, rho in [(0.9, 0.4), (-0.9, 0.4), (0.3, 0.4), (0.9, 0.0)]
    },
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.few(1)
def test_endless_sequences(name):
    t, a, b, w = golden(f"inf/{name}/")["t_abw"]
    start = theory.Modes(a[0], w[0], b[0])
    endless = theory.Endless(theory.Modes(1.2, 0.7, 1.0))
    path = theory.integrate(ENDLESS[name], start, endless, t)
    for got, want in zip(path.modes, (a, w, b), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    end = theory.endpoint(ENDLESS[name], start, endless.teacher)
    if np.isnan(end.s):
        assert min(abs(end.candidates - a[-1])) < 1e-5
    else:
        np.testing.assert_allclose(end.s, a[-1], atol=1e-5)


@pytest.mark.parametrize(
    "rule", [theory.bptt(), theory.tbptt(1), theory.tbptt(4), theory.rflo(0.7, 0.3)]
)
def test_long_sequences_become_endless_ones(rule):
    teacher, modes = theory.Modes(1.2, 0.7, 1.0), theory.Modes(0.8, 0.5, -0.6)
    one = theory.descent(rule, modes, theory.Endless(teacher))
    other = theory.descent(rule, modes, theory.realisable(teacher, 200))
    np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(
        theory.loss(modes, theory.Endless(teacher)),
        theory.loss(modes, theory.realisable(teacher, 200)),
        rtol=1e-12,
    )


def test_bptt_descends_the_loss():
    """BPTT's direction is the derivative of the loss, as autodiff finds it."""
    task = theory.realisable(theory.Modes(1.2, 0.7, 1.0), 6, "per_step")
    modes = theory.Modes(jnp.float64(0.8), jnp.float64(0.0), jnp.float64(-0.6))
    want = jax.grad(lambda modes: theory.loss(modes, task))(modes)
    np.testing.assert_allclose(theory.descent(theory.bptt(), modes, task), want, rtol=1e-12)


def test_rules_are_special_cases_of_each_other():
    task = theory.realisable(theory.Modes(1.2, 0.7, 1.0), 6)
    modes = theory.Modes(0.8, 0.5, -0.6)
    same = [
        (theory.rflo(modes.a, modes.w), theory.bptt()),
        (theory.rflo(modes.a, 0.0), theory.tbptt(1)),
        (theory.tbptt(6), theory.bptt()),
    ]
    for one, other in same:
        np.testing.assert_allclose(
            theory.descent(one, modes, task), theory.descent(other, modes, task), rtol=1e-12
        )


@pytest.mark.parametrize(
    "rule", ["rflo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bptt", "tbptt1"))]
)
@pytest.mark.slow
def test_plateaus(rule):
    """Half the loss is gone after the time that the outside program found; slopes 1, 1 and 0."""
    at = golden("plateau/")
    endless = theory.Endless(theory.Modes(1.0, 0.7, 1.0))
    moves = mode_rule(rule, 0.9, 0.4)
    times = np.linspace(0, 16, 3201)
    found = []
    for scale in at["eps"]:
        path = theory.integrate(moves, theory.Modes(scale, 0.0, scale), endless, times)
        found.append(float(theory.half_time(path, endless)))
    np.testing.assert_allclose(found, at[f"{rule}_t_half"], rtol=0, atol=2e-3)
    slope = np.diff(found)[-3:] / np.log(10)
    np.testing.assert_allclose(slope, 0.0 if rule == "rflo" else 1.0, atol=2e-3)


@pytest.mark.slow
def test_a_flow_stops_where_endless_sequences_lose_their_loss():
    """RFLO may leave |w| < 1 in finite time; the saved times do not move the moment."""
    rule, start = theory.rflo(-1.28, 0.48), theory.Modes(0.67, 0.16, -1.1)
    endless = theory.Endless(theory.Modes(-1.2, -0.74, 1.0))
    path = theory.integrate(rule, start, endless, np.linspace(0, 1, 11))
    stopped = float(path.stopped)
    assert 0.3 < stopped < 0.5
    before = np.asarray(path.times) <= stopped
    assert np.isfinite(path.modes.w[before]).all() and np.isnan(path.modes.w[~before]).all()
    np.testing.assert_allclose(
        theory.integrate(rule, start, endless, np.linspace(0, 5, 11)).stopped, stopped, rtol=1e-6
    )
    just = np.linspace(0, stopped * (1 - 1e-12), 11)
    last = theory.integrate(rule, start, endless, just).modes.w[-1]
    np.testing.assert_allclose(abs(last), 1.0, atol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: theory.tbptt(0), "horizon must be a positive integer"),
        (lambda: theory.rflo(1.0, 1.0), "decay must lie inside"),
        (lambda: theory.lag_weights(3, "last"), "'final' or 'per_step'; got 'last'"),
        (
            lambda: theory.integrate(
                theory.bptt(),
                theory.Modes(1.0, 0.0, 1.0),
                theory.realisable(theory.Modes(1.0, 0.5, 1.0), 3),
                [0.0, 2.0, 1.0],
            ),
            "times must be at least two increasing numbers",
        ),
        (
            lambda: theory.integrate(
                theory.bptt(),
                theory.Modes(1.0, 1.5, 1.0),
                theory.Endless(theory.Modes(1.0, 0.5, 1.0)),
                [0.0, 1.0],
            ),
            "start.w must lie inside",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_float32_is_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        theory.descent(
            theory.bptt(), theory.Modes(1.0, 0.0, 1.0), theory.Endless(theory.Modes(1.0, 0.5, 1.0))
        )
