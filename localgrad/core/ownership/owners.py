"""Owners of the entries of an array, and what is known of an array in a program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NONE_LO, NONE_HI = np.int32(np.iinfo(np.int32).max), np.int32(-1)


class Owners(NamedTuple):
    """The least and the greatest owner of each entry; beyond all numbers where it has none.

    In place of arrays that belong to nobody stands None.
    """

    lo: np.ndarray
    hi: np.ndarray


class Fact(NamedTuple):
    """What is known of an array: its owners, and its value if no input of the program reaches it.

    The value comes from a function, so that nothing is computed that nobody asks for.
    """

    owners: Owners | None = None
    value: Callable[[], Any] | None = None


def strays(owners: Owners | None, labels: np.ndarray) -> bool:
    """Whether an entry belongs to another than its label says, or to many."""
    if owners is None:
        return False
    return bool(((owners.hi >= 0) & ((owners.lo != labels) | (owners.hi != labels))).any())


def known_array(fact: Fact) -> np.ndarray | None:
    """The value of an array, or None if it is not known."""
    return None if fact.value is None else np.asarray(fact.value())


def mapped(owners: Owners | None, f: Callable[[np.ndarray], np.ndarray]) -> Owners | None:
    """What moves entries about, done to their owners."""
    return None if owners is None else Owners(f(owners.lo), f(owners.hi))


def joined(*each: Owners | None) -> Owners | None:
    """Entry by entry, the owners of all; shapes broadcast."""
    found = [owners for owners in each if owners is not None]
    if not found:
        return None
    lo, hi = zip(*found, strict=True)
    return Owners(functools.reduce(np.minimum, lo), functools.reduce(np.maximum, hi))


def reduced(owners: Owners | None, axes: Any, keep: bool = False) -> Owners | None:
    """The owners of all entries along some axes (None: along all)."""
    if owners is None:
        return None
    axes = None if axes is None else tuple(axes)
    return Owners(
        owners.lo.min(axes, keepdims=keep, initial=NONE_LO),
        owners.hi.max(axes, keepdims=keep, initial=NONE_HI),
    )


def fitted(owners: Owners | None, shape: tuple[int, ...]) -> Owners | None:
    """Owners of an array that is broadcast."""
    return mapped(owners, lambda a: np.broadcast_to(a, shape))


def whole(owners: Owners | None, shape: tuple[int, ...]) -> Owners:
    """The same as arrays, also where all belongs to nobody."""
    return owners or Owners(np.full(shape, NONE_LO), np.full(shape, NONE_HI))


def where(keep: np.ndarray, owners: Owners | None) -> Owners | None:
    """The owners of what is kept; the rest belongs to nobody."""
    if owners is None:
        return None
    return Owners(np.where(keep, owners.lo, NONE_LO), np.where(keep, owners.hi, NONE_HI))


def unless_many(owners: Owners | None) -> Owners | None:
    """The same, with what belongs to many made nobody's."""
    return None if owners is None else where(owners.lo >= owners.hi, owners)


def taken(owners: Owners, places: np.ndarray) -> Owners:
    """The owners at these places of the flat array; a negative place is nobody's."""
    found = mapped(owners, lambda a: a.ravel()[places])
    return whole(where(places >= 0, found), places.shape)


def shape_of(eqn: Any, k: int = 0) -> tuple[int, ...]:
    """The shape of the k-th output of an equation."""
    return eqn.outvars[k].aval.shape


def stack_up(each: list[Owners], axis: int = 0) -> Owners:
    """Owners of arrays side by side on a new axis."""
    return Owners(*(np.stack(arrays, axis) for arrays in zip(*each, strict=True)))
