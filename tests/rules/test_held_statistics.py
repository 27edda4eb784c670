"""Cells that normalise, with their statistics held: the gradient of a program that stops them."""

import contextlib
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad
from localgrad.core.model.statistics import holding
from tests.conformance import oracles
from tests.conformance.oracles import CUT, dense, sg
from tests.conformance.zoo import Cell, concat, leaky

B, T, N, IN, OUT = 2, 8, 4, 3, 2
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)


def normalised(p, x, groups=1, centred=True):
    """Each group of columns by its own mean and deviation, which are constants."""
    each = x.reshape(*x.shape[:-1], groups, -1)
    mean = sg(each.mean(-1, keepdims=True)) if centred else 0.0
    size = sg(jnp.sqrt(((each - mean) ** 2).mean(-1, keepdims=True) + 1e-6))
    y = ((each - mean) / size).reshape(x.shape) * p["scale"][None]
    return y + p["bias"][None] if "bias" in p else y


def gated(h, drive):
    """DreamerV3's GRU, whose three gates come normalised from one layer."""
    reset, new, update = jnp.split(drive, 3, axis=-1)
    update = jax.nn.sigmoid(update - 1)
    h = update * jnp.tanh(jax.nn.sigmoid(reset) * new) + (1 - update) * h
    return h, h


class Dreamer(Cell):
    """LayerNorm over the gates of all units."""

    @nn.compact
    def __call__(self, h, x):
        drive = nn.Dense(3 * self.features, use_bias=False, name="w")(jnp.concatenate([x, h], -1))
        return gated(h, nn.LayerNorm(param_dtype=float, name="norm")(drive))


def wide(p, h, x, how):
    """One layer for input and carry, with gates."""
    drive = dense(p, jnp.concatenate([x, h if how == oracles.EXACT else sg(h)], -1))
    if how == oracles.DIAGONAL:
        own = jnp.diagonal(p["kernel"][x.shape[-1] :].reshape(h.shape[-1], 3, -1), 0, 0, 2)
        drive += jnp.tile(h - sg(h), 3) * sg(own.reshape(1, -1))
    return drive


def dreamer(p, h, x, how):
    return gated(h, normalised(p["norm"], wide(p["w"], h, x, how)))


class Scaled(Cell):
    """RMSNorm over the drives of leaky rate units."""

    @nn.compact
    def __call__(self, h, x):
        drive = self.layer("i")(x) + self.layer("h")(h)
        h = leaky(h, nn.RMSNorm(param_dtype=float, name="norm")(drive))
        return h, h


def scaled(p, h, x, how):
    drive = dense(p["i"], x) + oracles.recurrent(p["h"], h, how)
    h = leaky(h, normalised(p["norm"], drive, centred=False))
    return h, h


class Grouped(Cell):
    """GroupNorm over the state itself."""

    @nn.compact
    def __call__(self, h, x):
        h = leaky(h, self.layer("w", use_bias=True)(jnp.concatenate([x, h], -1)))
        h = nn.GroupNorm(2, param_dtype=float, name="norm")(h)
        return h, h


def grouped(p, h, x, how):
    h = normalised(p["norm"], concat(p, h, x, how)[0], groups=2)
    return h, h


class Before(Cell):
    """LayerNorm, without gain and bias, over what its recurrent layer receives."""

    @nn.compact
    def __call__(self, h, x):
        norm = nn.LayerNorm(use_scale=False, use_bias=False)
        h = leaky(h, self.layer("i")(x) + self.layer("h")(norm(h)))
        return h, h


def before(p, h, x, how):
    plain = normalised({"scale": jnp.ones(h.shape[-1])}, h)
    h = leaky(h, dense(p["i"], x) + oracles.recurrent(p["h"], plain, how))
    return h, h


class NNXDreamer(nnx.Module):
    """`Dreamer` of NNX layers."""

    def __init__(self, inputs, features, **options):
        self.features = features
        self.w = nnx.Linear(inputs + features, 3 * features, use_bias=False, **options)
        self.norm = nnx.LayerNorm(3 * features, **options)

    def __call__(self, h, x):
        return gated(h, self.norm(self.w(jnp.concatenate([x, h], -1))))

    def initialize_carry(self, input_shape, rngs):
        return jnp.full((*input_shape[:-1], self.features), 0.3)


