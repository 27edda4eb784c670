"""Doctests of `localgrad.theory` run in float64, which the package asks for."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def theory_in_float64(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.node.nodeid.startswith("localgrad/theory/"):
        yield
        return
    with jax.enable_x64(True):
        yield
