"""How everything runs, tests and doctests: quick compilation, bounded memory, fixed workers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

FULL = 1.1 * 2**30
"""Bytes of a worker above which what JAX compiled is thrown away, after the test that got there."""


@pytest.fixture(scope="module", autouse=True)
def compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests compile much and compute little, so what they compile is not optimized.

    But that of modules marked `optimized`, which shares nothing with other modules.
    """
    optimized = request.node.get_closest_marker("optimized") is not None
    before = jax.config.read("jax_disable_most_optimizations")
    if optimized:
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    if optimized:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Compiled programs are most of what a worker holds, and the allocator keeps what they free."""
    yield
    if resident() > FULL:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """The bytes this process holds in memory; 0 where there is no way to know."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


@pytest.fixture(autouse=True)
def theory_in_float64(request: pytest.FixtureRequest) -> Iterator[None]:
    """Doctests of `localgrad.theory` run in float64, which the package asks for."""
    if not request.node.nodeid.startswith("localgrad/theory/"):
        yield
        return
    with jax.enable_x64(True):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what they compile go to one worker: a module, or a case of the contract."""
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        shared = "-".join(case) if case and item.path.stem == "test_contract" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path}{shared}"))
