"""Saved runs: what was learned so far and how far it is, to go on from."""

from __future__ import annotations

import json
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
        valid: [epochs + 1][S].
        seconds: of the last epoch.
    """

    rate: float
    tried: dict[float, float]
    valid: list[list[float]]
    seconds: float = 0.0


def save(folder: Path, run: Run, done: Progress, settings: dict[str, Any]) -> None:
    """Writes a run and how far it is; the latter last, so that it speaks of what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "run", _plain(run), force=True)
    said = {"settings": settings, "progress": done._asdict()}
    (folder / "progress.json").write_text(json.dumps(said))


def restore(folder: Path, like: Run, settings: dict[str, Any]) -> tuple[Run, Progress]:
    """What `save` wrote; raises if it was made with other settings."""
    said = json.loads((folder / "progress.json").read_text())
    if said["settings"] != settings:
        raise ValueError(
            f"{folder} holds a run made with {said['settings']}, and this one has {settings}. "
            "Remove that folder, or give other --results."
        )
    done = said["progress"]
    tried = {float(rate): value for rate, value in done["tried"].items()}
    with ocp.StandardCheckpointer() as checkpointer:
        leaves = checkpointer.restore(folder.absolute() / "run", _plain(like))
    made = [
        jax.random.wrap_key_data(a) if _keyed(old) else a
        for a, old in zip(leaves, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), made), Progress(**done | {"tried": tried})


def _plain(run: Run) -> list[jax.Array]:
    """Leaves as arrays that any checkpointer takes."""
    return [jax.random.key_data(a) if _keyed(a) else a for a in jax.tree.leaves(run)]


def _keyed(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
