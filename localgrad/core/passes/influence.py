"""Influences: how every number of the carries responds to every parameter, carried over windows.

Within a window credit runs backward; the rows behind the loss's are one for every number of every
cell's carry, so that they become the window's Jacobian and its own part of the influence.
Letters: B batch, W steps of the window, K credit rows, n numbers of a cell's carry, D drive width.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.examples import over_examples
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, accumulator, placed, under
from localgrad.core.passes.backward import assign, input_credit, sweep, unowned_by_example
from localgrad.core.passes.contraction import contract, outer, pres
from localgrad.core.passes.forward import Method
from localgrad.core.passes.run import Level, Pass, descend, encoded_each
from localgrad.core.steps import (
    even_window,
    example_row_step,
    examples_first,
    length,
    one_row,
    row,
)


def _size(carry: Any) -> int:
    """How many numbers one example's carry holds."""
    return sum(int(np.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(carry))


def carry_size(stack: Stack, level: int) -> int:
    """How many numbers of an example a cell's carry holds."""
    return _size(stack.initial[level])


def reaching(stack: Stack, params: Leaves, level: int) -> list[Path]:
    """Paths of the parameters that reach a cell's carry: its own, and all below."""
    paths = stack.below(params, level)
    cell, prefix = stack.cells[level], stack.prefixes[level]
    own = under(params, prefix)
    for site, reach in zip(cell.sites, cell.drives_reach, strict=True):
        if reach:
            paths += [prefix + site.layer.path + path for path in under(own, site.layer.path)]
    return list(dict.fromkeys([*paths, *(prefix + path for path in sorted(cell.unowned_reach))]))


def _blocks(
    stack: Stack, params: Leaves, level: int, batch: int, but: Collection[Path] = ()
) -> dict[Path, tuple[int, ...]]:
    """Shapes of a cell's influence, by parameter path."""
    size = carry_size(stack, level)
    paths = [path for path in reaching(stack, params, level) if path not in but]
    return {path: (batch, size, *params[path].shape) for path in paths}


def no_influence(
    stack: Stack, params: Leaves, batch: int, but: Collection[Path] = ()
) -> dict[str, Leaves]:
    """The influence at the start of B sequences, by cell and parameter path, but of some."""
    return {
        stack.name(level): {
            path: jnp.zeros(shape, accumulator(params[path]))
            for path, shape in _blocks(stack, params, level, batch, but).items()
        }
        for level in stack.levels
    }


def longest_window(stack: Stack, params: Leaves, steps: int) -> int:
    """As long as the window's posts take no more memory than twice the influence."""
    rows = 1 + sum(_size(carry) for carry in stack.initial)
    width = sum(int(np.prod(site.drive.shape[1:])) for cell in stack.cells for site in cell.sites)
    held = sum(
        int(np.prod(shape))
        for level in stack.levels
        for shape in _blocks(stack, params, level, 1).values()
    )
    return even_window(steps, int(np.clip(2 * held // (rows * max(1, width)), 1, 128)))


class Rows(NamedTuple):
    """Row 0 is the loss; those after it are one for every number of every carry, or as given.

    Attributes:
        spans: for each cell, which rows start as its carry at the window's end.
        entering: for each cell, credit of the carry that entered the window, [B, K, n].
        received: for each cell, pre of each synapse, [B, W, ...].
        posts: for each cell, credit of each drive, [B, K, W, D].
        unowned: for each cell, credit of the parameters no synapse owns, [B, K, ...].
        encoded: credit of the first cell's input, leaves [B, K, W, ...], or None.
    """

    spans: list[slice]
    entering: list[jax.Array]
    received: list[list]
    posts: list[list]
    unowned: list[Leaves]
    encoded: Any

    def loss_credit(self) -> list[jax.Array]:
        """For each cell, the loss's credit of the carry that entered the window, [B, n]."""
        return [entering[:, 0] for entering in self.entering]


def credit_rows(
    stack: Stack,
    params: Leaves,
    ran: Pass,
    q_y: Any,
    methods: list[Method],
    closing: bool,
    probes: Sequence[Any] | None = None,
) -> tuple[Leaves, Rows]:
    """Sends the loss, and a row for every number of every carry, back through a window.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        ran: the forward pass.
        q_y: credit of the highest cell's outputs, leaves [W, B, ...].
        methods: for each cell, how credit passes its recurrent synapses.
        closing: no rows but the loss are needed.
        probes: for each cell, credit of the carry that leaves the window, leaves [K, B, ...]: K
            rows in place of one for every number; or None.

    Returns:
        The gradients that the window itself gives, and the rows.
    """
    visit = functools.partial(_visit, methods, closing, probes)
    grads, parts, q_x = descend(stack, params, ran.tapes, one_row(q_y), visit)
    encoded = None
    if stack.encoder is not None:
        grads |= ran.encode(row(q_x, 0))
        encoded = jax.tree.map(example_row_step, q_x)
    return grads, Rows(*map(list, zip(*parts, strict=True)), encoded=encoded)


def _visit(
    methods: list[Method], closing: bool, probes: Any, at: Level, q_y: Any
) -> tuple[Leaves, tuple, Any]:
    """One cell: its gradients, its part of the rows, and the credit of its input."""
    cell, own, tape, method = at.cell, at.params, at.tape, methods[at.number]
    count = jax.tree.leaves(q_y)[0].shape[1]  # rows so far: the loss and the cells above
    size = 0 if closing else _size(jax.tree.map(lambda a: a[0], tape.carries))
    if probes is not None and not closing:
        count, size = 1, length(probes[at.number])  # the same rows at every cell
        ends = jax.tree.map(
            lambda a: jnp.pad(a, [(1, 0), *[(0, 0)] * (a.ndim - 1)]), probes[at.number]
        )
    else:
        ends = _identity(tape.carries, count, size)
    left, q_start = sweep(cell, own, tape, q_y, ends, method=method)
    credit = assign(cell, own, tape, q_y, left)
    received = pres(cell, own, tape)
    unowned = unowned_by_example(cell, own, tape, q_y, left)
    learned = contract(cell.sites, own, received, row(credit.posts, 0))
    learned |= {path: q[0].sum(0) for path, q in unowned.items()}
    part = (
        slice(count, count + size),
        jnp.moveaxis(side_by_side(q_start), 1, 0),
        examples_first(received, 1),
        jax.tree.map(example_row_step, credit.posts),
        examples_first(unowned, 1),
    )
    return learned, part, input_credit(cell, own, tape, credit) if at.below else q_y


def _identity(carries: Any, rows: int, size: int) -> Any:
    """`rows` rows of zeros, then one row for each number of the carry: leaves [K, B, ...]."""
    leaves, treedef = jax.tree.flatten(carries)
    found, at = [], rows
    for leaf in leaves:
        count = int(np.prod(leaf.shape[2:]))
        eye = np.eye(rows + size, count, -at) if size else np.zeros((rows, count))
        eye = jnp.asarray(eye, leaf.dtype).reshape(-1, 1, *leaf.shape[2:])
        found.append(jnp.broadcast_to(eye, (rows + size, *leaf.shape[1:])))
        at += count
    return jax.tree.unflatten(treedef, found)


def side_by_side(carry: Any) -> jax.Array:
    """Leaves [K, B, ...] side by side: [K, B, n]."""
    return jnp.concatenate([a.reshape(*a.shape[:2], -1) for a in jax.tree.leaves(carry)], axis=-1)


def recalled(stack: Stack, influence: Any, credits: list[jax.Array]) -> Leaves:
    """What credit of each cell's carry, [B, n], adds by way of the influence."""
    grads: Leaves = {}
    for level in stack.levels:
        credit = credits[level].reshape(-1)
        for path, held in influence[stack.name(level)].items():
            flat = held.reshape(held.shape[0] * held.shape[1], -1)
            found = (credit.astype(flat.dtype) @ flat).reshape(held.shape[2:])
            grads[path] = grads[path] + found if path in grads else found
    return grads


def written(stack: Stack, params: Leaves, rows: Rows, x: Any) -> Leaves:
    """What each row says of each parameter, for one example: by whole path, [K, ...]."""
    found: Leaves = {}
    for level, prefix in enumerate(stack.prefixes):
        each = dict(rows.unowned[level])
        if stack.cells[level].sites:
            learn = functools.partial(
                outer, stack.cells[level].sites, under(params, prefix), rows.received[level]
            )
            each |= jax.vmap(learn)(rows.posts[level])
        found |= placed(each, prefix)
    if stack.encoder is not None:
        found |= encoded_each(stack.encoder, params, x, rows.encoded)
    return found


def carried(
    stack: Stack, params: Leaves, influence: Any, rows: Rows, xs: Any, read: Any = ()
) -> Any:
    """M_T = A M_0 + M_window, block by block and example by example.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        influence: M_0, by cell and path, leaves [B, n, ...].
        rows: one for each number of each carry at the window's end.
        xs: inputs of the window, leaves [W, B, ...].
        read: what was computed from the influence.

    Returns:
        M_T.
    """

    def renew(held: Any, at: tuple[Rows, Any]) -> Any:
        rows_b, x = at
        found = written(stack, params, rows_b, x)
        new: dict[str, Leaves] = {}
        for level in stack.levels:
            name, span = stack.name(level), rows.spans[level]
            new[name] = {}
            for path, block in held[name].items():
                total = found[path][span].astype(block.dtype)
                for below in range(level + 1):
                    source = held[stack.name(below)].get(path)
                    if source is not None:
                        passed = rows_b.entering[below][span].astype(block.dtype)
                        total += jnp.tensordot(passed, source, 1)
                new[name][path] = total
        return new

    each = rows._replace(spans=[]), examples_first(xs, 1)
    return over_examples(influence, each, None, renew, read)[1]
