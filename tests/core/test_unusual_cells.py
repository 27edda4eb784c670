"""Cells that are not in Flax, under the local and the exact rules, against jax.grad."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import localgrad

B, T, N, IN, OUT = 3, 6, 4, 3, 2


class _Cell(nn.RNNCellBase):
    cut: bool = False  # stop the gradient where e-prop cuts: the oracle of the local rules

    def seen(self, carry):
        return jax.lax.stop_gradient(carry) if self.cut else carry

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], N), jnp.float64)

    @property
    def num_feature_axes(self):
        return 1


class Gain(_Cell):
    """One number for all units and one a unit, outside any layer; y reads x directly."""

    @nn.compact
    def __call__(self, carry, x):
        gain = self.param("gain", nn.initializers.constant(0.7), ())
        decay = self.param("decay", nn.initializers.constant(0.6), (N,))
        drive = nn.Dense(N, name="i")(x) + nn.Dense(N, name="h")(self.seen(carry))
        carry = jnp.broadcast_to(decay, drive.shape) * carry + gain * jnp.tanh(drive)
        return carry, carry + x.sum(-1, keepdims=True)


class Concatenated(_Cell):
    """One layer for x and the carry, a leak, and a layer of its own to the output."""

    @nn.compact
    def __call__(self, carry, x):
        both = jnp.concatenate([x, self.seen(carry)], -1)
        carry = 0.7 * carry + jnp.tanh(nn.Dense(N, name="both")(both))
        return carry, nn.Dense(OUT, name="out")(jnp.tanh(carry))


class TwoStates(_Cell):
    """An adapting unit: its two states feed each other within the unit."""

    @nn.compact
    def __call__(self, carry, x):
        v, a = carry
        drive = nn.Dense(N, name="i")(x) + nn.Dense(N, name="h")(self.seen(v))
        new_v = jnp.tanh(drive - 0.5 * a + 0.3 * v)
        return (new_v, 0.8 * a + 0.2 * v * v), new_v

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        zeros = jnp.zeros((*input_shape[:-1], N), jnp.float64)
        return zeros, zeros


CELLS = {"gain": Gain, "concatenated": Concatenated, "two states": TwoStates}


def batch_for(width):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (B, T, IN))
    return localgrad.Batch(x, jax.random.normal(keys[1], (B, T, width)))


def parameters(cell, batch):
    carry = cell.initialize_carry(None, (B, IN))
    params = cell.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
    return jax.tree.map(lambda a: a.astype(jnp.float64) + 0.1, params)


def gradient(cell, params, batch):
    def total(params):
        carry, losses = cell.initialize_carry(None, (B, IN)), 0.0
        for t in range(T):
            carry, y = cell.apply({"params": params}, carry, batch.inputs[:, t])
            losses += optax.l2_loss(y, batch.targets[:, t]).mean()
        return losses / T

    return jax.grad(total)(params)


def largest_gap(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.abs(x - y).max(), a, b)))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("window", [None, 2])
def test_rules_on_unusual_cells(x64, name, window):
    cell = CELLS[name]()
    batch = batch_for(OUT if name == "concatenated" else N)
    params = parameters(cell, batch)
    example = batch.inputs[0, 0]
    exact, local = gradient(cell, params, batch), gradient(CELLS[name](cut=True), params, batch)
    for factory, oracle in ((localgrad.rtrl, exact), (localgrad.eprop, local)):
        rule = factory(cell, optax.l2_loss, window=window, example=example)
        updates, _ = rule(params, rule.init(params), batch)
        assert largest_gap(updates, oracle) < 1e-12
    rule = localgrad.bptt(cell, optax.l2_loss)
    assert largest_gap(rule(params, rule.init(params), batch)[0], exact) < 1e-12
    assert largest_gap(exact, local) > 1e-4  # or the cut would have nothing to cut


@pytest.mark.parametrize("name", CELLS)
def test_streams_of_unusual_cells_split_anywhere(x64, name):
    cell = CELLS[name]()
    batch = batch_for(OUT if name == "concatenated" else N)
    params = parameters(cell, batch)
    example = batch.inputs[0, 0]
    for factory in (localgrad.rtrl, localgrad.eprop, localgrad.snap):
        rule = factory(cell, optax.l2_loss, batch_size=B, reduction="sum", example=example)
        whole, end = rule(params, rule.init(params), batch)
        state, total = rule.init(params), jax.tree.map(jnp.zeros_like, params)
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            piece = jax.tree.map(lambda a, s=start, e=stop: a[:, s:e], batch)
            updates, state = rule(params, state, piece)
            total = jax.tree.map(jnp.add, total, updates)
        assert largest_gap(total, whole) < 1e-12
        assert largest_gap(state._replace(loss=end.loss), end) < 1e-12
