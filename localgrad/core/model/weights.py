"""The weights of a flat program: where what parameters make meets what moves.

A *product* is a `dot_general` of a moving value with a weight, read as `pre [R] @ kernel [R, D]`
whatever its axes; blocks that share or split axes become one block-diagonal kernel. All else that
parameters make and what moves meets is a *part*: biases, time constants, diagonals.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from localgrad.core.model.program import MADE, MOVING, Program
from localgrad.core.params import Leaves, Path

STILL = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy"}
"""Steps that repeat, rename or cast entries and do nothing else."""


class Product(NamedTuple):
    """A synapse of a program.

    Attributes:
        eqn: the `dot_general`.
        side: which of its operands is the weight.
        source: the variable that holds the weight, before a cast.
        head: how its virtual layer is called.
        bias: the variable that is added to the product, or to a sum of products, as one number a
            column; or None.
    """

    eqn: Any
    side: int
    source: Any
    head: Path
    bias: Any = None

    @property
    def pre(self) -> Any:
        """The variable that the weight is applied to."""
        return self.eqn.invars[1 - self.side]

    def _axes(self) -> tuple[tuple, tuple]:
        """For the moving operand and the weight: its axes of blocks, free and contracted."""
        contracted, blocks = self.eqn.params["dimension_numbers"]
        found = []
        for k in (1 - self.side, self.side):
            bound = {*contracted[k], *blocks[k]}
            free = [d for d in range(self.eqn.invars[k].aval.ndim) if d not in bound]
            found.append((list(blocks[k]), free, list(contracted[k])))
        return found[0], found[1]

    def _sizes(self) -> tuple[int, int, int, int]:
        """How many blocks there are, rows of a block's own, entries of a row, and columns."""
        (blocks, rows, entries), (_, columns, _) = self._axes()
        moving, weight = self.eqn.invars[1 - self.side].aval, self.eqn.invars[self.side].aval
        count = lambda aval, axes: math.prod(aval.shape[d] for d in axes)  # noqa: E731
        return (
            count(moving, blocks),
            count(moving, rows),
            count(moving, entries),
            count(weight, columns),
        )

    @property
    def width(self) -> int:
        """D, the columns of the kernel."""
        blocks, rows, _, columns = self._sizes()
        return blocks * rows * columns

    @property
    def is_plain(self) -> bool:
        """Whether it is one block, so that the entries of what it gives are the columns."""
        blocks, rows, _, _ = self._sizes()
        return blocks * rows == 1

    def kernel(self, weight: jax.Array) -> jax.Array:
        """The weight as a matrix [R, D]; linear."""
        blocks, rows, entries, columns = self._sizes()
        _, (at, free, contracted) = self._axes()
        each = weight.transpose([*at, *contracted, *free]).reshape(blocks, entries, columns)
        if blocks * rows == 1:
            return each[0]
        each = jnp.repeat(each, rows, axis=0)
        eye = jnp.eye(blocks * rows, dtype=each.dtype)[:, None, :, None]
        return (eye * each[:, :, None, :]).reshape(blocks * rows * entries, self.width)

    def received(self, value: jax.Array) -> jax.Array:
        """The moving operand [B, ...] as pre [B, R]."""
        (blocks, rows, entries), _ = self._axes()
        order = [0, *(1 + d for d in [*blocks, *rows, *entries])]
        return value.transpose(order).reshape(len(value), -1)

    def given(self, drive: jax.Array) -> jax.Array:
        """The drive [B, D] as what the equation gives, [B, ...]."""
        blocks, rows, _, columns = self._sizes()
        split = drive.reshape(-1, blocks, rows, columns)
        split = split if self.side == 1 else split.swapaxes(2, 3)
        return split.reshape(len(drive), *self.eqn.outvars[0].aval.shape)

    def apply(self, leaves: Leaves, pre: jax.Array) -> jax.Array:
        """The virtual layer's own call: `pre @ kernel + bias`, in the program's precision."""
        kernel, bias = leaves[("kernel",)], leaves.get(("bias",))
        params = self.eqn.params
        wanted = params["preferred_element_type"]
        if kernel.dtype == self.source.aval.dtype:
            kernel = kernel.astype(self.eqn.invars[self.side].aval.dtype)
        else:  # a copy in which gradients are summed
            pre, wanted = pre.astype(jnp.promote_types(pre.dtype, kernel.dtype)), None
        numbers = (((1,), (0,)), ((), ()))
        drive = jax.lax.dot_general(
            pre, kernel, numbers, precision=params["precision"], preferred_element_type=wanted
        )
        return drive if bias is None else drive + bias.astype(drive.dtype)[None]


class Weights(NamedTuple):
    """The weights of a program.

    Attributes:
        products: its synapses, in the order in which the step makes them.
        parts: by name, the other variables that parameters make.
        skipped: by the identity of an equation, which operand goes on past it: what else it adds is
            a product's bias.
        made: the parameters that each variable is made of.
        labels: by name of a product or part, how messages call it.
    """

    products: tuple[Product, ...]
    parts: dict[Path, Any]
    skipped: dict[int, int]
    made: dict[Any, tuple[Path, ...]]
    labels: dict[Path, str]


