"""The folder of an experiment's results: tried before anything is trained, and never overwritten
by a run with other options.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

RESULTS, UNFINISHED = "results.json", "unfinished.json"
FREE = ("results", "workers")
"""Options that say nothing of what is found."""


def claim_folder(folder: Path, config: Any) -> None:
    """Makes the folder, and refuses one that cannot be written to or holds another run's results.

    Args:
        folder: where the results will go.
        config: the experiment's dataclass of options.

    Raises:
        OSError: if it cannot be made, or nothing can be written there.
        ValueError: if it holds results of other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for path in (folder / RESULTS, folder / UNFINISHED):
        if not path.exists():
            continue
        other = difference(path, config)
        if other is not None:
            raise ValueError(
                f"{path} is of another run ({other}). Remove that folder, or give other --results."
            )
        print(f"{path} is of the same options, and will be replaced.", flush=True)


def difference(path: Path, config: Any) -> str | None:
    """How the options of a file of results differ from these, in words; None if they do not."""
    ours = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    try:
        theirs = json.loads(path.read_text())["config"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its options cannot be read"
    missing = object()
    for name, value in ours.items():
        if name not in FREE and theirs.get(name, missing) != value:
            return f"{name} {theirs.get(name)} there, {value} here"
    return None


def write_results(folder: Path, content: dict[str, Any], *, finished: bool = True) -> None:
    """Writes results.json; or unfinished.json, all that a run leaves which is interrupted.

    Args:
        folder: where to.
        content: what was found, with the options it was found with as `config`.
        finished: whether that is all; what was unfinished is removed then.
    """
    target = folder / (RESULTS if finished else UNFINISHED)
    draft = target.with_suffix(".part")  # a file is whole, or not there
    draft.write_text(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")
    os.replace(draft, target)
    if finished:
        (folder / UNFINISHED).unlink(missing_ok=True)
