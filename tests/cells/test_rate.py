"""`RateCell` against its equation, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad


@pytest.mark.parametrize("alpha", [1.0, 0.2, np.array([0.1, 0.5, 1.0])])
@pytest.mark.parametrize("learn_alpha", [False, True])
def test_it_is_its_equation(alpha, learn_alpha):
    cell = localgrad.RateCell(3, alpha=alpha, learn_alpha=learn_alpha, activation=jax.nn.relu)
    x, a = np.ones((2, 4), np.float32), np.full((2, 3), 0.5, np.float32)
    params = cell.init(jax.random.key(0), jnp.asarray(a), jnp.asarray(x))["params"]
    new, y = cell.apply({"params": params}, jnp.asarray(a), jnp.asarray(x))
    params = jax.tree.map(np.asarray, params)
    drive = x @ params["i"]["kernel"] + params["i"]["bias"] + a @ params["h"]["kernel"]
    expected = (1 - alpha) * a + alpha * np.maximum(drive, 0)
    np.testing.assert_allclose(new, expected, rtol=1e-5)
    np.testing.assert_array_equal(new, y)
    assert ("alpha" in params) == learn_alpha


def test_it_can_be_a_static_argument():
    first, second = (localgrad.RateCell(3, alpha=np.array([0.1, 0.5, 1.0])) for _ in range(2))
    assert hash(first) == hash(second) and first == second


@pytest.mark.parametrize("alpha", [0.0, 1.5, -0.1, float("nan"), np.array([0.5, 2.0, 0.1])])
def test_a_leak_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\]"):
        localgrad.RateCell(3, alpha=alpha)


def test_a_leak_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\).*got shape \(2,\)"):
        localgrad.RateCell(3, alpha=np.array([0.1, 0.2]))
