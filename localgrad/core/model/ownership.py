"""Whose is each number? Owners, followed through a program, where numbers tried may show nothing.

Every entry of an array belongs to nobody, to one owner (a unit, or an example) or to many. Inputs
are labelled; each equation of the jaxpr hands the owners of what it reads to what it gives. A
coupling is found whatever its size: behind a `relu` that is silent, in a branch not taken.

An equation that cannot be read (a callback, an FFT, a loop of unknown length, several indices that
are not known) gives to its one owner what it reads from one owner alone, and to nobody what it
reads from many: many owners are found only where every step of the way was read, so finding them
is a proof, and not finding them is none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

NONE_LO, NONE_HI = np.int32(np.iinfo(np.int32).max), np.int32(-1)
UNROLLED, PASSES = 64, 8


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


def owners_of(
    program: jex.ClosedJaxpr, labels: Sequence[np.ndarray | None], credit: bool
) -> list[Owners | None]:
    """Follows owners through a program.

    Args:
        program: the jaxpr.
        labels: for each input, the owner of each entry, or None if it belongs to nobody.
        credit: follow derivatives, for which comparisons, integers, `stop_gradient` and steps such
            as `round` are dead ends; else follow values.

    Returns:
        The owners of each output.
    """
    seeds = [None if a is None else np.asarray(a, np.int32) for a in labels]
    facts = [Fact(None if a is None else Owners(a, a)) for a in seeds]
    with jax.disable_jit(False):
        return [fact.owners for fact in _follow(program, facts, credit)]


def strays(owners: Owners | None, labels: np.ndarray) -> bool:
    """Whether an entry belongs to another than its label says, or to many."""
    if owners is None:
        return False
    return bool(((owners.hi >= 0) & ((owners.lo != labels) | (owners.hi != labels))).any())


def _follow(program: Any, facts: Sequence[Fact], credit: bool) -> list[Fact]:
    jaxpr = getattr(program, "jaxpr", program)
    known = dict(zip(jaxpr.invars, facts, strict=True))
    known |= {
        var: _constant(value)
        for var, value in zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True)
    }

    def of(atom: Any) -> Fact:
        return _constant(atom.val) if isinstance(atom, jex.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        outs = _through(eqn, [of(atom) for atom in eqn.invars], credit)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _constant(value: Any) -> Fact:
    return Fact() if isinstance(value, jax.core.Tracer) else Fact(value=lambda: value)


def _through(eqn: Any, ins: list[Fact], credit: bool) -> list[Fact]:
    name, is_owned = eqn.primitive.name, any(fact.owners for fact in ins)
    if name in CALLS:
        inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
        # What a custom derivative makes of comparisons and the like is its own affair.
        outs = _follow(inner, ins, credit and not name.startswith("custom"))
    elif name in LOOPS and is_owned:
        outs = LOOPS[name](eqn, ins, credit)
    elif not is_owned or (credit and name in FLAT):
        outs = [Fact(value=value) for value in _values(eqn, ins)]
    else:
        outs = [Fact(owners) for owners in READERS.get(name, _unread)(eqn, ins)]
    return [
        Fact(None, fact.value) if credit and _is_discrete(var) else fact
        for fact, var in zip(outs, eqn.outvars, strict=True)
    ]


def _is_discrete(var: Any) -> bool:
    return not jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _values(eqn: Any, ins: list[Fact]) -> list[Callable[[], Any] | None]:
    """How to compute the outputs of an equation, if its inputs are known."""
    if any(fact.value is None for fact in ins) or eqn.effects or "callback" in eqn.primitive.name:
        return [None] * len(eqn.outvars)

    @functools.cache
    def computed() -> Any:
        with jax.ensure_compile_time_eval():
            out = eqn.primitive.bind(*(fact.value() for fact in ins), **eqn.params)  # pyrefly: ignore
        return out if eqn.primitive.multiple_results else [out]

    return [lambda k=k: computed()[k] for k in range(len(eqn.outvars))]


def _array(fact: Fact) -> np.ndarray | None:
    return None if fact.value is None else np.asarray(fact.value())


# ------------------------------------------------------------------------------------------------
# Owners of arrays.


def _mapped(owners: Owners | None, f: Callable[[np.ndarray], np.ndarray]) -> Owners | None:
    return None if owners is None else Owners(f(owners.lo), f(owners.hi))


def _joined(*each: Owners | None) -> Owners | None:
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


def _fitted(owners: Owners | None, shape: tuple[int, ...]) -> Owners | None:
    return _mapped(owners, lambda a: np.broadcast_to(a, shape))


def _whole(owners: Owners | None, shape: tuple[int, ...]) -> Owners:
    """The same as arrays, also where all belongs to nobody."""
    return owners or Owners(np.full(shape, NONE_LO), np.full(shape, NONE_HI))


def _where(keep: np.ndarray, owners: Owners | None) -> Owners | None:
    """The owners of what is kept; the rest belongs to nobody."""
    if owners is None:
        return None
    return Owners(np.where(keep, owners.lo, NONE_LO), np.where(keep, owners.hi, NONE_HI))


def _unless_many(owners: Owners | None) -> Owners | None:
    return None if owners is None else _where(owners.lo >= owners.hi, owners)


def _taken(owners: Owners, places: np.ndarray) -> Owners:
    """The owners at these places of the flat array; a negative place is nobody's."""
    found = _mapped(owners, lambda a: a.ravel()[places])
    return _whole(_where(places >= 0, found), places.shape)


