"""`evaluate`, `learn`, `reset` and `summary`."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import localgrad
from catalogue import RULES
from tests.conformance.table import by_machinery

B, T, IN, N, OUT = 3, 10, 2, 4, 2


@functools.cache
def problem(**kwargs):
    model = localgrad.Network((nn.GRUCell(N), nn.LSTMCell(N)), readout=nn.Dense(OUT), **kwargs)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (B, T, IN))
    if "encoder" in kwargs:
        inputs = jax.random.randint(keys[0], (B, T), 0, 5)
    batch = localgrad.Batch(inputs, jax.random.normal(keys[1], (B, T, OUT)))
    carry = model.initialize_carry(keys[2], batch.inputs[:, 0].shape)
    return model, jax.jit(model.init)(keys[2], carry, batch.inputs[:, 0])["params"], batch


def piece(batch, start, stop):
    return jax.tree.map(lambda a: a[:, start:stop], batch)


@pytest.mark.parametrize("kwargs", [{}, {"encoder": nn.Embed(5, 3)}], ids=["dense", "embed"])
@pytest.mark.slow
def test_evaluate_is_what_flax_runs(kwargs):
    model, params, batch = problem(**kwargs)
    loss, outputs, carry = localgrad.evaluate(model, optax.l2_loss, params, batch)
    runner = nn.RNN(model, return_carry=True)
    end, expected = runner.apply({"params": {"cell": params}}, batch.inputs)
    chex.assert_trees_all_close((outputs, carry), (expected, end), atol=1e-6)
    chex.assert_trees_all_close(loss, optax.l2_loss(expected, batch.targets).mean(), rtol=1e-5)


def test_evaluate_goes_on_from_a_carry():
    model, params, batch = problem()
    whole = localgrad.evaluate(model, optax.l2_loss, params, batch)
    first = localgrad.evaluate(model, optax.l2_loss, params, piece(batch, 0, 4))
    second = localgrad.evaluate(model, optax.l2_loss, params, piece(batch, 4, T), first[2])
    chex.assert_trees_all_close(second[2], whole[2], atol=1e-6)
    chex.assert_trees_all_close(jnp.concatenate([first[1], second[1]], 1), whole[1], atol=1e-6)


@pytest.mark.parametrize(
    "chunk", [1, 3, *(pytest.param(c, marks=pytest.mark.slow) for c in (10, 20))]
)
@pytest.mark.few(1)
def test_learn_is_a_loop_of_updates(chunk):
    model, params, batch = problem()
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B)
    tx = optax.chain(rule, optax.adam(1e-2))
    learned, opt_state, losses = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=chunk))(
        params, tx.init(params), batch
    )
    state, expected = tx.init(params), []
    for start in range(0, T, chunk):
        updates, state = tx.update(None, state, params, batch=piece(batch, start, start + chunk))
        params = optax.apply_updates(params, updates)
        expected.append(optax.tree.get(state, "loss"))
    chex.assert_trees_all_close(learned, params, atol=1e-5)
    chex.assert_trees_all_close(opt_state, state, atol=1e-5)
    chex.assert_trees_all_close(losses, jnp.stack(expected), atol=1e-6)


def test_learn_refuses_a_chunk_that_is_none():
    model, params, batch = problem()
    tx = optax.chain(localgrad.eprop(model, optax.l2_loss, batch_size=B), optax.sgd(0.1))
    with pytest.raises(ValueError, match="chunk must be a positive integer.*got 0"):
        localgrad.learn(tx, params, tx.init(params), batch, chunk=0)


@functools.cache
def started(name):
    """A rule of the table in a stream, on a network that every rule takes."""
    rate = localgrad.RateCell(N, alpha=0.3)
    simple = nn.SimpleCell(N, carry_init=nn.initializers.constant(0.3))
    model = localgrad.Network((rate, simple), readout=nn.Dense(OUT))
    batch = problem()[2]
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = jax.jit(model.init)(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    example = batch.inputs[0, 0]
    return RULES[name].make(model, optax.l2_loss, batch_size=B, example=example), params, batch


@pytest.mark.parametrize("name", by_machinery(RULES))
@pytest.mark.few(1)
def test_reset_starts_afresh_and_keeps_the_feedback(name):
    rule, params, batch = started(name)
    tx = optax.chain(rule, optax.sgd(0.1))
    fresh = tx.init(params)
    _, used = tx.update(None, fresh, params, batch=piece(batch, 0, 5))
    if RULES[name].random:  # a clock goes on, so that no noise is drawn twice
        fresh = (fresh[0]._replace(clock=used[0].clock), *fresh[1:])
    again = piece(batch, 5, T)  # as many steps: compiled already
    expected, _ = tx.update(None, fresh, params, batch=again)
    updates, _ = tx.update(None, localgrad.reset_state(used), params, batch=again)
    chex.assert_trees_all_close(updates, expected, atol=1e-7)
    stale, _ = tx.update(None, used, params, batch=again)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(stale, expected, atol=1e-7)


def test_what_learn_measures_is_each_steps_prediction():
    """Also where chunks are several windows, and the last one is short."""
    _, params, batch = started("eprop")
    model = started("eprop")[0].settings["model"]
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B, window=2)
    tx = optax.chain(rule, optax.adam(1e-2))
    metric = lambda y, target: {"y": y, "off": jnp.abs(y - target).max(-1)}  # noqa: E731
    learn = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=4, metric=metric))
    learned, _, _, measured = learn(params, tx.init(params), batch)
    alone = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=4))
    state, outputs = tx.init(params), []
    for start in range(0, T, 4):
        now = piece(batch, start, start + 4)
        _, y, _ = localgrad.evaluate(model, optax.l2_loss, params, now, state[0].carry)
        params, state, _ = alone(params, state, now)
        outputs.append(y)
    y = jnp.concatenate(outputs, axis=1)
    chex.assert_trees_all_close(learned, params, atol=1e-6)
    chex.assert_trees_all_close(measured["y"], y, atol=1e-6)
    chex.assert_trees_all_close(measured["off"], jnp.abs(y - batch.targets).max(-1), atol=1e-6)


def of_several(name, model, **options):
    """Rules that are made of others, or that have no row of the table."""
    key = jax.random.key(1)
    noisy = localgrad.node_perturbation(model, optax.l2_loss, key=key, **options)
    exact = localgrad.readout_only(model, optax.l2_loss, **options)
    drawn = localgrad.uoro(model, optax.l2_loss, key=key, **options)
    return {
        "mix": lambda: localgrad.mix(
            {"a": noisy, "b": exact}, {"cells_0": "a", "cells_1": "a", "readout": "b"}
        ),
        "average": lambda: localgrad.average(drawn, samples=2),
        "force": lambda: localgrad.force(model, optax.l2_loss, **options),
        "dni": lambda: localgrad.dni(model, optax.l2_loss, **options),
    }[name]()


@pytest.mark.parametrize("name", [*by_machinery(RULES), "mix", "average", "force", "dni"])
@pytest.mark.slow
def test_every_rule_predicts_before_it_learns(name):
    """With masks and resets; the oracle runs the model as it was before the update."""
    rule, params, batch = started(name if name in RULES else "bptt")
    model = rule.settings["model"]
    if name not in RULES:
        rule = of_several(name, model, batch_size=B)
    tx = optax.chain(rule, optax.sgd(0.5))
    mask = jnp.ones((B, T)).at[1, 2:7].set(0)
    batch = batch._replace(mask=mask, reset=jnp.zeros((B, T), bool).at[0, 6].set(True))
    keep = lambda outputs, targets: outputs  # noqa: E731
    learn = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=5, metric=keep))
    state = tx.init(params)
    for start in (0, 5):
        now = piece(batch, start, start + 5)
        carry = state[0].carry
        _, expected, _ = localgrad.evaluate(model, optax.l2_loss, params, now, carry)
        params, state, _, outputs = learn(params, state, now)
        chex.assert_trees_all_close(outputs, expected, atol=1e-6)


def test_summary_declares_what_gets_nothing():
    model, params, batch = problem()
    rule = localgrad.readout_only(model, optax.l2_loss)
    credits = rule.credits(params)
    updates, _ = rule(params, rule.init(params), batch)
    for path, how in credits.items():
        leaf = updates
        for name in path:
            leaf = leaf[name]
        assert how.startswith("nothing") != bool(jnp.any(leaf)), path
    with pytest.raises(ValueError, match="rule must be a rule of localgrad"):
        localgrad.summary(optax.chain(rule, optax.sgd(0.1)), params)


def test_every_public_name_is_documented():
    for name in localgrad.__all__:
        documented = getattr(localgrad, name).__doc__
        assert documented and "Example:" in documented or name == "Alignment", name