class NNXScaled(NNXDreamer):
    """`Scaled` of NNX layers."""

    def __init__(self, inputs, features, **options):
        self.features = features
        self.i = nnx.Linear(inputs, features, use_bias=False, **options)
        self.h = nnx.Linear(features, features, use_bias=False, **options)
        self.norm = nnx.RMSNorm(features, **options)

    def __call__(self, h, x):
        h = leaky(h, self.norm(self.i(x) + self.h(h)))
        return h, h


@functools.cache
def problem(*cells):
    """A model of these cells, its parameters, none zero, a batch, and what an oracle takes."""
    model = localgrad.Network(cells, readout=nn.Dense(OUT)) if len(cells) > 1 else cells[0]
    rng = np.random.default_rng(0)
    width = OUT if len(cells) > 1 else N
    batch = localgrad.Batch(*(jnp.asarray(rng.normal(size=(B, T, n))) for n in (IN, width)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = jax.jit(model.init)(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.5 * rng.normal(size=a.shape)), params)
    steps = oracles.steps_of(batch)
    equations = {Dreamer: dreamer, Scaled: scaled, Grouped: grouped, Before: before}
    return (
        model,
        params,
        batch,
        oracles.net_of(tuple(equations[type(cell)] for cell in cells), model, steps),
        steps,
    )


def learned(factory, model, params, batch, **options):
    """The updates of two calls of a stream, summed."""
    rule = factory(
        model,
        optax.l2_loss,
        held_statistics=True,
        reduction="sum",
        batch_size=B,
        example=batch.inputs[0, 0],
        **options,
    )
    state, found = rule.init(params), []
    for piece in (slice(0, T // 2), slice(T // 2, T)):
        updates, state = rule(params, state, jax.tree.map(lambda a, s=piece: a[:, s], batch))
        found.append(updates)
    return jax.tree.map(jnp.add, *found)


STACK = Dreamer(N), Scaled(N - 1)
RULES = {"eprop": CUT, "snap": oracles.DIAGONAL, "mdgl": oracles.ONCE, "deep_eprop": "deep"}


@pytest.fixture(autouse=True)
def float64(x64):
    yield


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.few(1)
def test_the_statistics_carry_no_credit(rule):
    model, params, batch, net, steps = problem(*STACK)
    if rule == "deep_eprop":
        expected = jax.jit(lambda p: oracles.deep(net, p, steps, CUT))(params)
    else:
        expected = jax.jit(lambda p: oracles.local(net, p, steps, RULES[rule]))(params)
    found = learned(getattr(localgrad, rule), model, params, batch)
    close(found, expected)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("rule", "cell"),
    [("eprop", Grouped()), ("snap", Grouped()), ("snap", Before())],
    ids=["eprop", "snap", "before"],
)
@pytest.mark.slow
def test_states_may_be_normalised(rule, cell):
    """By groups as they leave a step; as they enter a recurrent layer."""
    model, params, batch, net, steps = problem(cell)
    expected = oracles.local(net, params, steps, RULES[rule])
    close(learned(getattr(localgrad, rule), model, params, batch), expected)


def test_units_that_only_leak_are_for_rflo():
    model, params, batch, net, steps = problem(Scaled())
    found = learned(localgrad.rflo, model, params, batch, feedback="symmetric")
    close(found, oracles.local(net, params, steps, CUT))


@pytest.mark.slow
def test_sets_that_hold_all_units_leave_out_the_statistics_alone():
    model, params, batch, net, steps = problem(Dreamer())
    ring = np.eye(N) + np.eye(N, k=1) + np.eye(N, k=1 - N)
    there = np.concatenate([np.ones((IN, 3 * N)), np.tile(ring, 3)])
    params = params | {"w": {"kernel": params["w"]["kernel"] * there}}
    found = learned(localgrad.snap, model, params, batch, order=N, mask=ring)
    expected = oracles.local(net, params, steps, oracles.EXACT)
    close(found, expected | {"w": {"kernel": expected["w"]["kernel"] * there}})


@pytest.mark.slow
def test_nnx_cells_give_the_same():
    model, params, batch, *_ = problem(*STACK)
    expected = learned(localgrad.eprop, model, params, batch)
    options = {"param_dtype": float, "rngs": nnx.Rngs(0)}
    cells = [NNXDreamer(IN, N, **options), NNXScaled(N, N - 1, **options)]
    network = localgrad.NNXNetwork(cells, readout=nnx.Linear(N - 1, OUT, **options))
    model, own = localgrad.from_nnx(network)
    nnx.replace_by_pure_dict(own, params)
    close(nnx.to_pure_dict(learned(localgrad.eprop, model, own, batch)), expected)
    rule = localgrad.eprop(model, optax.l2_loss, example=batch.inputs[0, 0])
    with pytest.raises(ValueError, match=r"cells_0 \(NNXDreamer\).*held_statistics=True"):
        rule(own, rule.init(own), batch)


@pytest.mark.slow
def test_it_is_said():
    model, params, batch, *_ = problem(*STACK)
    example = batch.inputs[0, 0]
    rule = localgrad.eprop(model, optax.l2_loss, held_statistics=True, example=example)
    assert repr(rule).endswith("reduction='mean', held_statistics=True)")
    said = localgrad.summary(rule, params).splitlines()
    assert all(line.endswith(", statistics held") for line in said if "cells_" in line)
    assert not any("held" in line for line in said if "readout" in line)
    plain = localgrad.Network((nn.GRUCell(N),), readout=nn.Dense(OUT))
    carry = plain.initialize_carry(jax.random.key(0), (B, IN))
    others = plain.init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    rule = localgrad.eprop(plain, optax.l2_loss, held_statistics=True)
    assert "held" not in localgrad.summary(rule, others)


@pytest.mark.parametrize("cell", [Dreamer(), Scaled(), Grouped()], ids=lambda c: type(c).__name__)
@pytest.mark.few(1)
def test_the_refusal_names_it(cell):
    model, params, batch, *_ = problem(cell)
    rule = localgrad.eprop(model, optax.l2_loss)
    with pytest.raises(ValueError, match="held_statistics=True leaves the credit of its stat"):
        rule(params, rule.init(params), batch)


class ByHand(Cell):
    """A normalisation that no layer of Flax makes."""

    @nn.compact
    def __call__(self, h, x):
        drive = self.layer("i")(x) + self.layer("h")(h)
        h = leaky(h, drive / jnp.sqrt(1 + (drive**2).mean(-1, keepdims=True)))
        return h, h


def test_only_layers_of_flax_are_held():
    cell, batch = ByHand(), problem(Scaled())[2]
    carry = cell.initialize_carry(jax.random.key(0), (B, IN))
    params = cell.init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    rule = localgrad.eprop(cell, optax.l2_loss, held_statistics=True)
    with pytest.raises(ValueError, match="reaches other units than its own.*Use an exact rule"):
        rule(params, rule.init(params), batch)
    with pytest.raises(ValueError, match="held_statistics must be True or False; got 'yes'"):
        localgrad.eprop(cell, optax.l2_loss, held_statistics="yes")


@pytest.mark.parametrize("units", [16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_what_holding_costs_by_itself(units):
    model = localgrad.Network((Dreamer(units),), readout=nn.Dense(OUT))
    inputs = jax.random.normal(jax.random.key(0), (16, 50, IN))
    targets = jnp.roll(inputs, 3, axis=1)[..., :OUT]
    carry = model.initialize_carry(jax.random.key(0), (16, IN))
    params = model.init(jax.random.key(1), carry, inputs[:, 0])["params"]

    def loss(params, hold):
        def step(carry, x):
            with holding() if hold else contextlib.nullcontext():
                return model.apply({"params": params}, carry, x)

        _, outputs = jax.lax.scan(step, carry, jnp.moveaxis(inputs, 1, 0))
        return optax.l2_loss(outputs, jnp.moveaxis(targets, 1, 0)).mean()

    exact, held = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, hold) for hold in (False, True)
    )
    assert 0.9 < localgrad.compare(held, exact)["cells_0"].cosine < 0.99
