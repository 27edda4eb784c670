"""Copies of a rule that lie on eight devices average to what they do on one."""

import chex
import flax.linen as nn
import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

import localgrad

B, T, IN, K = 2, 6, 3, 16


def test_copies_over_devices_give_the_same():
    assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
    model = localgrad.Network((localgrad.RateCell(4, alpha=0.3),), readout=nn.Dense(2))
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (B, T, IN))
    batch = localgrad.Batch(inputs, jax.random.normal(keys[1], (B, T, 2)))
    carry = model.initialize_carry(keys[2], (B, IN))
    params = model.init(keys[2], carry, inputs[:, 0])["params"]
    one = localgrad.uoro(model, optax.l2_loss, key=keys[0], batch_size=B, window=2)
    rule = localgrad.average(one, samples=K)
    state = rule.init(params)
    updates, after = rule(params, state, batch)

    mesh = jax.make_mesh((8,), ("copies",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("copies"))
    spread = jax.device_put(state._replace(copies=None), whole)
    spread = spread._replace(copies=jax.device_put(state.copies, split))
    step = jax.jit(lambda p, s, b: rule(p, s, b))
    found, new = step(jax.device_put(params, whole), spread, jax.device_put(batch, whole))
    right = new.copies.state.right["cells_0", "h", "kernel"]
    assert right.sharding.shard_shape(right.shape) == (K // 8, B, 4, 4)
    chex.assert_trees_all_close(*jax.device_get((found, updates)), atol=1e-6)
    held = [s.copies.state._replace(key=None) for s in (new, after)]
    chex.assert_trees_all_close(*jax.device_get(held), atol=1e-5)
