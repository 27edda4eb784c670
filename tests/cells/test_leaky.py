"""`LeakyCell` against its equation, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad


@pytest.mark.parametrize("decay", [0.0, 0.9, np.array([0.1, 0.5, 1.0])])
@pytest.mark.parametrize("use_bias", [False, True])
def test_it_is_its_equation(decay, use_bias):
    cell = localgrad.LeakyCell(
        3, decay, scale=0.3, use_bias=use_bias, bias_init=nn.initializers.ones_init()
    )
    inputs = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    rnn = nn.RNN(cell)
    params = rnn.init(jax.random.key(1), inputs)
    layer = jax.tree.map(np.asarray, params["params"]["cell"]["i"])
    y = np.zeros((2, 3))
    for t, found in enumerate(np.asarray(jax.jit(rnn.apply)(params, inputs)).swapaxes(0, 1)):
        y = decay * y + 0.3 * (inputs[:, t] @ layer["kernel"] + use_bias)
        np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
    assert ("bias" in layer) == use_bias


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_precision(dtype):
    cell = localgrad.LeakyCell(3, 0.9, dtype=dtype, param_dtype=dtype)
    x = jnp.ones((2, 4), dtype)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    (carry, y), params = cell.init_with_output(jax.random.key(1), carry, x)
    assert {a.dtype for a in (carry, y, *jax.tree.leaves(params))} == {jnp.dtype(dtype)}


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\].*-0.1.*exp\(-dt / tau\)"):
        localgrad.LeakyCell(3, decay=-0.1)
    with pytest.raises(ValueError, match="scale must be 0 or more"):
        localgrad.LeakyCell(3, decay=0.9, scale=-1.0)
    with pytest.raises(ValueError, match=r"scale must be .* shape \(3,\).*got shape \(2,\)"):
        localgrad.LeakyCell(3, decay=0.9, scale=np.ones(2))
