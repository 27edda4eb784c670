"""`guard`: what goes wrong in one stream stays there, and what explodes is seen and held."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from catalogue import RULES
from tests.conformance.table import by_machinery

pytestmark = pytest.mark.usefixtures("x64")

B, T, IN, OUT, N = 5, 6, 2, 3, 4
ILL = 3
"""The stream that goes wrong."""
WELL = np.arange(B) != ILL
NAMES = by_machinery(name for name, row in RULES.items() if not row.deep)


def network(make=lambda: nn.GRUCell(N, param_dtype=float)):
    model = localgrad.Network((make(),), readout=nn.Dense(OUT, param_dtype=float))
    x = jnp.zeros((B, IN))
    params = model.init(jax.random.key(0), model.initialize_carry(jax.random.key(0), x.shape), x)
    return model, params["params"]


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    inputs, targets = (jnp.asarray(rng.normal(size=(B, T, n))) for n in (IN, OUT))
    return localgrad.Batch(inputs, targets)


def rule_of(name, model, **told):
    if "gated" in RULES[name].refuses:
        model = network(lambda: localgrad.RateCell(N, alpha=0.3, param_dtype=float))[0]
    return RULES[name].make(
        model, optax.l2_loss, batch_size=B, reduction="sum", example=jnp.zeros(IN), **told
    )


def params_of(rule):
    model = rule.settings["model"]
    x = jnp.zeros((B, IN))
    return model.init(jax.random.key(0), model.initialize_carry(jax.random.key(0), x.shape), x)[
        "params"
    ]


def numbers(tree):
    keyed = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda a: np.asarray(jax.random.key_data(a) if keyed(a) else a), tree)


def same(one, two):
    jax.tree.map(np.testing.assert_array_equal, numbers(one), numbers(two))


def near(one, two):
    check = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11)
    jax.tree.map(check, numbers(one), numbers(two))


def of_streams(state, which):
    """What a state remembers of some streams: along the one axis that is B long."""
    leaves = [leaf for leaf in jax.tree.leaves(numbers(state)) if B in leaf.shape]
    return [np.moveaxis(leaf, leaf.shape.index(B), 0)[which] for leaf in leaves]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(1)
def test_of_streams_that_are_well_it_is_the_rule(name):
    rule = rule_of(name, network()[0])
    params, guarded = params_of(rule), localgrad.guard(rule)
    state, own = rule.init(params), guarded.init(params)
    for seed in range(2):
        updates, state = rule(params, state, drawn(seed))
        ours, own = guarded(params, own, drawn(seed))
        near(ours, updates)
        kept = own.member.state._replace(
            loss=own.loss, carry=own.carry, initial_carry=own.initial_carry
        )
        near(kept, state)
    assert own.refused == 0 and not own.poisoned.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shown", ["inputs", "targets"])
@pytest.mark.few(2)
def test_a_stream_that_is_shown_a_nan_is_left_out_and_begins_anew(name, shown):
    rule = rule_of(name, network()[0])
    params, guarded = params_of(rule), localgrad.guard(rule)
    batch = drawn()
    there = getattr(batch, shown).at[ILL, 2, 1].set(jnp.nan)
    weights = jnp.ones((B, T)).at[ILL].set(0)
    blank = batch._replace(inputs=batch.inputs.at[ILL].set(0), mask=weights)
    blank = blank._replace(targets=batch.targets.at[ILL].set(0))

    _, begun = guarded(params, guarded.init(params), drawn(1))
    updates, after = guarded(params, begun, batch._replace(**{shown: there}))
    wanted, calm = guarded(params, begun, blank)
    near(updates, wanted)
    near(of_streams(after, WELL), of_streams(calm._replace(poisoned=after.poisoned), WELL))
    assert after.poisoned.tolist() == [0, 0, 0, 1, 0] and after.refused == 0
    anew = of_streams(guarded.init(params), ILL)
    now = of_streams(after._replace(poisoned=0 * after.poisoned, norm=0 * after.norm), ILL)
    same(now, anew)
    _, after = guarded(params, after, drawn(2))
    assert after.poisoned.sum() == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(1)
def test_without_a_guard_no_other_streams_memory_is_reached(name):
    rule = rule_of(name, network()[0])
    params, batch = params_of(rule), drawn()
    broken = batch._replace(inputs=batch.inputs.at[ILL, 2, 1].set(jnp.nan))
    _, state = rule(params, rule.init(params), broken)
    _, calm = rule(params, rule.init(params), batch)
    same(of_streams(state, WELL), of_streams(calm, WELL))
    assert not np.isfinite(state.loss)


def linear(activation=lambda u: u):
    cell = lambda: localgrad.RateCell(N, alpha=1.0, activation=activation, param_dtype=float)  # noqa: E731
    model, params = network(cell)
    params["cells_0"]["h"]["kernel"] = 3.0 * jnp.eye(N)
    return model, params


def explosive():
    """A batch that is finite, and after which a linear network's stream is not."""
    batch = drawn()
    return batch._replace(inputs=batch.inputs.at[ILL].set(1e307))


