"""What one update of a rule costs: time and temporary memory of the compiled function."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

import localgrad


class Update(NamedTuple):
    """A compiled update `rule(params, state, batch)` with its arguments."""

    compiled: Any
    arguments: tuple[Any, Any, localgrad.Batch]


class Cost(NamedTuple):
    """The price of one update on one batch, without the optimizer.

    Attributes:
        milliseconds: the median time, all rules' repeats interleaved in one process.
        temporary_bytes: peak memory inside the call; arguments and results are excluded.
    """

    milliseconds: float
    temporary_bytes: int


def compile_update(rule: localgrad.LearningRule, params: Any, batch: localgrad.Batch) -> Update:
    """Compiles one update of a rule."""
    arguments = params, rule.init(params), batch
    return Update(jax.jit(rule.__call__).lower(*arguments).compile(), arguments)


def costs(updates: Mapping[Any, Update], repeats: int) -> dict[Any, Cost]:
    """Measures updates side by side.

    Args:
        updates: the updates by name.
        repeats: how many rounds; each round times every update once.

    Returns:
        The cost of each by name.
    """
    times: dict[Any, list[float]] = {name: [] for name in updates}
    for _ in range(repeats + 1):  # The first round warms up.
        for name, (compiled, arguments) in updates.items():
            begin = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times[name].append(time.perf_counter() - begin)
    return {
        name: Cost(
            milliseconds=1e3 * statistics.median(times[name][1:]),
            temporary_bytes=update.compiled.memory_analysis().temp_size_in_bytes,
        )
        for name, update in updates.items()
    }
