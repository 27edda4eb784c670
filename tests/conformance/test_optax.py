"""Rules as members of optax's chains, and in `nnx.Optimizer`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad
from catalogue import RULES
from tests.conformance.table import IN, B, Case, N, build, by_machinery, plain, rule_of

MODEL = "rate"
RATE = 0.1
every_rule = pytest.mark.parametrize("name", by_machinery(RULES))
EXACT = [n for n, row in RULES.items() if row.expectation == "bptt" and not row.random]


def close(found, wanted):
    chex.assert_trees_all_close(plain(found), plain(wanted), rtol=1e-10, atol=1e-10)


@pytest.fixture
def built():
    return build(MODEL)


def streamed(name):
    return rule_of(Case(name, MODEL), streaming=True, window=5, reduction="mean")


def trained(tx, built, calls=1):
    """Parameters and state after some updates, one call each."""
    params, state = built.params, tx.init(built.params)
    for _ in range(calls):
        updates, state = tx.update(None, state, params, batch=built.batch)
        params = optax.apply_updates(params, updates)
    return params, state


def by_hand(rule, params, batch, calls=1):
    """The same by gradient descent on the rule's updates; also the last loss."""
    state = rule.init(params)
    for _ in range(calls):
        updates, state = rule(params, state, batch)
        params = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
    return params, state.loss


@every_rule
@pytest.mark.few(2)
def test_it_heads_a_chain(name, built):
    rule = streamed(name)
    expected, loss = by_hand(rule, built.params, built.batch, calls=2)
    for chain in (
        optax.chain(rule, optax.sgd(RATE)),
        optax.named_chain(("rule", rule), ("sgd", optax.sgd(RATE))),
        optax.chain(rule, optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)),
        optax.chain(rule, optax.apply_if_finite(optax.sgd(RATE), 3)),
    ):
        params, state = trained(chain, built, calls=2)
        close(params, expected)
        close(optax.tree.get(state, "loss"), loss)


def test_a_chain_runs_inside_jit(built):
    rule = streamed("eprop")
    tx = optax.chain(rule, optax.clip_by_global_norm(1e9), optax.sgd(RATE))

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    params, state = step(built.params, tx.init(built.params), built.batch)
    close(params, by_hand(rule, built.params, built.batch)[0])


@every_rule
@pytest.mark.few(2)
def test_it_swallows_what_it_does_not_know(name, built):
    rule = streamed(name)
    state = rule.init(built.params)
    extra = {"value": 1.0, "grad": built.params, "unheard_of": None}
    close(
        rule.update(None, state, built.params, batch=built.batch, **extra),
        rule(built.params, state, built.batch),
    )


@pytest.mark.parametrize("name", EXACT)
def test_it_descends(name, built):
    """What gives the gradient lowers the loss; for other rules their oracles are held to it."""
    tx = optax.chain(streamed(name), optax.adam(0.05))
    first = trained(tx, built, calls=1)[1]
    last = trained(tx, built, calls=15)[1]
    assert optax.tree.get(last, "loss") < 0.95 * optax.tree.get(first, "loss")


def test_gradients_are_accumulated_behind_the_rule(built):
    rule = streamed("eprop")
    every = optax.MultiSteps(optax.sgd(RATE), every_k_schedule=2).gradient_transformation()
    tx = optax.chain(rule, every)
    chex.assert_trees_all_equal(trained(tx, built, calls=1)[0], built.params)
    state, held = rule.init(built.params), every.init(built.params)
    for _ in range(2):
        found, state = rule(built.params, state, built.batch)
        updates, held = every.update(found, held, built.params)
    assert np.any(updates["cells_0"]["h"]["kernel"])
    close(trained(tx, built, calls=2)[0], optax.apply_updates(built.params, updates))


def test_what_follows_the_rule_can_be_masked(built):
    rule = streamed("eprop")
    labels = {group: "keep" if group == "readout" else "learn" for group in built.params}
    split = optax.partition({"learn": optax.sgd(RATE), "keep": optax.set_to_zero()}, labels)
    params, _ = trained(optax.chain(rule, split), built)
    expected, _ = by_hand(rule, built.params, built.batch)
    close(params, expected | {"readout": built.params["readout"]})


@every_rule
@pytest.mark.few(2)
def test_it_takes_no_gradients(name, built):
    rule = streamed(name)
    state = rule.init(built.params)
    with pytest.raises(ValueError, match="comes first in its chain and takes no gradients"):
        rule.update(built.params, state, built.params, batch=built.batch)
    two = optax.chain(rule, rule)
    with pytest.raises(ValueError, match=f"{RULES[name].public_name}.*pass None"):
        two.update(None, two.init(built.params), built.params, batch=built.batch)
    with pytest.raises(ValueError, match="needs the parameters"):
        rule.update(None, state, batch=built.batch)
    with pytest.raises(ValueError, match="batch is missing"):
        rule.update(None, state, built.params)


def test_around_the_rule_wrappers_fail_rather_than_hide_batches(built):
    # MultiSteps would show the rule every second batch only; masked hides parameters from it.
    wrapped = optax.MultiSteps(optax.chain(streamed("eprop"), optax.sgd(RATE)), 2)
    with pytest.raises(ValueError):
        wrapped.update(None, wrapped.init(built.params), built.params, batch=built.batch)


def test_nnx_optimizer_forwards_the_batch():
    rngs = np.random.default_rng(0)
    module = nnx.GRUCell(IN, N, param_dtype=jnp.float64, dtype=jnp.float64, rngs=nnx.Rngs(0))
    model, params = localgrad.from_nnx(module)
    batch = localgrad.Batch(rngs.normal(size=(B, 5, IN)), rngs.normal(size=(B, 5, N)))
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B)
    expected, loss = by_hand(rule, params, batch, calls=2)

    optimizer = nnx.Optimizer(module, optax.chain(rule, optax.sgd(RATE)), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, batch):
        # A rule takes no gradients, so it is given a state that holds none.
        optimizer.update(module, nnx.State({}), batch=batch)

    for _ in range(2):
        step(module, optimizer, batch)
    close(nnx.to_pure_dict(nnx.state(module, nnx.Param)), nnx.to_pure_dict(expected))
    close(optax.tree.get(nnx.as_pure(optimizer.opt_state), "loss"), loss)
