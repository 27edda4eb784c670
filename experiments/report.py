"""Reports: the rows of a comparison, as a plain-text table and as JSON."""

from __future__ import annotations

import dataclasses
import math
import platform
import textwrap
from collections.abc import Collection, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

import localgrad
from experiments.measure import Cost
from experiments.tasks import Floors
from experiments.train import History

WIDTH = 100
HEADINGS = (
    "rule",
    "test loss",
    "accuracy %",
    "cosine",
    "norm ratio",
    "ms/update",
    "temp MiB",
)


class Row(NamedTuple):
    """A rule on one problem: either refused, or with a history and a cost.

    Attributes:
        name: the rule's name on the command line.
        label: its name in the table.
        history: its training, or None.
        cost: the price of one update, or None.
        refusal: why the library does not train this network by this rule, or None.
    """

    name: str
    label: str
    history: History | None = None
    cost: Cost | None = None
    refusal: str | None = None


class Panel(NamedTuple):
    """All rules on one task with one cell.

    Attributes:
        task: the task's name.
        cell: the cell's name.
        title: both, for the reader.
        summary: one line about the task.
        group: the parameters whose alignment is shown: the recurrent layer's.
        floors: what a prediction that ignores the input reaches.
        rows: one a rule.
    """

    task: str
    cell: str
    title: str
    summary: str
    group: str
    floors: Floors
    rows: list[Row]


Note = tuple[set[str], str]
"""What must be shown for a line of a footnote to be said, and the line."""


def footnote(notes: Sequence[Note], shown: Collection[str]) -> str:
    """The lines that speak of what is shown.

    Args:
        notes: all lines.
        shown: names of rows, columns or tables that are there.

    Returns:
        The lines under each other.

    Example:
        >>> print(footnote([({"s"}, "s: seconds"), ({"pause"}, "pause: in steps")], ["s", "test"]))
        s: seconds
    """
    return "\n".join(text for needed, text in notes if needed <= {*shown})


def mean_and_spread(values: np.ndarray, digits: int) -> str:
    """Formats the mean and the sample standard deviation over seeds.

    Example:
        >>> mean_and_spread(np.array([1.0, 2.0, 3.0]), 1)
        '2.0 ± 1.0'
    """
    if len(values) < 2:
        return f"{np.mean(values):.{digits}f}"
    spread = np.std(values, ddof=1)
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}"


def align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Pads cells: the first column to the left, the others to the right.

    Example:
        >>> align_columns([["a", "loss"], ["bcd", "1"]])
        ['a    loss', 'bcd     1']
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    ]


def row_cells(row: Row, group: str) -> list[str]:
    """The cells of a trained row, in the order of `HEADINGS`."""
    history, cost = row.history, row.cost
    if history is None or cost is None:
        return [row.label] + ["-"] * (len(HEADINGS) - 1)
    alignment = history.alignment[group]
    return [
        row.label,
        mean_and_spread(history.test_loss[:, -1], 3),
        mean_and_spread(100 * history.test_accuracy[:, -1], 1),
        f"{np.mean(alignment.cosine):.3f}",
        f"{np.median(alignment.norm_ratio):.3g}",
        f"{cost.milliseconds:.2f}",
        f"{cost.temporary_bytes / 2**20:.2f}",
    ]


def table(panel: Panel) -> str:
    """The table of one panel, with its floors and the reasons of refusals below it."""
    chance = [
        "chance (ignores the input)",
        f"{panel.floors.loss:.3f}",
        f"{100 * panel.floors.accuracy:.1f}",
    ]
    cells = [list(HEADINGS)] + [row_cells(row, panel.group) for row in panel.rows]
    lines = align_columns([*cells, chance + [""] * (len(HEADINGS) - len(chance))])
    rule = "-" * max(len(line) for line in lines)
    refusals = [f"{row.label} refused: {row.refusal}" for row in panel.rows if row.refusal]
    wrapped = [line for text in refusals for line in textwrap.wrap(text, WIDTH)]
    title = f"{panel.title}: {panel.summary}"
    return "\n".join([title, lines[0], rule, *lines[1:-1], rule, lines[-1], *wrapped])


def as_json(panel: Panel) -> dict[str, Any]:
    """A panel as nested dictionaries and lists; axes of curves are [seed, checkpoint]."""
    return {
        "task": panel.task,
        "cell": panel.cell,
        "chance": panel.floors._asdict(),
        "rules": [
            {
                "name": row.name,
                "label": row.label,
                "refusal": row.refusal,
                "cost": row.cost._asdict() if row.cost else None,
                "history": history_as_json(row.history) if row.history else None,
            }
            for row in panel.rows
        ],
    }


def history_as_json(history: History) -> dict[str, Any]:
    """A history as lists, rounded to six digits."""

    def rounded(values: ArrayLike) -> Any:
        values = np.asarray(values)
        if values.ndim:
            return [rounded(value) for value in values]
        return plain_number(values, digits=6)

    return {
        "steps": history.steps.tolist(),
        "test_loss": rounded(history.test_loss),
        "test_accuracy": rounded(history.test_accuracy),
        "train_loss": rounded(history.train_loss),
        "alignment": {
            group: {"cosine": rounded(value.cosine), "norm_ratio": rounded(value.norm_ratio)}
            for group, value in history.alignment.items()
        },
    }


def plain_number(value: ArrayLike, digits: int = 5) -> float | None:
    """A number of a few digits; None for one that is not finite, which JSON does not have."""
    number = float(f"{value:.{digits}g}")
    return number if math.isfinite(number) else None


def circumstances(config: Any, *packages: str) -> dict[str, Any]:
    """What a result was made with, for its JSON: options, versions and the device.

    Args:
        config: the experiment's dataclass of options.
        *packages: distributions to list beside the core ones.
    """
    names = ("jax", "flax", "optax", *packages)
    return {
        "config": dataclasses.asdict(config),
        "versions": {
            "python": platform.python_version(),
            "localgrad": localgrad.__version__,
            **{name: metadata.version(name) for name in names},
        },
        "device": jax.devices()[0].device_kind,
    }
