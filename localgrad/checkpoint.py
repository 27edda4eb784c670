"""Saved runs that can be resumed whatever happened: what Orbax's manager leaves to its user.

When and what to keep is Orbax's: its options, its manager, its files. It lacks a check that what it
reads is what was saved. Of one array in a large file any byte may change unseen; a leaf of another
dtype is cast; a damaged step stands in the way of older ones that are whole. So `save` writes, with
each step, a record of the tree's leaves, and `restore` holds the target and the arrays against it.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from localgrad.core.contract.checks import is_integer
from localgrad.core.record import (
    asked_for,
    check_of,
    placed_as,
    record_of,
    require_divisible,
    require_same,
    require_savable,
)

RECORD = "localgrad"
"""The name of a step's record in Orbax's own metadata of that step."""

ITEM = ocp.checkpoint_manager.DEFAULT_ITEM_NAME


class _Damaged(Exception):
    """Why a step cannot be used."""


def open(
    directory: Any, options: ocp.CheckpointManagerOptions | None = None
) -> ocp.CheckpointManager:
    """Orbax's manager of a directory, which opens even where a step's files are damaged.

    Orbax reads the metadata and the metrics of all steps at once, and raises for those that it
    cannot read. Steps that are to blame for that are here renamed to `STEP.damaged`, with a
    warning.

    Args:
        directory: a local one (also one that is mounted), made if it is not there; `~` is the home.
        options: Orbax's. With a `best_fn`, `max_to_keep` keeps the best steps and not the newest;
            a `preservation_policy` keeps both (`docs/checkpoints.md`).

    Returns:
        An `ocp.CheckpointManager`: a context manager that waits for saves under way at its end.

    Raises:
        ValueError: for what is no local directory.
        Exception: Orbax's own, if no step, or every step, is to blame.

    Example:
        >>> import tempfile, orbax.checkpoint as ocp
        >>> from localgrad import checkpoint
        >>> options = ocp.CheckpointManagerOptions(max_to_keep=2)
        >>> with checkpoint.open(tempfile.mkdtemp(), options) as manager:
        ...     print(manager.latest_step())
        None
    """
    if "://" in str(directory):
        raise ValueError(
            f"directory must be a local one; got {str(directory)!r}. Mount it, or use Orbax's own "
            "manager, which reads and writes buckets but checks no arrays."
        )
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must not be a file; got {directory}.")
    try:
        return _manager(directory, options)
    except Exception:
        steps = _folders(directory)
        found = {step: _unopened(folder, options) for step, folder in steps.items()}
        damaged = {step: _Damaged(_brief(e)) for step, e in found.items() if e is not None}
        if not damaged or len(damaged) == len(steps):
            raise
    _set_aside(directory, damaged)
    manager = _manager(directory, options)
    warnings.warn(f"{_told(directory, damaged)} Other steps are there.", stacklevel=2)
    return manager


def save(
    manager: ocp.CheckpointManager,
    step: int,
    tree: Any,
    *,
    metrics: Any = None,
    force: bool = False,
) -> bool:
    """Saves a tree by `manager.save`, with a record by which `restore` knows it again.

    The call returns when the arrays are copied, so that they may then be donated; they are written
    in the background, unless the manager's options say otherwise, and a step is there when it is
    there whole. The record (a path, a shape, a dtype and a sum of 32 bits a leaf) takes one pass
    over the arrays, where they lie.

    Args:
        manager: from `open`.
        step: how many steps were done, not below the last one saved; Orbax would save no other,
            and say nothing.
        tree: arrays, typed keys and Python's numbers, such as `(params, opt_state, position)`.
        metrics: what the options' `best_fn` takes, of Python's numbers (`float(loss)`).
        force: whether to save even if the options do not ask for this step.

    Returns:
        Whether the step is saved, which the manager's options decide.

    Raises:
        ValueError: for a leaf that cannot be saved, by its path; for a step that is none, or lies
            before the last.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from localgrad import checkpoint
        >>> with checkpoint.open(tempfile.mkdtemp()) as manager:
        ...     checkpoint.save(manager, 7, {"weights": jnp.arange(3.0), "position": 70})
        ...     checkpoint.restore(manager, {"weights": jnp.zeros(3), "position": 0})
        True
        (7, {'position': 70, 'weights': Array([0., 1., 2.], dtype=float32)})
    """
    require_savable(tree)  # also where nothing will be saved
    if not is_integer(step, 0):
        raise ValueError(f"step must be an integer, 0 or more; got {type(step).__name__} {step!r}.")
    last = manager.latest_step()
    if last is not None and step < last:
        raise ValueError(
            f"step {step} lies before step {last}, the last in {manager.directory}. To go on from "
            "an older step, delete those after it (manager.delete(step)), or save in another "
            "directory."
        )
    if not force and not manager.should_save(step):
        return False
    record = record_of(tree)
    return manager.save(
        step,
        args=ocp.args.StandardSave(tree),
        metrics=metrics,
        force=force,
        custom_metadata={RECORD: record, "check": check_of(record)},
    )


def restore(
    manager: ocp.CheckpointManager, target: Any, step: int | None = None
) -> tuple[int, Any] | None:
    """The newest step that is whole, of those that `save` wrote.

    A step that cannot be read, or does not hold what was saved, is skipped for the next older one
    and renamed to `STEP.damaged`, so that Orbax counts it no more (not where the manager's options
    say `read_only`); a warning says all that. Arrays come back as the target's: on its devices, by
    its shardings, whatever mesh they were saved from. A disk that fails or memory that does not
    suffice is no damage, and what was raised is raised on.

    Args:
        manager: as for `save`.
        target: a tree such as was saved: freshly made (its values do not matter), or its
            `jax.ShapeDtypeStruct`s with the shardings wanted.
        step: this one and no other, such as `manager.best_step()`; nothing is then renamed, so that
            who only looks at another's run gives one.

    Returns:
        The step and the tree; None if there is no step.

    Raises:
        ValueError: if the target's leaves are not those saved (the model, the rule or the optimizer
            is another), telling each by its path and both shapes, or cannot be divided as its
            shardings want; if no step is whole, or `step` is not there.

    Example:
        >>> import tempfile, flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> from localgrad import checkpoint
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> batch = localgrad.Batch(jnp.ones((4, 10, 3)), jnp.ones((4, 10, 2)))
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
        >>> tx = optax.chain(localgrad.eprop(model, optax.l2_loss, batch_size=4), optax.adam(1e-2))
        >>> learn = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=1)[:2])
        >>> fresh = (params, tx.init(params))
        >>> folder = tempfile.mkdtemp()
        >>> with checkpoint.open(folder) as manager:
        ...     checkpoint.save(manager, 1, learn(*fresh))
        True
        >>> with checkpoint.open(folder) as manager:
        ...     step, (params, opt_state) = checkpoint.restore(manager, fresh)
        >>> step, int(optax.tree.get(opt_state, "count"))
        (1, 10)
    """
    manager.wait_until_finished()
    steps = sorted(manager.all_steps(), reverse=True)
    if step is not None and step not in steps:
        raise ValueError(f"step {step} is not in {manager.directory}; there are {steps[::-1]}.")
    steps = steps if step is None else [step]
    damaged: dict[int, _Damaged] = {}
    for one in steps:
        try:
            found = _read(manager, one, target)
        except _Damaged as error:
            damaged[one] = error
            continue
        if damaged:
            if not manager._options.read_only:  # which no public attribute tells
                _set_aside(Path(manager.directory), damaged)
                manager.reload()
            told = _told(manager.directory, damaged)
            warnings.warn(f"{told} Step {one} is used instead.", stacklevel=2)
        return one, found
    if not damaged:
        return None
    raise ValueError(
        f"{_told(manager.directory, damaged)} No other step is there. Bring back a copy, or begin "
        "anew in another directory."
    )


def _manager(directory: Path, options: Any) -> ocp.CheckpointManager:
    """Orbax's manager, told what steps hold, without which it warns as it reads their metadata."""
    handlers = {ITEM: ocp.StandardCheckpointHandler()}
    registry = ocp.handlers.create_default_handler_registry(**handlers)
    return ocp.CheckpointManager(directory, options=options, handler_registry=registry)


