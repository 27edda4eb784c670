"""Counts how an update's work divides among devices: `python -m benchmarks.devices SIZES`.

Run by `benchmarks.samples` in a process that has several. Letters: B batch, K samples, D devices.
"""

from __future__ import annotations

import collections
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.harness import Problem, check_close, problem, streaming
from benchmarks.samples import MAKES, Share

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
REPEATS = 3
PER_SAMPLE = ("deviation", "eligibility", "noise", "met", "returned")
"""The fields of a stream's state that have a leading axis of K samples."""


class Recipe(NamedTuple):
    """A way to divide an update.

    Attributes:
        name: of the way.
        call: what is compiled.
        arguments: on one device.
        places: for each argument, the mesh axes of its leading axes (or a tree of such).
        rows: of the mesh, along its axis `samples`.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple
    places: tuple
    rows: int = 1


def recipes(make: Callable[..., Any], task: Problem, most: int) -> Iterator[Recipe]:
    """The ways that plain `jit` knows, on a mesh of axes `samples` and `data`."""
    devices = jax.device_count()
    # Large noise on weights makes copies chaotic: rounding would grow as large as the update.
    options = {"key": jax.random.key(1), "scale": 0.05}
    both = ("samples", "data")

    rule = make(task.model, optax.l2_loss, samples=most, **options)
    plain = (task.params, rule.init(task.params), task.batch)
    yield Recipe("batch split", lambda p, s, b: rule(p, s, b)[0], plain, ((), (), (both,)))

    stream = streaming(make, task, samples=most, **options)
    state = stream.init(task.params)
    fields = {name for name in PER_SAMPLE if getattr(state, name, None) is not None}
    split = type(state)(*((both,) if name in fields else () for name in state._fields))
    arguments = (task.params, state, task.batch)
    call = lambda p, s, b: stream(p, s, b)[0]  # noqa: E731
    yield Recipe("a stream's samples split", call, arguments, ((), split, ()))

    for name, parts, chunks in (
        (f"{devices} keys", devices, 1),
        (f"{devices} chunks", 1, devices),
        (f"2 keys x {devices // 2} chunks", 2, devices // 2),
    ):
        rule = make(task.model, optax.l2_loss, samples=most // parts, **options)
        pieces = jax.tree.map(lambda a, n=chunks: a.reshape(n, -1, *a.shape[1:]), task.batch)
        keys = jax.random.split(jax.random.key(1), (parts, chunks))
        axes = both if 1 in (parts, chunks) else None
        if parts == 1:
            where = ((), (None, axes), (axes,))
        elif chunks == 1:
            where = ((), (axes,), ())
        else:
            where = ((), both, ("data",))
        call = _mapped(rule, rule.init(task.params))
        rows = 1 if axes else parts
        yield Recipe(f"mapped over {name}", call, (task.params, keys, pieces), where, rows)


def _mapped(rule: Any, state: Any) -> Callable[..., Any]:
    """The mean update over keys [D, C] of noise and chunks [C, B / C, ...] of the batch."""

    def call(params: Any, keys: jax.Array, chunks: Any) -> Any:
        def one(key: jax.Array, chunk: Any) -> Any:
            return rule(params, state._replace(key=key), chunk)[0]

        updates = jax.vmap(jax.vmap(one), (0, None))(keys, chunks)
        return jax.tree.map(lambda a: a.mean((0, 1)), updates)

    return call


def measured(rule: str, task: Problem, most: int) -> Iterator[Share]:
    """Every way with one rule."""
    undivided, alone = 0.0, 0.0
    for recipe in recipes(MAKES[rule], task, most):
        on_one = jax.jit(recipe.call).lower(*recipe.arguments).compile()
        if not undivided:
            undivided, alone = _operations(on_one), _busy(on_one, recipe.arguments)
        grid = np.array(jax.devices()).reshape(recipe.rows, -1)
        mesh = Mesh(grid, ("samples", "data"), axis_types=(AxisType.Auto,) * 2)
        placed = _placed(mesh, recipe)
        on_all = jax.jit(recipe.call).lower(*placed).compile()
        expected, found = jax.device_get((on_one(*recipe.arguments), on_all(*placed)))
        check_close(found, expected, f"{rule}, {recipe.name}, {jax.device_count()} devices")
        gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, expected)
        yield Share(
            rule,
            recipe.name,
            _operations(on_all),
            undivided,
            dict(collections.Counter(COLLECTIVE.findall(on_all.as_text() or ""))),
            _busy(on_all, placed) / alone,
            max(jax.tree.leaves(gaps)),
        )


def _placed(mesh: Mesh, recipe: Recipe) -> tuple:
    """The arguments, on the devices of a mesh."""

    def put(axes: tuple, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    return tuple(
        type(place)(*map(put, place, argument))
        if hasattr(place, "_fields")
        else put(place, argument)
        for place, argument in zip(recipe.places, recipe.arguments, strict=True)
    )


def _operations(call: Any) -> float:
    return call.cost_analysis()["flops"]


def _busy(call: Any, arguments: tuple) -> float:
    """Processor time of all threads for one call."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        jax.block_until_ready(call(*arguments))
        times.append(time.process_time() - begin)
    return min(times)


def main() -> None:
    """Prints what every way costs, as one line of JSON."""
    told = json.loads(sys.argv[1])
    task = problem(told["cell"], told["units"], told["steps"], told["batch"])
    shares = [s for rule, most in told["samples"].items() for s in measured(rule, task, most)]
    print(json.dumps([share._asdict() for share in shares]))


if __name__ == "__main__":
    main()
