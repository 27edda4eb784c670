"""What was saved from one mesh is restored onto another, and goes on with the same numbers."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import localgrad
from localgrad import checkpoint
from tests.conformance.table import plain

B, T, IN = 8, 6, 3
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.fixture(scope="module")
def problem():
    assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
    model = localgrad.RateCell(4, alpha=0.3)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (B, T, IN))
    batch = localgrad.Batch(inputs, jax.random.normal(keys[1], (B, T, 4)))
    params = model.init(keys[2], model.initialize_carry(keys[2], (B, IN)), inputs[:, 0])["params"]
    rule = localgrad.node_perturbation(
        model, optax.l2_loss, scale=1.0, batch_size=B, key=jax.random.key(3)
    )
    tx = optax.chain(rule, optax.adam(1e-2))
    return tx, (params, tx.init(params), jax.random.split(jax.random.key(4), B)), batch


def spread(tree, devices, axis_type):
    """What has streams, over a mesh of these devices; all else on each of them."""
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",), axis_types=(axis_type,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    return jax.tree.map(
        lambda a: jax.device_put(a, split if a.ndim and a.shape[0] == B else whole), tree
    )


@pytest.mark.parametrize(("before", "after"), [((8, AUTO), (2, EXPLICIT)), ((4, EXPLICIT), None)])
def test_a_run_goes_on_upon_another_mesh(before, after, problem, tmp_path):
    tx, fresh, batch = problem

    @jax.jit
    def learn(tree, batch):
        params, opt_state, keys = tree
        return *localgrad.learn(tx, params, opt_state, batch, chunk=2)[:2], keys

    first = spread(fresh, *before)
    first = learn(first, spread(batch, *before))
    with checkpoint.open(tmp_path) as manager:
        assert checkpoint.save(manager, 1, first)
    target = fresh if after is None else spread(fresh, *after)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), target
    )
    with checkpoint.open(tmp_path) as manager:
        for wanted in (target, abstract):
            _, found = checkpoint.restore(manager, wanted)
            for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
                assert leaf.sharding == like.sharding
            chex.assert_trees_all_equal(*jax.device_get(plain((found, first))))
    then = learn(found, batch if after is None else spread(batch, *after))
    expected = learn(first, spread(batch, *before))
    chex.assert_trees_all_close(*jax.device_get(plain((then, expected))), atol=1e-6)


def test_what_is_bound_to_no_device_is_restored_so(problem, tmp_path):
    """Beside what lies on a mesh it then goes on as in a fresh run."""
    tx, fresh, batch = problem
    params = spread(fresh[0], 8, AUTO)
    tree = {"params": params, "opt": tx.init(fresh[0]), "on_one": jax.device_put(1.0)}
    tree["on_one"] = jax.device_put(tree["on_one"], SingleDeviceSharding(jax.devices()[5]))
    with checkpoint.open(tmp_path) as manager:
        assert checkpoint.save(manager, 1, tree)
        _, found = checkpoint.restore(manager, tree)
    bound = jax.tree.map(lambda a: a.committed, (tree, found))
    assert bound[0] == bound[1] and not all(jax.tree.leaves(bound[0]))
    assert found["on_one"].devices() == {jax.devices()[5]}
    update = jax.jit(lambda p, s: tx.update(None, s, p, batch=batch)[0])
    chex.assert_trees_all_equal(
        *jax.device_get([update(t["params"], t["opt"]) for t in (found, tree)])
    )


def test_a_target_that_cannot_be_divided_is_no_damage(problem, tmp_path):
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    tree = {"weights": jnp.ones(12)}
    with checkpoint.open(tmp_path) as manager:
        assert checkpoint.save(manager, 1, tree)
        target = {"weights": jax.ShapeDtypeStruct((12,), tree["weights"].dtype, sharding=split)}
        with pytest.raises(ValueError, match=r"target\['weights'\] cannot be divided .*12.*8"):
            checkpoint.restore(manager, target)
        assert manager.all_steps() == [1]
