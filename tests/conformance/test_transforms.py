"""Rules under JAX's transformations: the same numbers, one trace, no leaks.

A network that every rule takes stands for all models.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from catalogue import RULES
from tests.conformance.table import B, Case, T, build, by_machinery, plain, rule_of

MODEL = "rate"
every_rule = pytest.mark.parametrize("name", by_machinery(RULES))
KEYED = [name for name, row in RULES.items() if row.keyed]


def close(found, wanted):
    chex.assert_trees_all_close(plain(found), plain(wanted), rtol=1e-10, atol=1e-10)


def steps(batch):
    """A batch as T batches of one step, on a new leading axis."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], batch)


@every_rule
@pytest.mark.few(1)
def test_scan_over_steps_is_a_loop_over_steps(name):
    built, rule = build(MODEL), rule_of(Case(name, MODEL), streaming=True, window=5)
    pieces = steps(built.batch)
    start = rule.init(built.params)

    @jax.jit
    def scanned(params, state):
        def body(state, piece):
            updates, state = rule(params, state, piece)
            return state, (updates, state.loss)

        return jax.lax.scan(body, state, pieces)

    state, (updates, losses) = scanned(built.params, start)
    looped = start
    for t in range(T):
        found, looped = rule(built.params, looped, jax.tree.map(lambda a, t=t: a[t], pieces))
        close((found, looped.loss), jax.tree.map(lambda a, t=t: a[t], (updates, losses)))
    close(looped, state)


@every_rule
@pytest.mark.few(1)
def test_vmap_over_networks_is_a_loop_over_networks(name):
    built, rule = build(MODEL), rule_of(Case(name, MODEL), streaming=True, window=5)
    both = jax.tree.map(lambda a: jnp.stack([a, a[::-1] + 0.1]), built.params)
    states = jax.vmap(rule.init)(both)
    updates, states = jax.vmap(rule, (0, 0, None))(both, states, built.batch)
    for k in range(2):
        params = jax.tree.map(lambda a, k=k: a[k], both)
        alone = rule(params, rule.init(params), built.batch)
        close(jax.tree.map(lambda a, k=k: a[k], (updates, states)), alone)


@pytest.mark.parametrize("name", by_machinery(KEYED))
@pytest.mark.slow
def test_vmap_over_seeds_draws_other_numbers(name):
    built = build(MODEL)

    def make(key):
        return RULES[name].make(built.model, optax.l2_loss, key=key)

    keys = jax.random.split(jax.random.key(7), 3)
    states = jax.vmap(lambda key: make(key).init(built.params))(keys)
    rule = make(keys[0])
    updates, _ = jax.vmap(rule, (None, 0, None))(built.params, states, built.batch)
    kernels = updates["cells_0"]["h"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1]) and not np.allclose(kernels[1], kernels[2])
    for k, key in enumerate(keys):
        alone = make(key)
        close(
            rule(built.params, jax.tree.map(lambda a, k=k: a[k], states), built.batch)[0],
            alone(built.params, alone.init(built.params), built.batch)[0],
        )
        close(
            jax.tree.map(lambda a, k=k: a[k], updates),
            alone(built.params, alone.init(built.params), built.batch)[0],
        )


@every_rule
@pytest.mark.few(2)
def test_a_second_call_does_not_trace_again(name):
    built, traces = build(MODEL), 0

    def loss(outputs, targets):
        nonlocal traces
        traces += 1
        return optax.l2_loss(outputs, targets)

    rule = RULES[name].make(
        built.model, loss, batch_size=B, window=5, reduction="mean", example=built.example
    )
    state = rule.init(built.params)
    _, state = rule(built.params, state, built.batch)
    assert traces > 0
    before = traces
    params = jax.tree.map(lambda a: 0.9 * a, built.params)
    _, state = rule(params, state, built.batch._replace(targets=built.batch.targets + 1))
    rule(built.params, rule.init(built.params), built.batch)
    assert traces == before


@every_rule
@pytest.mark.few(1)
def test_nothing_leaks_from_a_trace(name):
    built = build(MODEL)
    rule = rule_of(Case(name, MODEL), streaming=True, window=5, reduction="mean")
    with jax.checking_leaks():
        run = jax.jit(lambda params, batch: rule(params, rule.init(params), batch))
        inside = run(built.params, built.batch)
    close(inside, rule(built.params, rule.init(built.params), built.batch))


@every_rule
@pytest.mark.few(1)
def test_a_rule_can_be_jitted_by_its_methods(name):
    built, rule = build(MODEL), rule_of(Case(name, MODEL), streaming=True, window=5)
    state = rule.init(built.params)
    expected = rule(built.params, state, built.batch)
    close(jax.jit(rule.__call__)(built.params, state, built.batch), expected)
    close(jax.jit(rule.update)(None, state, built.params, batch=built.batch), expected)
    close(jax.jit(rule.init)(built.params), state)
