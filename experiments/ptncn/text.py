"""Text: each symbol of a sentence from those before it, with an update every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.claims import Claim
from experiments.datasets import symbol_floors
from experiments.datasets import text as read
from experiments.ptncn import figures, standings
from experiments.ptncn.found import Found, best_source
from experiments.ptncn.problems import of_text
from experiments.ptncn.rows import ROWS
from experiments.ptncn.training import Outcome


def source_of(config: Any) -> str:
    """Which text."""
    return best_source(config.source, config.data_dir, "ptb", "manual")


def run(config: Any, source: Any, folder: Path) -> Found:
    """Trains all rows on a text."""
    size = config.sized
    text = read(source, config.data_dir, download=config.download)
    problem, learned = of_text(
        text,
        size.batch_size,
        size.steps,
        size.sentences,
        size.tested_sentences,
        scored=size.scored,
    )
    floors = symbol_floors(learned, text.test[: size.tested_sentences], len(text.symbols))._asdict()
    _, outcomes = standings.compete(
        problem,
        config.rows,
        size.text_units,
        size.epochs,
        config.seeds,
        config.workers,
        folder / "runs",
    )
    figures.curves(outcomes, floors, problem.outputs.unit, folder / "curves.png")
    table = standings.table(problem, outcomes, floors, digits=3)
    content = {"floors": floors, "rows": standings.as_json(outcomes)}
    return Found(f"{table}\n\n{curve(outcomes)}", content, claims_of(outcomes, floors, source))


def curve(outcomes: dict[str, Outcome]) -> str:
    """The P-TNCN's score on held-out sentences after each epoch."""
    values = outcomes["ptncn"].valid.mean(0)
    return "P-TNCN, valid after each epoch: " + " ".join(f"{value:.3f}" for value in values)


def claims_of(outcomes: dict[str, Outcome], floors: dict[str, float], source: str) -> list[Claim]:
    """What is claimed of the small size."""
    mean = {name: outcome.test.mean() for name, outcome in outcomes.items()}
    ours = mean["ptncn"]
    claims = [
        Claim(
            "P-TNCN predicts better than the symbols' frequencies",
            f"{ours:.3f}, unigram {floors['unigram']:.3f}",
            bool(ours < floors["unigram"]),
        )
    ]
    if source == "ptb":
        last = outcomes["ptncn"].valid[:, -1]
        claims.append(
            Claim(
                "P-TNCN learns as its authors' code does: below 2.9 bits a character",
                f"{np.array2string(last, precision=3)} on held-out sentences",
                bool(last.max() < 2.9),
            )
        )
    for name in ("esn", "esn_force", "esn_ridge"):  # RTRL is better: docs/papers/ptncn.md
        if name in mean:
            claims.append(
                Claim(
                    f"P-TNCN predicts better than {ROWS[name].label}",
                    f"{ours:.3f}, {mean[name]:.3f}",
                    bool(ours < mean[name]),
                )
            )
    return claims
