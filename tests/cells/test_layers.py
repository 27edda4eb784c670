"""The sums of outer products that layers learn from, beside NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from localgrad.cells.layers import outer, outers

pytestmark = pytest.mark.usefixtures("x64")


def clipped(matrix, radius):
    return matrix * min(1, radius / max(np.linalg.norm(matrix), 1e-300))


def pair(batch, width=6):
    rng = np.random.default_rng(batch)
    return rng.normal(size=(batch, width)), rng.normal(size=(batch, width + 1))


@pytest.mark.parametrize("batch", [1, 5, 6, 7, 40], ids="B={}".format)
@pytest.mark.parametrize("gain", [1.0, 0.3, -0.7, 2.5, -4.0, 0.0])
@pytest.mark.few(15)
def test_a_sum_is_scaled_down_before_and_after_its_gain(batch, gain):
    pre, post = pair(batch)
    for radius in (0.4, 1e3):
        found = outer(radius, jnp.asarray(pre), jnp.asarray(post), jnp.float64, gain)
        wanted = clipped(gain * clipped(pre.T @ post, radius), radius)
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_layers_are_scaled_one_by_one_listed_or_stacked():
    pre, post = pair(3)
    listed = outers(1.0, (pre, 9 * pre), (post, post), jnp.float64)
    stacks = [jnp.stack(both, 1) for both in ((pre, 9 * pre), (post, post))]
    stacked = outers(1.0, *stacks, jnp.float64)
    for found in (listed, stacked):
        for one, factor in zip(found, (1, 9), strict=True):
            np.testing.assert_allclose(one, clipped(factor * pre.T @ post, 1.0), rtol=1e-12)


@pytest.mark.parametrize("batch", [2, 40])
def test_products_that_cancel_are_no_norm_below_zero(batch):
    pre, post = pair(batch)
    pre, post = np.concatenate([pre, pre]), np.concatenate([post, -post])
    found = outer(1e-3, jnp.float32(pre), jnp.float32(post), jnp.float32)
    assert np.isfinite(found).all() and np.linalg.norm(found) <= 1e-3 * (1 + 1e-5)