def _shape(eqn: Any, k: int = 0) -> tuple[int, ...]:
    return eqn.outvars[k].aval.shape


# ------------------------------------------------------------------------------------------------
# Readers: what an equation hands on, as a function of the equation and the facts it reads.

Found = list[Owners | None]


def _unread(eqn: Any, ins: list[Fact]) -> Found:
    one = _unless_many(_joined(*(reduced(fact.owners, None) for fact in ins)))
    return [_fitted(one, var.aval.shape) for var in eqn.outvars]


def _pointwise(eqn: Any, ins: list[Fact]) -> Found:
    return [_fitted(_joined(*(fact.owners for fact in ins)), _shape(eqn))]


def _each_alone(eqn: Any, ins: list[Fact]) -> Found:
    del eqn
    return [fact.owners for fact in ins]


def _product(eqn: Any, ins: list[Fact]) -> Found:
    """A factor that is known to be 0 takes away the other's owners."""

    def kept(fact: Fact, other: Fact) -> Owners | None:
        factor = None if fact.owners is None else _array(other)
        return fact.owners if factor is None else _where(factor != 0, fact.owners)

    return [_fitted(_joined(kept(*ins), kept(*ins[::-1])), _shape(eqn))]


def _choice(eqn: Any, ins: list[Fact]) -> Found:
    """`select_n`: by entry where the choice is known."""
    which, cases = _array(ins[0]), [fact.owners for fact in ins[1:]]
    if which is not None:
        cases = [_where(which == k, owners) for k, owners in enumerate(cases)]
    return [_fitted(_joined(ins[0].owners, *cases), _shape(eqn))]


def _move(move: Callable[[np.ndarray, dict, tuple], np.ndarray]) -> Callable[..., Found]:
    def read(eqn: Any, ins: list[Fact]) -> Found:
        return [_mapped(ins[0].owners, lambda a: move(a, eqn.params, _shape(eqn)))]

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

    owners = _whole(ins[0].owners, _shape(eqn))
    return [Owners(along(np.minimum, owners.lo), along(np.maximum, owners.hi))]


def _reduction(eqn: Any, ins: list[Fact]) -> Found:
    return [reduced(ins[0].owners, eqn.params["axes"])]


def _along(axis: str) -> Callable[..., Found]:
    """Of what joins all entries along the axis that is the parameter of this name."""

    def read(eqn: Any, ins: list[Fact]) -> Found:
        keys = [fact.owners for fact in ins[: eqn.params.get("num_keys", 1)]]
        each = ins if len(ins) == len(eqn.outvars) else ins * len(eqn.outvars)
        reach = [
            reduced(_joined(fact.owners, *keys), [eqn.params[axis]], keep=True) for fact in each
        ]
        return [_fitted(found, _shape(eqn, k)) for k, found in enumerate(reach)]

    return read


