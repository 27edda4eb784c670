"""Cells of every kind that people write, held to oracles written into the cells themselves."""

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
from tests.conformance import oracles
from tests.conformance.kinds import (
    CUT,
    DIAGONAL,
    IN,
    KINDS,
    WHOLE,
    Cell,
    Interleaved,
    N,
    Traces,
    Vanilla,
)
from tests.conformance.table import plain as plain_numbers

B, T = 2, 7
RULES = {"eprop": (localgrad.eprop, CUT), "snap": (localgrad.snap, DIAGONAL)}
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)


def model_of(name, how=WHOLE):
    """A cell of this kind, as rules take it, and its parameters."""
    cell = KINDS[name].make(how)
    if isinstance(cell, nnx.Module):
        return localgrad.from_nnx(cell)
    x = jnp.ones((B, IN))
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    return cell, jax.jit(cell.init)(jax.random.key(0), carry, x)["params"]


@functools.cache
def problem(name):
    """The cell, parameters of which none is zero, and a batch."""
    model, params = model_of(name)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    inputs = jnp.asarray(rng.normal(size=(B, T, IN)))
    step, start = oracles.runner(model)
    _, y = jax.eval_shape(step, params, start(inputs[:, 0]), inputs[:, 0])
    return (
        model,
        params,
        localgrad.Batch(inputs, jnp.asarray(rng.normal(size=(B, T, *y.shape[1:])))),
    )


def expected(name, how):
    """The gradient of the cell that stops what a rule does not credit."""
    _, params, batch = problem(name)
    model, own = model_of(name, how)
    own = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(params))
    found = jax.jit(functools.partial(oracles.bptt, model))(own, oracles.steps_of(batch))
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(found))


def updates(factory, name, **options):
    """The updates of one call."""
    model, params, batch = problem(name)
    rule = factory(model, optax.l2_loss, reduction="sum", **options)
    return rule(params, rule.init(params), batch)[0]


TAKEN = [name for name, kind in KINDS.items() if not kind.refusal]
REFUSED = [name for name, kind in KINDS.items() if kind.refusal]
TELLING = {
    "eprop": ("slstm", "interleaved", "traces", "tied"),
    "snap": ("interleaved", "heads", "twice"),
}
"""What is asked of them always: gates in heads and unit by unit, memories of another shape, weights
that work twice. The others are slow tests."""


def pairs(names):
    """Kinds and rules as pytest takes them."""
    return [
        pytest.param(name, rule, marks=() if name in TELLING[rule] else pytest.mark.slow)
        for name in names
        for rule in RULES
    ]


@pytest.mark.parametrize(("name", "rule"), pairs(TAKEN))
@pytest.mark.few(1)
def test_local_rules_take(name, rule):
    factory, how = RULES[rule]
    close(updates(factory, name, window=3), expected(name, how))


def test_the_oracles_tell_the_rules_apart():
    whole, cut, diagonal = (expected("vanilla", how) for how in (WHOLE, CUT, DIAGONAL))
    for a, b in ((whole, cut), (cut, diagonal), (diagonal, whole)):
        assert np.abs(a["u"] - b["u"]).max() > 1e-3


