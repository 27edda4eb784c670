"""`compare`: the geometry, the edge cases and the refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import localgrad


def tree(key):
    """A network's parameters, more or less."""
    keys = jax.random.split(key, 3)
    return {
        "cells_0": {
            "h": {"kernel": jax.random.normal(keys[0], (3, 4))},
            "bias": jax.random.normal(keys[1], (4,)),
        },
        "readout": {"kernel": jax.random.normal(keys[2], (4, 2))},
    }


def test_groups_and_whole_are_angles_between_vectors():
    updates, reference = tree(jax.random.key(0)), tree(jax.random.key(1))
    result = localgrad.compare(updates, reference)
    assert list(result) == ["cells_0", "readout", "all"]
    for name, (cosine, norm_ratio) in result.items():
        pair = (updates, reference) if name == "all" else (updates[name], reference[name])
        left, right = (np.asarray(ravel_pytree(one)[0], np.float64) for one in pair)
        lengths = np.linalg.norm(left), np.linalg.norm(right)
        assert cosine == pytest.approx(left @ right / np.prod(lengths), abs=1e-6)
        assert norm_ratio == pytest.approx(lengths[0] / lengths[1], rel=1e-6)


@pytest.mark.parametrize(
    ("left", "right", "cosine", "norm_ratio"),
    [(0.0, 0.0, 0, 0), (0.0, 1.0, 0, 0), (1.0, 0.0, 0, np.inf), (-2.0, 1.0, -1, 2)],
)
def test_zeros_are_safe(left, right, cosine, norm_ratio):
    result = localgrad.compare(jnp.full(3, left), jnp.full(3, right))
    assert list(result) == ["all"]
    assert result["all"] == (cosine, norm_ratio)


def test_small_gradients_do_not_underflow_nor_large_ones_overflow():
    exact = tree(jax.random.key(2))
    small, large = (jax.tree.map(lambda leaf, s=s: s * leaf, exact) for s in (1e-30, 1e30))
    assert localgrad.compare(small, exact)["all"] == pytest.approx((1, 1e-30), rel=1e-5)
    assert localgrad.compare(large, exact)["all"] == pytest.approx((1, 1e30), rel=1e-5)


def test_bfloat16_is_summed_in_float32():
    ones = jnp.ones(1001, jnp.bfloat16)
    cosine, norm_ratio = localgrad.compare(ones, ones.at[0].set(0))["all"]
    assert cosine.dtype == norm_ratio.dtype == jnp.float32
    assert cosine == pytest.approx(np.sqrt(1000 / 1001), abs=1e-6)


def test_float64_is_summed_in_float64(x64):
    assert localgrad.compare(jnp.ones(3), jnp.ones(3))["all"].cosine.dtype == jnp.float64


def test_under_jit_and_vmap():
    keys = jax.random.split(jax.random.key(3), (2, 5))
    updates, reference = jax.vmap(tree)(keys[0]), jax.vmap(tree)(keys[1])
    result = jax.jit(jax.vmap(localgrad.compare))(updates, reference)
    one = localgrad.compare(tree(keys[0, 3]), tree(keys[1, 3]))
    for name, value in one.items():
        np.testing.assert_allclose(result[name].cosine[3], value.cosine, rtol=1e-5)
        np.testing.assert_allclose(result[name].norm_ratio[3], value.norm_ratio, rtol=1e-5)


def test_different_trees_are_refused():
    with pytest.raises(ValueError, match="trees of one structure"):
        localgrad.compare({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"at \['a'\] got \(2,\) and \(3,\)"):
        localgrad.compare({"a": jnp.ones(2)}, {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="named 'all'"):
        localgrad.compare({"all": jnp.ones(2)}, {"all": jnp.ones(2)})
