"""Every rule beside Flax BPTT over cells and sizes, as it is meant for a GPU: time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

import catalogue
from benchmarks.harness import (
    FLAX,
    TRAITS,
    Plan,
    Problem,
    flax_bptt,
    interleave,
    problem,
    state_bytes,
    unlimited,
    update_of,
)
from benchmarks.report import Bytes, Ratio, Table

COMPILERS = 8


def grid(plan: Plan) -> Iterator[Table]:
    """A table for each cell and N, as soon as it is measured."""
    for cell in plan.cells:
        for units in plan.grid_units:
            yield _table(plan, cell, units)


def _table(plan: Plan, cell: str, units: int) -> Table:
    task = problem(cell, units, plan.grid_steps, plan.grid_batch)
    rules = {n: r for n, r in catalogue.RULES.items() if n in plan.grid_rules}
    rules = {n: r for n, r in rules.items() if r.refusal(TRAITS[cell]) is None}
    kept = {n: state_bytes(r.make, task, **unlimited(r.factory)) for n, r in rules.items()}
    small = [name for name in rules if kept[name] <= plan.grid_room]
    with ThreadPoolExecutor(COMPILERS) as pool:
        ahead = {name: pool.submit(_update, task, rules[name]) for name in small}
        flax, peak = _compiled(*flax_bptt(task))
        arguments = flax_bptt(task)[1]
        once = interleave(plan, {FLAX: lambda: flax(*arguments)}, FLAX)[FLAX]
        rows: list[list[Any]] = [[FLAX, once, Bytes(peak), Ratio(1), "-"]]
        for name in rules:
            if name not in small:
                rows.append([name, "-", "-", "-", Bytes(kept[name])])
                continue
            try:
                call, temporary = ahead[name].result()
                # A state is made when it is needed, and goes when it was.
                given = update_of(rules[name].make, task, **unlimited(rules[name].factory))[1]
                pair = {
                    FLAX: lambda: flax(*arguments),
                    name: lambda call=call, given=given: call(*given),
                }
                timing = interleave(plan, pair, FLAX)[name]
            except jax.errors.JaxRuntimeError as error:
                rows.append([name, str(error).split(":")[0], "-", "-", Bytes(kept[name])])
                continue
            row = [name, timing, Bytes(temporary), Ratio(temporary / peak), Bytes(kept[name])]
            rows.append(row)
    return Table(
        f"{cell}, N={units}, B={plan.grid_batch}, T={plan.grid_steps}",
        f"Milliseconds of a streaming call and the ratio to {FLAX} (jitted flax.linen.RNN), of "
        "medians (of minima) over interleaved repeats; temporary MiB of the compiled call, the "
        "ratio of that, and MiB that the state keeps. -: its state is larger than is tried.",
        ["", "time", "temporary MiB", "of Flax", "kept MiB"],
        rows,
    )


def _update(task: Problem, row: catalogue.Rule) -> tuple[Callable[..., Any], int]:
    """A rule's update, compiled from shapes."""
    shapes = task._replace(
        params=jax.eval_shape(lambda: task.params), batch=jax.eval_shape(lambda: task.batch)
    )
    return _compiled(*update_of(row.make, shapes, **unlimited(row.factory)))


def _compiled(function: Callable[..., Any], arguments: tuple) -> tuple[Callable[..., Any], int]:
    """The compiled call, and its temporary bytes."""
    program = jax.jit(function).lower(*arguments).compile()
    stats: Any = program.memory_analysis()
    return program, stats.temp_size_in_bytes
