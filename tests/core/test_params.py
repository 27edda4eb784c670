"""Parameters by path: nested dicts, boxes and NNX states come back as they went in."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import localgrad
from localgrad.core.params import accumulator, added, flatten, leaves_of, placed, under


def test_flatten_and_back():
    tree = {"b": {"kernel": 1, "bias": 2}, "a": {"w": 3}}
    leaves, back = flatten(tree)
    assert leaves == {("a", "w"): 3, ("b", "bias"): 2, ("b", "kernel"): 1}
    assert back({path: 10 * leaf for path, leaf in leaves.items()}) == {
        "b": {"kernel": 10, "bias": 20},
        "a": {"w": 30},
    }


def test_an_nnx_variable_adds_nothing_to_its_path():
    _, params = localgrad.from_nnx(nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0)))
    assert set(leaves_of(params)) == {
        ("dense_i", "kernel"),
        ("dense_i", "bias"),
        ("dense_h", "kernel"),
    }
    leaves, back = flatten(params)
    chex.assert_trees_all_equal(back(leaves), params)


def test_subtrees():
    leaves = {("a", "x"): 1, ("a", "y"): 2, ("b",): 3}
    assert under(leaves, ("a",)) == {("x",): 1, ("y",): 2}
    assert under(leaves, ()) == leaves
    assert placed(under(leaves, ("a",)), ("a",)) == {("a", "x"): 1, ("a", "y"): 2}
    assert added({("a",): 1, ("b",): 2}, {("b",): 3, ("c",): 4}) == {
        ("a",): 1,
        ("b",): 5,
        ("c",): 4,
    }


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_are_at_least_float32(dtype):
    assert accumulator(jnp.zeros(2, dtype)) == jnp.float32


def test_sums_of_float64_are_float64(x64):
    assert accumulator(jnp.zeros(2)) == jnp.float64


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop, localgrad.rtrl])
@pytest.mark.few(1)
def test_boxed_parameters_give_boxed_updates(factory):
    shared = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    boxed = localgrad.Network((nn.SimpleCell(4, kernel_init=shared),), readout=nn.Dense(2))
    plain = localgrad.Network((nn.SimpleCell(4),), readout=nn.Dense(2))
    x = jnp.ones((2, 5, 3))
    carry = boxed.initialize_carry(jax.random.key(0), (2, 3))
    params = boxed.init(jax.random.key(0), carry, x[:, 0])["params"]
    assert isinstance(params["cells_0"]["i"]["kernel"], nn.Partitioned)
    batch = localgrad.Batch(x, jnp.ones((2, 5, 2)))
    rule = factory(boxed, optax.l2_loss, batch_size=2)
    updates, _ = rule(params, rule.init(params), batch)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    bare = nn.meta.unbox(params)
    rule = factory(plain, optax.l2_loss, batch_size=2)
    expected, _ = rule(bare, rule.init(bare), batch)
    chex.assert_trees_all_close(nn.meta.unbox(updates), expected, atol=1e-6)