def _concatenated(eqn: Any, ins: list[Fact]) -> Found:
    parts = [_whole(f.owners, a.aval.shape) for f, a in zip(ins, eqn.invars, strict=True)]
    axis = eqn.params["dimension"]
    return [Owners(*(np.concatenate(arrays, axis) for arrays in zip(*parts, strict=True)))]


def _stacked_up(eqn: Any, ins: list[Fact]) -> Found:
    parts = [_whole(f.owners, a.aval.shape) for f, a in zip(ins, eqn.invars, strict=True)]
    return [_stack(parts, eqn.params["axis"])]


def _stack(each: list[Owners], axis: int = 0) -> Owners:
    return Owners(*(np.stack(arrays, axis) for arrays in zip(*each, strict=True)))


def _unstacked(eqn: Any, ins: list[Fact]) -> Found:
    axis = eqn.params["axis"]
    return [_mapped(ins[0].owners, lambda a, k=k: a.take(k, axis)) for k in range(len(eqn.outvars))]


def _split(eqn: Any, ins: list[Fact]) -> Found:
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    owners = _whole(ins[0].owners, eqn.invars[0].aval.shape)
    pieces = (np.split(a, ends, eqn.params["axis"]) for a in owners)
    return [Owners(*piece) for piece in zip(*pieces, strict=True)]


def _padded(eqn: Any, ins: list[Fact]) -> Found:
    inside, target, source = _whole(ins[0].owners, eqn.invars[0].aval.shape), [], []
    for size, n, (low, _, between) in zip(
        _shape(eqn), inside.lo.shape, eqn.params["padding_config"], strict=True
    ):
        places = low + np.arange(n) * (between + 1)
        fits = (places >= 0) & (places < size)
        target.append(places[fits])
        source.append(np.flatnonzero(fits))
    out = [np.array(np.broadcast_to(a, _shape(eqn))) for a in _whole(ins[1].owners, ())]
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
        factor = None if fact.owners is None else _array(other)
        used = None if factor is None else stack[1](factor != 0)
        found.append(_met(_mapped(fact.owners, stack[0]), used))
        sizes.append(stack[0](np.broadcast_to(np.int8(0), shape)).shape)
    out = _joined(found[0], _mapped(found[1], lambda a: a.swapaxes(1, 2)))
    full = (*sizes[0][:2], sizes[1][1])
    return [_mapped(out, lambda a: np.broadcast_to(a, full).reshape(_shape(eqn)))]


def _met(owners: Owners | None, used: np.ndarray | None) -> Owners | None:
    """Owners [b, M, K], of which entry n of the other side uses those of `used` [b, N, K]."""
    if owners is None or used is None or used.all():
        return reduced(owners, [2], keep=True)
    found = None
    for k in range(used.shape[2]):
        column = Owners(owners.lo[:, :, None, k], owners.hi[:, :, None, k])
        found = _joined(found, _where(used[:, None, :, k], column))
    return found


def _convolved(eqn: Any, ins: list[Fact]) -> Found:
    """`conv_general_dilated`: examples are kept apart, and nothing else."""
    if ins[1].owners is not None or eqn.params["batch_group_count"] > 1:
        return _unread(eqn, ins)
    dims, shape = eqn.params["dimension_numbers"], _shape(eqn)
    axes = [d for d in range(len(shape)) if d != dims.lhs_spec[0]]
    one = _unless_many(reduced(ins[0].owners, axes))
    place = [-1 if d == dims.out_spec[0] else 1 for d in range(len(shape))]
    return [_fitted(_mapped(one, lambda a: a.reshape(place)), shape)]


def _searched(owners: Owners | None, shape: tuple, axes: list[int]) -> Owners | None:
    """Each entry as that of any place along these axes."""
    return _fitted(reduced(owners, axes, keep=True), shape)


