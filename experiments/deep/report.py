"""Tables and JSON of the experiment."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.deep.memory import Size
from experiments.deep.stacks import ROWS, STACKS
from experiments.deep.study import PUBLISHED, Study
from experiments.deep.trials import Outcome, Trial
from experiments.report import Note, align_columns, history_as_json, mean_and_spread

MIB = 2**20
COLUMNS = """\
accuracy     % on held-out data after training: mean ± standard deviation of seeds
updates to   median of seeds until that accuracy is reached; - where most never did
cosine, norm ratio   each layer's first update to BPTT's at the same parameters and batch
ms, MiB      one update of a batch of streams, in two windows, so that what is carried is used, and
             its temporary memory
carried MiB  what the streams of a batch keep beside the model's carry"""
NOTES: tuple[Note, ...] = (
    (set(), COLUMNS),
    ({"rtrl"}, "RTRL is BPTT by another name in training, which is in one window"),
    (
        {"no_temporal", "eprop"},
        "no temporal path is e-prop with symmetric feedback, by another name: equal rows",
    ),
)
"""What is said below the tables where all of these rules have a row."""


def trials_table(
    trials: list[Trial], delays: tuple[int, ...], criterion: float, floors: dict[str, str]
) -> str:
    """One kind of stack: a row a depth and rule.

    Args:
        trials: those of the stack, by depth.
        delays: the delays; the last is that of the alignments.
        criterion: the accuracy that counts as learned.
        floors: what predictions without a network reach, label -> text.

    Returns:
        The table.
    """
    stack = STACKS[trials[0].stack]
    each = "/".join(map(str, delays))
    headings = [
        "L rule",
        f"accuracy % at delay {each}",
        f"updates to {100 * criterion:.0f} %",
        f"cosine, lowest layer first (delay {delays[-1]})",
        "norm ratio",
        "ms",
        "MiB",
        "carried MiB",
    ]
    lines = align_columns(
        [headings]
        + [
            [f"{trial.depth} {ROWS[rule].label}", *_cells(outcome, delays, criterion)]
            for trial in trials
            for rule, outcome in trial.outcomes.items()
        ]
    )
    bar = "-" * max(map(len, lines))
    ceilings = ", ".join(f"{100 * t.ceilings.mean():.1f} % at L={t.depth}" for t in trials)
    below = [f"{label}: {text}" for label, text in floors.items()]
    below.append(f"ceiling of a lowest layer that keeps its first weights: {ceilings}")
    title = f"{stack.label}, {stack.features} units a layer, {stack.channels} channels"
    return "\n".join([title, lines[0], bar, *lines[1:], bar, *below])


def _cells(outcome: Outcome, delays: tuple[int, ...], criterion: float) -> list[str]:
    accuracies = [mean_and_spread(100 * outcome.accuracy(d), 1) for d in delays]
    updates = [_typical(outcome.updates_to(criterion, d)) for d in delays]
    cost, last = outcome.cost, delays[-1]
    return [
        "  ".join(accuracies),
        " ".join(updates),
        _layers(outcome.cosine[last]),
        _layers(outcome.norm_ratio[last]),
        "" if cost is None else f"{cost.milliseconds:.2f}",
        "" if cost is None else f"{cost.temporary_bytes / MIB:.1f}",
        f"{outcome.state_bytes / MIB:.2f}",
    ]


def _typical(updates: np.ndarray) -> str:
    """The median over seeds; a dash if most never got there."""
    middle = np.median(updates)
    return f"{middle:4.0f}" if np.isfinite(middle) else "   -"


def _layers(values: np.ndarray) -> str:
    """Means over seeds [S, layers], in few characters."""
    return " ".join(_short(value) for value in values.mean(axis=0))


def _short(value: float) -> str:
    """Two digits.

    Example:
        >>> _short(0.634), _short(1.0), _short(-0.05), _short(12.3)
        (' .63', '1.00', '-.05', '12.3')
    """
    text = f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"
    text = text.replace("0.", ".", 1) if abs(value) < 0.995 else text
    return text.rjust(4)


def study_table(study: Study) -> str:
    """The public study's task: its numbers beside ours."""
    cells = [["rule", "accuracy %", "there", "updates to 90 %", "there"]]
    for rule in study.histories:
        there, ours = PUBLISHED[rule], study.updates(rule)
        reached = np.isfinite(ours).all()
        cells.append(
            [
                ROWS[rule].label,
                mean_and_spread(100 * study.accuracy(rule), 1),
                f"{100 * there.accuracy:.1f}",
                mean_and_spread(ours, 0) if reached else "-",
                "-" if there.updates is None else str(there.updates),
            ]
        )
    lines = align_columns(cells)
    bar = "-" * max(map(len, lines))
    title = "The public study's own task (motif count, delay 12), beside its numbers"
    return "\n".join([title, lines[0], bar, *lines[1:]])


def memory_table(sizes: list[Size]) -> str:
    """What one stream's traces take."""
    cells = [["N x L", "e-prop", "deep e-prop", "RTRL", "BPTT, T=1000"]]
    for s in sizes:
        row = [s.eprop, s.deep_eprop, s.rtrl, s.tape]
        cells.append([f"{s.width} x {s.depth}", *(f"{value / MIB:.3g}" for value in row)])
    lines = align_columns(cells)
    title = "MiB for each stream of a rate network, float32: what is carried, and BPTT's tape"
    return "\n".join([title, lines[0], "-" * max(map(len, lines)), *lines[1:]])


def trial_as_json(trial: Trial) -> dict[str, Any]:
    """A trial as nested dictionaries and lists."""
    return {
        "stack": trial.stack,
        "depth": trial.depth,
        "ceilings": [round(float(value), 4) for value in trial.ceilings],
        "rules": {rule: _outcome_as_json(each) for rule, each in trial.outcomes.items()},
    }


def _outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "cosine": {str(d): _rounded(value) for d, value in outcome.cosine.items()},
        "norm_ratio": {str(d): _rounded(value) for d, value in outcome.norm_ratio.items()},
        "state_bytes": outcome.state_bytes,
        "cost": outcome.cost._asdict() if outcome.cost else None,
        "histories": {str(d): history_as_json(h) for d, h in outcome.histories.items()},
    }


def study_as_json(study: Study) -> dict[str, Any]:
    """The study's task as nested dictionaries and lists."""
    return {
        "cosines": {str(d): _rounded(value) for d, value in study.cosines.items()},
        "rules": {rule: history_as_json(h) for rule, h in study.histories.items()},
    }


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values]
