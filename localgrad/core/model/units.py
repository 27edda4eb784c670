"""Where the units of a cell lie: in its carry, and among the columns of what drives them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Units(NamedTuple):
    """Where the units of a cell lie in its carry.

    Attributes:
        count: N.
        shapes: of each leaf, without the batch axis.
        axes: for each leaf, which of these axes counts the units; None if all of them do. Empty if
            the carry is to stay as it is.
    """

    count: int
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[int | None, ...]

    def split(self, carry: Any) -> Any:
        """The carry as a list of leaves [..., N]."""
        if not self.axes:
            return carry
        found: list[jax.Array] = []
        for leaf, shape, axis in zip(jax.tree.leaves(carry), self.shapes, self.axes, strict=True):
            lead = leaf.shape[: leaf.ndim - len(shape)]
            if axis is None:
                found.append(leaf.reshape(*lead, self.count))
                continue
            apart = jnp.moveaxis(leaf, len(lead) + axis, -1).reshape(*lead, -1, self.count)
            found += [apart[..., k, :] for k in range(apart.shape[-2])]
        return found

    def join(self, carry: Any, like: Any) -> Any:
        """The inverse of `split`, in this structure."""
        if not self.axes:
            return carry
        found, rest = [], list(carry)
        for shape, axis in zip(self.shapes, self.axes, strict=True):
            lead = rest[0].shape[:-1]
            if axis is None:
                found.append(rest.pop(0).reshape(*lead, *shape))
                continue
            others = [size for d, size in enumerate(shape) if d != axis]
            each = [rest.pop(0) for _ in range(math.prod(others))]
            apart = jnp.stack(each, -2).reshape(*lead, *others, self.count)
            found.append(jnp.moveaxis(apart, -1, len(lead) + axis))
        return jax.tree.unflatten(like, found)


def units_in(carry: Any) -> Units:
    """Finds the units: as many as the smallest leaf has entries, an axis of every larger one."""
    shapes = tuple(leaf.shape[1:] for leaf in jax.tree.leaves(carry))
    count = min(math.prod(shape) for shape in shapes)
    axes = [None if math.prod(s) == count else s.index(count) if count in s else -1 for s in shapes]
    if -1 in axes or count < 2 or all(len(shape) == 1 for shape in shapes):
        return Units(shapes[0][-1] if shapes[0] else 1, shapes, ())
    return Units(count, shapes, tuple(axes))


def layouts(size: int, units: int) -> Iterator[np.ndarray]:
    """Whose each entry may be: the unit of each of `size` entries, in one layout after another."""
    at, each = np.arange(size), size // units
    yield at % units
    if each == 1:
        return
    for width in range(1, units):
        if units % width == 0:
            yield at // (each * width) * width + at % width
