"""How everything runs, tests and doctests: quick compilation, bounded memory, fixed workers."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import pytest
from xdist.scheduler import LoadScopeScheduling

# Where in the code each operation came from is asked by no test, and takes a twentieth of the time.
jax.config.update("jax_traceback_in_locations_limit", 0)
flax.config.update("flax_profile", False)

# JAX's objects live long, and looking through them all again and again takes a tenth of the time.
gc.set_threshold(100_000, 20, 100)

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


class Together(LoadScopeScheduling):
    """Gives tests that share what they compile to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        """A module, or a case of the contract: `...[rule-model]` or `...[rule-model-more]`.

        On many devices each test by itself, as they share nothing but a page's code.
        """
        module, _, test = nodeid.partition("::")
        if "multidevice" in module and "page" not in module:
            return nodeid
        case = re.search(r"\[(\w+-\w+)", test) if module.endswith("test_contract.py") else None
        return f"{module}::{case[1]}" if case else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    """Whatever `--dist` says."""
    return Together(config, log)