@pytest.mark.parametrize(
    "told", [{}, {"feedback": "adaptive", "feedback_rate": 0.1, "key": jax.random.key(5)}]
)
@pytest.mark.few(1)
def test_of_a_stream_that_breaks_by_itself_nothing_is_learnt(told):
    model, params = linear()
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B, **told)
    guarded = localgrad.guard(rule)
    begun = guarded.init(params)
    updates, after = guarded(params, begun, explosive())
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert after.refused == 1 and after.poisoned.tolist() == [0, 0, 0, 1, 0]
    assert not np.isfinite(after.norm[ILL]) and np.isfinite(after.norm[WELL]).all()
    same(after.member.state.feedback, begun.member.state.feedback)
    _, calm = guarded(params, begun, drawn())
    same(of_streams(after, WELL)[:-2], of_streams(calm, WELL)[:-2])
    updates, after = guarded(params, after, drawn())
    assert after.refused == 1 and any((leaf != 0).any() for leaf in jax.tree.leaves(updates))
    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, after._replace(norm=0)))
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_leaves_its_stream_out(value):
    model, params = network()
    guarded = localgrad.guard(localgrad.eprop(model, optax.l2_loss, batch_size=B, reduction="sum"))
    broken = drawn()._replace(mask=jnp.ones((B, T)).at[ILL, 2].set(value))
    without = drawn()._replace(mask=jnp.ones((B, T)).at[ILL].set(0))
    updates, state = guarded(params, guarded.init(params), broken)
    same(updates, guarded(params, guarded.init(params), without)[0])
    assert state.poisoned.tolist() == [0, 0, 0, 1, 0] and state.refused == 0


def test_a_stream_whose_loss_overflows_is_named():
    """Its carry and its influence are as well as anyone's; the others keep theirs."""
    model, params = network()
    guarded = localgrad.guard(localgrad.eprop(model, optax.l2_loss, batch_size=B))
    state = guarded.init(params)
    far = drawn()._replace(targets=drawn().targets.at[ILL, 2, 1].set(1e200))
    for call in (1, 2):
        updates, state = guarded(params, state, far)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
        assert state.refused == call and state.poisoned.tolist() == [0, 0, 0, call, 0]
    same(of_streams(state.carry, ILL), of_streams(guarded.init(params).carry, ILL))
    assert all((rows != 0).all() for rows in of_streams(state.carry, WELL))


def test_an_influence_whose_square_is_infinite_is_finite_still():
    """Of float32: a norm beyond 1.8e19 is told, and held."""
    cell = localgrad.RateCell(1, alpha=1.0, activation=lambda u: u)
    x = jnp.ones((B, 45, 1), jnp.float32)
    params = cell.init(jax.random.key(0), jnp.zeros((B, 1), jnp.float32), x[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.full(a.shape, 3.0, jnp.float32), params)
    small = lambda y, t: 1e-30 * y  # noqa: E731
    rule = localgrad.rtrl(cell, small, batch_size=B)
    _, alone = rule(params, rule.init(params), localgrad.Batch(x, x))
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(alone.influence)]
    norm = np.sqrt(sum(np.square(leaf).reshape(B, -1).sum(1) for leaf in leaves))
    assert (norm > 1e20).all()
    for most, kept in ((None, norm), (50.0, 50.0)):
        guarded = localgrad.guard(rule, max_norm=most)
        _, state = guarded(params, guarded.init(params), localgrad.Batch(x, x))
        assert not state.poisoned.any() and state.refused == 0
        np.testing.assert_allclose(state.norm, norm, rtol=1e-5)
        leaves = jax.tree.leaves(state.member.state.influence)
        after = np.sqrt(sum(np.square(np.float64(a)).reshape(B, -1).sum(1) for a in leaves))
        np.testing.assert_allclose(after, kept, rtol=1e-5)


def test_an_influence_that_explodes_is_seen_and_held():
    model, params = linear()
    params["cells_0"]["h"]["kernel"] = jnp.diag(jnp.array([3.0, 0.1, 0.1, 0.1]))
    rule = localgrad.rtrl(model, optax.l2_loss, batch_size=B)
    free, held = localgrad.guard(rule), localgrad.guard(rule, max_norm=50.0)
    one, two = free.init(params), held.init(params)
    small = drawn()._replace(inputs=drawn().inputs * jnp.array([1e-9, 1, 1, 1, 1])[:, None, None])
    for _ in range(3):
        _, one = free(params, one, small)
        _, two = held(params, two, small)
    alone = rule.init(params)
    for _ in range(3):
        _, alone = rule(params, alone, small)
    leaves = jax.tree.leaves(alone.influence)
    norm = np.sqrt(sum(np.square(leaf).reshape(B, -1).sum(1) for leaf in leaves))
    np.testing.assert_allclose(one.norm, norm, rtol=1e-12)
    assert (one.norm > 1e6).all()
    kept = jax.tree.leaves(two.member.state.influence)
    norm = np.sqrt(sum(np.square(leaf).reshape(B, -1).sum(1) for leaf in kept))
    np.testing.assert_allclose(norm, 50.0, rtol=1e-12)


