"""How much memory a rule may take for what its streams remember."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax

GIB = 1024**3


class Room(NamedTuple):
    """A limit to what is remembered between windows.

    Attributes:
        needed: `(stack, params, B) -> bytes` that B streams take; nothing is allocated.
        limit: `max_influence_bytes`.
        what: what is remembered, for the message.
        instead: the rule that takes less, and how much less.
    """

    needed: Callable[[Any, Any, int], int]
    limit: float
    what: str
    instead: str

    def require(self, stack: Any, params: Any, batch: int, episodic: bool) -> None:
        """Raises if it would not fit."""
        needed = self.needed(stack, params, batch)
        if needed <= self.limit:
            return
        whole = " An episodic call in one window, window=T, remembers nothing." if episodic else ""
        raise ValueError(
            f"{self.what} would take {needed / GIB:.3g} GiB, more than max_influence_bytes = "
            f"{self.limit / GIB:.3g} GiB, for batch_size={batch} streams. Raise that limit, take "
            f"fewer streams or narrower cells, or use {self.instead}.{whole}"
        )


def held_bytes(nothing: Callable[[], Any]) -> int:
    """How many bytes what is held at the start takes; nothing is allocated."""
    leaves = jax.tree.leaves(jax.eval_shape(nothing))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def room_of(needed: Callable[[Any, Any, int], int], limit: Any, what: str, instead: str) -> Room:
    """A `Room`; raises for a limit that is no number of bytes."""
    if isinstance(limit, bool) or not isinstance(limit, Real) or not float(limit) >= 0:
        raise ValueError(
            f"max_influence_bytes must be a number of bytes, 0 or more; got {limit!r}. 4 GiB are "
            "4 * 1024**3."
        )
    return Room(needed, float(limit), what, instead)
