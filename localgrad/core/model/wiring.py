"""How a cell's linear layers are wired: which share what they receive, and which are only added.

All is read off the cell's program, and what cannot be read counts as apart.
Letters: B batch, R width of a pre, D width of a drive.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from localgrad.core.model.synapses import Anatomy, record
from localgrad.core.params import Leaves, Path, under


class Port(NamedTuple):
    """Where a layer finds itself in its cell's `(drives) x (what they receive)`.

    Attributes:
        site: its number among the cell's synapse calls.
        rows: what it receives.
        columns: what it drives.
        biased: whether it has a bias, a weight on the 1 that is the last row.
    """

    site: int
    rows: slice
    columns: slice
    biased: bool


class Wiring(NamedTuple):
    """The linear layers of a cell that reach its new carry, as one matrix.

    Attributes:
        ports: of each call of such a layer.
        received: the calls whose pres, side by side, are the rows.
        driven: the calls whose drives, side by side, are the columns.
        ones: whether there is a last row of ones, for biases.
        height: how many rows there are.
        width: how many columns.
    """

    ports: tuple[Port, ...]
    received: tuple[int, ...]
    driven: tuple[int, ...]
    ones: bool
    height: int
    width: int

    def paths(self, cell: Anatomy, params: Leaves) -> set[Path]:
        """The paths, within the cell, of the parameters in the matrix."""
        heads = [cell.sites[port.site].layer.path for port in self.ports]
        return {head + path for head in heads for path in under(params, head)}


def wiring_of(cell: Anatomy, params: Leaves, carry: Any, x: Any) -> Wiring:
    """Reads how a cell's layers are wired; shapes suffice.

    Args:
        cell: its anatomy.
        params: its parameters.
        carry: the carry of B examples.
        x: one step's input of B examples.

    Returns:
        The wiring of its layers that are a matrix and, maybe, a bias.
    """
    drives = [site.drive for site in cell.sites]
    count = 0

    def step(drives: list, carry: Any, params: Leaves, x: Any) -> list:
        nonlocal count
        new, y, pres = record(cell.module, params, carry, x, drives)
        count = len(jax.tree.leaves((new, y)))
        return [*jax.tree.leaves((new, y)), *pres]

    program = jax.make_jaxpr(step)(drives, carry, params, x)
    pres = program.jaxpr.outvars[count:]
    sums = _sums(program.jaxpr, len(drives))
    taken = [i for i in range(len(drives)) if _is_matrix(cell, params, i, pres[i].aval)]
    rows, columns = {}, {}
    for i in taken:
        rows.setdefault(pres[i], (i, pres[i].aval.shape[-1]))
        columns.setdefault(sums[i], (i, drives[i].shape[-1]))
    row_of, height = _laid_out(rows)
    column_of, width = _laid_out(columns)
    biased = {i: ("bias",) in under(params, cell.sites[i].layer.path) for i in taken}
    ports = tuple(Port(i, row_of[pres[i]], column_of[sums[i]], biased[i]) for i in taken)
    ones = any(biased.values())
    received, driven = (tuple(i for i, _ in found.values()) for found in (rows, columns))
    return Wiring(ports, received, driven, ones, height + ones, width)


def _is_matrix(cell: Anatomy, params: Leaves, i: int, pre: Any) -> bool:
    """Whether a call's layer is `pre @ kernel + bias` and reaches the new carry."""
    site = cell.sites[i]
    own = under(params, site.layer.path)
    plain = site.layer.kind in ("Dense", "Linear") and own.keys() <= {("kernel",), ("bias",)}
    shapes = (pre.shape[-1:] + site.drive.shape[-1:], pre.ndim, len(site.drive.shape))
    return cell.drives_reach[i] and plain and (own[("kernel",)].shape, 2, 2) == shapes


def _laid_out(widths: dict[Any, tuple[int, int]]) -> tuple[dict[Any, slice], int]:
    """Where each of some things lies, side by side, and how wide they are together."""
    found, at = {}, 0
    for thing, (_, width) in widths.items():
        found[thing] = slice(at, at + width)
        at += width
    return found, at


def _sums(jaxpr: Any, drives: int) -> list[int]:
    """For each drive a number: the same for drives that the program uses only as a sum."""
    used = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, jex.Var))
    used.update(v for v in jaxpr.outvars if isinstance(v, jex.Var))
    number, held = list(range(drives)), {jaxpr.invars[i]: {i} for i in range(drives)}
    for eqn in jaxpr.eqns:
        terms = [v for v in eqn.invars if isinstance(v, jex.Var)]
        kinds: list[Any] = [v.aval for v in [*terms, *eqn.outvars]]
        alike = {(kind.shape, kind.dtype) for kind in kinds}
        lone = all(v in held and used[v] == 1 for v in terms)
        if eqn.primitive.name in ("reshape", "broadcast_in_dim") and len(terms) == 1 and lone:
            if kinds[0].size == kinds[1].size:
                held[eqn.outvars[0]] = held[terms[0]]
        if eqn.primitive.name not in ("add", "add_any") or len(terms) < 2 or len(alike) > 1:
            continue
        if lone:
            held[eqn.outvars[0]] = joined = held[terms[0]] | held[terms[1]]
            for i in joined:
                number[i] = min(joined)
    return number


def output_leaf(cell: Anatomy, params: Leaves, carry: Any, x: Any) -> int | None:
    """Which leaf of its new carry a cell gives as its output, or None if it gives another thing."""
    leaves = len(jax.tree.leaves(carry))
    out = jax.make_jaxpr(cell.module.apply)(params, carry, x).jaxpr.outvars
    if len(out) != leaves + 1 or out[-1] not in out[:-1]:
        return None
    return out.index(out[-1])
