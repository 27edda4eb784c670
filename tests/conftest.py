"""What the whole suite shares: strict ranks, repeatable examples and float64 on request."""

import collections
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


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `few` are slow but for their first cases."""
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("few")
        if mark is None or item.get_closest_marker("slow") is not None:
            continue
        test = item.nodeid.split("[")[0]
        seen[test] += 1
        if seen[test] > mark.args[0]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 inside the test (and inside fixtures named after this one), float32 outside."""
    with jax.enable_x64(True):
        yield
