"""A rule as an object: JAX compiles, maps and scans it, optax takes it for one of its own."""

import copy
import functools
import gc
import pickle
import weakref

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

close = functools.partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
B, T, IN, OUT = 2, 4, 3, 2


def problem(**options):
    """A rule, its parameters, and a batch."""
    rng = np.random.default_rng(0)
    model = localgrad.Network((localgrad.RateCell(4, alpha=0.5),), readout=nn.Dense(OUT))
    inputs = jnp.asarray(rng.normal(size=(B, T, IN)), jnp.float32)
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, inputs[:, 0])["params"]
    batch = localgrad.Batch(inputs, jnp.asarray(rng.normal(size=(B, T, OUT)), jnp.float32))
    return localgrad.eprop(model, optax.l2_loss, batch_size=B, **options), params, batch


@pytest.mark.slow
def test_twenty_rules_are_jitted_in_one_process():
    for _ in range(20):
        rule, params, batch = problem()
        state = rule.init(params)
        close(jax.jit(rule)(params, state, batch), rule(params, state, batch))


def test_one_rule_is_jitted_twenty_times_and_traced_once():
    rule, params, batch = problem()
    state = rule.init(params)
    traces = chex.assert_max_traces(lambda *args: rule(*args), n=1)
    for _ in range(20):
        jax.jit(traces)(params, state, batch)
        jax.jit(rule)(params, state, batch)


def test_it_is_mapped_scanned_and_bound():
    rule, params, batch = problem()
    state = rule.init(params)
    expected = rule(params, state, batch)
    both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    mapped = jax.vmap(rule, (0, None, None))(both, state, batch)
    close(jax.tree.map(lambda a: a[0], mapped), expected)
    close(functools.partial(rule, params)(state, batch), expected)

    def step(state, piece):
        updates, state = rule(params, state, piece)
        return state, updates

    pieces = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], batch)
    last, _ = jax.lax.scan(step, state, pieces)
    close(last.carry, expected[1].carry)


def test_nothing_keeps_it_alive():
    rule, params, batch = problem()
    rule(params, rule.init(params), batch)
    seen = weakref.ref(rule)
    del rule
    gc.collect()
    assert seen() is None


def test_it_is_one_of_optax_and_one_of_ours():
    rule, params, batch = problem()
    assert isinstance(rule, localgrad.LearningRule)
    assert isinstance(rule, optax.GradientTransformationExtraArgs)
    assert isinstance(rule, optax.GradientTransformation)
    assert optax.with_extra_args_support(rule) is rule
    assert {rule: 1}[rule] == 1 and rule != problem()[0]
    init, update = rule
    assert init is rule.init and update is rule.update
    assert jax.tree.leaves(rule) == [rule]


def everything(tree):
    """A mask that lets all through."""
    return jax.tree.map(lambda leaf: True, tree)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rule: optax.chain(rule, optax.sgd(0.1)),
        lambda rule: optax.named_chain(("rule", rule), ("sgd", optax.sgd(0.1))),
        lambda rule: optax.chain(rule, optax.masked(optax.sgd(0.1), everything)),
        lambda rule: optax.chain(rule, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)),
        lambda rule: optax.inject_hyperparams(
            lambda rate: optax.chain(rule, optax.scale_by_learning_rate(rate))
        )(rate=0.1),
    ],
    ids=["chain", "named_chain", "masked behind", "inject behind", "inject around"],
)
@pytest.mark.few(1)
def test_it_heads_chains_under_jit(wrap):
    rule, params, batch = problem()
    expected, state = rule(params, rule.init(params), batch)
    tx = wrap(rule)
    update = jax.jit(lambda p, s, b: tx.update(None, s, p, batch=b))
    updates, opt_state = update(params, tx.init(params), batch)
    close(updates, jax.tree.map(lambda u: -0.1 * u, expected))
    close(optax.tree.get(opt_state, "loss"), state.loss)


def test_it_says_what_it_is():
    rule, _, _ = problem(feedback="random", key=jax.random.key(0), window=3)
    assert repr(rule) == (
        "eprop(Network, l2_loss, feedback='random', batch_size=2, window=3, reduction='mean')"
    )
    model = nn.GRUCell(3)
    weights = np.ones((3, 2), np.float32)
    loss = functools.partial(optax.huber_loss, delta=0.5)
    assert "GRUCell, huber_loss, horizon=4" in repr(localgrad.tbptt(model, loss, horizon=4))
    assert "feedback=float32[3, 2]" in repr(localgrad.eprop(model, loss, feedback=weights))
    assert "feedback=[float32[3, 2]]" in repr(localgrad.eprop(model, loss, feedback=[weights]))
    assert "max_influence_bytes=4294967296" in repr(localgrad.rtrl(model, loss))
    noisy = localgrad.weight_perturbation(
        model, loss, key=jax.random.key(0), samples=np.int64(2), scale=np.float64(0.5)
    )
    assert "scale=0.5, samples=2," in repr(noisy)


def test_it_is_copied_as_itself_and_refuses_to_be_pickled():
    rule, params, _ = problem()
    assert copy.deepcopy({"rule": rule})["rule"] is rule and copy.copy(rule) is rule
    with pytest.raises(TypeError, match=r"cannot be pickled; got eprop\(.*make the rule anew"):
        pickle.dumps(rule)
    pickle.loads(pickle.dumps(jax.tree.map(np.asarray, rule.init(params))))
