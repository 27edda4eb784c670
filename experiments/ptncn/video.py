"""Video: each frame of bouncing glyphs from those before it, with an update every frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

import localgrad
from experiments.claims import Claim
from experiments.datasets import video_floors
from experiments.ptncn import figures, standings
from experiments.ptncn.found import Found, best_source
from experiments.ptncn.learner import Learner
from experiments.ptncn.problems import Problem
from experiments.ptncn.rows import ROWS
from experiments.ptncn.sources import canvas_for, load, problem_of, video_of
from experiments.ptncn.training import Outcome


def source_of(config: Any) -> str:
    """Which glyphs."""
    return best_source(config.source, config.data_dir, "mnist", "digits")


def run(config: Any, source: str, folder: Path) -> Found:
    """Trains all rows on videos of some glyphs."""
    size = config.sized
    given = load(source, config.data_dir, config.download, size)
    video = video_of(given, size, canvas_for(given))
    problem = problem_of(video, size)
    floors = floors_of(problem)
    learners, outcomes = standings.compete(
        problem,
        config.rows,
        size.video_units,
        size.epochs,
        config.seeds,
        config.workers,
        folder / "runs",
    )
    figures.curves(outcomes, floors, problem.outputs.unit, folder / "curves.png")
    shown = {"true": np.asarray(problem.test[0, 0])}
    for name in ("ptncn", *best_two(outcomes)):
        shown[ROWS[name].label] = predicted(learners[name], outcomes[name], video.shape)
    figures.frames(shown, folder / "frames.png")
    table = standings.table(problem, outcomes, floors, digits=1)
    content = {"floors": floors, "rows": standings.as_json(outcomes)}
    return Found(table, content, claims_of(source, outcomes, floors))


def floors_of(problem: Problem) -> dict[str, float]:
    """In nats a frame: the mean frame, the last one, and the least there is (pixels are grey)."""
    test = np.asarray(problem.test).reshape(-1, *problem.test.shape[2:])
    valid = np.asarray(problem.valid).reshape(-1, *problem.valid.shape[2:])
    found = video_floors(valid, test)._asdict()
    names = {"mean": "per-pixel mean", "copied": "last frame copied", "itself": "the frame itself"}
    return {names[k]: problem.size * score.cross_entropy for k, score in found.items()}


def best_two(outcomes: dict[str, Outcome]) -> list[str]:
    """The two best rivals."""
    rivals = [name for name in outcomes if not name.startswith("ptncn")]
    return sorted(rivals, key=lambda name: np.nan_to_num(outcomes[name].test.mean(), nan=1e9))[:2]


def predicted(learner: Learner, outcome: Outcome, shape: tuple[int, int, int]) -> np.ndarray:
    """What the first seed's network predicts of the first test video, [F, H, W]."""
    problem, row = learner.problem, learner.row
    params = jax.tree.map(lambda a: a[0], outcome.params)
    batch = problem.expand(problem.test[0])
    _, outputs, _ = localgrad.evaluate(learner.model, row.loss(problem.outputs), params, batch)
    squash = {"logits": problem.outputs.squash, "linear": problem.outputs.as_prediction}
    outputs = squash[row.gives](outputs) if row.gives in squash else outputs
    return np.asarray(outputs[0]).reshape(shape)


ECHOES = ("esn", "esn_force", "esn_ridge")


def claims_of(source: str, outcomes: dict[str, Outcome], floors: dict[str, float]) -> list[Claim]:
    """What is claimed of the small size; on larger frames echo states are better."""
    ours = outcomes["ptncn"].test.mean()
    claims = [
        Claim(
            f"P-TNCN predicts better than the {floor}",
            f"{ours:.1f}, {floors[floor]:.1f}",
            bool(ours < floors[floor]),
        )
        for floor in ("per-pixel mean", "last frame copied")
    ]
    for name in (*(ECHOES if source == "digits" else ()), "lstm_rtrl", "gru_rtrl"):
        if name in outcomes:
            theirs = outcomes[name].test.mean()
            claims.append(
                Claim(
                    f"P-TNCN predicts better than {ROWS[name].label}",
                    f"{ours:.1f}, {theirs:.1f}",
                    bool(ours < theirs),
                )
            )
    return claims
