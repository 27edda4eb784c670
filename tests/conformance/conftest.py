"""The settings of the conformance tests."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    """Everything here is compared at 1e-10."""
    with jax.enable_x64(True):
        yield
