"""Continual: one task after another, never to come back, and what is left of each at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.claims import Claim
from experiments.datasets import Glyphs, of_classes
from experiments.progress import progress
from experiments.ptncn import figures
from experiments.ptncn.checkpoints import restore, save
from experiments.ptncn.found import Found, best_source
from experiments.ptncn.learner import make_learner, make_score
from experiments.ptncn.problems import Problem
from experiments.ptncn.rows import ROWS, parameters_of
from experiments.ptncn.sources import canvas_for, halves, load, problem_of, video_of
from experiments.ptncn.training import choose, epoch_of, settings_of
from experiments.report import align_columns, mean_and_spread

NAMES = ("ptncn", "lstm_bptt", "gru_bptt")
LITTLE = 2.0  # nats a frame, of some 60


class Kept(NamedTuple):
    """What a row made of a sequence of tasks.

    Attributes:
        losses: [S, after task i, on task j].
        rate: its learning rate.
    """

    losses: np.ndarray
    rate: float

    @property
    def average(self) -> np.ndarray:
        """[S] the loss after the last task, mean over all."""
        return self.losses[:, -1].mean(axis=-1)

    @property
    def forgotten(self) -> np.ndarray:
        """[S] what the loss on earlier tasks rose by since each was learned, on average.

        The backward transfer of Lopez-Paz and Ranzato ("Gradient episodic memory for continual
        learning", 2017, https://arxiv.org/abs/1706.08840) with its sign turned, since losses are
        better low.
        """
        last, learned = self.losses[:, -1], np.diagonal(self.losses, axis1=1, axis2=2)
        return (last - learned)[:, :-1].mean(axis=-1)


def source_of(config: Any) -> str:
    """Which tasks."""
    return best_source(config.source, config.data_dir, "mnist_notmnist", "digits_pairs")


def run(config: Any, source: str, folder: Path) -> Found:
    """Trains each row on each task in turn."""
    size = config.sized
    sets = tasks_of(source, config)
    problems = [problem_of(video_of(each, size, canvas_for(each)), size) for each in sets]
    first = problems[0]
    reference = ROWS["ptncn"].model(size.video_units, first.size, first.outputs)
    budget = parameters_of(reference, first.size)
    found = {}
    with progress(total=len(NAMES) * (1 + len(problems) * size.epochs), unit="epoch") as bar:
        for name in NAMES:
            own = folder / "runs" / name
            found[name] = one(name, problems, budget, size.epochs, config.seeds, bar.update, own)
    labels = {ROWS[name].label: kept for name, kept in found.items()}
    short = [each.name for each in sets]
    figures.matrices(
        {label: kept.losses.mean(0) for label, kept in labels.items()},
        short,
        first.outputs.unit,
        folder / "matrices.png",
    )
    content = {
        "tasks": short,
        "rows": {
            name: {"rate": kept.rate, "losses": kept.losses.tolist()}
            for name, kept in found.items()
        },
    }
    return Found(table(labels), content, claims_of(source, found))


def tasks_of(source: str, config: Any) -> list[Glyphs]:
    """The glyphs of each task."""
    if source == "digits_pairs":
        digits = load("digits", config.data_dir, config.download, config.sized)
        pairs = [(k, k + 1) for k in range(0, 10, 2)]
        return [of_classes(digits, pair, f"{pair[0]} and {pair[1]}") for pair in pairs]
    if source == "mnist_notmnist":
        names = ("mnist", "notmnist")
        each = [load(n, config.data_dir, config.download, config.sized) for n in names]
        return [half for pair in zip(*map(halves, each), strict=True) for half in pair]
    raise ValueError(f"source must be mnist_notmnist or digits_pairs; got {source!r}.")


def one(
    name: str,
    problems: list[Problem],
    budget: int,
    epochs: int,
    seeds: int,
    tick: Any,
    folder: Path | None = None,
) -> Kept:
    """A row through all tasks; its learning rate is chosen on the first.

    Args:
        name: of the row.
        problems: the tasks.
        budget: how many parameters it may have.
        epochs: of each task.
        seeds: S.
        tick: called after each epoch.
        folder: where to save after each epoch and to go on from; None for neither.

    Returns:
        What it made of them.
    """
    learners = [make_learner(ROWS[name], problem, budget) for problem in problems]
    scores = [make_score(learner) for learner in learners]
    run = learners[0].init(jax.random.split(jax.random.key(0), seeds))
    settings = settings_of(learners[0], seeds) | {"epochs": epochs, "tasks": len(problems)}
    total = epochs * len(problems)
    found = restore(folder, run, settings, total)
    run, done = found or (run, choose(learners[0], run, scores[0])._replace(scores=[]))
    tick()
    for number in range(done.epochs, total):
        task, epoch = divmod(number, epochs)
        run, done = epoch_of(learners[task], run, done, epoch)
        if epoch == epochs - 1:
            pairs = zip(scores, problems, strict=True)
            done.scores.append([score(run.params, p.test)[:, -1].tolist() for score, p in pairs])
        if folder is not None:
            save(folder, run, done, settings)
        tick()
    return Kept(np.moveaxis(np.array(done.scores), 2, 0), done.rate)


def table(found: dict[str, Kept]) -> str:
    """A row a network."""
    lines = [["nats a frame", "learned", "at the end", "forgotten"]]
    for label, kept in found.items():
        learned = np.diagonal(kept.losses, axis1=1, axis2=2).mean(axis=-1)
        values = (learned, kept.average, kept.forgotten)
        lines.append([label, *(mean_and_spread(value, 1) for value in values)])
    return "\n".join(align_columns(lines))


def claims_of(source: str, found: dict[str, Kept]) -> list[Claim]:
    """That the P-TNCN keeps what it learned, of tasks that are alike; the table shows the rest."""
    if source != "digits_pairs":
        return []
    ours = found["ptncn"]
    return [
        Claim(
            f"P-TNCN forgets no more than {LITTLE} nats a frame of earlier tasks",
            mean_and_spread(ours.forgotten, 1),
            bool(ours.forgotten.mean() <= LITTLE),
        )
    ]
