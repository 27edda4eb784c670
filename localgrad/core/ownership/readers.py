"""Readers: what an equation of a program hands on, as a function of it and of what it reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.ownership.owners import (
    Fact,
    Owners,
    fitted,
    joined,
    known_array,
    mapped,
    reduced,
    shape_of,
    stack_up,
    taken,
    unless_many,
    where,
    whole,
)

Found = list[Owners | None]


def unread(eqn: Any, ins: list[Fact]) -> Found:
    """Of an equation that cannot be read: one owner of all it reads owns all it gives."""
    one = unless_many(joined(*(reduced(fact.owners, None) for fact in ins)))
    return [fitted(one, var.aval.shape) for var in eqn.outvars]


def _pointwise(eqn: Any, ins: list[Fact]) -> Found:
    return [fitted(joined(*(fact.owners for fact in ins)), shape_of(eqn))]


def _each_alone(eqn: Any, ins: list[Fact]) -> Found:
    del eqn
    return [fact.owners for fact in ins]


def _product(eqn: Any, ins: list[Fact]) -> Found:
    """A factor that is known to be 0 takes away the other's owners."""

    def kept(fact: Fact, other: Fact) -> Owners | None:
        factor = None if fact.owners is None else known_array(other)
        return fact.owners if factor is None else where(factor != 0, fact.owners)

    return [fitted(joined(kept(*ins), kept(*ins[::-1])), shape_of(eqn))]


def _choice(eqn: Any, ins: list[Fact]) -> Found:
    """`select_n`: by entry where the choice is known."""
    which, cases = known_array(ins[0]), [fact.owners for fact in ins[1:]]
    if which is not None:
        cases = [where(which == k, owners) for k, owners in enumerate(cases)]
    return [fitted(joined(ins[0].owners, *cases), shape_of(eqn))]


def _move(move: Callable[[np.ndarray, dict, tuple], np.ndarray]) -> Callable[..., Found]:
    def read(eqn: Any, ins: list[Fact]) -> Found:
        return [mapped(ins[0].owners, lambda a: move(a, eqn.params, shape_of(eqn)))]

    return read


def _broadcast(a: np.ndarray, params: dict, shape: tuple) -> np.ndarray:
    sizes = dict(zip(params["broadcast_dimensions"], a.shape, strict=True))
    return np.broadcast_to(a.reshape([sizes.get(d, 1) for d in range(len(shape))]), shape)


def _slice(a: np.ndarray, params: dict, shape: tuple) -> np.ndarray:
    del shape
    strides = params["strides"] or (1,) * a.ndim
    return a[tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]


def _accumulated(eqn: Any, ins: list[Fact]) -> Found:
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]

    def along(f: np.ufunc, a: np.ndarray) -> np.ndarray:
        a = np.flip(a, axis) if reverse else a
        return np.flip(f.accumulate(a, axis), axis) if reverse else f.accumulate(a, axis)

    owners = whole(ins[0].owners, shape_of(eqn))
    return [Owners(along(np.minimum, owners.lo), along(np.maximum, owners.hi))]


def _reduction(eqn: Any, ins: list[Fact]) -> Found:
    return [reduced(ins[0].owners, eqn.params["axes"])]


def _along(axis: str) -> Callable[..., Found]:
    """Of what joins all entries along the axis that is the parameter of this name."""

    def read(eqn: Any, ins: list[Fact]) -> Found:
        keys = [fact.owners for fact in ins[: eqn.params.get("num_keys", 1)]]
        each = ins if len(ins) == len(eqn.outvars) else ins * len(eqn.outvars)
        reach = [
            reduced(joined(fact.owners, *keys), [eqn.params[axis]], keep=True) for fact in each
        ]
        return [fitted(found, shape_of(eqn, k)) for k, found in enumerate(reach)]

    return read


def _concatenated(eqn: Any, ins: list[Fact]) -> Found:
    parts = [whole(f.owners, a.aval.shape) for f, a in zip(ins, eqn.invars, strict=True)]
    axis = eqn.params["dimension"]
    return [Owners(*(np.concatenate(arrays, axis) for arrays in zip(*parts, strict=True)))]


def _stacked_up(eqn: Any, ins: list[Fact]) -> Found:
    parts = [whole(f.owners, a.aval.shape) for f, a in zip(ins, eqn.invars, strict=True)]
    return [stack_up(parts, eqn.params["axis"])]


def _unstacked(eqn: Any, ins: list[Fact]) -> Found:
    axis = eqn.params["axis"]
    return [mapped(ins[0].owners, lambda a, k=k: a.take(k, axis)) for k in range(len(eqn.outvars))]


