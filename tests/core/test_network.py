"""`Network` against its equations, and as the cell of `nn.RNN`."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, IN, OUT = 3, 6, 2, 5


def made(model, inputs):
    carry = model.initialize_carry(jax.random.key(0), inputs[:, 0].shape)
    return jax.jit(model.init)(jax.random.key(1), carry, inputs[:, 0])["params"]


@pytest.fixture
def inputs():
    return jax.random.normal(jax.random.key(2), (B, T, IN))


def test_it_is_its_parts_one_after_another(inputs):
    parts = nn.Dense(3), nn.GRUCell(4), nn.LSTMCell(2), nn.Dense(OUT)
    model = localgrad.Network((nn.GRUCell(4), nn.LSTMCell(2)), nn.Dense(OUT), nn.Dense(3))
    params, x = made(model, inputs), inputs[:, 0]
    carry = jax.tree.map(
        lambda a: a + 0.3, model.initialize_carry(jax.random.key(0), inputs[:, 0].shape)
    )
    encoder, gru, lstm, readout = (
        lambda *args, part=part, name=name: part.apply({"params": params[name]}, *args)
        for part, name in zip(parts, ("encoder", "cells_0", "cells_1", "readout"), strict=True)
    )
    first, z = gru(carry[0], encoder(x))
    second, z = lstm(carry[1], z)
    found = model.apply({"params": params}, carry, x)
    chex.assert_trees_all_close(found, ((first, second), readout(z)))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.few(1)
def test_a_drawn_initial_carry_is_the_one_flax_draws(inputs, depth):
    drawn = nn.initializers.normal(1.0)
    cells = [nn.GRUCell(4, carry_init=drawn), nn.LSTMCell(3, carry_init=drawn)][:depth]
    model = localgrad.Network(tuple(cells), readout=nn.Dense(OUT))
    params = made(model, inputs)
    expected = nn.RNN(model).apply({"params": {"cell": params}}, inputs)
    batch = localgrad.Batch(inputs, expected)
    loss, outputs, _ = localgrad.evaluate(model, optax.l2_loss, params, batch)
    chex.assert_trees_all_close(outputs, expected, atol=1e-6)
    assert loss < 1e-10


@pytest.mark.parametrize("symbols", [False, True])
def test_shapes_of_its_carry(symbols):
    encoder = nn.Embed(7, 3) if symbols else None
    model = localgrad.Network((nn.GRUCell(4), nn.LSTMCell(2)), encoder=encoder)
    assert model.num_feature_axes == (0 if symbols else 1)
    carry = model.initialize_carry(jax.random.key(0), (B,) if symbols else (B, IN))
    assert jax.tree.map(jnp.shape, carry) == ((B, 4), ((B, 2), (B, 2)))


@pytest.mark.slow
def test_an_encoder_or_readout_may_have_no_parameters():
    class OneHot(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.nn.one_hot(x, 4)

    model = localgrad.Network((nn.GRUCell(4),), encoder=OneHot())
    symbols = jax.random.randint(jax.random.key(0), (B, T), 0, 4)
    bare = nn.GRUCell(4)
    onehot = jax.nn.one_hot(symbols, 4)
    params = made(bare, onehot)
    batch = localgrad.Batch(symbols, jnp.ones((B, T, 4)))
    for factory in (localgrad.bptt, localgrad.eprop, localgrad.rtrl):
        rule = factory(bare, optax.l2_loss)
        expected, _ = rule(params, rule.init(params), batch._replace(inputs=onehot))
        rule = factory(model, optax.l2_loss, example=symbols[0, 0])
        found, _ = rule({"cells_0": params}, rule.init({"cells_0": params}), batch)
        chex.assert_trees_all_close(found["cells_0"], expected, atol=1e-6)


def test_no_output_depends_on_what_comes_later(inputs):
    model = localgrad.Network((nn.GRUCell(4), nn.LSTMCell(2)), readout=nn.Dense(OUT))
    params, targets = made(model, inputs), jnp.ones((B, T, OUT))

    def each(inputs):
        batch = localgrad.Batch(inputs, targets)
        return localgrad.evaluate(model, optax.l2_loss, params, batch)[1].sum(-1)  # [B, T]

    slopes = np.abs(jax.jacrev(each)(inputs)).sum(-1)  # output (b, s) by input (c, t)
    for b in range(B):
        for c in range(B):
            if b == c:
                assert np.all(np.triu(slopes[b, :, b], 1) == 0)
                assert np.all(np.tril(slopes[b, :, b])[np.tril_indices(T)] > 0)
            else:
                assert np.all(slopes[b, :, c] == 0)
