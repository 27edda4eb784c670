"""How long the first call takes beside Flax's: the state, tracing, lowering and compiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

import localgrad
from benchmarks.harness import FLAX, Plan, Problem, flax_bptt, problem, update_of
from benchmarks.report import Bar, Ratio, Table

RULES = {"eprop": localgrad.eprop, "snap": localgrad.snap, "rtrl": localgrad.rtrl}
LAYERS = (1, 3)
LIMITS = {("eprop", 1): 1.5, ("snap", 1): 1.5, ("eprop", 3): 2.0, ("snap", 3): 2.0, ("rtrl", 1): 3}
ROUNDS = 3


def compilation(plan: Plan) -> Iterator[Table | Bar]:
    """Processor time until a rule's first update is compiled, nothing being remembered."""
    units, _ = plan.main
    makes = {
        FLAX: flax_bptt,
        **{name: lambda task, make=make: update_of(make, task) for name, make in RULES.items()},
    }
    for cell in plan.cells:
        rows: dict[str, list[Any]] = {name: [name] for name in makes}
        bars = []
        for layers in LAYERS:
            task = problem(cell, units, 100, plan.batch, depth=layers)
            asked = [n for n in makes if n == FLAX or (n, layers) in LIMITS]
            took = {name: min(_seconds(makes[name], task) for _ in range(ROUNDS)) for name in asked}
            for name, row in rows.items():
                there = name in took
                row += (
                    [f"{took[name]:.2f}", Ratio(took[name] / took[FLAX])] if there else ["-", "-"]
                )
            bars += [
                Bar(f"{n}, {cell}, {layers} layers: first call / {FLAX}", took[n] / took[FLAX], bar)
                for (n, count), bar in LIMITS.items()
                if count == layers
            ]
        header = ["", *(text for n in LAYERS for text in (f"{n} layers, s", f"of {FLAX}"))]
        note = f"Seconds of the processor, least of {ROUNDS} rounds with JAX's caches empty."
        yield Table(
            f"First call: {cell} cell, N={units}, B={plan.batch}", note, header, [*rows.values()]
        )
        yield from bars


def _seconds(make: Callable[[Problem], tuple[Callable, tuple]], task: Problem) -> float:
    """From a model and its parameters to a compiled call."""
    jax.clear_caches()
    begin = time.process_time()
    function, arguments = make(task)
    jax.jit(function).lower(*arguments).compile()
    return time.process_time() - begin
