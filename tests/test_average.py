"""`average`: the mean of independent copies, with one loss and one carry."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, IN, N, OUT, K = 2, 6, 3, 4, 2, 3
MODEL = localgrad.Network((nn.GRUCell(N),), readout=nn.Dense(OUT))
KEY = jax.random.key(5)
close = chex.assert_trees_all_close


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (B, T, IN))
    batch = localgrad.Batch(inputs, jax.random.normal(keys[1], (B, T, OUT)))
    carry = MODEL.initialize_carry(keys[2], (B, IN))
    return MODEL.init(keys[2], carry, inputs[:, 0])["params"], batch


def uoro(key=KEY, **options):
    return localgrad.uoro(MODEL, optax.l2_loss, key=key, window=2, batch_size=B, **options)


def test_it_is_the_mean_of_copies_with_keys_of_their_own(problem):
    params, batch = problem
    rule = localgrad.average(uoro(), samples=K)
    updates, state = rule(params, rule.init(params), batch)
    each = [uoro(key) for key in jax.random.split(KEY, K)]
    found = [one(params, one.init(params), batch) for one in each]
    close(updates, jax.tree.map(lambda *a: sum(a) / K, *(u for u, _ in found)), atol=1e-6)
    assert not np.allclose(
        found[0][0]["cells_0"]["hn"]["kernel"], updates["cells_0"]["hn"]["kernel"]
    )
    copies = state.copies.state
    for k, (_, own) in enumerate(found):
        close(copies.left["cells_0"][k], own.left["cells_0"], atol=1e-6)
        close(state.carry, own.carry, atol=1e-6)
        close(state.loss, own.loss, atol=1e-6)


def test_one_loss_and_a_fresh_start(problem):
    params, batch = problem
    tx = optax.chain(localgrad.average(uoro(), samples=K), optax.sgd(0.1))
    _, state = tx.update(None, tx.init(params), params, batch=batch)
    assert optax.tree.get(state, "loss") > 0
    again = localgrad.reset_state(state)[0]
    blank = again.copies.state
    assert all(not np.any(leaf) for leaf in jax.tree.leaves((blank.left, blank.right)))
    assert np.array_equal(blank.clock, [T] * K)
    close(again.carry, again.initial_carry)


@pytest.mark.parametrize("make", ["node_perturbation", "kf_rtrl"])
@pytest.mark.few(1)
def test_any_rule_that_draws(problem, make):
    params, batch = problem
    rule = localgrad.average(
        getattr(localgrad, make)(MODEL, optax.l2_loss, key=KEY, window=2), samples=K
    )
    updates, state = jax.jit(rule.__call__)(params, rule.init(params), batch)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
    assert state.carry is None


@pytest.mark.slow
def test_a_part_of_a_mix(problem):
    params, batch = problem
    copies = localgrad.average(uoro(), samples=K)
    exact = localgrad.readout_only(MODEL, optax.l2_loss, batch_size=B)
    labels = {"cells_0": "drawn", "readout": "exact"}
    rule = localgrad.mix({"drawn": copies, "exact": exact}, labels)
    updates, state = rule(params, rule.init(params), batch)
    alone, _ = copies(params, copies.init(params), batch)
    close(updates, alone, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(rule.init(params))


def test_what_is_no_use_is_refused():
    for samples in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="samples must be a positive integer"):
            localgrad.average(uoro(), samples=samples)
    with pytest.raises(ValueError, match="eprop gives the same updates.*localgrad.uoro"):
        localgrad.average(localgrad.eprop(MODEL, optax.l2_loss), samples=2)
    with pytest.raises(ValueError, match="average takes a rule itself; got average"):
        localgrad.average(localgrad.average(uoro(), samples=2), samples=2)
    with pytest.raises(ValueError, match="must be a localgrad rule.*Put optimizers"):
        localgrad.average(optax.sgd(0.1), samples=2)
    rule = localgrad.average(uoro(), samples=2)
    with pytest.raises(ValueError, match="not its own"):
        rule({}, uoro(), localgrad.Batch(jnp.ones((B, T, IN)), jnp.ones((B, T, OUT))))
