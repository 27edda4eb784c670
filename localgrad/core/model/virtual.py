"""A cell seen by its weights: virtual layers and unit parameters, made of the real parameters.

Where no Flax layer holds a weight (`self.param` and `h @ w`), or a layer's parameters are masked,
transposed, joined or normalised before they work, a cell is reparametrised. What its step makes of
the parameters alone is the *prelude*, `virtual = f(params)`; the rest sees only virtual leaves: a
kernel for each product with what moves, as a `Dense` has it, and one number a unit for all else. A
rule works on these, and its updates go back by the transpose of f's derivative: since a gradient is
linear, that makes of an estimate for the virtual leaves the same estimate for the real ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from localgrad.core.model.coded import CodedModule
from localgrad.core.model.modules import Layer, Module, Tap
from localgrad.core.model.program import Program, bound, made, program_of, steps_to
from localgrad.core.model.trial import Outline, memoised, outline
from localgrad.core.model.units import Units, layouts, units_in
from localgrad.core.model.weights import Product, Weights, weights_in
from localgrad.core.model.wrapped import Wrapped
from localgrad.core.ownership.owners import strays
from localgrad.core.ownership.walk import owners_of
from localgrad.core.params import Leaves, Path, under

Order = np.ndarray | None
"""Which own entry stands at each place of the order in which units follow each other; or None."""


@dataclasses.dataclass(frozen=True)
class VirtualModule(Wrapped):
    """A cell as a pure function of virtual leaves; as other modules are of parameters.

    Attributes:
        leaves: path, shape and dtype of its parameters.
        units: where they lie in its carry.
        program: its step.
        weights: those of the program.
        orders: by name of a product or part, the order of its columns or entries.
    """

    inner: Any
    leaves: tuple[tuple[Path, tuple[int, ...], str], ...]
    units: Units
    program: Program = dataclasses.field(compare=False, repr=False)
    weights: Weights = dataclasses.field(compare=False, repr=False)
    orders: dict[Path, Order] = dataclasses.field(compare=False, repr=False)

    def initialize_carry(self, shape: tuple[int, ...], key: jax.Array | None = None) -> Any:
        """The initial carry for inputs of this shape, batch axis first."""
        return self.units.split(self.inner.initialize_carry(shape, key))

    def own_carry(self, carry: Any) -> Any:
        """The carry as the cell itself has it."""
        joined = self.units.join(carry, self.program.trees[0])
        return self.inner.own_carry(joined) if isinstance(self.inner, CodedModule) else joined

    def enter_carry(self, own: Any) -> Any:
        """The inverse of `own_carry`."""
        coded = isinstance(self.inner, CodedModule)
        return self.units.split(self.inner.enter_carry(own) if coded else own)

    def see(self, params: Leaves) -> Leaves:
        """The virtual leaves that real parameters make; differentiable."""
        wanted = [*(p.source for p in self.weights.products), *self.weights.parts.values()]
        wanted += [p.bias for p in self.weights.products if p.bias is not None]
        values = [params[path] for path, _, _ in self.leaves]
        known = dict(zip(wanted, made(self.program, values, wanted), strict=True))
        found: Leaves = {}
        for product in self.weights.products:
            order = self.orders.get(product.head)
            kernel = product.kernel(known[product.source])
            found[*product.head, "kernel"] = kernel if order is None else kernel[:, order]
            if product.bias is not None:
                bias = known[product.bias].reshape(-1)
                found[*product.head, "bias"] = bias if order is None else bias[order]
        for head, var in self.weights.parts.items():
            found[head] = self._parted(head, known[var])
        return found

    def origins(self) -> dict[Path, tuple[Path, ...]]:
        """The real parameters that each virtual leaf is made of."""
        made, found = self.weights.made, {}
        for product in self.weights.products:
            found[*product.head, "kernel"] = made[product.source]
            if product.bias is not None:
                found[*product.head, "bias"] = made[product.bias]
        for head, var in self.weights.parts.items():
            found[head] = made[var]
        return found

    def label(self, path: Path) -> str:
        """How messages call a virtual layer or leaf: by its real name, and which use it is."""
        return "/".join([self.weights.labels[path[:1]], *path[1:]])

    def weighs(self, paths: Iterable[Path]) -> bool:
        """Whether any of these parameters is a weight, or makes one."""
        made = [self.weights.made[product.source] for product in self.weights.products]
        return bool(set().union(*made).intersection(paths))

    def _parted(self, head: Path, value: jax.Array) -> jax.Array:
        """A part as a leaf (G N,), G numbers for each unit as in a layer's columns; or as it is."""
        order = self.orders.get(head)
        if value.size % self.units.count or value.size == 1:
            return value
        return value.reshape(-1) if order is None else value.reshape(-1)[order]

    def _whole(self, head: Path, leaf: jax.Array) -> jax.Array:
        """The inverse of `_parted`."""
        order = self.orders.get(head)
        leaf = leaf if order is None else leaf[np.argsort(order)]
        return leaf.reshape(self.weights.parts[head].aval.shape)

    def apply(self, params: Leaves, *args: Any) -> Any:
        """Calls the cell."""

        def plain(layer: Layer, pre: Any) -> Any:
            return layer.apply(under(params, layer.path), pre)

        return self.tapped(params, plain, *args)

    def tapped(self, params: Leaves, tap: Tap, *args: Any) -> Any:
        """Calls the cell with `tap` supplying the drive of every product.

        The program is that of one example; each of its equations is mapped over the batch.
        """
        carry = self.units.join(args[0], self.program.trees[0])
        x, jaxpr = args[1], self.program.closed.jaxpr
        batch = len(jax.tree.leaves(carry)[0])
        parts = {var: self._whole(head, params[head]) for head, var in self.weights.parts.items()}
        still = dict(zip(jaxpr.constvars, self.program.closed.consts, strict=True)) | parts
        moving = [jnp.expand_dims(a, 1) for a in jax.tree.leaves((carry, x))]
        known = {var: (value, False) for var, value in still.items()}
        known |= {
            var: (value, True)
            for var, value in zip(jaxpr.invars[self.program.params :], moving, strict=True)
        }

        def of(atom: Any) -> tuple[Any, bool]:
            return (atom.val, False) if isinstance(atom, jex.Literal) else known[atom]

        products = {id(p.eqn): p for p in self.weights.products}
        for eqn in self._steps():
            product, past = products.get(id(eqn)), self.weights.skipped.get(id(eqn))
            if product is not None:
                outs = [self._driven(product, tap, known[product.pre][0])]
                moves = True
            elif past is not None:
                value, moves = of(eqn.invars[past])
                outs = [value.reshape(len(value), *eqn.outvars[0].aval.shape)]
            else:
                values, flags = zip(*map(of, eqn.invars), strict=True) if eqn.invars else ((), ())
                moves = any(flags)
                outs = _mapped(eqn, values, flags) if moves else bound(eqn, values)
            known |= {v: (value, moves) for v, value in zip(eqn.outvars, outs, strict=True)}

        def out(atom: Any) -> jax.Array:
            value, moves = of(atom)
            return (
                value.reshape(batch, *atom.aval.shape[1:])
                if moves
                else jnp.broadcast_to(value, (batch, *atom.aval.shape[1:]))
            )

        ends = {id(atom): out(atom) for atom in jaxpr.outvars}  # what is one array stays one
        flat = [ends[id(atom)] for atom in jaxpr.outvars]
        new, y = self.program.trees
        return (
            self.units.split(jax.tree.unflatten(new, flat[: new.num_leaves])),
            jax.tree.unflatten(y, flat[new.num_leaves :]),
        )

    def _steps(self) -> list[Any]:
        """The equations behind the prelude."""
        jaxpr, skipped = self.program.closed.jaxpr, self.weights.skipped
        pres = {id(p.eqn): [p.pre] for p in self.weights.products}

        def reads(eqn: Any) -> Any:
            if id(eqn) in skipped:
                return [eqn.invars[skipped[id(eqn)]]]
            return pres.get(id(eqn), eqn.invars)

        given = [*jaxpr.invars, *self.weights.parts.values()]
        return steps_to(self.program, jaxpr.outvars, given, reads)

    def _driven(self, product: Product, tap: Tap, value: jax.Array) -> jax.Array:
        order = self.orders.get(product.head)
        drive = tap(Layer(product.head, "Dense", product.apply), product.received(value))
        return product.given(drive if order is None else drive[:, np.argsort(order)])


