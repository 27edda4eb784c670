"""Carries that hold counters, flags and keys, under the exact rules."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, IN, N = 3, 6, 2, 4


class Noisy(nn.RNNCellBase):
    """It counts its steps, has a flag, and draws noise from each example's own key."""

    @nn.compact
    def __call__(self, carry, x):
        h, count, flag, key = carry
        key, now = jnp.moveaxis(jax.vmap(jax.random.split)(key), 1, 0)
        noise = jax.vmap(lambda key: jax.random.normal(key, (N,)))(now)
        fed = nn.Dense(N, param_dtype=float)(x) + nn.Dense(N, param_dtype=float)(h)
        drive = fed + 0.3 * noise
        h = 0.5 * h + jnp.where((count % 3 == 1)[:, None], 1.0, 0.2) * jnp.tanh(drive)
        return (h + 0.1 * flag[:, None], count + 1, count % 2 == 0, key), h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        size = input_shape[0]
        h, count = jnp.full((size, N), 0.3), jnp.full((size,), -1, jnp.int32)
        return h, count, jnp.zeros((size,), bool), jax.random.split(jax.random.key(7), size)

    @property
    def num_feature_axes(self):
        return 1


def problem():
    rng = np.random.default_rng(0)
    batch = localgrad.Batch(*(jnp.asarray(rng.normal(size=(B, T, size))) for size in (IN, N)))
    carry = Noisy().initialize_carry(None, (B, IN))
    params = Noisy().init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]

    def loss(params):
        carry, total = Noisy().initialize_carry(None, (B, IN)), 0.0
        for t in range(T):
            carry, y = Noisy().apply({"params": params}, carry, batch.inputs[:, t])
            total += optax.l2_loss(y, batch.targets[:, t]).mean(-1).sum()
        return total

    return params, batch, jax.jit(jax.grad(loss))(params)


@pytest.mark.slow
def test_exact_rules_count_and_draw_as_the_cell_does(x64):
    params, batch, wanted = problem()
    options = {"batch_size": B, "reduction": "sum"}
    rule = localgrad.rtrl(Noisy(), optax.l2_loss, **options)
    state, found = rule.init(params), []
    for half in (slice(0, 2), slice(2, T)):
        updates, state = rule(params, state, jax.tree.map(lambda a, s=half: a[:, s], batch))
        found.append(updates)
    close = chex.assert_trees_all_close
    close(jax.tree.map(jnp.add, *found), wanted, rtol=1e-10)
    rule = localgrad.bptt(Noisy(), optax.l2_loss, **options)
    updates, after = rule(params, rule.init(params), batch)
    close(updates, wanted, rtol=1e-10)
    _, _, carry = localgrad.evaluate(Noisy(), optax.l2_loss, params, batch)
    for kept in (state.carry, after.carry):
        assert kept[1].tolist() == carry[1].tolist() == [T - 1] * B
        assert kept[2].dtype == bool
        close(*(jax.random.key_data(c[3]) for c in (kept, carry)))
    fresh = localgrad.reset_state(state).carry
    assert fresh[1].tolist() == [-1] * B


@pytest.mark.slow
def test_local_rules_refuse_them_by_name():
    params, batch, _ = problem()
    rule = localgrad.eprop(Noisy(), optax.l2_loss)
    with pytest.raises(ValueError, match=r"eprop .*\(Noisy\): its carry holds integers"):
        rule(params, rule.init(params), batch)
