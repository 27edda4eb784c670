"""`rtrl` where no unit feels another's past: the same numbers, and less that is held.

The dense form is had by denying what `rtrl` finds out about its cells.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.core.model.stack import assemble
from localgrad.core.params import leaves_of
from localgrad.core.passes.eligibility import units_never_meet
from localgrad.rules import influence
from tests.conformance import zoo
from tests.golden.common import assert_close

pytestmark = pytest.mark.usefixtures("x64")

B, T, INPUTS = 3, 10, 3


class MinGRU(zoo.Cell):
    """A GRU whose gate and candidate see the input alone."""

    @nn.compact
    def __call__(self, h, x):
        z = jax.nn.sigmoid(self.layer("z", use_bias=True)(x))
        h = (1 - z) * h + z * self.layer("h")(x)
        return h, h


class Roll(zoo.Cell):
    """Units without a recurrent layer that hear their neighbours all the same."""

    @nn.compact
    def __call__(self, h, x):
        h = 0.5 * jnp.roll(h, 1, axis=-1) + self.layer("i")(x)
        return h, h


def lru(features: int, outputs: int = 3) -> localgrad.LRUCell:
    return localgrad.LRUCell(features, outputs=outputs, param_dtype=jnp.float64)


def leaky(features: int) -> localgrad.LeakyCell:
    return localgrad.LeakyCell(features, decay=0.7, scale=0.3, param_dtype=jnp.float64)


MODELS = {
    "mingru": lambda: localgrad.Network((MinGRU(),), readout=nn.Dense(2)),
    "stack": lambda: localgrad.Network((leaky(4), lru(3)), readout=nn.Dense(2)),
}


def problem(model: localgrad.Network) -> tuple:
    """Random parameters and data, with weights and resets."""
    rng = np.random.default_rng(0)
    inputs, targets = (jnp.asarray(rng.normal(size=(B, T, n))) for n in (INPUTS, 2))
    mask, reset = jnp.asarray(rng.uniform(size=(B, T))), jnp.asarray(rng.uniform(size=(B, T)) < 0.1)
    carry = model.initialize_carry(jax.random.key(0), (B, INPUTS))
    params = jax.jit(model.init)(jax.random.key(1), carry, inputs[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    return params, localgrad.Batch(inputs, targets, mask, reset)


def streamed(model: localgrad.Network, params: dict, batch: localgrad.Batch) -> tuple:
    """The updates of two calls, the first of a single step, and the state after them."""
    rule = localgrad.rtrl(model, optax.l2_loss, batch_size=B, reduction="sum", window=3)
    state, total = rule.init(params), jax.tree.map(jnp.zeros_like, params)
    for steps in (slice(0, 1), slice(1, T)):
        piece = jax.tree.map(lambda a, steps=steps: a[:, steps], batch)
        updates, state = rule(params, state, piece)
        total = jax.tree.map(jnp.add, total, updates)
    return total, state


def units_of(dense: jax.Array, live: int) -> jax.Array:
    """Of an influence [B, S N, ..., N], a unit's response to its own columns: [B, S, ..., N]."""
    split = dense.reshape(B, live, -1, *dense.shape[2:])
    return jnp.diagonal(split, axis1=2, axis2=-1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.few(1)
def test_it_is_dense_rtrl_and_bptt(name, monkeypatch):
    model = MODELS[name]()
    params, batch = problem(model)
    updates, state = streamed(model, params, batch)
    exact = localgrad.bptt(model, optax.l2_loss, reduction="sum")
    assert_close(updates, exact(params, exact.init(params), batch)[0])

    monkeypatch.setattr(influence, "units_never_meet", lambda stack, params: False)
    same, dense = streamed(model, params, batch)
    assert_close(updates, same)
    for cell, blocks in dense.influence.items():
        for path, block in blocks.items():
            held = state.influence[cell][path]
            own = path[0] == cell
            live = held.shape[1]
            assert_close(held, units_of(block, live) if own else block)


def test_it_holds_one_number_a_parameter_and_state_component():
    model = localgrad.Network((lru(6),), readout=nn.Dense(2))
    params, _ = problem(model)
    state = localgrad.rtrl(model, optax.l2_loss, batch_size=B).init(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.influence))
    assert held == 8 * B * 2 * (2 * INPUTS * 6 + 3 * 6)
    room = {"batch_size": B, "max_influence_bytes": held}
    localgrad.rtrl(model, optax.l2_loss, **room).init(params)
    room["max_influence_bytes"] -= 1
    with pytest.raises(ValueError, match="rtrl's influence would take .* more than"):
        localgrad.rtrl(model, optax.l2_loss, **room).init(params)


@pytest.mark.parametrize(
    "cells",
    [
        (Roll(),),
        (nn.SimpleCell(4),),
        (zoo.Matrix(),),
        (nn.OptimizedLSTMCell(4),),
        (lru(4), nn.GRUCell(3)),
    ],
    ids=lambda cells: "-".join(type(cell).__name__ for cell in cells),
)
@pytest.mark.few(2)
def test_units_that_meet_are_told(cells):
    model = localgrad.Network(cells)
    x = jnp.ones((B, INPUTS))
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    params = leaves_of(jax.eval_shape(model.init, jax.random.key(1), carry, x)["params"])
    assert not units_never_meet(assemble(model, params, x), params)
