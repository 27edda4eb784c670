"""A rank-one influence, A (x) B: one number for each of the carries' and one for each parameter.

Letters: B batch, W steps of the window, n numbers of a cell's carry.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from localgrad.core.contract.noise import drawn
from localgrad.core.examples import over_examples
from localgrad.core.model.stack import Stack
from localgrad.core.model.wiring import output_leaf
from localgrad.core.params import Leaves, accumulator, under
from localgrad.core.passes.influence import Rows, carry_size, reaching, side_by_side, written
from localgrad.core.passes.run import Pass
from localgrad.core.passes.tangents import push_carries
from localgrad.core.steps import examples_first, length

Sides = tuple[dict[str, jax.Array], Leaves]
"""A by cell, [B, n], and B by parameter path, [B, ...]."""


def no_sides(stack: Stack, params: Leaves, x: Any) -> Sides:
    """Those of B sequences that begin."""
    batch, dtype = length(x), _dtype(stack)
    paths = [path for level in stack.levels for path in reaching(stack, params, level)]
    return (
        {stack.name(k): jnp.zeros((batch, carry_size(stack, k)), dtype) for k in stack.levels},
        {p: jnp.zeros((batch, *params[p].shape), accumulator(params[p])) for p in paths},
    )


def _dtype(stack: Stack) -> Any:
    return jnp.result_type(jnp.float32, *jax.tree.leaves(stack.initial))


def noise_for(stack: Stack, key: jax.Array, kind: str) -> list[jax.Array]:
    """For each cell, independent noise on the carry of each example, [B, n]."""
    sizes = [carry_size(stack, level) for level in stack.levels]
    batch = length(stack.initial)
    every = drawn(key, (batch, sum(sizes)), kind, _dtype(stack))
    return [every[:, sum(sizes[:k]) : sum(sizes[: k + 1])] for k in stack.levels]


def as_carry(stack: Stack, level: int, numbers: jax.Array) -> Any:
    """Numbers [B, n] as a row of credit, or a tangent, of a cell's carry: leaves [1, B, ...]."""
    leaves, treedef = jax.tree.flatten(stack.initial[level])
    found, at = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape[1:])
        piece = numbers[:, at : at + size].reshape(leaf.shape)
        found.append(piece.astype(leaf.dtype)[None])
        at += size
    return jax.tree.unflatten(treedef, found)


def own_credit(stack: Stack, params: Leaves, q_y: Any) -> list[jax.Array] | None:
    """The credit of a single step's outputs as that of the carries it leaves, [B, n] for each cell.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        q_y: credit of the highest cell's outputs, leaves [1, B, ...].

    Returns:
        The credit, or None where the outputs are no part of the highest cell's carry.
    """
    top = stack.levels[-1]
    own = under(params, stack.prefixes[top])
    place = output_leaf(stack.cells[top], own, stack.initial[top], stack.fed[top])
    if place is None:
        return None
    leaves, treedef = jax.tree.flatten(
        jax.tree.map(lambda a: jnp.zeros_like(a)[None], stack.initial)
    )
    first = len(leaves) - len(jax.tree.leaves(stack.initial[top]))
    (leaves[first + place],) = jax.tree.leaves(q_y)
    carries = jax.tree.unflatten(treedef, leaves)
    return [side_by_side(carry)[0] for carry in carries]


def recalled(stack: Stack, sides: Sides, credits: list[jax.Array]) -> Leaves:
    """What credit of each cell's carry, [B, n], adds by way of the influence."""
    left, right = sides
    each = [(left[stack.name(k)] * credits[k]).sum(-1) for k in stack.levels]
    felt = functools.reduce(jnp.add, each)
    return {p: jnp.einsum("b,b...->...", felt.astype(b.dtype), b) for p, b in right.items()}


def reduced(
    stack: Stack,
    params: Leaves,
    sides: Sides,
    ran: Pass,
    rows: Rows,
    noise: list,
    xs: Any,
    read: Any = (),
) -> Sides:
    """The influence after a window as rank one again: `(p0 A' + p1 nu) (x) (B / p0 + B' / p1)`.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        sides: before the window.
        ran: the forward pass.
        rows: of the backward pass; row 1 was the noise at the window's end, and so holds B'.
        noise: nu for each cell, [B, n].
        xs: inputs of the window, leaves [W, B, ...].
        read: what was computed from A and B.

    Returns:
        A and B after it.
    """
    left, right = sides
    starts = [as_carry(stack, k, left[stack.name(k)]) for k in stack.levels]
    moved = [side_by_side(d)[0] for d in push_carries(stack, params, ran.tapes, starts)]
    size = math.sqrt(sum(nu.shape[-1] for nu in noise))

    def renew(sides: Sides, at: tuple) -> Sides:
        (_, right), (rows_b, x, moved, nu) = sides, at
        found = written(stack, params, rows_b, x)
        fresh = {path: found[path][1].astype(old.dtype) for path, old in right.items()}
        old, old_over = balanced(_norm(right), _norm(moved))
        new, new_over = balanced(_norm(fresh), size)
        left = {stack.name(k): _sum(old, moved[k], new, nu[k]) for k in stack.levels}
        return left, {p: _sum(old_over, b, new_over, fresh[p]) for p, b in right.items()}

    moved = [a.astype(nu.dtype) for a, nu in zip(moved, noise, strict=True)]
    at = (rows._replace(spans=[]), examples_first(xs, 1), moved, noise)
    return over_examples((left, right), at, None, renew, read)[1]


def _sum(a: jax.Array, old: jax.Array, b: jax.Array, new: jax.Array) -> jax.Array:
    return a.astype(old.dtype) * old + b.astype(old.dtype) * new


def balanced(over: Any, under: Any) -> tuple[jax.Array, jax.Array]:
    """`sqrt(over / under)` and its inverse; both 0 where either is 0, since there is no product."""
    ratio = jnp.sqrt(over / jnp.where(under > 0, under, 1))
    there = (over > 0) & (under > 0)
    return jnp.where(there, ratio, 0), jnp.where(there, 1 / jnp.where(there, ratio, 1), 0)


def _norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.vdot(a, a) for a in jax.tree.leaves(tree)))
