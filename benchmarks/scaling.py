"""How a step's time grows with the number of units, beside the power that is documented."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import catalogue
from benchmarks.harness import (
    FLAX,
    TRAITS,
    Plan,
    Timing,
    compiled,
    flax_bptt,
    interleave,
    problem,
    state_bytes,
    unlimited,
    update_of,
)
from benchmarks.report import Bar, Table

SLACK = 0.3
"""By how much a fitted power may pass the documented one: caches are left on the way."""


class Power(float):
    """An exponent of N."""

    def __str__(self) -> str:
        return f"{float(self):.2f}"


def scaling(plan: Plan) -> Iterator[Table | Bar]:
    """Every rule over N, with the exponent of its time."""
    for cell in plan.cells:
        rules = _rules(plan, cell)
        found: dict[str, dict[int, Timing]] = {name: {} for name in (FLAX, *rules)}
        for units in plan.scaled_units:
            for name, timing in _timings(plan, cell, units, rules).items():
                found[name][units] = timing
        powers = {name: _power(timings) for name, timings in found.items()}
        said = {name: str(row.power) for name, row in rules.items()} | {FLAX: "2"}
        title = f"Time of one step over N: {cell} cell, B={plan.batch}"
        note = (
            "Milliseconds, and the ratio to Flax BPTT; the power of N, fitted to the largest three "
            "N, and for large N as documented. -: its state takes too much."
        )
        header = ["", *(f"N={units}" for units in plan.scaled_units), "power", "documented"]
        yield Table(
            title,
            note,
            header,
            [
                [name, *(row.get(n, "-") for n in plan.scaled_units), powers[name], said[name]]
                for name, row in found.items()
            ],
        )
        over = {name: powers[name] - row.power for name, row in rules.items()}
        worst = max(over, key=lambda name: over[name])
        claim = f"time over N, {cell}: fitted power less the documented one (worst: {worst})"
        yield Bar(claim, over[worst], SLACK)


def _rules(plan: Plan, cell: str) -> dict[str, catalogue.Rule]:
    """The first row of each public function that credits this cell."""
    found: dict[str, catalogue.Rule] = {}
    for row in catalogue.RULES.values():
        if row.public_name in plan.scaled_rules and row.refusal(TRAITS[cell]) is None:
            found.setdefault(row.public_name, row)
    return found


def _timings(
    plan: Plan, cell: str, units: int, rules: Mapping[str, catalogue.Rule]
) -> dict[str, Timing]:
    """Time a step of all that fit, at one N."""
    steps = {FLAX: plan.scaled_steps[0]}
    calls = {FLAX: compiled(*flax_bptt(problem(cell, units, steps[FLAX], plan.batch)))}
    for name, row in rules.items():
        steps[name] = plan.scaled_steps[row.power > 2]
        task = problem(cell, units, steps[name], plan.batch)
        if state_bytes(row.make, task, **unlimited(row.factory)) <= plan.room:
            calls[name] = compiled(*update_of(row.make, task))
    return interleave(plan, calls, FLAX, steps)


def _power(timings: Mapping[int, Timing]) -> Power:
    """The slope of the logarithm of the time over that of N, at the largest three N."""
    points = [(math.log(n), math.log(timing.min_ms)) for n, timing in sorted(timings.items())[-3:]]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    over = sum((a - x) ** 2 for a, _ in points)
    return Power(sum((a - x) * (b - y) for a, b in points) / over) if over else Power(math.nan)
