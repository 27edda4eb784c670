"""Tables and JSON of the experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.perturbation.learner import Outcome
from experiments.perturbation.problems import Problem
from experiments.perturbation.rows import ROWS
from experiments.perturbation.variance import FEW_STEPS, FEW_UNITS, KINDS, Point, over, slope
from experiments.report import Note, align_columns, footnote, mean_and_spread, plain_number

NEAR, LITTLE, SETTLED = 1.5, 0.01, 1.1
RECALL, PANELS, OTHERS = "recall", "panels", "several rows"
NOTES: tuple[Note, ...] = (
    (
        set(),
        "test         loss on held-out sequences after training (squared error): mean ± standard "
        "deviation\n             of seeds",
    ),
    ({RECALL}, "             of recall cross-entropy, in nats"),
    (
        {PANELS},
        "rate         the first, chosen by a validation set; the grid goes on where the best is an "
        "edge",
    ),
    (
        set(),
        f"to BPTT's    median of seeds: updates until the test loss is {NEAR} times BPTT's last, "
        "or\n             a hundredth of a constant's, if more; - where most never got there",
    ),
    (
        {PANELS},
        f"to its own   until it is {SETTLED} times what it is at the end: how soon it stopped\n"
        "ms           an update of all seeds at once",
    ),
    ({PANELS, OTHERS}, "             other rows may have run beside it"),
)
"""What is said below the tables, of these problems, of tables of one problem, of several rows."""


class Panel(NamedTuple):
    """All rules on one problem."""

    problem: Problem
    outcomes: dict[str, Outcome]


def notes_of(panels: Sequence[Panel]) -> str:
    """What the columns mean of tables of these problems, or, without any, of the units' alone."""
    several = any(len(panel.outcomes) > 1 for panel in panels)
    names = [panel.problem.name for panel in panels]
    return footnote(NOTES, names + [PANELS] * bool(panels) + [OTHERS] * several)


def panel_table(panel: Panel) -> str:
    """A row a rule, and the floors below."""
    problem, outcomes = panel
    headings = ["rule", "test", problem.also[0], "rate", "to BPTT's", "to its own", "ms"]
    near = level(panel)
    rows = [
        [
            ROWS[name].label,
            mean_and_spread(o.final, problem.digits),
            mean_and_spread(o.also, 1),
            f"{o.rate:g}",
            _typical(o.updates_to(near)),
            _typical(o.updates_to(SETTLED * o.final.mean())),
            f"{1e3 * o.seconds / problem.updates:.1f}",
        ]
        for name, o in outcomes.items()
    ]
    below = [
        [label, f"{value:.{problem.digits}f}", *[""] * (len(headings) - 2)]
        for label, value in problem.floors.items()
    ]
    lines = align_columns([headings, *rows, *below])
    bar = "-" * max(map(len, lines))
    title = f"{problem.title}; N = {problem.units}, {problem.updates} updates"
    split = len(rows) + 1
    return "\n".join([title, lines[0], bar, *lines[1:split], bar, *lines[split:]])


def level(panel: Panel) -> float:
    """A loss that counts as BPTT's."""
    constant = next(iter(panel.problem.floors.values()))
    return max(NEAR * panel.outcomes["bptt"].final.mean(), LITTLE * constant)


def _typical(updates: np.ndarray) -> str:
    middle = np.median(updates)
    return f"{middle:.0f}" if np.isfinite(middle) else "-"


def units_table(panels: Sequence[Panel]) -> str:
    """One problem at several numbers of units: a row a rule."""
    names, digits = [*panels[0].outcomes], panels[0].problem.digits
    sizes = [f"N = {panel.problem.units}" for panel in panels]
    lines = [["rule", *sizes, *(f"to BPTT's, {size}" for size in sizes)]]
    for name in names:
        found = [panel.outcomes[name] for panel in panels]
        near = [level(panel) for panel in panels]
        updates = [_typical(o.updates_to(low)) for o, low in zip(found, near, strict=True)]
        losses = [mean_and_spread(o.final, digits) for o in found]
        lines.append([ROWS[name].label, *losses, *updates])
    lines = align_columns(lines)
    title = f"{panels[0].problem.title}: test loss over the number of units"
    return "\n".join([title, lines[0], "-" * max(map(len, lines)), *lines[1:]])


def variance_table(points: Sequence[Point]) -> str:
    """Measured variances over N and over T, theory's in brackets, and slopes."""
    tables = []
    for axis, letter, fixed in (
        ("units", "N", f"T = {FEW_STEPS}"),
        ("steps", "T", f"N = {FEW_UNITS}"),
    ):
        rows = {name: over(points, name, axis) for name in KINDS}
        sizes = [getattr(point, axis) for point in rows["wp"]]
        lines = [["rule", *(f"{letter} = {size}" for size in sizes), "slope", "cosine"]]
        for name, found in rows.items():
            cells = [f"{p.measured:.4g} ({p.predicted:.4g})" for p in found]
            mean = np.mean([p.cosine for p in found])
            lines.append([KINDS[name].label, *cells, f"{slope(found, axis):.2f}", f"{mean:.3f}"])
        lines = align_columns(lines)
        title = f"variance of one sample over {letter}, {fixed}: measured (theory)"
        tables.append("\n".join([title, lines[0], "-" * max(map(len, lines)), *lines[1:]]))
    note = (
        "variance about the estimate's own mean, over the square of that mean; slope: the exponent "
        "of N or T;\ncosine: of that mean to BPTT's gradient"
    )
    return "\n\n".join(tables) + f"\n{note}"


def panel_as_json(panel: Panel) -> dict[str, Any]:
    """A problem and its rows as nested dictionaries and lists."""
    problem = panel.problem
    return {
        "problem": problem.name,
        "title": problem.title,
        "units": problem.units,
        "updates": problem.updates,
        "also": problem.also[0],
        "floors": {label: plain_number(value) for label, value in problem.floors.items()},
        "rows": {name: _outcome_as_json(name, o) for name, o in panel.outcomes.items()},
    }


def _outcome_as_json(name: str, outcome: Outcome) -> Mapping[str, Any]:
    return {
        "label": ROWS[name].label,
        "rate": outcome.rate,
        "tried": {f"{rate:g}": plain_number(value) for rate, value in outcome.tried.items()},
        "steps": outcome.steps.tolist(),
        "test": [[plain_number(value) for value in curve] for curve in outcome.test],
        "also": [plain_number(value) for value in outcome.also],
        "seconds": round(outcome.seconds, 2),
    }
