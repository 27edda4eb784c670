"""Tasks: what a network is trained and tested on, by name.

`TASKS[name](seed)` makes a `Task`; a task enters by one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from experiments.tasks.base import Floors, Task, accuracy, constant_floors
from experiments.tasks.delayed_recall import delayed_recall
from experiments.tasks.digits import digits

TaskName = Literal["digits_rows", "digits_pixels", "delayed_recall"]

TASKS: dict[TaskName, Callable[..., Task]] = {
    "digits_rows": partial(digits, "rows"),
    "digits_pixels": partial(digits, "pixels"),
    "delayed_recall": delayed_recall,
}

__all__ = [
    "TASKS",
    "Floors",
    "Task",
    "TaskName",
    "accuracy",
    "constant_floors",
    "delayed_recall",
    "digits",
]
