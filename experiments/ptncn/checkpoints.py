"""Saved runs: what was learned so far and how far it is, to go on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


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
    """Writes a run and how far it is; whatever happens, the latter speaks of a run that is there.

    Args:
        folder: of this run alone.
        run: what was learned.
        done: how far it is.
        settings: what it was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = _folder(folder, done.epochs)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(own.absolute(), _plain(run), force=True)
    said = json.dumps({"settings": settings, "progress": done._asdict()})
    written = folder / "progress.json.new"
    written.write_text(said)
    os.replace(written, folder / "progress.json")
    for old in folder.glob("epoch_*"):
        if old != own:
            shutil.rmtree(old)


def restore(
    folder: Path | None, like: Run, settings: dict[str, Any], epochs: int
) -> tuple[Run, Progress] | None:
    """What `save` wrote, or None if it wrote nothing.

    Args:
        folder: of the run, or None for nothing.
        like: a run with such arrays.
        settings: what it must have been made with; raises if it was made with others.
        epochs: how many it may have at most; raises if it has more.

    Returns:
        The run, and how far it is.
    """
    if folder is None or not (folder / "progress.json").exists():
        return None
    said = json.loads((folder / "progress.json").read_text())
    if said["settings"] != settings:
        raise ValueError(
            f"{folder} holds a run made with {said['settings']}, and this one has {settings}. "
            "Remove that folder, or give other --workdir."
        )
    tried = {float(rate): value for rate, value in said["progress"]["tried"].items()}
    done = Progress(**said["progress"] | {"tried": tried})
    if done.epochs > epochs:
        raise ValueError(
            f"{folder} holds a run of {done.epochs} epochs, and this one has {epochs}. Remove that "
            "folder, or give other --workdir."
        )
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(_folder(folder, done.epochs).absolute(), _plain(like))
    made = [
        jax.random.wrap_key_data(a) if _keyed(old) else a
        for a, old in zip(leaves, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), made), done


def _folder(folder: Path, epochs: int) -> Path:
    return folder / f"epoch_{epochs}"


def _plain(run: Run) -> list[jax.Array]:
    """Leaves as arrays that any checkpointer takes."""
    return [jax.random.key_data(a) if _keyed(a) else a for a in jax.tree.leaves(run)]


def _keyed(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
