"""An influence as few Kronecker products: for each cell, sum_i A_i (x) u_i.

The rows of A_i are the numbers of the carries of a cell and of those above, its columns what the
cell's layers drive; u_i is like what they receive. Parameters that lie in no such layer keep their
exact influence.
Letters: B batch, W steps of the window, R rank, N numbers of the carries, D columns, U length of u,
T terms, n numbers of one cell's carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.examples import over_examples
from localgrad.core.model.stack import Stack
from localgrad.core.model.wiring import Wiring, wiring_of
from localgrad.core.params import Leaves, Path, accumulator, placed, under
from localgrad.core.passes.contraction import outer
from localgrad.core.passes.influence import Rows, carry_size

Reduce = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""`(draw, A [T, N, D], u [T, U]) -> (A [R, N, D], u [R, U])`, without a bias."""


class Factors(NamedTuple):
    """The Kronecker products of B streams, by cell.

    Attributes:
        left: A, [B, R, N, D].
        right: u, [B, R, U].
    """

    left: dict[str, jax.Array]
    right: dict[str, jax.Array]


def wirings(stack: Stack, params: Leaves) -> list[Wiring]:
    """How the layers of each cell are wired."""
    return [
        wiring_of(cell, under(params, prefix), carry, x)
        for cell, prefix, carry, x in zip(
            stack.cells, stack.prefixes, stack.initial, stack.fed, strict=True
        )
    ]


def factored(stack: Stack, params: Leaves) -> set[Path]:
    """The parameters whose influence is a sum of Kronecker products."""
    return {
        prefix + path
        for cell, prefix, wiring in zip(
            stack.cells, stack.prefixes, wirings(stack, params), strict=True
        )
        for path in wiring.paths(cell, under(params, prefix))
    }


def _shapes(stack: Stack, params: Leaves, rank: int) -> dict[str, tuple]:
    """For each cell with such layers: shapes of A and u of an example, and their dtype."""
    found = {}
    for level, wiring in enumerate(wirings(stack, params)):
        if wiring.ports:
            above = sum(carry_size(stack, k) for k in stack.levels[level:])
            sites = [stack.cells[level].sites[port.site] for port in wiring.ports]
            own = under(params, stack.prefixes[level])
            kernels = [own[(*site.layer.path, "kernel")] for site in sites]
            dtype = jnp.result_type(*map(accumulator, kernels))
            found[stack.name(level)] = (
                (rank, above, wiring.width),
                (rank, wiring.height),
                dtype,
            )
    return found


def no_factors(stack: Stack, params: Leaves, rank: int, batch: int) -> Factors:
    """Those of B sequences that begin."""
    shapes = _shapes(stack, params, rank)
    return Factors(
        {name: jnp.zeros((batch, *a), dtype) for name, (a, _, dtype) in shapes.items()},
        {name: jnp.zeros((batch, *u), dtype) for name, (_, u, dtype) in shapes.items()},
    )


def recalled(stack: Stack, params: Leaves, factors: Factors, credits: list[jax.Array]) -> Leaves:
    """What credit of each cell's carry, [B, n], adds by way of the products."""
    grads: Leaves = {}
    for level, wiring in enumerate(wirings(stack, params)):
        name = stack.name(level)
        if name not in factors.left:
            continue
        left, right = factors.left[name], factors.right[name]
        credit = jnp.concatenate(credits[level:], axis=-1).astype(left.dtype)
        posts = jnp.einsum("bn,brnd->brd", credit, left).reshape(-1, wiring.width)
        learned = _learned(stack, params, level, wiring, right.reshape(-1, wiring.height), posts)
        grads |= placed(learned, stack.prefixes[level])
    return grads


def _learned(
    stack: Stack, params: Leaves, level: int, wiring: Wiring, us: jax.Array, posts: jax.Array
) -> Leaves:
    """What the layers of a cell make of pairs of u [M, U] and credit of what they drive [M, D]."""
    cell, own = stack.cells[level], under(params, stack.prefixes[level])
    grads: Leaves = {}
    for port in wiring.ports:
        site, post = cell.sites[port.site], posts[:, port.columns]
        found = outer([site], own, [us[:, port.rows]], [post])
        if port.biased:
            found[(*site.layer.path, "bias")] = us[:, -1] @ post  # a weight on the last row
        for path, grad in found.items():
            grads[path] = grads[path] + grad if path in grads else grad
    return grads


def reduced(
    stack: Stack,
    params: Leaves,
    factors: Factors,
    rows: Rows,
    draws: dict[str, jax.Array],
    reduce: Reduce,
    read: Leaves | None = None,
) -> Factors:
    """The products after a window: those before it, moved on, and one of each step, made few again.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        factors: before the window.
        rows: of the backward pass, one for each number of each carry at the window's end.
        draws: by cell, what to reduce with, leaves [B, ...].
        reduce: how.
        read: what was computed from the products before.

    Returns:
        Those after it.
    """
    every = wirings(stack, params)

    def renew(held: Factors, at: tuple[Rows, dict]) -> Factors:
        rows_b, draws = at
        left, right = {}, {}
        for level, wiring in enumerate(every):
            name = stack.name(level)
            if name not in held.left:
                continue
            old, us = held.left[name], held.right[name]
            moved = _moved(stack, rows, rows_b, level, old)
            fresh, seen = _window(stack, rows, rows_b, level, wiring)
            terms = jnp.concatenate([moved, fresh.astype(old.dtype)])
            found = reduce(draws[name], terms, jnp.concatenate([us, seen.astype(us.dtype)]))
            left[name], right[name] = found
        return Factors(left, right)

    return over_examples(factors, (rows._replace(spans=[]), draws), None, renew, read)[1]


