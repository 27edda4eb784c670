"""Ten million steps of a stream, one by one inside one program: slow, run by itself.

A small GRU learns to tell what it was shown three steps ago: in the end all is finite, and the
process holds no more memory than after the first tenth. While it learns, rounding grows as in any
chaotic system. So a second run keeps the parameters, and its carry and influence are held against
those of a twin in float64.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from conftest import resident

STEPS, CALL, CALLS = 10_000_000, 1000, 1000  # CALLS of CALL steps in a program
N, LAG = 4, 3
RULES = {
    "eprop": localgrad.eprop,
    "rtrl": localgrad.rtrl,
    # Without a guard its trace, which keeps a unit's weight on itself, explodes on this stream.
    "snap": lambda *args, **told: localgrad.guard(localgrad.snap(*args, **told), max_norm=100.0),
}


def learner(name, dtype, optimizer):
    """Untrained parameters with their state, and what learns from CALLS calls."""
    model = localgrad.Network(
        (nn.GRUCell(N, param_dtype=dtype),), readout=nn.Dense(1, param_dtype=dtype)
    )
    rule = RULES[name](model, optax.l2_loss, batch_size=1)
    tx = optax.chain(rule, optimizer)
    x = jnp.zeros((1, 1), dtype)
    start = nn.GRUCell(N).initialize_carry(jax.random.key(0), x.shape)
    params = localgrad.Network((nn.GRUCell(N),), readout=nn.Dense(1)).init(
        jax.random.key(1), (start,), jnp.zeros((1, 1), jnp.float32)
    )["params"]
    params = jax.tree.map(lambda a: a.astype(dtype), params)

    def call(so_far, key):
        params, state, before = so_far
        shown = (jax.random.bits(key, (1, CALL, 1), jnp.uint32) % 2 * 2.0 - 1).astype(dtype)
        asked = jnp.concatenate([before, shown], axis=1)
        batch = localgrad.Batch(shown, asked[:, :CALL])
        params, state, losses = localgrad.learn(tx, params, state, batch, chunk=1)
        return (params, state, asked[:, CALL:]), losses.mean()

    @jax.jit
    def calls(so_far, keys):
        return jax.lax.scan(call, so_far, keys)

    return (params, tx.init(params), jnp.zeros((1, LAG, 1), dtype)), calls


def soaked(name, dtype, optimizer):
    """The end of the stream: what was learnt, the state, losses of calls, and bytes held."""
    so_far, calls = learner(name, dtype, optimizer)
    losses, held = [], []
    for number in range(STEPS // (CALL * CALLS)):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(2), number), CALLS)
        so_far, found = calls(so_far, keys)
        losses.append(np.asarray(found))
        held.append(resident())
    return so_far[0], so_far[1], np.concatenate(losses), held


def numbers(tree):
    """All real numbers of a tree, in one array."""
    leaves = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return np.concatenate([np.ravel(a).astype(np.float64) for a in leaves])


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_ten_million_steps_of_learning_end_finite_in_flat_memory(name):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    params, state, losses, held = soaked(name, jnp.float32, optimizer)
    assert np.isfinite(numbers((params, state))).all() and np.isfinite(losses).all()
    assert held[-1] - held[0] < 20 * 2**20
    assert losses[-1000:].mean() < losses[:10].mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_after_ten_million_steps_float32_is_near_float64(name):
    still = optax.set_to_zero()
    _, state, *_ = soaked(name, jnp.float32, still)
    with jax.enable_x64(True):
        _, twin, *_ = soaked(name, jnp.float64, still)
    own, exact = (numbers(s[0]._replace(loss=None)) for s in (state, twin))
    assert np.linalg.norm(own - exact) < 1e-5 * np.linalg.norm(exact)