def _split(eqn: Any, ins: list[Fact]) -> Found:
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    owners = whole(ins[0].owners, eqn.invars[0].aval.shape)
    pieces = (np.split(a, ends, eqn.params["axis"]) for a in owners)
    return [Owners(*piece) for piece in zip(*pieces, strict=True)]


def _padded(eqn: Any, ins: list[Fact]) -> Found:
    inside, target, source = whole(ins[0].owners, eqn.invars[0].aval.shape), [], []
    for size, n, (low, _, between) in zip(
        shape_of(eqn), inside.lo.shape, eqn.params["padding_config"], strict=True
    ):
        places = low + np.arange(n) * (between + 1)
        fits = (places >= 0) & (places < size)
        target.append(places[fits])
        source.append(np.flatnonzero(fits))
    out = [np.array(np.broadcast_to(a, shape_of(eqn))) for a in whole(ins[1].owners, ())]
    for a, b in zip(out, inside, strict=True):
        a[np.ix_(*target)] = b[np.ix_(*source)]
    return [Owners(*out)]


def _stacked(a: np.ndarray, batch: Sequence[int], contract: Sequence[int]) -> np.ndarray:
    """[all of the batch, all that is free, all that is contracted]."""
    free = [d for d in range(a.ndim) if d not in (*batch, *contract)]
    groups = [list(batch), free, list(contract)]
    sizes = [math.prod(a.shape[d] for d in group) for group in groups]
    return a.transpose([*batch, *free, *contract]).reshape(sizes)


def _contracted(eqn: Any, ins: list[Fact]) -> Found:
    """`dot_general`: what meets a known 0 does not count."""
    contract, batch = eqn.params["dimension_numbers"]
    found, sizes = [], []
    for k, (fact, other) in enumerate((ins, ins[::-1])):
        shape, stack = (
            eqn.invars[k].aval.shape,
            [functools.partial(_stacked, batch=batch[i], contract=contract[i]) for i in (k, 1 - k)],
        )
        factor = None if fact.owners is None else known_array(other)
        used = None if factor is None else stack[1](factor != 0)
        found.append(_met(mapped(fact.owners, stack[0]), used))
        sizes.append(stack[0](np.broadcast_to(np.int8(0), shape)).shape)
    out = joined(found[0], mapped(found[1], lambda a: a.swapaxes(1, 2)))
    full = (*sizes[0][:2], sizes[1][1])
    return [mapped(out, lambda a: np.broadcast_to(a, full).reshape(shape_of(eqn)))]


def _met(owners: Owners | None, used: np.ndarray | None) -> Owners | None:
    """Owners [b, M, K], of which entry n of the other side uses those of `used` [b, N, K]."""
    if owners is None or used is None or used.all():
        return reduced(owners, [2], keep=True)
    found = None
    for k in range(used.shape[2]):
        column = Owners(owners.lo[:, :, None, k], owners.hi[:, :, None, k])
        found = joined(found, where(used[:, None, :, k], column))
    return found


def _convolved(eqn: Any, ins: list[Fact]) -> Found:
    """`conv_general_dilated`: examples are kept apart, and nothing else."""
    if ins[1].owners is not None or eqn.params["batch_group_count"] > 1:
        return unread(eqn, ins)
    dims, shape = eqn.params["dimension_numbers"], shape_of(eqn)
    axes = [d for d in range(len(shape)) if d != dims.lhs_spec[0]]
    one = unless_many(reduced(ins[0].owners, axes))
    place = [-1 if d == dims.out_spec[0] else 1 for d in range(len(shape))]
    return [fitted(mapped(one, lambda a: a.reshape(place)), shape)]


def _searched(owners: Owners | None, shape: tuple, axes: list[int]) -> Owners | None:
    """Each entry as that of any place along these axes."""
    return fitted(reduced(owners, axes, keep=True), shape)


def _gathered(eqn: Any, ins: list[Fact]) -> Found:
    """`gather`; what is looked up in a place not known may come from any."""
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = (atom.aval.shape for atom in eqn.invars)
    picked = None
    if ins[0].owners is not None:
        picked, index = ins[0].owners, known_array(ins[1])
        if index is None:
            axes = [d for d in dims.start_index_map if sizes[d] < operand[d]]
            picked, index = _searched(picked, operand, axes), np.zeros(indices, np.int32)
            picked = picked if len(axes) < 2 else unless_many(picked)
        places = np.arange(math.prod(operand), dtype=np.int32).reshape(operand)
        with jax.ensure_compile_time_eval():
            params = eqn.params | {"fill_value": -1}
            found = eqn.primitive.bind(jnp.asarray(places), jnp.asarray(index), **params)
        picked = picked and taken(picked, np.asarray(found))
    asked = reduced(ins[1].owners, [len(indices) - 1])
    asked = mapped(asked, lambda a: np.expand_dims(a, dims.offset_dims))
    return [fitted(joined(picked, asked), shape_of(eqn))]


