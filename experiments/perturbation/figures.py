"""Figures: variances over sizes, learning curves, and losses over the number of units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import finish, subplots
from experiments.perturbation.report import Panel
from experiments.perturbation.rows import ROWS
from experiments.perturbation.variance import FEW_STEPS, FEW_UNITS, KINDS, Point, over

# Okabe and Ito's palette, as in `experiments.figures`; rules of one family share a colour.
BLUE, GREEN, ORANGE, RED, GREY = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#7F7F7F"
STEP, MANY, PLAIN = (0, (4, 2)), (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1))
STYLES: dict[str, dict[str, Any]] = {
    "bptt": {"color": "#000000", "linewidth": 2.4},
    "tbptt1": {"color": "#000000", "linestyle": STEP},
    "readout_only": {"color": GREY},
    "np_causal": {"color": BLUE},
    "np_causal16": {"color": BLUE, "linestyle": MANY, "linewidth": 2.2},
    "np_total": {"color": "#56B4E9"},
    "np_step": {"color": BLUE, "linestyle": STEP},
    "np_resync": {"color": BLUE, "linestyle": MANY},
    "wp": {"color": ORANGE},
    "wp16": {"color": ORANGE, "linestyle": MANY, "linewidth": 2.2},
    "anp_causal": {"color": GREEN},
    "anp_step": {"color": GREEN, "linestyle": STEP},
    "dwp": {"color": ORANGE, "linestyle": PLAIN, "linewidth": 1.0},
    "dnp": {"color": BLUE, "linestyle": PLAIN, "linewidth": 1.0},
    "danp": {"color": GREEN, "linestyle": PLAIN, "linewidth": 1.0},
    "published": {"color": RED},
    "published_readout": {"color": GREY, "linestyle": STEP},
}
EXACT = 1e-6  # a floor below is no rival
LARGEST = 10.0  # times the first loss; a curve that leaves for good is cut there


def variance(points: Sequence[Point], path: Path) -> None:
    """Variances over N and over T: marks are measured, lines are theory."""
    figure, axes = _grid(1, 2, width=4.0)
    for axis, field, letter, fixed in (
        (axes[0, 0], "units", "N", f"T = {FEW_STEPS}"),
        (axes[0, 1], "steps", "T", f"N = {FEW_UNITS}"),
    ):
        for name, kind in KINDS.items():
            found = over(points, name, field)
            sizes, style = [getattr(p, field) for p in found], STYLES[name]
            axis.plot(sizes, [p.predicted for p in found], label=kind.label, **style)
            axis.plot(sizes, [p.measured for p in found], "o", color=style["color"], markersize=4)
        axis.set(xscale="log", yscale="log", xlabel=f"{letter} ({fixed})")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("variance of one sample / mean²")
    finish(figure, axes, path, "marks: measured; lines: theory")


def curves(panels: Sequence[Panel], path: Path) -> None:
    """Test loss over updates, median of seeds; dotted: the best floor that is not exact."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _grid(rows, columns, width=3.6)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (problem, outcomes) in zip(axes.flat, panels, strict=False):
        first = np.median(outcomes["bptt"].test[:, 0])
        for name, outcome in outcomes.items():
            middle = np.median(np.minimum(np.nan_to_num(outcome.test, nan=np.inf), 1e9), axis=0)
            shown = np.where(middle < LARGEST * first, middle, np.nan)
            axis.plot(outcome.steps, shown, label=ROWS[name].label, **STYLES.get(name, {}))
        rivals = [each for each in problem.floors.items() if each[1] > EXACT]
        label, value = min(rivals, key=lambda each: each[1])
        axis.axhline(value, color=GREY, linewidth=0.8, linestyle=":")
        axis.annotate(
            label,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            fontsize=7,
            color=GREY,
            horizontalalignment="right",
            verticalalignment="bottom",
        )
        axis.set_title(problem.title.split(";")[0].split(": ")[0], fontsize=9)
        axis.set(yscale="log", xlabel="updates")
    for row in axes:
        row[0].set_ylabel("test loss, median of seeds")
    finish(figure, axes, path)


def units(panels: Sequence[Panel], path: Path) -> None:
    """Final loss over the number of units: mean, least and greatest of seeds."""
    figure, axes = _grid(1, 1, width=4.6)
    axis = axes[0, 0]
    sizes = [panel.problem.units for panel in panels]
    for name in panels[0].outcomes:
        found = [panel.outcomes[name].final for panel in panels]
        means = np.array([f.mean() for f in found])
        spans = np.abs(np.array([[f.min() for f in found], [f.max() for f in found]]) - means)
        axis.errorbar(
            sizes, means, spans, label=ROWS[name].label, capsize=2, marker="o", **STYLES[name]
        )
    axis.set(xscale="log", yscale="log", xlabel="units", ylabel="test loss")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    finish(figure, axes, path, "mean of the seeds; bars: from the least to the greatest")


def _grid(rows: int, columns: int, width: float) -> tuple[Any, np.ndarray]:
    size = (0.8 + width * columns, 0.8 + 2.6 * rows)
    return subplots(rows, columns, size)
