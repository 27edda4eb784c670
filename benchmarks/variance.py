"""Variance of the rules with a drawn influence: over ranks, windows and copies.

Letters: T steps, N units, K copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import localgrad
from benchmarks.harness import Plan, Problem, problem
from benchmarks.report import Bar, Table


class Share(float):
    """A variance over the squared length of what is estimated."""

    def __str__(self) -> str:
        return f"{float(self):.2g}"


def makes(plan: Plan) -> dict[str, Callable[..., Any]]:
    """The rules, in the order in which their variance is to fall."""
    ranks = {f"OK({r})": functools.partial(localgrad.ok, rank=r) for r in plan.varied_ranks}
    return {"UORO": localgrad.uoro, "KF-RTRL": localgrad.kf_rtrl, **ranks}


def variance(plan: Plan) -> Iterator[Table | Bar]:
    """Total variance of the cells' gradient of one sequence."""
    for cell in plan.cells:
        yield from _of_cell(plan, cell)


def _of_cell(plan: Plan, cell: str) -> Iterator[Table | Bar]:
    task = problem(cell, plan.varied_units, plan.varied_steps, 1)
    columns = [(w, k) for k in plan.varied_copies for w in plan.varied_windows]
    found = {
        name: {(w, k): _share(plan, task, make, w, k) for w, k in columns}
        for name, make in makes(plan).items()
    }
    yield Table(
        f"Variance: {cell} cell, N={plan.varied_units}, T={plan.varied_steps}, one sequence",
        f"Of the cell's gradient, over its squared length; {plan.varied_draws} draws. W=1: as "
        "published; else credit is exact within windows.",
        ["", *(f"W={w}, K={k}" for w, k in columns)],
        [[name, *row.values()] for name, row in found.items()],
    )
    first, last = min(plan.varied_windows), max(plan.varied_windows)
    one, most = min(plan.varied_copies), max(plan.varied_copies)
    alone = [row[first, one] for row in found.values()]
    worst = max(b / a for a, b in zip(alone, alone[1:], strict=False))
    order = " > ".join(found)
    yield Bar(f"variance, {cell}: {order} (worst ratio of neighbours)", worst, 1.0)
    falls = {
        name: row[last, one] / row[first, one] for name, row in found.items() if row[first, one]
    }
    name = max(falls, key=lambda name: falls[name])
    yield Bar(f"variance, {cell}: W={last} / W={first} (worst: {name})", falls[name], 0.5)
    copies = max(row[first, most] * most / (row[first, one] * one) for row in found.values())
    yield Bar(f"variance, {cell}: {most} copies / one, times {most} (worst)", copies, 1.3)


def _share(plan: Plan, task: Problem, make: Callable[..., Any], window: int, copies: int) -> Share:
    """Of one rule."""

    def draw(key: jax.Array) -> Any:
        rule = make(task.model, optax.l2_loss, key=key, window=window)
        if copies > 1:
            rule = localgrad.average(rule, samples=copies)
        updates, _ = rule(task.params, rule.init(task.params), task.batch)
        return updates["cells_0"]

    keys = jax.random.split(jax.random.key(2), plan.varied_draws)
    many = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=min(50, len(keys))))(keys)
    exact = localgrad.bptt(task.model, optax.l2_loss)
    wanted = exact(task.params, exact.init(task.params), task.batch)[0]["cells_0"]
    gaps = jax.tree.map(lambda a, b: jnp.sum((a - b[None]) ** 2) / len(keys), many, wanted)
    return Share(sum(jax.tree.leaves(gaps)) / optax.tree.norm(wanted, squared=True))
