"""Tasks: what a network is trained and tested on, by name.

`TASKS[name](seed)` makes a `Task`; a task enters by one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from experiments.tasks.base import Floors, Task, accuracy, constant_floors
from experiments.tasks.crowded_cue import crowded_cue
from experiments.tasks.delayed_recall import delayed_recall
from experiments.tasks.digits import digits
from experiments.tasks.motif_count import motif_count

TaskName = Literal["digits_rows", "digits_pixels", "delayed_recall", "crowded_cue", "motif_count"]

TASKS: dict[TaskName, Callable[..., Task]] = {
    "digits_rows": partial(digits, "rows"),
    "digits_pixels": partial(digits, "pixels"),
    "delayed_recall": delayed_recall,
    "crowded_cue": crowded_cue,
    "motif_count": motif_count,
}

__all__ = [
    "TASKS",
    "Floors",
    "Task",
    "TaskName",
    "accuracy",
    "constant_floors",
    "crowded_cue",
    "delayed_recall",
    "digits",
    "motif_count",
]
