"""Figures: learning curves, frames beside their predictions, adaptation, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.ticker import MaxNLocator

from experiments.figures import MEANS, finish, subplots
from experiments.ptncn.rows import ROWS
from experiments.ptncn.training import Outcome

# Okabe and Ito's palette: a colour a network, dashes a rule.
COLOURS = {
    "ptncn": "#0072B2",
    "lstm": "#000000",
    "gru": "#E69F00",
    "sab": "#CC79A7",
    "esn": "#7F7F7F",
}
DASHES = {"bptt": "-", "tbptt": (0, (4, 2)), "rtrl": (0, (1, 1)), "eprop": (0, (5, 1, 1, 1))}


def style(name: str) -> dict[str, Any]:
    """How a row is drawn."""
    network, _, rule = name.partition("_")
    return {
        "color": COLOURS.get(network, "#009E73"),
        "linestyle": DASHES.get(rule, "-" if not rule else (0, (3, 1))),
        "linewidth": 2.4 if network == "ptncn" else 1.5,
    }


def curves(
    outcomes: Mapping[str, Outcome], floors: Mapping[str, float], unit: str, path: Path
) -> None:
    """The score on held-out data after each epoch."""
    figure, axes = subplots(1, 1, (6.4, 5.0))
    axis = axes[0, 0]
    for name, outcome in outcomes.items():
        values = outcome.valid[:, 1:]  # an untrained network's is no part of the picture
        epochs = np.arange(1, 1 + values.shape[1])
        if not len(epochs):
            axis.axhline(outcome.valid.mean(), label=ROWS[name].label, **style(name))
            continue
        axis.plot(epochs, values.mean(0), label=ROWS[name].label, **style(name))
        axis.fill_between(
            epochs, values.min(0), values.max(0), color=style(name)["color"], alpha=0.1
        )
    learned = [o.valid[:, 1:] if o.valid.shape[1] > 1 else o.valid for o in outcomes.values()]
    ends = [values.mean(0) for values in learned if values[:, -1].mean() < max(floors.values())]
    seen = np.concatenate(ends or [np.array([*floors.values()])])  # what diverged leaves the panel
    low, high = 0.97 * seen.min(), 1.03 * seen.max()
    for k, (label, value) in enumerate(floors.items()):
        axis.axhline(value, color="#7F7F7F", linewidth=0.8, linestyle=":")
        if low < value < high:
            axis.annotate(
                label,
                (0.99 - 0.33 * (k % 3), value),
                xycoords=("axes fraction", "data"),
                fontsize=7,
                color="#7F7F7F",
                ha="right",
                va="bottom",
            )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epochs", ylabel=f"held-out {unit}", ylim=(low, high))
    finish(figure, axes, path, MEANS)


def frames(rows: Mapping[str, np.ndarray], path: Path, every: int = 2) -> None:
    """Frames of one video beside what was predicted of them; a still and, beside it, a GIF.

    Args:
        rows: label -> frames [F, H, W] in [0, 1].
        path: of the PNG; the GIF has its name.
        every: how many frames a step of the still takes.
    """
    shown = range(0, len(next(iter(rows.values()))), every)
    size = (1.0 * len(shown) + 1.2, 1.05 * len(rows))
    figure, axes = subplots(len(rows), len(shown), size)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, t in zip(line, shown, strict=True):
            axis.imshow(images[t], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if line is axes[-1]:
                axis.set_xlabel(f"t={t}", fontsize=8)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

    figure, axes = subplots(1, len(rows), (1.8 * len(rows), 2.1))
    pictures = []
    for axis, (label, images) in zip(axes[0], rows.items(), strict=True):
        pictures.append(axis.imshow(images[0], cmap="gray", vmin=0, vmax=1))
        axis.set(xticks=[], yticks=[])
        axis.set_title(label, fontsize=8)
    figure.tight_layout()

    def show(t: int) -> list[Any]:
        for picture, images in zip(pictures, rows.values(), strict=True):
            picture.set_data(images[t])
        return pictures

    count = len(next(iter(rows.values())))
    FuncAnimation(figure, show, frames=count).save(
        path.with_suffix(".gif"), writer=PillowWriter(fps=4), dpi=80
    )


def adaptation(panels: Mapping[str, Mapping[str, np.ndarray]], unit: str, path: Path) -> None:
    """The score of each frame, a panel a data set, with frozen networks.

    Args:
        panels: data set -> label -> [S, T].
        unit: of scores.
        path: of the PNG.
    """
    figure, axes = subplots(1, len(panels), (4.2 * len(panels), 3.4), sharey=True)
    palette = ["#0072B2", "#56B4E9", "#009E73", "#D55E00", "#000000", "#7F7F7F", "#CC79A7"]
    for axis, (name, rows) in zip(axes[0], panels.items(), strict=True):
        for (label, values), colour in zip(rows.items(), palette, strict=False):
            t = 1 + np.arange(values.shape[1])  # the first follows from nothing
            axis.plot(t, values.mean(0), label=label, color=colour)
            axis.fill_between(t, values.min(0), values.max(0), color=colour, alpha=0.12)
        axis.set(title=name, xlabel="frame")
    axes[0, 0].set_ylabel(unit)
    finish(figure, axes, path, MEANS)


def matrices(found: Mapping[str, np.ndarray], tasks: Sequence[str], unit: str, path: Path) -> None:
    """The loss on each task after each, a panel a row, means over seeds [task, task]."""
    figure, axes = subplots(1, len(found), (1.0 + 3.2 * len(found), 3.4))
    low, high = min(m.min() for m in found.values()), max(m.max() for m in found.values())
    for axis, (label, matrix) in zip(axes[0], found.items(), strict=True):
        axis.imshow(matrix, cmap="viridis_r", vmin=low, vmax=high)
        for (i, j), value in np.ndenumerate(matrix):
            bright = (value - low) < 0.5 * (high - low)
            axis.text(
                j,
                i,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=9,
                color="k" if bright else "w",
            )
        axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=8)
        axis.set_yticks(range(len(tasks)), [f"after {task}" for task in tasks], fontsize=8)
        axis.set_title(f"{label}: {unit}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