def _moved(stack: Stack, rows: Rows, rows_b: Rows, level: int, old: jax.Array) -> jax.Array:
    """`J A_i` of one example, [R, N, D]: J is lower triangular in the cells."""
    sizes = [carry_size(stack, k) for k in stack.levels[level:]]
    starts = np.cumsum([0, *sizes])
    parts = []
    for k in range(len(sizes)):
        span = rows.spans[level + k]
        passed = [
            jnp.einsum(
                "mn,rnd->rmd",
                rows_b.entering[level + j][span].astype(old.dtype),
                old[:, starts[j] : starts[j + 1]],
            )
            for j in range(k + 1)
        ]
        parts.append(sum(passed))
    return jnp.concatenate(parts, axis=1)


def _window(
    stack: Stack, rows: Rows, rows_b: Rows, level: int, wiring: Wiring
) -> tuple[jax.Array, jax.Array]:
    """What each step of the window adds, for one example: A [W, N, D] and u [W, U]."""
    received = [rows_b.received[level][i] for i in wiring.received]
    ones = [jnp.ones((len(received[0]), 1), received[0].dtype)] if wiring.ones else []
    posts = jnp.concatenate([rows_b.posts[level][i] for i in wiring.driven], axis=-1)
    spans = [rows.spans[k] for k in stack.levels[level:]]
    left = jnp.concatenate([posts[span] for span in spans])  # [N, W, D]
    return jnp.moveaxis(left, 1, 0), jnp.concatenate([*received, *ones], axis=-1)


def by_signs(signs: jax.Array, left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One product of sums with the same random signs, [T], the sides of each term balanced."""
    tall = jnp.sqrt((left**2).sum((1, 2)))
    long = jnp.sqrt((right**2).sum(1))
    there = (tall > 0) & (long > 0)
    ratio = jnp.sqrt(jnp.where(there, tall, 1) / jnp.where(there, long, 1))
    signs = jnp.where(there, signs, 0)
    return (
        jnp.einsum("t,tnd->nd", signs / ratio, left)[None],
        jnp.einsum("t,tu->u", signs * ratio, right)[None],
    )


def by_sampling(
    rank: int, start: jax.Array, left: jax.Array, right: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """R products of singular directions: the largest as they are, the others by chance.

    The largest are kept while that is worth a place; the places left go to the others with chances
    in proportion to their singular values d, whose sum they share. No R products without a bias
    have a smaller variance: (sum d)^2 / places - sum d^2, over the others.

    Args:
        rank: R.
        start: a number from [0, 1).
        left: A of each term, [T, N, D].
        right: u of each term, [T, U].

    Returns:
        A [R, N, D] and u [R, U]; some are zeros where fewer are enough.
    """
    sizes, lefts, rights = _directions(left.reshape(len(left), -1), right)
    weights = _weights(rank, start, sizes)
    first = jnp.argsort(weights == 0, stable=True)[:rank]  # those that were taken
    scale, size = jnp.sqrt(weights[first]), sizes[first]
    lefts = (scale / jnp.where(size > 0, size, 1))[:, None] * lefts[first]
    rights = scale[:, None] * rights[first]
    missing = rank - len(first)
    pad = lambda a: jnp.pad(a, [(0, missing), *[(0, 0)] * (a.ndim - 1)])  # noqa: E731
    return pad(lefts.reshape(-1, *left.shape[1:])), pad(rights)


def _directions(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`sum_t left_t (x) right_t` by singular directions: d [K], falling, d l [K, ND], r [K, U].

    Of the long sides only products are taken. The directions of those d that are next to nothing
    beside the largest are then not quite the singular ones, but all add up to the sum as it is.
    """
    long, lower = jnp.linalg.qr(right.T)
    backs = jnp.linalg.eigh(lower @ (left @ left.T) @ lower.T)[1].T
    lefts = (backs @ lower) @ left
    sizes = jnp.linalg.norm(lefts, axis=1)
    order = jnp.argsort(sizes, descending=True)
    return sizes[order], lefts[order], (backs @ long.T)[order]


def _weights(rank: int, start: jax.Array, sizes: jax.Array) -> jax.Array:
    """By how much each singular direction is taken, if at all: on average its singular value."""
    if len(sizes) <= rank:
        return sizes
    rest = jnp.cumsum(sizes[::-1])[::-1]  # the sum of this and all smaller ones
    places = jnp.maximum(rank - jnp.arange(len(sizes)), 1)
    kept = jnp.cumprod((places * sizes > rest) & (jnp.arange(len(sizes)) < rank - 1)) > 0
    count = kept.sum()
    shared, places = rest[count], rank - count
    chances = jnp.where(kept | (shared <= 0), 0, places * sizes / jnp.where(shared > 0, shared, 1))
    # Each has its stretch of a line; the marks start, start + 1, ... fall into as many as places.
    ends = jnp.floor(jnp.cumsum(chances) + start)
    taken = jnp.diff(ends, prepend=jnp.zeros_like(ends, shape=1)) > 0
    return jnp.where(kept, sizes, jnp.where(taken & ~kept, shared / places, 0))
