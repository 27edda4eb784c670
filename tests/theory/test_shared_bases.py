"""How far weights and data are from sharing singular vectors: known answers, and their names."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from localgrad import theory


@functools.cache
def problem() -> tuple[theory.Weights, np.ndarray]:
    """An aligned network of 3 outputs, 7 units and 4 inputs, and data of five lags."""
    rng = np.random.default_rng(0)
    bases = theory.random_bases(jax.random.key(0), outputs=3, units=7, inputs=4)
    modes = theory.Modes(*rng.normal(size=(3, 3)))
    weights = theory.aligned(modes, bases, others=rng.normal(size=4))
    target = rng.normal(size=(3, 5))
    inputs = theory.white_inputs(jax.random.key(1), 29, 7, 4)
    outputs = theory.lagged_targets(inputs, target, bases)
    data = np.asarray(theory.lagged_correlations(inputs, outputs, 5))
    want = np.einsum("om,ml,im->loi", bases.U[:, :3], target, bases.V[:, :3])
    np.testing.assert_allclose(data, want, atol=1e-12)
    return weights, data


def turned(size: int, by: float) -> np.ndarray:
    """A rotation of all directions, by an angle or so."""
    skew = np.random.default_rng(9).normal(size=(size, size))
    return scipy.linalg.expm(by * (skew - skew.T) / size**0.5)


def test_aligned_problems_have_ones():
    weights, data = problem()
    np.testing.assert_allclose(theory.alignment(weights, data), 1.0, atol=1e-12)
    leaky = weights._replace(W=(weights.W - 0.6 * np.eye(7)) / 0.4)
    np.testing.assert_allclose(theory.alignment(leaky, data), 1.0, atol=1e-12)


def test_each_number_sees_what_is_its_own():
    """The data's bases turn between lags; the readout's turn; W alone, or it is skew."""
    weights, data = problem()
    found = theory.alignment(weights, [data[0], turned(3, 0.5) @ data[1], *data[2:]])
    assert found.data < 0.99 and abs(found.recurrence - 1) < 1e-12
    found = theory.alignment(weights._replace(A=turned(3, 0.5) @ weights.A), data)
    assert found.weights < 0.99 and min(found.data, found.recurrence) > 1 - 1e-12
    spun = turned(7, 0.5)
    found = theory.alignment(weights._replace(W=spun @ weights.W @ spun.T), data)
    assert found.recurrence < 0.99 and min(found.data, found.weights) > 1 - 1e-12
    skew = np.triu(np.ones((7, 7)), 1)
    found = theory.alignment(weights._replace(W=skew - skew.T), data)
    assert found.recurrence < 0.5


def test_it_falls_by_the_square_of_the_angle():
    weights, data = problem()
    lost = [
        1 - np.array(theory.alignment(weights._replace(A=weights.A @ turned(7, angle)), data))
        for angle in (0.01, 0.02)
    ]
    np.testing.assert_allclose((lost[1] / lost[0])[1:], 4.0, rtol=2e-2)


def test_unrelated_matrices_have_little_of_it():
    rng = np.random.default_rng(0)
    shapes = [(20, 20, 40), (20, 40, 40), (20, 40, 20), (20, 4, 20, 20)]
    a, w, b, data = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    found = jax.vmap(theory.alignment)(theory.Weights(a, w, b), data)
    for cosine in found:
        assert 0 < float(cosine.mean()) < 0.1  # about 1/20


@pytest.mark.parametrize("part", ["A", "W", "B"])
@pytest.mark.parametrize("axis", [0, 1])
def test_each_wrong_shape_is_named(part, axis):
    weights, data = problem()
    wrong = np.repeat(getattr(weights, part), 2, axis=axis)
    for other in (wrong, wrong[0]):
        with pytest.raises(ValueError, match=r"weights A \[O, N\], W \[N, N\], B \[N, I\]; got"):
            theory.alignment(weights._replace(**{part: other}), data)


def test_errors():
    with pytest.raises(ValueError, match="weights must be Weights"):
        theory.alignment({"cells_0": {}}, np.ones((4, 2, 3)))
    with pytest.raises(ValueError, match="L at least 1"):
        theory.alignment(problem()[0], problem()[1][:0])
    with pytest.raises(ValueError, match=r"inputs \[E, T, I\] .*got \(2, 3\), \(2, 3\)"):
        theory.lagged_correlations(np.ones((2, 3)), np.ones((2, 3)), 1)
    weights, data = problem()
    with pytest.raises(ValueError, match="correlations must be"):
        theory.alignment(weights, data[:, :2])
    with pytest.raises(ValueError, match="correlations must be finite"):
        theory.alignment(weights, data * np.nan)
    with pytest.raises(ValueError, match=r"weights\.A must be finite"):
        theory.alignment(weights._replace(A=weights.A * np.nan), data)
    with pytest.raises(ValueError, match="lags from 1 to T"):
        theory.lagged_correlations(np.ones((2, 3, 1)), np.ones((2, 3, 1)), 4)
    with pytest.raises(ValueError, match=r"lags must be a positive integer; got 1\.5"):
        theory.lagged_correlations(np.ones((2, 3, 1)), np.ones((2, 3, 1)), 1.5)


def test_every_public_name_is_documented_and_has_an_example():
    names = [name for name in vars(theory) if name[0] != "_"]
    public = [name for name in names if not inspect.ismodule(getattr(theory, name))]
    assert len(public) > 40
    for name in public:
        assert ">>>" in inspect.getdoc(getattr(theory, name)), name
