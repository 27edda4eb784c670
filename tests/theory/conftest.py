"""All of the theory is float64."""

import pytest


@pytest.fixture(autouse=True)
def in_float64(x64: None) -> None:
    """Every test here runs with 64-bit numbers on."""
