"""Saved runs: what was learned so far and how far it is, to go on from.

Arrays are `localgrad.checkpoint`'s; beside each step lies what is known of it, as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from localgrad import checkpoint

OPTIONS = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
"""Two steps, so that there is one if the other is damaged."""


class Run(NamedTuple):
    """What has been learned; [S, ...]."""

    params: Any
    opt_state: Any


class Progress(NamedTuple):
    """How far a row is.

    Attributes:
        rate: the learning rate.
        tried: by learning rate, the score on `valid` after an epoch.
        scores: of each epoch so far, and before the first, if they are kept: [epochs + 1][S].
        epochs: how many are done.
        seconds: of the last epoch.
    """

    rate: float
    tried: dict[float, float]
    scores: list[Any]
    epochs: int = 0
    seconds: float = 0.0


def save(folder: Path, run: Run, done: Progress, settings: dict[str, Any]) -> None:
    """Writes a run and, before it, how far it is: what is said of each run that is there, is there.

    Args:
        folder: of this run alone.
        run: what was learned.
        done: how far it is.
        settings: what it was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "progress.part"
    draft.write_text(json.dumps({"settings": settings, "progress": done._asdict()}))
    os.replace(draft, _progress(folder, done.epochs))
    with checkpoint.open(folder / "run", OPTIONS) as manager:
        checkpoint.save(manager, done.epochs, run)
        kept = {_progress(folder, step) for step in manager.all_steps()}
    for old in set(folder.glob("progress_*.json")) - kept:
        old.unlink()


def restore(
    folder: Path | None, like: Run, settings: dict[str, Any], epochs: int
) -> tuple[Run, Progress] | None:
    """The last run that is whole of what `save` wrote, or None if it wrote nothing.

    Args:
        folder: of the run, or None for nothing.
        like: a run with such arrays.
        settings: what it must have been made with; raises if it was made with others.
        epochs: how many it may have at most; raises if it has more.

    Returns:
        The run, and how far it is.
    """
    if folder is None or not (folder / "run").exists():
        return None
    with checkpoint.open(folder / "run", OPTIONS) as manager:
        last = manager.latest_step()
        if last is None:
            return None
        made = json.loads(_progress(folder, last).read_text())["settings"]
        if made != settings:
            raise ValueError(
                f"{folder} holds a run made with {made}, and this one has {settings}. Remove that "
                "folder, or give other --workdir."
            )
        if last > epochs:
            raise ValueError(
                f"{folder} holds a run of {last} epochs, and this one has {epochs}. Remove that "
                "folder, or give other --workdir."
            )
        found = checkpoint.restore(manager, like)
    if found is None:
        return None
    step, run = found
    done = json.loads(_progress(folder, step).read_text())["progress"]
    tried = {float(rate): value for rate, value in done["tried"].items()}
    return run, Progress(**done | {"tried": tried})


def _progress(folder: Path, epochs: int) -> Path:
    return folder / f"progress_{epochs}.json"