def _read(manager: Any, step: int, target: Any) -> Any:
    """A step as the target wants it; raises `_Damaged` unless it is what was saved."""
    folder = _folders(Path(manager.directory)).get(step)
    if (
        folder is not None and not (folder / ITEM).is_dir()
    ):  # Orbax would ask it what all steps hold
        raise _Damaged(f"it has no folder {ITEM}")
    try:
        said = manager.metadata(step).custom_metadata
    except Exception as error:
        raise _Damaged(f"its metadata cannot be read: {_brief(error)}") from error
    record = said.get(RECORD) if isinstance(said, dict) else None
    if not isinstance(record, dict):
        raise _Damaged("it has no record")
    if said.get("check") != check_of(record):
        raise _Damaged("its record is damaged")
    require_same(manager.directory, step, record, target)
    require_divisible(target)
    try:
        asked = ocp.args.StandardRestore(jax.tree.map(asked_for, target))
        found = manager.restore(step, args=asked)
    except Exception as error:
        if _of_the_machine(error):
            raise
        raise _Damaged(f"it cannot be read: {_brief(error)}") from error
    there = record_of(found)
    changed = [path for path in record if record[path] != there[path]]
    if changed:
        raise _Damaged(f"{', '.join(changed)[:200]}: not what was saved")
    with jax.enable_x64(True):  # which leaves all dtypes as they are
        return jax.tree.map(placed_as, target, found)


def _of_the_machine(error: Exception) -> bool:
    """Whether an error is no fault of the files': of memory, or of a disk or a right to read."""
    full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return full or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError))


def _folders(directory: Path) -> dict[int, Path]:
    """The folders of a directory's steps, finished ones."""
    found = {path: re.fullmatch(r"[^.]*?(\d+)", path.name) for path in directory.iterdir()}
    return {int(match[1]): path for path, match in found.items() if match and path.is_dir()}


def _unopened(folder: Path, options: Any) -> Exception | None:
    """What Orbax raises for this step alone; None if nothing."""
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / folder.name).symlink_to(folder)
        try:
            _manager(Path(alone), options).close()
        except Exception as error:
            return error
    return None


def _set_aside(directory: Path, steps: Any) -> None:
    """Renames steps to what Orbax takes for none; nothing is deleted.

    Steps whose folders bear names of the user's own (`step_name_format`) stay where they are.
    """
    folders = _folders(directory)
    if jax.process_index() == 0:
        for folder in (folders[step] for step in steps if step in folders):
            names = itertools.chain([".damaged"], (f".damaged_{k}" for k in itertools.count(2)))
            free = (folder.with_name(folder.name + name) for name in names)
            folder.rename(next(path for path in free if not path.exists()))
    ocp.multihost.sync_global_processes("localgrad: damaged steps are set aside")


def _brief(error: Exception) -> str:
    """The beginning of what an error says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _told(directory: Any, damaged: dict[int, _Damaged]) -> str:
    """Which steps are skipped, and why."""
    reasons = [f"step {step} ({error})" for step, error in damaged.items()]
    return (
        f"checkpoints in {directory} are damaged, or not made by checkpoint.save, and skipped: "
        f"{'; '.join(reasons)}."
    )