def weights_in(program: Program, paths: Sequence[Path]) -> Weights:
    """Finds the weights of a program whose parameters have these paths."""
    jaxpr = program.closed.jaxpr
    by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    names = _Names(program, paths)
    products = [
        Product(eqn, side, source, names.of(source))
        for eqn in jaxpr.eqns
        if (side := _weight_of(program, eqn)) is not None
        for source in [_before(by, eqn.invars[side], {"convert_element_type", "copy"})]
    ]
    biases, skipped = _biases(program, by, products)
    products = [p._replace(bias=biases.get(id(p.eqn))) for p in products]

    taken = {id(p.eqn) for p in products}
    parts: dict[Path, Any] = {}
    seen: set[Any] = set()
    met = [
        eqn.invars
        for eqn in jaxpr.eqns
        if _moves(program, eqn) and id(eqn) not in taken | skipped.keys()
    ]
    for atom in [atom for atoms in (*met, jaxpr.outvars) for atom in atoms]:
        if program.kind(atom) == MADE and (source := _before(by, atom, STILL)) not in seen:
            seen.add(source)
            parts[names.of(source)] = source
    return Weights(tuple(products), parts, skipped, names.made, names.labels)


def _moves(program: Program, eqn: Any) -> bool:
    return any(program.kind(var) == MOVING for var in eqn.outvars)


def _weight_of(program: Program, eqn: Any) -> int | None:
    """Which operand of an equation is a weight on what moves, if one is."""
    if eqn.primitive.name != "dot_general":
        return None
    kinds = [program.kind(atom) for atom in eqn.invars]
    return kinds.index(MADE) if sorted(kinds) == [MADE, MOVING] else None


def _before(by: dict[Any, Any], var: Any, steps: set[str]) -> Any:
    """The variable of which this one is a mere copy."""
    while (eqn := by.get(var)) is not None and eqn.primitive.name in steps:
        (source,) = eqn.invars[:1]
        if isinstance(source, jex.Literal) or not _is_float(source):
            break
        var = source
    return var


def _is_float(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


class _Names:
    """Names for variables, after the parameters that they are made of; none begins another."""

    def __init__(self, program: Program, paths: Sequence[Path]) -> None:
        jaxpr = program.closed.jaxpr
        self.made: dict[Any, tuple[Path, ...]] = {
            var: (path,) for var, path in zip(jaxpr.invars, paths, strict=False)
        }
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                if program.kinds[var] == MADE:
                    atoms = [a for a in eqn.invars if isinstance(a, jex.Var)]
                    found = [path for atom in atoms for path in self.made.get(atom, ())]
                    self.made[var] = tuple(sorted(set(found)))
        self.count: Counter[str] = Counter()
        self.labels: dict[Path, str] = {}

    def of(self, var: Any) -> Path:
        """A new name for a variable; a parameter may itself be called like another's second use."""
        whole = ["/".join(path) for path in self.made[var]]
        head = "+".join(path.removesuffix("/kernel") for path in whole)
        self.count[head] += 1
        use = self.count[head]
        tried = (f"{head}_{n}" if n > 1 else head for n in itertools.count(use))
        name = next((name,) for name in tried if (name,) not in self.labels)
        self.labels[name] = f"{head} (use {use})" if use > 1 else head
        return name


def _biases(
    program: Program, by: dict[Any, Any], products: list[Product]
) -> tuple[dict[int, Any], dict[int, int]]:
    """What is added to sums of products: by their equations; and the additions that it makes idle.

    It goes to the first product of a sum that has none yet; nothing else may see the sum's terms.
    """
    jaxpr = program.closed.jaxpr
    used = Counter(a for eqn in jaxpr.eqns for a in eqn.invars if isinstance(a, jex.Var))
    used.update(a for a in jaxpr.outvars if isinstance(a, jex.Var))
    sums = {p.eqn.outvars[0]: [p] for p in products if p.is_plain}
    biases: dict[int, Any] = {}
    skipped: dict[int, int] = {}

    def lone(atom: Any) -> list[Product]:
        return sums.get(atom, []) if isinstance(atom, jex.Var) and used[atom] == 1 else []

    for eqn in jaxpr.eqns:
        terms = [lone(atom) for atom in eqn.invars]
        out = eqn.outvars[0]
        if eqn.primitive.name in ("reshape", "squeeze", "convert_element_type") and terms[0]:
            sums[out] = terms[0]
        if eqn.primitive.name not in ("add", "add_any") or not any(terms):
            continue
        if all(terms):
            sums[out] = terms[0] + terms[1]
            continue
        k = 0 if terms[0] else 1
        free = [p for p in terms[k] if id(p.eqn) not in biases]
        other = eqn.invars[1 - k]
        if not free or program.kind(other) != MADE or eqn.invars[k].aval.size != out.aval.size:
            continue
        source = _before(by, other, STILL)
        if source.aval.size == out.aval.size == free[0].width:
            biases[id(free[0].eqn)] = source
            skipped[id(eqn)] = k
            sums[out] = terms[k]
    return biases, skipped