def _dynamic_slice(eqn: Any, ins: list[Fact]) -> Found:
    owners, starts = ins[0].owners, [known_array(fact) for fact in ins[1:]]
    operand, shape = eqn.invars[0].aval.shape, shape_of(eqn)
    unknown = [d for d, at in enumerate(starts) if at is None and shape[d] < operand[d]]
    picked = _searched(owners, operand, unknown)
    window = _window(starts, shape, operand)
    picked = mapped(picked, lambda a: a[window])
    return [fitted(joined(picked, *(fact.owners for fact in ins[1:])), shape)]


def _window(starts: Sequence[Any], sizes: tuple, shape: tuple) -> tuple[slice, ...]:
    """Where a dynamic slice lies, moved inside as XLA does; at 0 if that is not known."""
    least = (
        min(max(int(at or 0), 0), n - k) for at, k, n in zip(starts, sizes, shape, strict=True)
    )
    return tuple(slice(at, at + k) for at, k in zip(least, sizes, strict=True))


def _dynamic_update(eqn: Any, ins: list[Fact]) -> Found:
    starts = [known_array(fact) for fact in ins[2:]]
    if any(at is None for at in starts):
        return unread(eqn, ins)
    shape, size = shape_of(eqn), eqn.invars[1].aval.shape
    out = [np.array(a) for a in whole(ins[0].owners, shape)]
    for a, b in zip(out, whole(ins[1].owners, size), strict=True):
        a[_window(starts, size, shape)] = b
    return [Owners(*out)]


def _scattered(eqn: Any, ins: list[Fact]) -> Found:
    """`scatter` and its kin; in a known place only."""
    index = known_array(ins[1])
    if index is None:
        return unread(eqn, ins)
    old = whole(ins[0].owners, shape_of(eqn))
    new = whole(ins[2].owners, eqn.invars[2].aval.shape)
    dims, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    with jax.ensure_compile_time_eval():
        if eqn.primitive.name == "scatter":  # what it overwrites is gone
            kept = jax.lax.scatter_mul(
                np.ones(shape_of(eqn), np.int32), index, np.zeros_like(new.lo), dims, mode=mode
            )
            old = whole(where(np.asarray(kept) == 1, old), shape_of(eqn))
        lo = jax.lax.scatter_min(old.lo, index, new.lo, dims, mode=mode)
        hi = jax.lax.scatter_max(old.hi, index, new.hi, dims, mode=mode)
    return [Owners(np.asarray(lo), np.asarray(hi))]


READERS: dict[str, Callable[[Any, list[Fact]], Found]] = {
    "mul": _product,
    "select_n": _choice,
    "reshape": _move(lambda a, params, shape: a.reshape(shape)),
    "squeeze": _move(lambda a, params, shape: a.reshape(shape)),
    "broadcast_in_dim": _move(_broadcast),
    "transpose": _move(lambda a, params, shape: a.transpose(params["permutation"])),
    "rev": _move(lambda a, params, shape: np.flip(a, params["dimensions"])),
    "slice": _move(_slice),
    "concatenate": _concatenated,
    "stack": _stacked_up,
    "unstack": _unstacked,
    "tile": _move(lambda a, params, shape: np.tile(a, params["reps"])),
    "split": _split,
    "pad": _padded,
    "dot_general": _contracted,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "sort": _along("dimension"),
    "top_k": _along("axis"),
    "optimization_barrier": _each_alone,
    "device_put": _each_alone,
}
READERS |= dict.fromkeys(
    """reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or reduce_xor argmax
    argmin""".split(),
    _reduction,
)
READERS |= dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _accumulated)
READERS |= dict.fromkeys(
    "scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max".split(), _scattered
)
READERS |= dict.fromkeys(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil
    clamp clz complex conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc
    exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le lgamma log
    log1p logistic lt max min name ne neg nextafter not or polygamma population_count pow
    real reduce_precision regularized_incomplete_beta rem round rsqrt
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor zeta""".split(),
    _pointwise,
)