def _gathered(eqn: Any, ins: list[Fact]) -> Found:
    """`gather`; what is looked up in a place not known may come from any."""
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = (atom.aval.shape for atom in eqn.invars)
    picked = None
    if ins[0].owners is not None:
        picked, index = ins[0].owners, _array(ins[1])
        if index is None:
            axes = [d for d in dims.start_index_map if sizes[d] < operand[d]]
            picked, index = _searched(picked, operand, axes), np.zeros(indices, np.int32)
            picked = picked if len(axes) < 2 else _unless_many(picked)
        places = np.arange(math.prod(operand), dtype=np.int32).reshape(operand)
        with jax.ensure_compile_time_eval():
            params = eqn.params | {"fill_value": -1}
            found = eqn.primitive.bind(jnp.asarray(places), jnp.asarray(index), **params)
        picked = picked and _taken(picked, np.asarray(found))
    asked = reduced(ins[1].owners, [len(indices) - 1])
    asked = _mapped(asked, lambda a: np.expand_dims(a, dims.offset_dims))
    return [_fitted(_joined(picked, asked), _shape(eqn))]


def _dynamic_slice(eqn: Any, ins: list[Fact]) -> Found:
    owners, starts = ins[0].owners, [_array(fact) for fact in ins[1:]]
    operand, shape = eqn.invars[0].aval.shape, _shape(eqn)
    unknown = [d for d, at in enumerate(starts) if at is None and shape[d] < operand[d]]
    picked = _searched(owners, operand, unknown)
    window = _window(starts, shape, operand)
    picked = _mapped(picked, lambda a: a[window])
    return [_fitted(_joined(picked, *(fact.owners for fact in ins[1:])), shape)]


def _window(starts: Sequence[Any], sizes: tuple, shape: tuple) -> tuple[slice, ...]:
    """Where a dynamic slice lies, moved inside as XLA does; at 0 if that is not known."""
    least = (
        min(max(int(at or 0), 0), n - k) for at, k, n in zip(starts, sizes, shape, strict=True)
    )
    return tuple(slice(at, at + k) for at, k in zip(least, sizes, strict=True))


def _dynamic_update(eqn: Any, ins: list[Fact]) -> Found:
    starts = [_array(fact) for fact in ins[2:]]
    if any(at is None for at in starts):
        return _unread(eqn, ins)
    shape, size = _shape(eqn), eqn.invars[1].aval.shape
    out = [np.array(a) for a in _whole(ins[0].owners, shape)]
    for a, b in zip(out, _whole(ins[1].owners, size), strict=True):
        a[_window(starts, size, shape)] = b
    return [Owners(*out)]


def _scattered(eqn: Any, ins: list[Fact]) -> Found:
    """`scatter` and its kin; in a known place only."""
    index = _array(ins[1])
    if index is None:
        return _unread(eqn, ins)
    old = _whole(ins[0].owners, _shape(eqn))
    new = _whole(ins[2].owners, eqn.invars[2].aval.shape)
    dims, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    with jax.ensure_compile_time_eval():
        if eqn.primitive.name == "scatter":  # what it overwrites is gone
            kept = jax.lax.scatter_mul(
                np.ones(_shape(eqn), np.int32), index, np.zeros_like(new.lo), dims, mode=mode
            )
            old = _whole(_where(np.asarray(kept) == 1, old), _shape(eqn))
        lo = jax.lax.scatter_min(old.lo, index, new.lo, dims, mode=mode)
        hi = jax.lax.scatter_max(old.hi, index, new.hi, dims, mode=mode)
    return [Owners(np.asarray(lo), np.asarray(hi))]


# ------------------------------------------------------------------------------------------------
# Control flow.


def _cond(eqn: Any, ins: list[Fact], credit: bool) -> list[Fact]:
    """The branch that is known to be taken, or all."""
    which, branches = _array(ins[0]), eqn.params["branches"]
    if which is not None:
        k = min(max(int(which), 0), len(branches) - 1)
        return _follow(branches[k], ins[1:], credit)
    found = [_follow(branch, ins[1:], credit) for branch in branches]
    return [
        Fact(_fitted(_joined(ins[0].owners, *(f.owners for f in each)), _shape(eqn, k)))
        for k, each in enumerate(zip(*found, strict=True))
    ]


