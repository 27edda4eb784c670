"""`ReservoirCell`: how its weights are drawn, and that it is a rate cell in all else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.cells.reservoir import radius_of


def weights(cell, seed=0, inputs=3, batch=1):
    """The parameters of a cell."""
    x = jnp.zeros((batch, inputs))
    return cell.init(jax.random.key(seed), cell.initialize_carry(None, x.shape), x)["params"]


def eigenvalue(matrix):
    """The largest modulus of the eigenvalues, by LAPACK in float64."""
    return abs(np.linalg.eigvals(np.asarray(matrix, np.float64))).max()


@pytest.mark.parametrize("density", [0.01, 0.1, 0.55, 1.0])
@pytest.mark.parametrize("features", [1, 2, 9, 64])
@pytest.mark.few(4)
def test_weights_are_sparse_and_have_the_spectral_radius(features, density):
    cell = localgrad.ReservoirCell(features, spectral_radius=1.3, density=density)
    for seed in range(3):
        kernel = np.asarray(weights(cell, seed)["h"]["kernel"])
        np.testing.assert_allclose(eigenvalue(kernel), 1.3, rtol=2e-5)
        assert np.all((kernel != 0).sum(0) == max(1, round(density * features)))


def test_radius_of_matrices_that_are_hard(x64):
    """No gap between moduli, no basis of eigenvectors, far from normal, very small."""
    rng = np.random.default_rng(0)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    jordan = np.array([[0.5, 1e3], [0.0, 0.5]])
    upper = np.triu(rng.normal(size=(30, 30)), 1) + np.diag(np.linspace(0.1, 0.7, 30))
    for matrix, radius in ((turn, 1.0), (jordan, 0.5), (upper, 0.7), (1e-30 * turn, 1e-30)):
        np.testing.assert_allclose(radius_of(jnp.asarray(matrix)), radius, rtol=1e-4)
    assert np.isnan(radius_of(jnp.asarray(np.eye(3, k=1))))


@pytest.mark.slow
def test_weights_are_drawn_within_their_scales():
    cell = localgrad.ReservoirCell(200, input_scale=0.7, bias_scale=0.2)
    params = weights(cell, inputs=50)
    for leaf, scale in ((params["i"]["kernel"], 0.7), (params["i"]["bias"], 0.2)):
        assert leaf.min() < -0.95 * scale and leaf.max() > 0.95 * scale
        assert abs(leaf).max() <= scale
    assert not np.any(weights(localgrad.ReservoirCell(20))["i"]["bias"])
    assert not np.any(weights(localgrad.ReservoirCell(20, spectral_radius=0.0))["h"]["kernel"])
    each = [weights(cell, seed)["h"]["kernel"] for seed in range(2)]
    assert np.any((each[0] != 0) != (each[1] != 0))


@pytest.mark.parametrize(("radius", "forgets"), [(0.8, True), (3.0, False)])
def test_it_forgets_how_it_began_below_one_and_not_far_above(radius, forgets):
    cell = localgrad.ReservoirCell(80, spectral_radius=radius, input_scale=0.1, bias_scale=0.0)
    params = weights(cell)
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(size=(200, 1, 3)), jnp.float32)
    carry = jnp.asarray(rng.normal(size=(2, 80)), jnp.float32)

    def step(a, x):
        return cell.apply({"params": params}, a, jnp.broadcast_to(x, (2, 3)))[0], None

    (one, other), _ = jax.lax.scan(step, carry, xs)
    assert (jnp.linalg.norm(one - other) < 1e-4) == forgets


@pytest.mark.parametrize("rule", [localgrad.eprop, localgrad.rflo, localgrad.snap])
@pytest.mark.few(1)
def test_rules_credit_it_as_a_rate_cell(rule):
    kind = {"alpha": 0.3, "activation": jax.nn.sigmoid}
    cells = (localgrad.ReservoirCell(4, **kind), localgrad.RateCell(4, **kind))
    params = weights(cells[0], batch=2)
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    batch = localgrad.Batch(x, jnp.ones((2, 5, 4)))
    options = {} if rule is localgrad.snap else {"feedback": "symmetric"}
    found = []
    for cell in cells:
        made = rule(cell, optax.l2_loss, **options)
        found.append(made(params, made.init(params), batch)[0])
    for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.any(ours)


def test_transforms_and_dtypes():
    cell = localgrad.ReservoirCell(12, density=0.3, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: weights(cell))
    assert {a.dtype for a in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
    x = jnp.zeros((1, 3))
    init = lambda key: cell.init(key, cell.initialize_carry(key, x.shape), x)["params"]  # noqa: E731
    many = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), 3))["h"]["kernel"]
    for kernel in many:
        np.testing.assert_allclose(eigenvalue(kernel), 0.9, rtol=0.02)


def test_it_can_be_a_static_argument():
    first, second = (localgrad.ReservoirCell(3, alpha=np.array([0.1, 0.5, 1.0])) for _ in range(2))
    assert hash(first) == hash(second) and first == second == first.clone()
    assert first != localgrad.ReservoirCell(3, alpha=0.1, density=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spectral_radius": -0.1}, "spectral_radius must be .* 0 or more, and finite; got -0.1"),
        ({"input_scale": float("inf")}, "input_scale must be .* 0 or more, and finite; got inf"),
        ({"bias_scale": float("nan")}, "bias_scale must be .* 0 or more, and finite; got nan"),
        ({"density": 0.0}, r"density must .*lie in \(0, 1\]; got 0.0.*10 / features"),
        ({"density": 10}, r"density must .*lie in \(0, 1\]; got 10"),
        ({"alpha": 0.0}, "alpha must lie in"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        localgrad.ReservoirCell(5, **options)
