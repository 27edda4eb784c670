"""One problem, all rivals: who predicts best after the same number of frames."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from experiments.progress import progress
from experiments.ptncn.learner import Learner, make_learner
from experiments.ptncn.problems import Problem
from experiments.ptncn.rows import ROWS, parameters_of
from experiments.ptncn.training import Outcome, learned
from experiments.report import align_columns, mean_and_spread, plain_number


def compete(
    problem: Problem,
    names: tuple[str, ...],
    units: int,
    epochs: int,
    seeds: int,
    workers: int,
    folder: Path,
) -> tuple[dict[str, Learner], dict[str, Outcome]]:
    """Trains every row on a problem, as many at a time as there are workers.

    Args:
        problem: what is learned.
        names: rows.
        units: H, of each layer of the P-TNCN, whose number of parameters all others get.
        epochs: how often each goes through the data.
        seeds: S.
        workers: rows at a time.
        folder: where runs are saved, to go on from.

    Returns:
        Learners and outcomes by row.
    """
    reference = ROWS["ptncn"].model(units, problem.size, problem.outputs)
    budget = parameters_of(reference, problem.size)
    total = sum(epochs + 1 if ROWS[name].rule else 0 for name in names)
    with ThreadPoolExecutor(workers) as pool, progress(total=total, unit="epoch") as bar:

        def one(name: str) -> tuple[Learner, Outcome]:
            learner = make_learner(ROWS[name], problem, budget)
            return learner, learned(learner, epochs, seeds, bar.update, folder / name)

        found = dict(zip(names, pool.map(one, names), strict=True))
    return (
        {name: learner for name, (learner, _) in found.items()},
        {name: outcome for name, (_, outcome) in found.items()},
    )


def table(
    problem: Problem, outcomes: Mapping[str, Outcome], floors: Mapping[str, float], digits: int
) -> str:
    """A row a rival, best first, and the floors below.

    Args:
        problem: what was learned.
        outcomes: by row.
        floors: what predictions without a network score.
        digits: of scores.

    Returns:
        The table.
    """
    headings = [
        "network and rule",
        "units",
        "parameters",
        f"test, {problem.outputs.unit}",
        "valid, best epoch",
        "rate",
        "updates a call",
        "s/epoch",
    ]
    ranked = sorted(outcomes.items(), key=lambda item: np.nan_to_num(item[1].test.mean(), nan=1e9))
    rows = [
        [
            ROWS[name].label,
            f"{ROWS[name].layers} x {o.units}" if ROWS[name].layers > 1 else f"{o.units}",
            f"{o.parameters:,}",
            mean_and_spread(o.test, digits),
            f"{np.nanmin(o.valid.mean(0)):.{digits}f} ({np.nanargmin(o.valid.mean(0))})",
            f"{o.rate:g}" if o.tried else "-",
            _updates(name),
            f"{o.seconds:.1f}" if o.seconds else "-",
        ]
        for name, o in ranked
    ]
    below = [
        [label, "", "", f"{value:.{digits}f}", "", "", "", ""] for label, value in floors.items()
    ]
    lines = align_columns([headings, *rows, *below])
    bar = "-" * max(map(len, lines))
    return "\n".join(
        [problem.name, lines[0], bar, *lines[1 : len(rows) + 1], bar, *lines[len(rows) + 1 :]]
    )


def _updates(name: str) -> str:
    row = ROWS[name]
    if row.rule is None:
        return "fitted once"
    return {None: "one", 1: "every step"}.get(row.chunk, f"every {row.chunk} steps")


def as_json(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Outcomes as nested dictionaries and lists."""

    def plain(values: np.ndarray) -> list:
        return [[plain_number(v) for v in row] for row in np.atleast_2d(values)]

    return {
        name: {
            "label": ROWS[name].label,
            "units": o.units,
            "parameters": o.parameters,
            "rate": o.rate,
            "tried": {str(rate): plain_number(value) for rate, value in o.tried.items()},
            "valid": plain(o.valid),
            "test": plain(o.test)[0],
            "seconds": round(o.seconds, 2),
        }
        for name, o in outcomes.items()
    }
