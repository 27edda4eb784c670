"""Laws between rules: limits in which one becomes another, and horizons of any length."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from catalogue import RULES
from tests.conformance import oracles
from tests.conformance.table import MODELS, B, Case, T, build, by_machinery, groups, rule_of

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)


def fed(batch: localgrad.Batch) -> localgrad.Batch:
    """The batch with weights and resets."""
    rng = np.random.default_rng(3)
    mask = jnp.asarray(rng.choice([0.0, 0.5, 1.0], (B, T)))
    return batch._replace(mask=mask, reset=jnp.asarray(rng.random((B, T)) < 0.1))


def learn(rule, params, batch, length=T):
    """Updates summed over calls of this length."""
    state, total = rule.init(params), 0
    for at in range(0, T, length):
        updates, state = rule(
            params, state, jax.tree.map(lambda a, i=at: a[:, i : i + length], batch)
        )
        total = updates if at == 0 else jax.tree.map(jnp.add, total, updates)
    return groups(total)


@functools.cache
def brute_force(model):
    """The oracle of tbptt, compiled once a model: `(params, steps, horizon, stride) -> updates`."""
    return jax.jit(functools.partial(oracles.tbptt, build(model).model))


@pytest.mark.parametrize(
    "horizon", [1, 3, *(pytest.param(h, marks=pytest.mark.slow) for h in (2, 7))]
)
@pytest.mark.parametrize("model", [pytest.param("two_rates", marks=pytest.mark.slow), "embed"])
@pytest.mark.slow
def test_tbptt_credits_each_loss_with_its_last_steps(model, horizon):
    built = build(model)
    batch = fed(built.batch)
    tbptt = functools.partial(
        localgrad.tbptt, built.model, optax.l2_loss, horizon=horizon, reduction="sum"
    )
    expected = groups(brute_force(model)(built.params, oracles.steps_of(batch), horizon, 1))
    close(learn(tbptt(window=6), built.params, batch), expected)
    # In calls of 4 steps the longest horizon reaches back over two calls.
    close(learn(tbptt(batch_size=B, example=built.example), built.params, batch, 4), expected)


@pytest.mark.parametrize(
    "horizon, stride",
    [(3, 4), *(pytest.param(*r, marks=pytest.mark.slow) for r in [(1, 7), (6, 2)])],
)
@pytest.mark.parametrize("model", [pytest.param("two_rates", marks=pytest.mark.slow), "embed"])
@pytest.mark.slow
def test_tbptt_credits_blocks_of_losses_together(model, horizon, stride):
    built = build(model)
    batch = fed(built.batch)
    tbptt = functools.partial(
        localgrad.tbptt,
        built.model,
        optax.l2_loss,
        horizon=horizon,
        stride=stride,
        reduction="sum",
        example=built.example,
    )
    expected = groups(brute_force(model)(built.params, oracles.steps_of(batch), horizon, stride))
    close(learn(tbptt(), built.params, batch), expected)
    close(learn(tbptt(window=6), built.params, batch), expected)
    # Calls begin within blocks, and end there; windows as long as a block lie within one, or not.
    for window, length in ((3, 5), (stride, stride + 2)):
        close(learn(tbptt(batch_size=B, window=window), built.params, batch, length), expected)


@pytest.mark.parametrize("horizon", [T, T + 5])
@pytest.mark.few(1)
def test_a_horizon_beyond_the_data_is_bptt(horizon):
    built = build("rate")
    batch = fed(built.batch)
    tbptt = functools.partial(
        localgrad.tbptt, built.model, optax.l2_loss, horizon=horizon, reduction="sum"
    )
    expected = learn(rule_of(Case("bptt", "rate")), built.params, batch)
    close(learn(tbptt(), built.params, batch), expected)
    close(learn(tbptt(batch_size=B, example=built.example), built.params, batch, 4), expected)


SOME = ("rate_alpha", "nnx_gru")
ALONE = [
    pytest.param(name, marks=() if name in SOME else pytest.mark.slow)
    for name, row in MODELS.items()
    if len(row.cells) == 1 and not RULES["snap"].refusal(row.traits)
]


@pytest.mark.parametrize("model", ALONE)
@pytest.mark.few(1)
def test_snap_is_exact_where_units_do_not_meet(model):
    built = build(model)

    def thinned(path, leaf):
        """Recurrent kernels without what a unit sends to others."""
        names = jax.tree_util.keystr(path)
        recurrent = any(f"['{name}']['kernel']" in names for name in RECURRENT)
        blocks = leaf.shape[-1] // leaf.shape[0] if recurrent else 0
        return leaf * jnp.tile(jnp.eye(leaf.shape[0]), blocks) if recurrent else leaf

    params = jax.tree_util.tree_map_with_path(thinned, built.params)
    thinner = sum(np.sum(leaf == 0) for leaf in jax.tree.leaves(params)) > 0
    assert thinner == (model != "lru")  # whose recurrence is a diagonal to begin with
    exact = jax.jit(functools.partial(oracles.bptt, built.model))
    expected = groups(exact(params, oracles.steps_of(built.batch)))
    close(learn(rule_of(Case("snap", model)), params, built.batch), expected)
    close(learn(rule_of(Case("rtrl", model)), params, built.batch), expected)


RECURRENT = ("h", "hi", "hf", "hg", "ho", "hr", "hz", "hn", "dense_h")


def test_without_a_leak_eprop_rflo_and_one_step_of_bptt_agree():
    built = build("simple")
    make = functools.partial(built_rule, built)
    eprop = learn(make(localgrad.eprop), built.params, built.batch)
    close(learn(make(localgrad.rflo, feedback="symmetric"), built.params, built.batch), eprop)
    close(learn(make(localgrad.tbptt, horizon=1), built.params, built.batch), eprop)


def test_with_a_leak_rflo_is_eprop_and_one_step_of_bptt_is_not():
    built = build("rate")
    make = functools.partial(built_rule, built)
    eprop = learn(make(localgrad.eprop), built.params, built.batch)
    close(learn(make(localgrad.rflo, feedback="symmetric"), built.params, built.batch), eprop)
    shorter = learn(make(localgrad.tbptt, horizon=1), built.params, built.batch)
    assert not np.allclose(shorter["cells_0"]["h"]["kernel"], eprop["cells_0"]["h"]["kernel"], 1e-2)


@pytest.mark.slow
def test_feedback_through_the_readouts_own_weights_is_symmetric():
    built = build("gru")
    make = functools.partial(built_rule, built)
    symmetric = learn(make(localgrad.eprop), built.params, built.batch)
    kernel = built.params["readout"]["kernel"]
    for feedback in (kernel, [kernel], {"cells_0": kernel}):
        fixed = learn(make(localgrad.eprop, feedback=feedback), built.params, built.batch)
        close(fixed, symmetric)


def test_an_update_uses_the_feedback_in_the_state_and_no_key():
    case = Case("eprop_random", "two_rates")
    built, rule = build(case.model), rule_of(case)
    state = rule.init(built.params)
    silent = state._replace(feedback=jax.tree.map(jnp.zeros_like, state.feedback))
    updates, after = rule(built.params, silent, built.batch)
    for level in range(len(MODELS[case.model].cells)):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates[f"cells_{level}"]))
    assert np.any(updates["readout"]["kernel"])
    chex.assert_trees_all_equal(after.feedback, silent.feedback)


@pytest.mark.parametrize("name", [name for name, row in RULES.items() if row.keyed])
def test_random_feedback_has_the_announced_size(name):
    network = localgrad.Network((nn.SimpleCell(200),), readout=nn.Dense(300))
    carry = network.initialize_carry(jax.random.key(0), (1, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), carry, jnp.zeros((1, 3)))["params"]
    state = RULES[name].make(network, optax.l2_loss, key=jax.random.key(5)).init(params)
    if not hasattr(state, "feedback"):
        pytest.skip("it draws something else")
    (drawn,) = state.feedback.values()
    assert drawn.shape == (200, 300)
    np.testing.assert_allclose(drawn.std(), 200**-0.5, rtol=0.02)  # 60000 draws: 7 sigma
    assert abs(drawn.mean()) < 5 * 200**-0.5 / np.sqrt(drawn.size)


@pytest.mark.parametrize("rule", by_machinery(RULES))
@pytest.mark.few(1)
def test_mean_is_the_sum_over_the_weight(rule):
    case = Case(rule, "rate")
    built = build(case.model)
    batch = fed(built.batch)
    mean, state = (r := rule_of(case, reduction="mean"))(built.params, r.init(built.params), batch)
    total, summed = (r := rule_of(case))(built.params, r.init(built.params), batch)
    close(jax.tree.map(lambda a: a / batch.mask.sum(), total), mean)
    steps = oracles.steps_of(batch)
    outputs = oracles.outputs_of(built.model, built.params, steps)
    close(state.loss, oracles.weighed(outputs, steps) / batch.mask.sum())
    close(summed.loss, state.loss)


def built_rule(built, factory, **options):
    """A rule of a model of the table."""
    return factory(built.model, optax.l2_loss, reduction="sum", example=built.example, **options)
