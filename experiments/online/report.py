"""Tables and JSON of the experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.online.lags import PAUSES, Price, lags
from experiments.online.learner import Outcome
from experiments.online.problems import STEPS, Problem
from experiments.online.rows import ROWS
from experiments.report import Note, align_columns, footnote, mean_and_spread, plain_number

PAUSE, COSINE, PRICE, OTHERS = "pause", "cosine", "price", "several rows"
NOTES: tuple[Note, ...] = (
    (
        set(),
        "test     loss on held-out sequences after training: mean ± standard deviation of seeds\n"
        "rate     the first, chosen by runs of another seed; the grid goes on where the best is an "
        "edge",
    ),
    ({PAUSE}, "pause    the longest that was being learned in the end, mean of seeds"),
    (set(), "s        of all updates of all seeds at once"),
    ({OTHERS}, "         other rows may have run beside it"),
    (
        {PRICE},
        f"parameters, updates   of the network; after so many steps, or after a call, which is "
        f"{STEPS}\n"
        "µs a step             of all streams, with its share of an update by the optimizer\n"
        "state, KiB            of a stream, beside the carry of its network",
    ),
    (
        {COSINE},
        "cosine   of what the rule says of its cells to BPTT's gradient, parameters fixed, over "
        "the steps\n         from a bit of `copy` to its question: fresh networks, then those that "
        "BPTT trained",
    ),
)
"""What is said below the tables where these columns are there."""


class Panel(NamedTuple):
    """All rules on one problem."""

    problem: Problem
    outcomes: dict[str, Outcome]


def notes_of(
    panels: Sequence[Panel], prices: Mapping[str, Price], found: Mapping[str, np.ndarray]
) -> str:
    """What the columns of the tables mean that are there."""
    shown = {
        PAUSE: any(panel.problem.grows for panel in panels),
        OTHERS: any(len(panel.outcomes) > 1 for panel in panels),
        PRICE: bool(prices),
        COSINE: bool(found),
    }
    return footnote(NOTES, [column for column, there in shown.items() if there])


def panel_table(panel: Panel) -> str:
    """A row a rule, and the floors below."""
    problem, outcomes = panel
    headings = ["rule", "test", problem.also[0], "rate", "s"] + [PAUSE] * problem.grows
    rows = [
        [
            ROWS[name].label,
            mean_and_spread(o.final, problem.digits),
            mean_and_spread(o.also, problem.also_digits),
            f"{o.rate:g}",
            f"{o.seconds:.1f}",
            *([f"{o.pauses[:, -1].mean():.0f}"] * problem.grows),
        ]
        for name, o in outcomes.items()
    ]
    below = [
        [label, f"{value:.{problem.digits}f}", *[""] * (len(headings) - 2)]
        for label, value in problem.floors.items()
    ]
    lines = align_columns([headings, *rows, *below])
    bar = "-" * max(map(len, lines))
    split = len(rows) + 1
    return "\n".join([problem.title, lines[0], bar, *lines[1:split], bar, *lines[split:]])


def prices_table(prices: Mapping[str, Price], found: Mapping[str, np.ndarray]) -> str:
    """What each row takes, and how near those that were found come to BPTT's credit."""
    shown = [k for k, pause in enumerate(PAUSES) if pause in (1, 8, 32)] if found else []
    spans = [f"cosine, {lags()[k]} steps" for k in shown]
    headings = ["rule", "parameters", "updates", "µs a step", "state, KiB", *spans]
    rows = []
    for name, price in prices.items():
        row = ROWS[name]
        near = found.get(name)
        means = [] if near is None else [near[:, k].mean(axis=-1) for k in shown]
        rows.append(
            [
                row.label,
                f"{price.parameters:,}",
                "a call" if row.chunk is None else f"every {row.chunk}",
                f"{price.microseconds:.0f}",
                f"{price.state / 1024:.1f}",
                *(f"{mean[0]:.2f}, {mean[1]:.2f}" for mean in means),
                *[""] * (len(shown) - len(means)),
            ]
        )
    lines = align_columns([headings, *rows])
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def panel_as_json(panel: Panel) -> dict[str, Any]:
    """A problem and its rows as nested dictionaries and lists."""
    problem = panel.problem
    return {
        "problem": problem.name,
        "title": problem.title,
        "also": problem.also[0],
        "floors": {label: plain_number(value) for label, value in problem.floors.items()},
        "rows": {name: _outcome_as_json(name, o) for name, o in panel.outcomes.items()},
    }


def _outcome_as_json(name: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "label": ROWS[name].label,
        "rate": outcome.rate,
        "tried": {f"{rate:g}": plain_number(value) for rate, value in outcome.tried.items()},
        "steps": outcome.steps.tolist(),
        "test": [[plain_number(value) for value in curve] for curve in outcome.test],
        "also": [plain_number(value) for value in outcome.also],
        "pauses": outcome.pauses.tolist(),
        "seconds": round(outcome.seconds, 2),
    }


def cosines_as_json(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """By row [fresh or trained, lag, seed]."""
    rounded = {name: np.round(values, 4).tolist() for name, values in found.items()}
    return {"lags": lags().tolist(), "rows": rounded}
