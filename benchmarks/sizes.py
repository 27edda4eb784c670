"""The rules away from the usual size: wide cells, big batches, short episodes, single steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import optax
from flax import nnx

import localgrad
from benchmarks.harness import (
    FLAX,
    INPUTS,
    OUTPUTS,
    Plan,
    Problem,
    check_close,
    compiled,
    flax_bptt,
    interleave,
    problem,
    streaming,
    update_of,
)
from benchmarks.measures import ONE_STEP, TIMING, flax_scan
from benchmarks.report import Bar, Table

ADAM = optax.adam(1e-3)


class Case(NamedTuple):
    """One comparison: a rule on a cell, at N units, T steps, B examples, and the bar set for it."""

    rule: str
    cell: str
    bar: float
    units: int = 128
    steps: int = 1000
    batch: int = 16
    layers: int = 1

    def divided(self, by: int) -> Case:
        """The same with smaller N, T and B, to see that it runs."""
        units, steps, batch = (-(-n // by) for n in (self.units, self.steps, self.batch))
        return self._replace(units=units, steps=steps, batch=batch)


EPISODES = "Episodes"
STREAMS = "Streams"
ONE_BY_ONE = "Learning with Adam after every step"
CASES = {
    EPISODES: (
        Case("eprop", "GRU", 0.85, steps=250),
        Case("eprop", "rate", 0.85, units=512, steps=200),
        Case("snap", "LSTM", 1.0, steps=500),
    ),
    STREAMS: (
        *(
            Case(rule, cell, 1.1, steps=250, **size)
            for rule in ("eprop", "snap")
            for cell in ("rate", "GRU")
            for size in ({"units": 512}, {"batch": 256})
        ),
        Case("snap", "LSTM", 1.35),
        Case("snap", "LSTM", 1.5, units=512, steps=250),
        Case("tbptt", "rate", 1.4),
        Case("tbptt", "GRU", 1.7),
        Case("tbptt", "LSTM", 1.9),
        Case("tbptt", "rate", 2.4, layers=3),
        Case("bptt", "LSTM", 1.1),
        Case("bptt", "OptimizedLSTM", 1.1),
        Case("bptt", "OptimizedLSTM", 1.2, units=32),
        Case("bptt", "NNX GRU", 1.1),
        Case("bptt", "NNX GRU", 1.5, units=32),
        Case("bptt", "rate", 1.1, units=256),
    ),
    ONE_BY_ONE: (
        Case("eprop", "rate", 1.4, batch=1),
        Case("eprop", "GRU", 1.5, batch=1),
        Case("snap", "LSTM", 3.0, batch=1),
        Case("eprop", "rate", 2.5),
        Case("eprop", "GRU", 3.0),
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {"tbptt": {"horizon": 10}}


def sizes(plan: Plan) -> Iterator[Table | Bar]:
    """Each case beside Flax BPTT of the same cell and size, or beside its one-step form."""
    for title, cases in CASES.items():
        reference = ONE_STEP if title == ONE_BY_ONE else FLAX
        rows, bars = [], []
        for case in (case.divided(plan.sizes_divided) for case in cases):
            ours = case.rule + "".join(f"({n})" for n in SETTINGS.get(case.rule, {}).values())
            flax, mine = _calls(title, case)
            found = interleave(plan, {reference: flax, ours: mine}, reference)
            size = case.units, case.steps, case.batch, case.layers
            rows.append([ours, case.cell, *size, found[reference], found[ours], case.bar])
            at = ", ".join(f"{letter}={n}" for letter, n in zip("NTBL", size, strict=True))
            bars.append(Bar(f"{ours}, {case.cell}, {at}", found[ours].ratio, case.bar))
        header = ["", "cell", "N", "T", "B", "layers", reference, "ours", "bar"]
        note = f"{TIMING.format(reference)}. NNX cells beside the same Linen cell."
        yield Table(title, note, header, rows)
        yield from bars


def _calls(title: str, case: Case) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Flax's call and ours, ready to time."""
    linen = case.cell.removeprefix("NNX ")
    task = problem(linen, case.units, case.steps, case.batch, depth=case.layers)
    ours = task if linen == case.cell else _as_nnx(case, task)
    make = functools.partial(getattr(localgrad, case.rule), **SETTINGS.get(case.rule, {}))
    if title == ONE_BY_ONE:
        tx = optax.chain(streaming(make, ours), ADAM)
        learn = functools.partial(localgrad.learn, tx, chunk=1)
        mine = compiled(learn, (ours.params, tx.init(ours.params), ours.batch))
        return compiled(*flax_scan(task, ADAM)), mine
    flax = compiled(*flax_bptt(task))
    if title == EPISODES:
        rule = make(ours.model, optax.l2_loss)
        return flax, compiled(rule.__call__, (ours.params, rule.init(ours.params), ours.batch))
    mine = compiled(*update_of(make, ours))
    if case.rule == "bptt" and ours is task:
        check_close(mine()[0], flax()[1], f"bptt beside {FLAX}")
    return flax, mine


def _as_nnx(case: Case, task: Problem) -> Any:
    """The same problem for a network of NNX cells, with parameters of its own."""
    rngs = nnx.Rngs(0)
    cells = [
        nnx.GRUCell(INPUTS if level == 0 else case.units, case.units, rngs=rngs)
        for level in range(case.layers)
    ]
    network = localgrad.NNXNetwork(cells, readout=nnx.Linear(case.units, OUTPUTS, rngs=rngs))
    model, params = localgrad.from_nnx(network)
    return task._replace(model=model, params=params)
