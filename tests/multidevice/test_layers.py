"""A P-TNCN whose layers lie on eight devices learns what it learns on one."""

import chex
import jax
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import localgrad

B, T, D, H, LAYERS = 3, 5, 4, 6, 9


def placed(tree, layers, whole):
    """What layers 2..L hold is split over devices: parameters by axis 0, states by axis 1."""

    def place(path, leaf):
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        stacked = name in ("W", "E", "M", "V", "U")
        several = name in ("rest", "prediction")
        spec = layers[0] if stacked else layers[1] if several else whole
        return jax.device_put(leaf, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


@pytest.mark.parametrize("error_rule", ["transpose", "temporal"])
@pytest.mark.few(1)
def test_layers_over_devices_give_the_same(error_rule):
    assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
    model = localgrad.PTNCN((H,) * LAYERS, D, stacked=True, beta=0.5, alpha=0.2)
    frames = jax.nn.softmax(jax.random.normal(jax.random.key(0), (B, T + 1, D)))
    batch = localgrad.Batch(frames[:, :-1], frames[:, 1:])
    carry = model.initialize_carry(jax.random.key(0), (B, D))
    params = model.init(jax.random.key(1), carry, frames[:, 0])["params"]
    params = jax.tree.map(lambda a: 8 * a, params)
    loss = localgrad.categorical_cross_entropy
    rule = localgrad.lra(model, loss, batch_size=B, error_rule=error_rule)
    tx = optax.chain(rule, optax.sgd(0.3, momentum=0.9))
    updates, _ = rule(params, rule.init(params), batch)
    learn = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=1))
    learned, after, losses = learn(params, tx.init(params), batch)

    mesh = jax.make_mesh((8,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (PartitionSpec("layers"), PartitionSpec(None, "layers"))
    layers = [NamedSharding(mesh, spec) for spec in specs]
    whole = NamedSharding(mesh, PartitionSpec())
    on_all = [placed(tree, layers, whole) for tree in (params, tx.init(params))]
    spread = jax.device_put(batch, whole)
    found, _ = jax.jit(rule.__call__)(on_all[0], on_all[1][0], spread)
    assert found["V"].sharding.shard_shape(found["V"].shape) == (1, H, H)
    chex.assert_trees_all_close(*jax.device_get((found, updates)), atol=1e-6)
    trained, then, seen = learn(*on_all, spread)
    assert trained["M"].sharding.shard_shape(trained["M"].shape) == (1, H, H)
    chex.assert_trees_all_close(*jax.device_get((trained, learned)), atol=1e-5)
    chex.assert_trees_all_close(*jax.device_get((then, after)), atol=1e-5)
    chex.assert_trees_all_close(*jax.device_get((seen, losses)), atol=1e-6)