def _scan(eqn: Any, ins: list[Fact], credit: bool) -> list[Fact]:
    """Pass by pass; a long one as a loop of unknown length."""
    body, length, back = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    consts, carry, xs = _parted(ins, eqn.params["num_consts"], eqn.params["num_carry"])
    if not 0 < length <= UNROLLED:
        return _long_scan(eqn, consts, carry, xs, credit)
    kept = []
    for t in range(length):
        now = [_at(x, length - 1 - t if back else t) for x in xs]
        outs = _follow(body, [*consts, *carry, *now], credit)
        carry = [_settled(fact) for fact in outs[: len(carry)]]
        kept.append([fact.owners for fact in outs[len(carry) :]])
    shapes = [var.aval.shape[1:] for var in eqn.outvars[len(carry) :]]
    ys = zip(shapes, *(kept[::-1] if back else kept), strict=True)
    return carry + [Fact(_stack([_whole(y, shape) for y in each])) for shape, *each in ys]


def _parted(facts: list[Fact], n: int, m: int) -> tuple[list[Fact], list[Fact], list[Fact]]:
    return facts[:n], facts[n : n + m], facts[n + m :]


def _at(fact: Fact, t: int) -> Fact:
    value = fact.value
    picked = None if value is None else lambda: value()[t]
    return Fact(_mapped(fact.owners, lambda a: a[t]), picked)


def _settled(fact: Fact) -> Fact:
    """Computed at once if it is known, so that no pass has to repeat those before it."""
    return fact if fact.value is None else Fact(fact.owners, functools.partial(_same, fact.value()))


def _same(value: Any) -> Any:
    return value


def _long_scan(
    eqn: Any, consts: list[Fact], carry: list[Fact], xs: list[Fact], credit: bool
) -> list[Fact]:
    slices = [Fact(reduced(x.owners, [0])) for x in xs]

    def body(carry: list[Fact]) -> list[Fact]:
        return _follow(eqn.params["jaxpr"], [*consts, *carry, *slices], credit)

    return _until_steady(eqn, [*consts, *carry, *xs], carry, body)


def _while(eqn: Any, ins: list[Fact], credit: bool) -> list[Fact]:
    params = eqn.params
    tests, consts, carry = _parted(ins, params["cond_nconsts"], params["body_nconsts"])

    def body(carry: list[Fact]) -> list[Fact]:
        (ends,) = _follow(params["cond_jaxpr"], [*tests, *carry], credit)
        outs = _follow(params["body_jaxpr"], [*consts, *carry], credit)
        return [Fact(_joined(out.owners, ends.owners)) for out in outs]

    return _until_steady(eqn, ins, carry, body)


def _until_steady(
    eqn: Any, ins: list[Fact], carry: list[Fact], body: Callable[[list[Fact]], list[Fact]]
) -> list[Fact]:
    """What a loop of unknown length gives: owners that another pass does not change."""
    shapes = [var.aval.shape for var in eqn.outvars]
    held = [_whole(fact.owners, s) for fact, s in zip(carry, shapes[: len(carry)], strict=True)]
    for _ in range(PASSES):
        outs = [fact.owners for fact in body([Fact(owners) for owners in held])]
        new = [_joined(a, b) or a for a, b in zip(held, outs[: len(held)], strict=True)]
        if all(np.array_equal(a, b) for a, b in zip(held, new, strict=True)):
            found = [*held, *outs[len(held) :]]
            fitted = [_fitted(o, shape) for o, shape in zip(found, shapes, strict=True)]
            return [Fact(_unless_many(owners)) for owners in fitted]
        held = new
    return [Fact(owners) for owners in _unread(eqn, ins)]


CALLS = {"jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"}
FLAT = {"stop_gradient", "sign", "floor", "ceil", "round"}
"""Steps with derivative 0 wherever it exists."""
LOOPS = {"cond": _cond, "scan": _scan, "while": _while}

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
