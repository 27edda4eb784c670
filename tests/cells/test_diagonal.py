"""`LRUCell` against its equation and its initial distribution, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad


@pytest.mark.parametrize("skip", [False, True])
def test_it_is_its_equation(skip):
    rnn = nn.RNN(localgrad.LRUCell(5, outputs=3, skip=skip, r_min=0.4, r_max=0.9))
    inputs = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    params = rnn.init(jax.random.key(1), inputs)
    own = jax.tree.map(np.asarray, params["params"]["cell"])
    turn = np.exp(-np.exp(own["nu_log"]) + 1j * np.exp(own["theta_log"]))
    b = own["B_re"]["kernel"] + 1j * own["B_im"]["kernel"]
    c = own["C_re"]["kernel"] + 1j * own["C_im"]["kernel"]
    h = np.zeros((2, 5))
    for t, found in enumerate(np.asarray(jax.jit(rnn.apply)(params, inputs)).swapaxes(0, 1)):
        h = turn * h + np.exp(own["gamma_log"]) * (inputs[:, t] @ b)
        y = (h @ c).real + (inputs[:, t] @ own["D"]["kernel"] if skip else 0)
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
    assert ("D" in own) == skip


@pytest.mark.slow
def test_where_it_begins():
    cell = localgrad.LRUCell(2000, r_min=0.5, r_max=0.9, max_phase=1.0)
    carry = cell.initialize_carry(jax.random.key(0), (1, 2))
    params = cell.init(jax.random.key(1), carry, jnp.ones((1, 2)))["params"]
    size, phase = np.exp(-np.exp(params["nu_log"])), np.exp(params["theta_log"])
    assert size.min() > 0.499 and size.max() < 0.901 and 0 < phase.min() and phase.max() < 1.001
    assert abs(np.mean(size**2) - (0.25 + 0.81) / 2) < 0.02  # uniform in area
    np.testing.assert_allclose(np.exp(params["gamma_log"]), np.sqrt(1 - size**2), rtol=1e-4)
    assert abs(np.var(params["B_re"]["kernel"]) - 0.25) < 0.03
    assert params["C_im"]["kernel"].shape == (2000, 2000)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_precision(dtype):
    cell = localgrad.LRUCell(3, dtype=dtype, param_dtype=dtype)
    x = jnp.ones((2, 4), dtype)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    (carry, y), params = cell.init_with_output(jax.random.key(1), carry, x)
    leaves = jax.tree.leaves((carry, y, params))
    assert {a.dtype for a in leaves} == {jnp.dtype(dtype)}
    assert all(np.isfinite(np.asarray(a, float)).all() for a in leaves)


@pytest.mark.parametrize("ring", [(-0.1, 0.5), (0.5, 0.5), (0.5, 1.1), (float("nan"), 1.0)])
def test_a_ring_that_is_none_is_refused(ring):
    with pytest.raises(ValueError, match="0 <= r_min < r_max <= 1; got"):
        localgrad.LRUCell(3, r_min=ring[0], r_max=ring[1])


def test_no_phases_are_refused():
    with pytest.raises(ValueError, match="max_phase must be positive; got 0"):
        localgrad.LRUCell(3, max_phase=0)
