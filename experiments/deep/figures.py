"""Figures: what is learned by depth, credit by layer, the public study's task, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.deep.memory import Size
from experiments.deep.stacks import FEW, ROWS, STACKS
from experiments.deep.study import PUBLISHED, Study
from experiments.deep.trials import Trial
from experiments.figures import MEANS, finish, subplots

# Okabe and Ito's palette, as in `experiments.figures`.
STYLES: dict[str, dict[str, Any]] = {
    "bptt": {"color": "#000000", "marker": "o", "linewidth": 2.6},
    "deep_eprop": {"color": "#0072B2", "marker": "s", "linewidth": 2.0},
    "eprop": {"color": "#009E73", "marker": "^"},
    "no_temporal": {"color": "#009E73", "marker": "^"},
    "no_spatial": {"color": "#D55E00", "marker": "v"},
    "readout_only": {"color": "#7F7F7F", "linestyle": (0, (5, 1, 1, 1))},
}


def accuracies(trials: list[Trial], delays: tuple[int, ...], path: Path) -> None:
    """Accuracy at the end over depth: a row a delay, a column a stack."""
    names = list(dict.fromkeys(trial.stack for trial in trials))
    figure, axes = _grid(len(delays), len(names))
    for column, name in enumerate(names):
        own = [trial for trial in trials if trial.stack == name]
        for row, delay in enumerate(delays):
            axis = axes[row, column]
            for rule in FEW:
                shown = [trial for trial in own if rule in trial.outcomes]
                values = [100 * trial.outcomes[rule].accuracy(delay) for trial in shown]
                means, spreads = [v.mean() for v in values], [v.std() for v in values]
                depths = [trial.depth for trial in shown]
                label = ROWS[rule].label.strip()
                axis.errorbar(depths, means, spreads, label=label, capsize=2, **STYLES[rule])
            limit = [100 * trial.ceilings.mean() for trial in own]
            axis.plot([t.depth for t in own], limit, ":", color="#7F7F7F", label="ceiling, frozen")
            axis.set_xscale("log", base=2)
            axis.set_xticks([t.depth for t in own], [str(t.depth) for t in own])
            axis.set(ylim=(40, 103))
            if row == 0:
                axis.set_title(STACKS[name].label)
            if column == 0:
                axis.set_ylabel(f"delay {delay}: accuracy (%)")
            if row + 1 == len(delays):
                axis.set_xlabel("layers")
    finish(figure, axes, path, "mean of the seeds; bars: standard deviation")


def alignments(trials: list[Trial], delay: int, path: Path) -> None:
    """Cosine and norm ratio to BPTT layer by layer, in the deepest stack of each kind."""
    names = list(dict.fromkeys(trial.stack for trial in trials))
    figure, axes = _grid(2, len(names))
    for column, name in enumerate(names):
        trial = max((t for t in trials if t.stack == name), key=lambda t: t.depth)
        layers = np.arange(1, trial.depth + 1)
        for rule in ("deep_eprop", "eprop"):
            if rule not in trial.outcomes:
                continue
            outcome, label = trial.outcomes[rule], ROWS[rule].label
            axes[0, column].plot(layers, outcome.cosine[delay].mean(0), label=label, **STYLES[rule])
            axes[1, column].plot(
                layers, outcome.norm_ratio[delay].mean(0), label=label, **STYLES[rule]
            )
        axes[0, column].set(title=STACKS[name].label, ylim=(-0.3, 1.05))
        axes[1, column].set(yscale="log", xlabel="layer, lowest first")
        axes[0, column].axhline(0, color="#7F7F7F", linewidth=0.8, linestyle=":")
        axes[1, column].axhline(1, color="#7F7F7F", linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel(f"cosine to BPTT, delay {delay}")
    axes[1, 0].set_ylabel("norm ratio to BPTT")
    finish(figure, axes, path)


def study(found: Study, path: Path) -> None:
    """Learning curves on the public study's task; crosses are its updates to 90 %."""
    figure, axes = _grid(1, 1, width=6.0)
    axis = axes[0, 0]
    for rule, history in found.histories.items():
        style = {k: v for k, v in STYLES[rule].items() if k != "marker"}
        curves = 100 * np.asarray(history.test_accuracy)
        axis.plot(history.steps, curves.mean(0), label=ROWS[rule].label.strip(), **style)
        axis.fill_between(
            history.steps, curves.min(0), curves.max(0), color=style["color"], alpha=0.1
        )
        there = PUBLISHED[rule].updates
        if there is not None:
            axis.plot(there, 90, "x", color=style["color"], markersize=9, markeredgewidth=2)
    axis.axhline(90, color="#7F7F7F", linewidth=0.8, linestyle=":")
    axis.set(xlabel="updates", ylabel="accuracy (%)", ylim=(45, 102))
    finish(figure, axes, path, f"{MEANS}; crosses: published")


def memory(sizes: list[Size], path: Path) -> None:
    """Bytes for each stream over depth, a panel a width."""
    widths = list(dict.fromkeys(size.width for size in sizes))
    figure, axes = _grid(1, len(widths))
    series = {"eprop": "eprop", "deep_eprop": "deep_eprop", "rtrl": "rtrl", "tape": "bptt"}
    labels = {"rtrl": "RTRL", "tape": "BPTT's tape, T=1000"}
    styles = {**STYLES, "rtrl": {"color": "#E69F00", "marker": "D"}}
    for axis, width in zip(axes[0], widths, strict=True):
        own = [size for size in sizes if size.width == width]
        for field, rule in series.items():
            values = [getattr(size, field) / 2**20 for size in own]
            label = labels.get(field) or ROWS[rule].label
            axis.plot([size.depth for size in own], values, label=label, **styles[rule])
        depths = [size.depth for size in own]
        axis.set(title=f"N = {width}", yscale="log", xlabel="layers", xticks=depths)
    axes[0, 0].set_ylabel("MiB for each stream")
    finish(figure, axes, path)


def _grid(rows: int, columns: int, width: float = 2.9) -> tuple[Any, np.ndarray]:
    size = (1.0 + width * columns, 0.8 + 2.4 * rows)
    return subplots(rows, columns, size, sharey="row")
