"""The folder of an experiment's results: tried before anything is trained, never overwritten by a
run with other options, and gone on with by the same command after an interruption.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from experiments.report import circumstances

Found = TypeVar("Found")
RESULTS, UNFINISHED, PIECES = "results.json", "unfinished.json", "pieces"
FREE = ("workdir", "workers")
"""Options that say nothing of what is found."""


class Pieces(NamedTuple):
    """Finished pieces of a run, such as a row, until the whole run is finished.

    Attributes:
        workdir: the folder of the run's results.
    """

    workdir: Path

    def made(self, name: str, make: Callable[[], Found]) -> Found:
        """What `make()` gives, on the host; or what it gave before this run was interrupted.

        Args:
            name: of the piece, once a run.
            make: its result depends on the run's options alone.
        """
        path = self.workdir / PIECES / f"{name}.pickle"
        if path.exists():
            try:
                return pickle.loads(path.read_bytes())
            except Exception as error:  # cut off, say, as the machine went down
                print(f"{path} cannot be read ({error}), and is made anew.", flush=True)
        found = jax.device_get(make())
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".part")  # a file is whole, or not there
        draft.write_bytes(pickle.dumps(found))
        os.replace(draft, path)
        return found


def claim_folder(folder: Path, config: Any, *packages: str) -> Pieces:
    """Makes the folder, and refuses one that cannot be written to or holds another run's results.

    Args:
        folder: where the results will go.
        config: the experiment's dataclass of options.
        *packages: distributions, beside the core ones, that what is found depends on.

    Returns:
        The pieces that a run with the same options finished there before it was interrupted.

    Raises:
        OSError: if it cannot be made, or nothing can be written there.
        ValueError: if it holds results of other options, or a run begun with other versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    ours, begun = circumstances(config, *packages), folder / UNFINISHED
    for path in (folder / RESULTS, begun):
        if not path.exists():
            continue
        other = difference(path, ours, ("config",) if path != begun else tuple(ours))
        if other is not None:
            raise ValueError(
                f"{path} is of another run ({other}). Remove that folder, or give other --workdir."
            )
        what = "goes on" if path == begun else "will be replaced"
        print(f"{path} is of the same options, and {what}.", flush=True)
    if not begun.exists():
        shutil.rmtree(folder / PIECES, ignore_errors=True)
        write_results(folder, ours, finished=False)
    return Pieces(folder)


def difference(path: Path, ours: dict[str, Any], sides: tuple[str, ...]) -> str | None:
    """How the circumstances of a file of results differ from ours, in words; None if they do not.

    Args:
        path: the file.
        ours: as of `circumstances`.
        sides: which of them are compared.
    """
    ours = json.loads(json.dumps(ours, default=str))
    try:
        theirs = json.loads(path.read_text())
        pairs = [(_named(ours[side], side), _named(theirs[side], side)) for side in sides]
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its options cannot be read"
    missing = object()
    for here, there in pairs:
        for name, value in here.items():
            if name not in FREE and there.get(name, missing) != value:
                return f"{name} {there.get(name)} there, {value} here"
    return None


def _named(side: Any, name: str) -> dict[str, Any]:
    return side if isinstance(side, dict) else {name: side}


def write_results(folder: Path, content: dict[str, Any], *, finished: bool = True) -> None:
    """Writes results.json; or unfinished.json, all that a run leaves which is interrupted.

    Args:
        folder: where to.
        content: what was found, with the options it was found with as `config`.
        finished: whether that is all; what was unfinished is removed then, pieces and all.
    """
    target = folder / (RESULTS if finished else UNFINISHED)
    draft = target.with_suffix(".part")  # a file is whole, or not there
    draft.write_text(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")
    os.replace(draft, target)
    if finished:
        (folder / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(folder / PIECES, ignore_errors=True)
