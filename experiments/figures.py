"""Figures: learning curves and alignment with BPTT, one column a panel; and what all figures share.

They are made without pyplot: a notebook that imports this keeps its own way of showing pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure

from experiments.report import Panel

# Okabe and Ito's palette, told apart by the common kinds of colour blindness; rules of one family
# share a colour and differ in their dashes.
STYLES: dict[str, dict[str, Any]] = {
    "bptt": {"color": "#000000", "linewidth": 2.6},
    "rtrl": {"color": "#E69F00", "linestyle": (0, (3, 2)), "linewidth": 2.0},
    "snap": {"color": "#56B4E9"},
    "mdgl": {"color": "#56B4E9", "linestyle": (0, (4, 2))},
    "eprop": {"color": "#009E73"},
    "eprop_random": {"color": "#009E73", "linestyle": (0, (4, 2))},
    "rflo": {"color": "#CC79A7", "linestyle": (0, (1, 1)), "linewidth": 2.2},
    "tbptt": {"color": "#D55E00"},
    "tbptt1_rmsprop": {"color": "#D55E00", "linestyle": (0, (4, 2))},
    "readout_only": {"color": "#7F7F7F", "linestyle": (0, (5, 1, 1, 1))},
}
SMALLEST_RATIO = 1e-4
MEANS = "lines: mean of the seeds; shading: from the least to the greatest"


def learning_curves(panels: Sequence[Panel], path: Path) -> None:
    """Draws the accuracy on held-out data over updates."""
    figure, axes = grid(panels, rows=1)
    for axis, panel in zip(axes[0], panels, strict=True):
        axis.set_title(panel.title, fontsize=10)
        for row in panel.rows:
            if row.history is not None:
                draw(axis, row.name, row.history.steps, 100 * row.history.test_accuracy, row.label)
        chance = 100 * panel.floors.accuracy
        axis.axhline(chance, color="#7F7F7F", linewidth=0.8, linestyle=":")
        axis.annotate(
            "chance",
            (0.99, chance),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            color="#7F7F7F",
            horizontalalignment="right",
            verticalalignment="top",
        )
        axis.set(xlabel="updates", ylim=(0, 102))
    axes[0, 0].set_ylabel("accuracy on held-out data (%)")
    finish(figure, axes, path, MEANS)


def alignment(panels: Sequence[Panel], path: Path) -> None:
    """Draws cosine and norm ratio of the recurrent layer's update to BPTT's over updates."""
    figure, axes = grid(panels, rows=2)
    for column, panel in enumerate(panels):
        top, bottom = axes[:, column]
        top.set_title(panel.title, fontsize=10)
        for row in panel.rows:
            if row.history is not None:
                steps, value = row.history.steps[1:], row.history.alignment[panel.group]
                draw(top, row.name, steps, value.cosine, row.label)
                ratio = np.where(value.norm_ratio > SMALLEST_RATIO, value.norm_ratio, np.nan)
                draw(bottom, row.name, steps, ratio, row.label)
        top.set(ylim=(-0.35, 1.05))
        top.axhline(0, color="#7F7F7F", linewidth=0.8, linestyle=":")
        bottom.axhline(1, color="#7F7F7F", linewidth=0.8, linestyle=":")
        bottom.set(xlabel="updates", yscale="log")
    axes[0, 0].set_ylabel("cosine to BPTT\n(recurrent layer)")
    axes[1, 0].set_ylabel("norm ratio to BPTT\n(recurrent layer)")
    finish(figure, axes, path, MEANS)


def grid(panels: Sequence[Panel], rows: int) -> tuple[Any, np.ndarray]:
    """One column a panel."""
    size = (1.2 + 3.1 * len(panels), 1.2 + 2.5 * rows)
    return subplots(rows, len(panels), size, sharex="col", sharey="row")


def subplots(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of so many inches, with its axes [rows, columns]."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw(axis: Any, name: str, steps: np.ndarray, values: ArrayLike, label: str) -> None:
    """Draws the mean over seeds of values [S, C], and shades from the least to the greatest."""
    style = {"linewidth": 1.6, **STYLES.get(name, {})}
    values = np.asarray(values)
    axis.plot(steps, values.mean(axis=0), label=label, **style)
    low, high = values.min(axis=0), values.max(axis=0)
    axis.fill_between(steps, low, high, color=style.get("color"), alpha=0.08, linewidth=0)


def finish(figure: Figure, axes: np.ndarray, path: Path, note: str | None = None) -> None:
    """Puts one legend below all panels, from the panel that shows most, and writes the file.

    Args:
        figure: the figure.
        axes: its panels.
        path: where to.
        note: what lines and bands are, said above the legend.
    """
    entries: dict[str, Any] = {}
    for axis in sorted(axes.flat, key=lambda axis: -len(axis.lines)):
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=min(5, len(entries)),
        frameon=False,
        fontsize=9,
        title=note,
        title_fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
