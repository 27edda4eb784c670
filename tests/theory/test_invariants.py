"""Conserved quantities along flows of modes, and of whole networks under the library's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localgrad import theory
from localgrad.theory.flow import solve
from tests.theory.problems import batch_of, direction, linear, mode_rule


@pytest.mark.parametrize("rule", ["bptt", "tbptt1", "rflo"])
@pytest.mark.few(1)
def test_along_a_flow_of_modes(rule):
    task = theory.Task(np.array([0.3, -0.8, 0.5, 0.2]), theory.lag_weights(4, "per_step"))
    rates = theory.Modes(1.0, 0.3, 2.0)
    moves = mode_rule(rule, -0.7, 0.4)
    start = theory.Modes(0.5, -0.2, 0.8)
    path = theory.integrate(moves, start, task, np.linspace(0, 20, 9), rates=rates)
    found = theory.conserved(moves, path.modes, rates)
    np.testing.assert_allclose(found, found[0], rtol=0, atol=1e-9)
    assert np.ptp(path.modes.w) > 0.1


@pytest.mark.parametrize(
    "rule, alpha",
    [
        ("rflo", 0.4),
        *(pytest.param(n, 1.0, marks=pytest.mark.slow) for n in ("bptt", "tbptt1", "rflo")),
    ],
)
def test_along_a_flow_of_any_linear_network(rule, alpha):
    """Not aligned, correlated inputs, targets that no network can give.

    Of RFLO's matrix the trace says that `<R, A>` grows by half of what other weights' squares do.
    """
    rng = np.random.default_rng(0)
    inputs = np.cumsum(rng.normal(size=(6, 5, 2)), axis=1)
    batch = batch_of(inputs, rng.normal(size=(6, 5, 2)), "per_step")
    feedback = rng.normal(size=(2, 4))
    learner = linear(rule, feedback, 4, 2, alpha)
    start = theory.Weights(
        *(jnp.asarray(0.4 * rng.normal(size=s)) for s in [(2, 4), (4, 4), (4, 2)])
    )

    @jax.jit
    def velocity(weights):
        params = theory.to_params(weights)
        updates, _ = learner(params, learner.init(params), batch)
        return jax.tree.map(jnp.negative, theory.from_params(updates))

    path, _ = solve(velocity, start, np.linspace(0, 3, 4))
    moves = mode_rule(rule, 1.0, 1 - alpha)
    found = [
        theory.conserved_matrix(moves, jax.tree.map(lambda v, k=k: v[k], path), feedback, alpha)
        for k in range(4)
    ]
    for matrix in found:
        np.testing.assert_allclose(matrix, found[0], rtol=0, atol=1e-9)
    assert float(jnp.abs(path.W[-1] - path.W[0]).max()) > 0.05
    assert direction(learner, start, batch).A.shape == (2, 4)


def test_errors():
    weights = theory.Weights(np.ones((1, 2)), np.ones((2, 2)), np.ones((2, 1)))
    for modes, message in (
        (theory.Modes(np.nan, 0.0, 1.0), r"modes\.a must be finite"),
        (theory.Modes("a", 0.0, 1.0), r"modes\.a must be real numbers"),
        (theory.Modes(np.ones(2), np.ones(3), 1.0), r"a \(2,\), w \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            theory.conserved(theory.bptt(), modes)
    with pytest.raises(ValueError, match="feedback must be the matrix R"):
        theory.conserved_matrix(theory.rflo(1.0, 0.3), weights)
    with pytest.raises(ValueError, match="alpha must be 1 for bptt"):
        theory.conserved_matrix(theory.bptt(), weights, alpha=0.5)