def _mapped(eqn: Any, values: tuple, flags: tuple) -> list:
    axes = tuple(0 if moves else None for moves in flags)
    return jax.vmap(lambda *args: bound(eqn, args), in_axes=axes)(*values)


def virtual(module: Module, params: Leaves, carry: Any, x: Any) -> VirtualModule:
    """A cell seen by its weights.

    Args:
        module: the cell.
        params: its parameters; shapes suffice.
        carry: the carry of B examples; shapes suffice.
        x: one step's input of B examples; shapes suffice.

    Returns:
        The cell as a function of virtual leaves.
    """
    program = program_of(module, params, carry, x)
    weights = weights_in(program, list(params))
    leaves = tuple((path, v.shape, jnp.dtype(v.dtype).name) for path, v in params.items())
    units = units_in(carry)
    draft = VirtualModule(module, leaves, units, program, weights, {})
    orders = memoised(_orders)(draft, outline((params, carry, x)))
    return dataclasses.replace(draft, orders=orders)


def _orders(draft: VirtualModule, given: Outline) -> dict[Path, Order]:
    """The orders of columns and entries in which a cell's units follow each other.

    Of those that people use (gate by gate, unit by unit, or so within each head) the first in which
    no unit's columns reach another unit's state, as far as the program tells.
    """
    units = draft.units.count
    params, carry, x = given.filled(jax.ShapeDtypeStruct)
    one = lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype)  # noqa: E731
    carry, x = jax.tree.map(one, (jax.eval_shape(draft.units.split, carry), x))
    seen = jax.eval_shape(draft.see, params)
    heads = [product.head for product in draft.weights.products]
    drives = [jnp.zeros((1, p.width), p.eqn.outvars[0].aval.dtype) for p in draft.weights.products]
    inputs = (drives, seen)

    def step(inputs: tuple, carry: Any, x: Any) -> list:
        drives, seen = inputs
        asked = dict(zip(heads, drives, strict=True))
        new, _ = draft.tapped(seen, lambda layer, pre: asked[layer.path], carry, x)
        return jax.tree.leaves(new)

    program = jax.make_jaxpr(step)(inputs, carry, x)
    flat, treedef = jax.tree.flatten(inputs)
    rest = [None] * (len(program.in_avals) - len(flat))

    def meet(labels: np.ndarray, head: Path) -> bool:
        here: Any = ([None] * len(drives), dict.fromkeys(seen))
        if head in heads:
            here[0][heads.index(head)] = labels[None]
        else:
            here[1][head] = labels.reshape(seen[head].shape)
        seeds = jax.tree.leaves(here, is_leaf=lambda a: a is None)
        found = owners_of(program, [*seeds, *rest], credit=True)
        return any(strays(owners, np.arange(units)) for owners in found)

    orders: dict[Path, Order] = {}
    sizes = {p.head: p.width for p in draft.weights.products}
    sizes |= {head: var.aval.size for head, var in draft.weights.parts.items()}
    for head, size in sizes.items():
        if size % units or size == 0 or units < 2:
            continue
        for k, owner in enumerate(layouts(size, units)):
            if not meet(owner, head):
                if k:
                    orders[head] = np.argsort(owner, kind="stable").reshape(units, -1).T.ravel()
                break
    return orders
