"""Zero-shot: networks trained on one set of glyphs, frozen, and tried on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims import Claim
from experiments.progress import progress
from experiments.ptncn import figures
from experiments.ptncn.found import Found, best_source
from experiments.ptncn.learner import make_learner, make_score
from experiments.ptncn.rows import ROWS, parameters_of
from experiments.ptncn.sources import canvas_for, halves, load, problem_of, video_of
from experiments.ptncn.training import learned
from experiments.ptncn.video import floors_of
from experiments.report import align_columns, mean_and_spread

RIVALS = ("lstm_bptt", "gru_bptt")
STRENGTHS = (0.0, 0.1, 0.3, 1.0)


def source_of(config: Any) -> str:
    """The glyphs that are learned, and the others."""
    return best_source(config.source, config.data_dir, "mnist_notmnist", "digits_halves")


def run(config: Any, source: str, folder: Path) -> Found:
    """Trains on the first set, and tries both."""
    size = config.sized
    if source == "digits_halves":
        sets = halves(load("digits", config.data_dir, config.download, size))
    elif source == "mnist_notmnist":
        sets = [load(n, config.data_dir, config.download, size) for n in ("mnist", "notmnist")]
    else:
        raise ValueError(f"source must be mnist_notmnist or digits_halves; got {source!r}.")
    problems = [problem_of(video_of(each, size, canvas_for(each)), size) for each in sets]
    first = problems[0]
    reference = ROWS["ptncn"].model(size.video_units, first.size, first.outputs)
    budget = parameters_of(reference, first.size)
    panels: dict[str, dict[str, np.ndarray]] = {problem.name: {} for problem in problems}
    names = ("ptncn", *RIVALS)
    with progress(total=len(names) * (size.epochs + 1), unit="epoch") as bar:
        for name in names:
            learner = make_learner(ROWS[name], first, budget)
            own = folder / "runs" / name
            outcome = learned(learner, size.epochs, config.seeds, bar.update, own)
            models = {ROWS[name].label: learner.model}
            if name == "ptncn":
                models = {
                    f"P-TNCN, correction {beta:g}": learner.model.clone(beta=beta)
                    for beta in STRENGTHS
                }
            for problem in problems:
                for label, model in models.items():
                    score = make_score(learner, model, problem)
                    panels[problem.name][label] = score(outcome.params, problem.test)
    curves = {
        set_name: {label: values[:, 1:-1] for label, values in rows.items()}
        for set_name, rows in panels.items()
    }
    figures.adaptation(curves, first.outputs.unit, folder / "adaptation.png")
    totals = {n: {k: v[:, -1] for k, v in rows.items()} for n, rows in panels.items()}
    floors = {problem.name: floors_of(problem) for problem in problems}
    content = {
        "frames": {n: {k: v.tolist() for k, v in rows.items()} for n, rows in curves.items()},
        "floors": floors,
    }
    tried = [problem.name for problem in problems]
    if source == "mnist_notmnist":  # letters are so unlike digits that it does harm: docs/papers
        tried = tried[:1]
    return Found(table(totals, floors), content, claims_of(totals, tried))


def table(totals: dict[str, dict[str, np.ndarray]], floors: dict[str, dict[str, float]]) -> str:
    """A row a network, a column a set of glyphs."""
    sets = list(totals)
    lines = [["nats a frame, frozen", f"{sets[0]} (trained)", f"{sets[1]} (never seen)"]]
    lines += [
        [label, *(mean_and_spread(totals[each][label], 1) for each in sets)]
        for label in totals[sets[0]]
    ]
    lines += [
        [label, *(f"{floors[each][label]:.1f}" for each in sets)] for label in floors[sets[0]]
    ]
    return "\n".join(align_columns(lines))


def claims_of(totals: dict[str, dict[str, np.ndarray]], sets: list[str]) -> list[Claim]:
    """That the correction helps frozen networks on these sets."""
    claims = []
    for name in sets:
        rows = totals[name]
        on, off = rows["P-TNCN, correction 0.1"], rows["P-TNCN, correction 0"]
        claims.append(
            Claim(
                f"with frozen weights the correction helps on {name}, for every seed",
                f"{mean_and_spread(off - on, 2)} nats a frame",
                bool((on < off).all()),
            )
        )
    return claims
