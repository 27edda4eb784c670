"""`RTUCell` against its equations in complex numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad


@pytest.mark.parametrize("linear", [False, True])
def test_it_is_its_equations(linear):
    rnn = nn.RNN(localgrad.RTUCell(5, linear=linear, r_min=0.4, r_max=0.9))
    inputs = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    params = rnn.init(jax.random.key(1), inputs)
    own = jax.tree.map(np.asarray, params["params"]["cell"])
    size = np.exp(-np.exp(own["nu_log"]))
    assert size.min() >= 0.4 and size.max() <= 0.9
    turn = size * np.exp(1j * np.exp(own["theta_log"]))
    weights = own["W_1"]["kernel"] + 1j * own["W_2"]["kernel"]
    h = np.zeros((2, 5))
    for t, found in enumerate(np.asarray(jax.jit(rnn.apply)(params, inputs)).swapaxes(0, 1)):
        u = turn * h + np.sqrt(1 - size**2) * (inputs[:, t] @ weights)
        y = np.maximum(u.real, 0) + 1j * np.maximum(u.imag, 0)
        h = u if linear else y
        np.testing.assert_allclose(
            found, np.concatenate([y.real, y.imag], -1), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("cell", [localgrad.RTUCell, localgrad.ElementwiseLSTMCell])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.few(1)
def test_precision(cell, dtype):
    cell, x = cell(3, dtype=dtype, param_dtype=dtype), jnp.ones((2, 4), dtype)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    (carry, y), params = cell.init_with_output(jax.random.key(1), carry, x)
    leaves = jax.tree.leaves((carry, y, params))
    assert {a.dtype for a in leaves} == {jnp.dtype(dtype)}
    assert all(np.isfinite(np.asarray(a, float)).all() for a in leaves)


def test_a_ring_that_is_none_is_refused():
    with pytest.raises(ValueError, match="0 <= r_min < r_max <= 1; got r_min=0.5 and r_max=0.5"):
        localgrad.RTUCell(3, r_min=0.5, r_max=0.5)


@pytest.mark.parametrize(
    "make",
    [
        localgrad.RTUCell,
        localgrad.LRUCell,
        localgrad.ElementwiseLSTMCell,
        localgrad.LIFCell,
        localgrad.ALIFCell,
        lambda n: localgrad.RateCell(n, alpha=0.5),
        lambda n: localgrad.LeakyCell(n, decay=0.5),
    ],
)
@pytest.mark.parametrize("features", [0, -1, 2.5, True])
def test_a_cell_without_units_is_refused(make, features):
    with pytest.raises(ValueError, match=f"features must be a positive integer; got {features}"):
        make(features)
