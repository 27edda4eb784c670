"""The settings of the conformance tests."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    """Everything here is compared at 1e-10."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiles_fast() -> Iterator[None]:
    """These tests compile much and compute little: three times faster in all."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
