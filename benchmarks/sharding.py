"""Every rule's update over 1 to 8 devices: what each does, keeps and tells the others.

Counted in compiled programs, nothing is run: virtual devices share their cores, so times would say
little. `python -m benchmarks.sharding SIZES` counts in a process that has the devices.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import catalogue
from benchmarks.harness import TRAITS, Plan, problem, state_bytes, unlimited
from benchmarks.report import Bar, Bytes, Ratio, Table
from benchmarks.virtual import on_virtual_devices
from experiments.devices import axis_of, collectives, make_mesh, spread


class Portion(NamedTuple):
    """What one of several devices does in an update.

    Attributes:
        rule: its name in the catalogue.
        devices: how many there are.
        flops: operations, a loop's body counted once.
        kept: bytes of the state that lie on it.
        reductions: how many all-reduces there are.
        others: how many other collectives.
        told: bytes that all of them give.
    """

    rule: str
    devices: int
    flops: float
    kept: int
    reductions: int
    others: int
    told: int


def sharding(plan: Plan) -> Iterator[Table | Bar]:
    """A streaming update of every rule, its batch and state spread over devices."""
    told = {
        "cell": plan.cells[0],
        "units": plan.spread_units,
        "steps": plan.spread_steps,
        "batch": plan.batch,
        "devices": plan.spread_devices,
        "rules": plan.spread_rules,
        "room": plan.room,
    }
    most = max(plan.spread_devices)
    found = [Portion(*each) for each in on_virtual_devices("benchmarks.sharding", told, most)]
    yield table_of(plan, found)
    alone = {portion.rule: portion.flops for portion in found if portion.devices == 1}
    divided = {p.rule: alone[p.rule] / p.flops for p in found if p.devices == most}
    worst = min(divided, key=lambda rule: divided[rule])
    claim = f"{most} devices: work divided by (worst: {worst})"
    yield Bar(claim, divided[worst], 0.75 * most, True)
    if plan.figures is not None:
        figure(plan.figures / "devices.png", found)


def table_of(plan: Plan, found: list[Portion]) -> Table:
    """A row for each rule."""
    most = max(portion.devices for portion in found)
    rows = []
    for rule in dict.fromkeys(portion.rule for portion in found):
        own = [portion for portion in found if portion.rule == rule]
        last = own[-1]
        rows.append(
            [
                rule,
                *(Ratio(own[0].flops / portion.flops) for portion in own),
                Bytes(own[0].kept),
                Bytes(last.kept),
                f"{last.reductions} + {last.others}",
                f"{last.told / 2**10:.1f}",
            ]
        )
    cell, units = plan.cells[0], plan.spread_units
    counts = sorted({portion.devices for portion in found})
    header = [
        "",
        *(f"work / {n}" for n in counts),
        "MiB kept, 1",
        f"MiB kept, {most}",
        "collectives",
        "KiB told",
    ]
    return Table(
        f"Devices: {cell} cell, N={units}, B={plan.batch}, T={plan.spread_steps}, one window",
        "Into how many parts an update's operations come apart on so many devices; MiB of the "
        f"state on one of 1 and of {most}; of {most}, all-reduces + other collectives and what "
        "they give.",
        header,
        rows,
    )


def figure(path: Path, found: list[Portion]) -> None:
    """Work and memory of one device over their number, a line a rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted({portion.devices for portion in found})
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    shown = {"flops": "operations", "kept": "bytes kept"}
    for axis, (field, title) in zip(axes, shown.items(), strict=True):
        axis.plot(counts, [1 / n for n in counts], "k:", label="ideal")
        for rule in dict.fromkeys(portion.rule for portion in found):
            own = [portion for portion in found if portion.rule == rule]
            share = [getattr(p, field) / getattr(own[0], field) for p in own]
            axis.plot(counts, share, "o-", alpha=0.5, linewidth=1, markersize=3, label=rule)
        axis.set(xscale="log", yscale="log", xlabel="devices", title=f"{title}, of one device")
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.set_yticks([1 / n for n in counts], [f"1/{n}" if n > 1 else "1" for n in counts])
        axis.minorticks_off()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=6)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def measured(told: dict[str, Any]) -> Iterator[Portion]:
    """Every rule on every number of devices."""
    task = problem(told["cell"], told["units"], told["steps"], told["batch"], abstract=True)
    example = jax.ShapeDtypeStruct(task.batch.inputs.shape[2:], task.batch.inputs.dtype)
    for name in told["rules"]:
        row = catalogue.RULES[name]
        make = functools.partial(
            row.make, task.model, optax.l2_loss, example=example, **unlimited(row.factory)
        )
        refused = row.refusal(TRAITS[told["cell"]]) is not None
        if refused or state_bytes(row.make, task, **unlimited(row.factory)) > told["room"]:
            continue
        rule, size = make(batch_size=told["batch"]), told["batch"]
        state = jax.eval_shape(rule.init, task.params)
        streams = axis_of(lambda n, make=make: make(batch_size=n).init(task.params), size, 2 * size)
        for devices in told["devices"]:
            mesh = make_mesh(data=devices)
            placed = (
                spread(mesh, task.params),
                spread(mesh, state, data=streams),
                spread(mesh, task.batch, data=0),
            )
            program = jax.jit(lambda p, s, b, rule=rule: rule(p, s, b)).lower(*placed).compile()
            costs: Any = program.cost_analysis()
            each = collectives(program)
            count = sum(one.operation == "all-reduce" for one in each)
            yield Portion(
                name,
                devices,
                costs["flops"],
                sum(_bytes_here(leaf) for leaf in jax.tree.leaves(placed[1])),
                count,
                len(each) - count,
                sum(one.bytes for one in each),
            )


def _bytes_here(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def main() -> None:
    """Prints what was counted, as one line of JSON."""
    print(json.dumps(list(measured(json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
