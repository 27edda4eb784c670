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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

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
    unless_many,
    whole,
)
from localgrad.core.ownership.readers import READERS, unread

UNROLLED, PASSES = 64, 8


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
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if name in CALLS and inner is not None:
        # What a custom derivative makes of comparisons and the like is its own affair.
        outs = _follow(inner, ins, credit and not name.startswith("custom"))
    elif name in LOOPS and is_owned:
        outs = _looped(eqn, ins, credit)
    elif not is_owned or (credit and name in FLAT):
        outs = [Fact(value=value) for value in _values(eqn, ins)]
    else:
        outs = [Fact(owners) for owners in _read(eqn, ins)]
    return [
        Fact(None, fact.value) if credit and _is_discrete(var) else fact
        for fact, var in zip(outs, eqn.outvars, strict=True)
    ]


def _looped(eqn: Any, ins: list[Fact], credit: bool) -> list[Fact]:
    try:
        return LOOPS[eqn.primitive.name](eqn, ins, credit)
    except KeyError:  # another JAX may name a parameter otherwise
        return [Fact(owners) for owners in unread(eqn, ins)]


def _read(eqn: Any, ins: list[Fact]) -> list[Owners | None]:
    try:
        return READERS.get(eqn.primitive.name, unread)(eqn, ins)
    except KeyError:  # another JAX may name a parameter otherwise
        return unread(eqn, ins)


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


def _cond(eqn: Any, ins: list[Fact], credit: bool) -> list[Fact]:
    """The branch that is known to be taken, or all."""
    which, branches = known_array(ins[0]), eqn.params["branches"]
    if which is not None:
        k = min(max(int(which), 0), len(branches) - 1)
        return _follow(branches[k], ins[1:], credit)
    found = [_follow(branch, ins[1:], credit) for branch in branches]
    return [
        Fact(fitted(joined(ins[0].owners, *(f.owners for f in each)), shape_of(eqn, k)))
        for k, each in enumerate(zip(*found, strict=True))
    ]


def _scan(eqn: Any, ins: list[Fact], credit: bool) -> list[Fact]:
    """Pass by pass; a long one as a loop of unknown length."""
    body, length, back = (eqn.params[name] for name in ("jaxpr", "length", "reverse"))
    inner = getattr(body, "jaxpr", body)
    # xs and ys have an axis more outside than inside; JAX's own counts change their names.
    count = sum(map(_same_rank, eqn.outvars, inner.outvars))
    consts, carry, xs = _parted(ins, sum(map(_same_rank, eqn.invars, inner.invars)) - count, count)
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
    return carry + [Fact(stack_up([whole(y, shape) for y in each])) for shape, *each in ys]


def _same_rank(a: Any, b: Any) -> bool:
    return a.aval.ndim == b.aval.ndim


def _parted(facts: list[Fact], n: int, m: int) -> tuple[list[Fact], list[Fact], list[Fact]]:
    return facts[:n], facts[n : n + m], facts[n + m :]


def _at(fact: Fact, t: int) -> Fact:
    value = fact.value
    picked = None if value is None else lambda: value()[t]
    return Fact(mapped(fact.owners, lambda a: a[t]), picked)


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
        return [Fact(joined(out.owners, ends.owners)) for out in outs]

    return _until_steady(eqn, ins, carry, body)


def _until_steady(
    eqn: Any, ins: list[Fact], carry: list[Fact], body: Callable[[list[Fact]], list[Fact]]
) -> list[Fact]:
    """What a loop of unknown length gives: owners that another pass does not change."""
    shapes = [var.aval.shape for var in eqn.outvars]
    held = [whole(fact.owners, s) for fact, s in zip(carry, shapes[: len(carry)], strict=True)]
    for _ in range(PASSES):
        outs = [fact.owners for fact in body([Fact(owners) for owners in held])]
        new = [joined(a, b) or a for a, b in zip(held, outs[: len(held)], strict=True)]
        if all(np.array_equal(a, b) for a, b in zip(held, new, strict=True)):
            found = [*held, *outs[len(held) :]]
            each = [fitted(o, shape) for o, shape in zip(found, shapes, strict=True)]
            return [Fact(unless_many(owners)) for owners in each]
        held = new
    return [Fact(owners) for owners in unread(eqn, ins)]


CALLS = {"jit", "closed_call", "remat2", "custom_jvp_call", "custom_vjp_call"}
FLAT = {"stop_gradient", "sign", "floor", "ceil", "round"}
"""Steps with derivative 0 wherever it exists."""
LOOPS = {"cond": _cond, "scan": _scan, "while": _while}
