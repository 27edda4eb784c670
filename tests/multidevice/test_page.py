"""What docs/devices.md shows runs as it stands there, and gives the numbers of one device."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


@pytest.fixture(scope="module")
def page():
    assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
    found: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(snippet, found)
    return found


def close(found, expected):
    chex.assert_trees_all_close(*jax.device_get((found, expected)), rtol=1e-4, atol=1e-6)


def alone(page):
    rule, params = page["rule"], page["params"]
    return rule(params, rule.init(params), page["batch"])[0]


def test_the_recipe_gives_the_numbers_of_one_device(page):
    tx, params = page["tx"], page["params"]
    expected = page["step"](params, tx.init(params), page["batch"])
    close((page["p"], page["s"]), expected)
    assert page["reduced"].operation == "all-reduce" and not page["reduced"].looped
    for axis, leaf in zip(*map(jax.tree.leaves, (page["streams"], page["s"])), strict=True):
        shard = leaf.sharding.shard_shape(leaf.shape)
        assert shard == tuple(n // 8 if i == axis else n for i, n in enumerate(leaf.shape))


def test_the_others_are_not_in_the_trap(page):
    expected = alone(page)
    close(page["from_chunks"], expected)
    close(page["from_shards"], expected)
    close(jax.tree.map(lambda a: a[3], page["from_replicas"]), expected)


def updates_of(page, states):
    """What each chunk's noise makes of one and the same piece."""
    piece = jax.tree.map(lambda a: a[0], page["pieces"])
    found, _ = jax.vmap(page["drawing"], (None, 0, None))(page["params"], states, piece)
    return found["cells_0"]["hn"]["kernel"]


def test_each_chunk_draws_for_itself(page):
    found = updates_of(page, page["own"])
    assert len(np.unique(found[:, 0, 0])) == 8
    alike = jax.vmap(lambda _: page["drawing"].init(page["params"]))(jnp.arange(8))
    found = updates_of(page, alike)
    close(found, jnp.broadcast_to(found[:1], found.shape))


def test_each_device_of_shard_map_draws_for_itself(page):
    model, params, none, split = page["model"], page["params"], page["P"](), page["P"]("data")
    same = jnp.repeat(page["batch"].inputs[:1], 8, 0), jnp.repeat(page["batch"].targets[:1], 8, 0)

    def share(params, inputs, targets):
        key = jax.random.fold_in(jax.random.key(3), jax.lax.axis_index("data"))
        rule = localgrad.node_perturbation(model, optax.l2_loss, key=key)
        updates, _ = rule(params, rule.init(params), localgrad.Batch(inputs, targets))
        return updates["cells_0"]["hn"]["kernel"][None]

    mapped = jax.shard_map(
        share,
        mesh=page["mesh"],
        in_specs=(none, split, split),
        out_specs=split,
        check_vma=False,
    )
    assert len(np.unique(jax.jit(mapped)(params, *same)[:, 0, 0])) == 8


def test_the_trap_is_there(page):
    params, (inputs, targets, *_) = page["params"], page["batch"]
    specs = (page["P"](), page["P"]("data"), page["P"]("data"))
    summed = jax.shard_map(
        page["wrong"], mesh=page["mesh"], in_specs=specs, out_specs=page["P"](), check_vma=False
    )
    close(jax.jit(summed)(params, inputs, targets), jax.tree.map(lambda a: 8 * a, alone(page)))
    expected = jax.grad(page["loss"])(jnp.ones((1, 1)), inputs, targets)
    assert abs(expected).max() > 0.01
    close(page["too_large"], 8 * expected)