@pytest.mark.parametrize("rule", ["eprop", pytest.param("snap", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.few(2)
def test_local_rules_refuse_where_units_meet(name, rule):
    with pytest.raises(ValueError, match=f"(?s){rule} cannot credit cell .*{KINDS[name].refusal}"):
        updates(RULES[rule][0], name)


@pytest.mark.slow
@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.rtrl])
@pytest.mark.parametrize("name", KINDS)
def test_exact_rules_take_all(name, factory):
    close(updates(factory, name), expected(name, WHOLE))


@pytest.mark.parametrize(
    ("name", "factory"),
    [
        ("mapped", localgrad.rtrl),
        ("nnx_mapped", localgrad.bptt),
        ("namesakes", localgrad.bptt),
    ],
)
def test_exact_rules_take_what_is_seen_by_its_weights(name, factory):
    close(updates(factory, name), expected(name, WHOLE))


class LayersInAReadout(nn.Module):
    """A readout that maps its layer over the batch."""

    @nn.compact
    def __call__(self, h):
        layer = nn.Dense(2)
        return layer(h) if self.is_initializing() else jax.vmap(layer)(h)


def test_a_mapped_layer_is_named_where_it_must_be_heard():
    model, params, batch = read(nn.GRUCell(N), readout=LayersInAReadout())
    rule = localgrad.node_perturbation(model, optax.l2_loss, key=jax.random.key(0))
    with pytest.raises(ValueError, match="LayersInAReadout calls layer Dense_0 inside"):
        rule(params, rule.init(params), batch)


# ------------------------------------------------------------------------------------------------
# Both ways: the same numbers, whether Flax layers hold the weights or nobody does.


class Layered(Cell):
    """The equations of `Vanilla` in Flax layers."""

    @nn.compact
    def __call__(self, h, x):
        fed = nn.Dense(N, name="w")(x) + nn.Dense(N, use_bias=False, name="u")(h)
        h = 0.5 * h + 0.5 * jnp.tanh(fed)
        return h, h


def layered(tree):
    """Parameters of `Vanilla` as those of `Layered`."""
    return {"w": {"kernel": tree["w"], "bias": tree["b"]}, "u": {"kernel": tree["u"]}}


def lstm(tree):
    """The same for a stock LSTM, whose parameters both cells share."""
    return tree


RING = np.eye(N) + np.eye(N, k=1)
WAYS = {
    "eprop": localgrad.eprop,
    "rflo": functools.partial(localgrad.rflo, feedback="symmetric"),
    "snap": functools.partial(localgrad.snap, order=2, mask=RING),
    "mdgl": localgrad.mdgl,
    "deep_eprop": localgrad.deep_eprop,
    "kf_rtrl": functools.partial(localgrad.kf_rtrl, key=jax.random.key(3)),
    "ok": functools.partial(localgrad.ok, rank=2, key=jax.random.key(3)),
    "node_perturbation": functools.partial(localgrad.node_perturbation, key=jax.random.key(3)),
}
FEW = ("eprop", "kf_rtrl")


def rule_and_params(factory, model, params):
    """A streaming rule, twice called on one batch: its updates and its state."""
    rng = np.random.default_rng(0)
    batch = localgrad.Batch(*(jnp.asarray(rng.normal(size=(B, T, size))) for size in (IN, N)))
    rule = factory(model, optax.l2_loss, batch_size=B, window=3)
    _, state = rule(params, rule.init(params), batch)
    return rule(params, state, batch)


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in WAYS]
)
@pytest.mark.parametrize(
    ("plain", "bare", "to_plain"),
    [
        (Layered, Vanilla, layered),
        pytest.param(nn.LSTMCell, nn.OptimizedLSTMCell, lstm, marks=pytest.mark.slow),
    ],
    ids=["vanilla", "lstm"],
)
@pytest.mark.few(1)
def test_a_weight_is_a_weight_whoever_holds_it(name, plain, bare, to_plain):
    if bare is nn.OptimizedLSTMCell and name in ("rflo", "node_perturbation"):
        pytest.skip("gated cells are not for it; or noise is drawn a layer")
    options = {"param_dtype": float} if bare is nn.OptimizedLSTMCell else {}
    models = [make(features=N, **options) for make in (plain, bare)]
    carry = models[1].initialize_carry(jax.random.key(0), (B, IN))
    params = models[1].init(jax.random.key(0), carry, jnp.ones((B, IN)))["params"]
    one = rule_and_params(WAYS[name], models[0], to_plain(params))
    other = rule_and_params(WAYS[name], models[1], params)
    close(to_plain(other[0]), one[0])
    if bare is Vanilla:
        close(plain_numbers(other[1]), plain_numbers(one[1]))


# ------------------------------------------------------------------------------------------------
# What else works with cells that are seen by their weights.


def read(*cells, **ends):
    """A network of these cells, its parameters and a batch, in float32."""
    model = localgrad.Network(cells, **{"readout": nn.Dense(2)} | ends)
    rng = np.random.default_rng(0)
    inputs, targets = (rng.normal(size=(B, T, size)).astype(np.float32) for size in (IN, 2))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, inputs[:, 0])["params"]
    return model, params, localgrad.Batch(jnp.asarray(inputs), jnp.asarray(targets))


def test_groups_of_bare_parameters_learn_by_rules_of_their_own():
    model, params, batch = read(Vanilla())
    local = localgrad.eprop(model, optax.l2_loss)
    rules = {
        "noise": localgrad.node_perturbation(model, optax.l2_loss, key=jax.random.key(1)),
        "local": local,
    }
    labels = {"cells_0": {"w": "noise", "u": "local", "b": "local"}, "readout": "local"}
    found, _ = (rule := localgrad.mix(rules, labels))(params, rule.init(params), batch)
    wanted, _ = local(params, local.init(params), batch)
    for name in ("u", "b"):
        chex.assert_trees_all_close(found["cells_0"][name], wanted["cells_0"][name], rtol=1e-6)
    gap = np.abs(found["cells_0"]["w"] - wanted["cells_0"]["w"])
    assert gap.max() > 1e-3
    lines = localgrad.summary(rule, params).splitlines()
    assert any(line.startswith("cells_0/u ") and "local: own unit's past" in line for line in lines)


@pytest.mark.slow
def test_bare_parameters_in_half_precision_keep_their_dtype():
    model, params, batch = read(Interleaved(), nn.GRUCell(3))
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, batch))
    wanted, _ = rule(params, rule.init(params), batch)
    found, state = rule(half[0], rule.init(half[0]), half[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.eligibility)} == {jnp.dtype(jnp.float32)}
    assert localgrad.compare(found, wanted)["cells_0"].cosine > 0.999


@pytest.mark.slow
def test_a_stream_keeps_the_carry_that_the_cell_itself_has():
    model, params, batch = read(Traces())
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B)
    _, state = rule(params, rule.init(params), batch)  # nobody told it how wide inputs are
    loss, _, carry = localgrad.evaluate(model, optax.l2_loss, params, batch)
    chex.assert_trees_all_close((state.loss, state.carry), (loss, carry), atol=1e-6)
    fresh = localgrad.reset_state(state).carry
    chex.assert_trees_all_close(fresh, model.initialize_carry(jax.random.key(0), (B, IN)))
    tx = optax.chain(rule, optax.adam(1e-3))
    learn = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=1))
    assert learn(params, tx.init(params))[2].shape == (T,)
