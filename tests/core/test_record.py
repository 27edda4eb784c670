"""The record of a tree: whatever bit is changed, or entry moved, it is another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from localgrad.core.record import record_of

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "int8", "int64", "uint32")


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_any_bit_counts_and_its_place(dtype):
    rng, dtype = np.random.default_rng(0), jnp.dtype(dtype)
    flag = dtype == np.bool_
    size = 24 * dtype.itemsize
    raw = rng.integers(0, 2 if flag else 256, size).astype(np.uint8)
    told = record_of({"a": raw.view(dtype).reshape(4, 6)})
    assert told["['a']"].startswith(f"{dtype}[4,6] ")
    with jax.enable_x64(True):
        on_device = jnp.asarray(raw.view(dtype).reshape(4, 6))
    assert record_of({"a": on_device}) == told
    seen = {told["['a']"]}
    for place in range(size):
        other = raw.copy()
        other[place] ^= 1 if flag else 1 << rng.integers(8)
        seen.add(record_of({"a": other.view(dtype).reshape(4, 6)})["['a']"])
    assert len(seen) == size + 1
    moved = np.roll(raw.view(dtype), 1).reshape(4, 6)
    assert record_of({"a": moved}) != told


def test_equal_numbers_of_other_bits_are_told_apart():
    first, second = (
        record_of({"zero": jnp.zeros(2), "k": jax.random.key(0)}),
        record_of({"zero": -jnp.zeros(2), "k": jax.random.key(1)}),
    )
    assert all(first[path] != second[path] for path in first)