@pytest.mark.parametrize("name", ["average", "mix", "lra", "force"])
@pytest.mark.few(1)
def test_it_takes_rules_of_rules_and_those_with_no_row(name):
    model, params = network()
    told = {"batch_size": B, "example": jnp.zeros(IN)}
    inputs, targets = IN, OUT
    if name == "average":
        uoro = localgrad.uoro(model, optax.l2_loss, key=jax.random.key(3), **told)
        rule = localgrad.average(uoro, samples=2)
    elif name == "mix":
        rules = {
            "a": localgrad.snap(model, optax.l2_loss, **told),
            "b": localgrad.readout_only(model, optax.l2_loss, **told),
        }
        rule = localgrad.mix(rules, {"cells_0": "a", "readout": "b"})
    elif name == "lra":
        model = localgrad.PTNCN((N, N), IN)
        x = jnp.zeros((B, IN))
        start = model.initialize_carry(jax.random.key(0), x.shape)
        params = model.init(jax.random.key(0), start, x)["params"]
        rule, targets = localgrad.lra(model, optax.l2_loss, batch_size=B), IN
    else:
        rule = localgrad.force(model, optax.l2_loss, **told)
    guarded = localgrad.guard(rule)
    batch = localgrad.Batch(
        *(jnp.asarray(np.random.default_rng(0).normal(size=(B, T, n))) for n in (inputs, targets))
    )
    broken = batch._replace(inputs=batch.inputs.at[ILL, 2].set(jnp.inf))
    _, state = guarded(params, guarded.init(params), batch)
    updates, state = guarded(params, state, broken)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(updates))
    assert state.poisoned.tolist() == [0, 0, 0, 1, 0]


def test_it_learns_online_inside_one_program():
    model, params = network()
    rule = localgrad.guard(localgrad.snap(model, optax.l2_loss, batch_size=B), max_norm=10.0)
    tx = optax.chain(rule, optax.adam(1e-2))
    batch = drawn()._replace(targets=drawn().targets.at[ILL, 3:].set(jnp.nan))
    step = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=2))
    params, state, losses = step(params, tx.init(params), batch)
    assert np.isfinite(losses).all() and all(map(np.all, map(np.isfinite, jax.tree.leaves(params))))
    assert optax.tree.get(state, "poisoned").tolist() == [0, 0, 0, 2, 0]
    again = localgrad.reset_state(state)
    assert optax.tree.get(again, "poisoned")[ILL] == 2 and not optax.tree.get(again, "norm").any()


def test_a_nan_of_weight_0_is_no_harm():
    model, params = network()
    guarded = localgrad.guard(localgrad.eprop(model, optax.l2_loss, batch_size=B))
    batch = drawn()
    batch = batch._replace(
        targets=batch.targets.at[ILL, 2].set(jnp.nan), mask=jnp.ones((B, T)).at[ILL, 2].set(0)
    )
    updates, state = guarded(params, guarded.init(params), batch)
    assert not state.poisoned.any() and state.refused == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_what_it_refuses():
    model, _ = network()
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B)
    with pytest.raises(ValueError, match="streaming rule; got eprop with batch_size=None"):
        localgrad.guard(localgrad.eprop(model, optax.l2_loss))
    with pytest.raises(ValueError, match="got a guard"):
        localgrad.guard(localgrad.guard(rule))
    with pytest.raises(ValueError, match="got GradientTransformationExtraArgs.*behind it"):
        localgrad.guard(optax.chain(rule, optax.adam(1e-3)))
    told = {"key": jax.random.key(0), "batch_size": B}
    drawn = localgrad.guard(localgrad.uoro(model, optax.l2_loss, **told))
    with pytest.raises(ValueError, match="got guard.*guard an average as a whole"):
        localgrad.average(drawn, samples=2)
    with pytest.raises(ValueError, match="'b'.* is a guard; guard the mix as a whole"):
        localgrad.mix({"a": rule, "b": localgrad.guard(rule)}, {"cells_0": "a", "readout": "b"})
    for wrong in (0, np.inf, "1", True):
        with pytest.raises(
            ValueError, match=f"max_norm must be .*positive.*; got {wrong!r}. Or None"
        ):
            localgrad.guard(rule, max_norm=wrong)
