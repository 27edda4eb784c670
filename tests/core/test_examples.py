"""Memory of many examples, one after the other and all at once: the same numbers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, IN, OUT, N = 3, 4, 2, 2, 4
KEY = jax.random.key(7)
RULES = {
    "eprop": localgrad.eprop,
    "rtrl": localgrad.rtrl,
    "uoro": functools.partial(localgrad.uoro, key=KEY),
    "deep_eprop": localgrad.deep_eprop,
    "snap": localgrad.snap,
    "snap of sparse weights": functools.partial(localgrad.snap, order=2),
    "kf_rtrl": functools.partial(localgrad.kf_rtrl, key=KEY),
    "ok": functools.partial(localgrad.ok, rank=2, key=KEY),
}
"""Each way of keeping a memory of each example."""


def on_an_accelerator(*operands, cpu, default):
    """What `jax.lax.platform_dependent` chooses there."""
    del cpu
    return default(*operands)


def after_two_calls(name):
    """The updates of both and the state."""
    model = localgrad.Network((localgrad.RateCell(N, alpha=0.3),), readout=nn.Dense(OUT))
    keys = iter(jax.random.split(jax.random.key(0), 6))
    carry = model.initialize_carry(next(keys), (B, IN))
    params = model.init(next(keys), carry, jnp.zeros((B, IN)))["params"]
    params = jax.tree.map(jnp.float64, params)
    if "sparse" in name:
        ring = jnp.eye(N) + jnp.roll(jnp.eye(N), 1, axis=0)
        params = jax.tree.map(lambda a: a * ring if a.shape == (N, N) else a, params)
    batch = localgrad.Batch(
        jax.random.normal(next(keys), (B, T, IN)),
        jax.random.normal(next(keys), (B, T, OUT)),
        jnp.ones((B, T)).at[1, 2].set(0),
        jax.random.bernoulli(next(keys), 0.2, (B, T)),
    )
    rule = RULES[name](model, optax.l2_loss, batch_size=B, example=jnp.zeros(IN), window=2)
    step = jax.jit(rule.__call__)
    first, state = step(params, rule.init(params), batch)
    second, state = step(params, state, batch)
    return (
        first,
        second,
        [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.inexact)],
    )


@pytest.mark.parametrize("name", RULES)
@pytest.mark.few(3)
def test_all_examples_at_once_give_the_numbers_of_one_after_the_other(name, x64, monkeypatch):
    one_by_one = after_two_calls(name)
    monkeypatch.setattr(jax.lax, "platform_dependent", on_an_accelerator)
    jax.clear_caches()
    at_once = after_two_calls(name)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), at_once, one_by_one
    )
