"""Figures: loss over steps, cosines over lags, and loss against what a step costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import finish, subplots
from experiments.online.lags import Price, lags
from experiments.online.report import Panel
from experiments.online.rows import ROWS, gru

# Okabe and Ito's palette, as in `experiments.figures`; rules of one family share a colour.
COLOURS = {
    "bptt": "#000000",
    "truncated": "#D55E00",
    "exact": "#E69F00",
    "local": "#009E73",
    "random": "#0072B2",
    "learnt": "#CC79A7",
    "frozen": "#7F7F7F",
}
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (5, 1, 1, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
    (0, (1, 3)),
    (0, (9, 1, 1, 1)),
    (0, (4, 1, 4, 1, 1, 1)),
)
MARKERS = "osDv^P*X"
TICKS = (10, 30, 100, 300, 1000, 3000)  # of µs
LEAST = 1e-6  # of a loss that is drawn


def style_of(name: str) -> dict[str, Any]:
    """Colour by family; dashes and marker by place in it."""
    family = ROWS[name].family
    place = [other for other, row in ROWS.items() if row.family == family].index(name)
    return {
        "color": COLOURS[family],
        "linestyle": DASHES[place % len(DASHES)],
        "marker": MARKERS[place % len(MARKERS)],
        "linewidth": 2.0 if family == "bptt" else 1.4,
    }


def curves(panels: Sequence[Panel], path: Path) -> None:
    """Test loss over steps, median of seeds, floors dotted; other networks than GRUs below."""
    kinds = [True, False]
    kinds = [k for k in kinds if any((ROWS[n].cells is gru) == k for n in panels[0].outcomes)]
    figure, axes = _grid(len(kinds), len(panels))
    for kind, line in zip(kinds, axes, strict=True):
        for axis, (problem, outcomes) in zip(line, panels, strict=True):
            for name, outcome in outcomes.items():
                if (ROWS[name].cells is gru) == kind:
                    style = style_of(name) | {"marker": None}
                    middle = np.maximum(np.median(outcome.test, axis=0), LEAST)
                    axis.plot(outcome.steps / 1e3, middle, label=ROWS[name].label, **style)
            for value in problem.floors.values():
                if value > LEAST:
                    axis.axhline(value, color="#7F7F7F", linewidth=0.8, linestyle=":")
            others = "" if kind else ", other networks"
            axis.set_title(problem.name.replace("_", "-") + others, fontsize=10)
            axis.set(yscale=_scale(panels, problem.name), xlabel="thousand steps")
            first = next(iter(problem.floors.values()))
            axis.set_ylim(top=(2 if axis.get_yscale() == "log" else 1.1) * first)
        line[0].set_ylabel("test loss, median of seeds")
    finish(figure, axes, path)


def alignments(found: Mapping[str, np.ndarray], path: Path) -> None:
    """Cosine of each rule's credit of its cells to BPTT's over the lag; mean of seeds."""
    figure, axes = _grid(1, 2, width=4.2)
    titles = ("fresh networks", "networks that BPTT trained")
    for k, (axis, title) in enumerate(zip(axes[0], titles, strict=True)):
        for name, values in found.items():
            style = style_of(name) | {"markersize": 3}
            axis.plot(lags(), values[k].mean(axis=-1), label=ROWS[name].label, **style)
        axis.set(title=title, xscale="log", xlabel="steps from a bit to its question")
        axis.set_xticks(lags(), [str(lag) for lag in lags()])
        axis.minorticks_off()
        axis.axhline(0, color="#7F7F7F", linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel("cosine to BPTT, cells")
    finish(figure, axes, path)


def bargains(panels: Sequence[Panel], prices: Mapping[str, Price], path: Path) -> None:
    """Final loss against the time of a step: mean of seeds, least and greatest."""
    figure, axes = _grid(1, len(panels))
    for axis, (problem, outcomes) in zip(axes[0], panels, strict=True):
        for name, outcome in outcomes.items():
            last = np.maximum(outcome.final, LEAST)
            span = np.abs(np.array([[last.min()], [last.max()]]) - last.mean())
            style = style_of(name) | {"linestyle": "none", "linewidth": 0}
            at = prices[name].microseconds
            axis.errorbar(
                [at], [last.mean()], span, label=ROWS[name].label, elinewidth=0.7, **style
            )
        axis.set_title(problem.name.replace("_", "-"), fontsize=10)
        axis.set(xscale="log", yscale=_scale(panels, problem.name), xlabel="µs a step")
        axis.minorticks_off()
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axis.set_xlim(*_around([price.microseconds for price in prices.values()]))
    axes[0, 0].set_ylabel("test loss")
    finish(figure, axes, path, "mean of the seeds; bars: from the least to the greatest")


def _around(values: Sequence[float]) -> tuple[float, float]:
    return 0.7 * min(values), 1.4 * max(values)


def _scale(panels: Sequence[Panel], name: str) -> str:
    """Logarithmic where the best is far below the first floor."""
    problem, outcomes = next(panel for panel in panels if panel.problem.name == name)
    best = min(outcome.final.mean() for outcome in outcomes.values())
    return "log" if best < 0.1 * next(iter(problem.floors.values())) else "linear"


def _grid(rows: int, columns: int, width: float = 3.1) -> tuple[Any, np.ndarray]:
    size = (0.8 + width * columns, 0.8 + 2.6 * rows)
    return subplots(rows, columns, size)
