"""What the whole suite shares: strict ranks, repeatable examples and float64 on request."""

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

# Broadcasting [N] against [B, N] is written out, here and in localgrad, or it is a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")

# A first call compiles, which outlasts Hypothesis' deadline; every run draws the same examples.
hypothesis.settings.register_profile("localgrad", deadline=None, derandomize=True)
hypothesis.settings.load_profile("localgrad")

# The number of devices is fixed when JAX starts: `make test` gives multidevice/ its own process.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    collect_ignore = ["multidevice"]


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 inside the test (and inside fixtures named after this one), float32 outside."""
    with jax.enable_x64(True):
        yield
