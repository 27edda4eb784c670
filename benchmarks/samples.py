"""Perturbation rules: noisy samples beside as many forward passes, and over T and devices.

Letters: B batch, T steps, N units, K samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

import localgrad
from benchmarks.harness import (
    Plan,
    Problem,
    compiled,
    flax_forward,
    interleave,
    problem,
    temporary_bytes,
    update_of,
)
from benchmarks.report import Bar, Bytes, Ratio, Table
from benchmarks.virtual import on_virtual_devices

FORWARD = "flax forward"
NODE = "node_perturbation"
MAKES: dict[str, Callable[..., Any]] = {
    NODE: localgrad.node_perturbation,
    "activity_perturbation": localgrad.activity_perturbation,
    "weight_perturbation": localgrad.weight_perturbation,
}
DEVICES = 8


def settings(samples: int, at_once: int | None = None) -> dict[str, Any]:
    """Of a rule with so many samples."""
    return {"key": jax.random.key(1), "samples": samples, "samples_at_once": at_once}


def samples(plan: Plan) -> Iterator[Table | Bar]:
    """Time over K, memory over T, and how the work divides among devices."""
    for cell in plan.cells:
        yield from _times(plan, cell)
    for cell in plan.cells:
        yield from _memory(plan, cell)
    yield from _shares(plan)


def _times(plan: Plan, cell: str) -> Iterator[Table | Bar]:
    """One episodic update, beside as many forward passes as it has samples."""
    task = problem(cell, plan.sampled_units, plan.sampled_steps, plan.batch)
    calls = {FORWARD: compiled(*flax_forward(task))}
    counts = {FORWARD: 1}
    for name, most, at_once in _settings(plan):
        title = f"{name}, K={most}, {_at_once(at_once)}"
        calls[title] = compiled(*_episodic(name, task, **settings(most, at_once)))
        counts[title] = most
    found = interleave(plan, calls, FORWARD, counts)
    title = f"Samples: {cell} cell, N={plan.sampled_units}, B={plan.batch}, T={plan.sampled_steps}"
    note = (
        "Milliseconds of one update over K, and the ratio to one forward pass with its loss: of "
        "medians (of minima) over interleaved repeats. There are K + 1 passes, 2 K + 1 of weights."
    )
    yield Table(title, note, ["", "a sample"], [[*item] for item in found.items()])
    most, at_once = max(plan.samples), plan.samples_at_once
    at = f"{NODE}, K={most}, {_at_once(at_once)}"
    yield Bar(f"{at}, {cell}: time / {most} forward passes", found[at].ratio, 1.2)


def _settings(plan: Plan) -> Iterator[tuple[str, int, int | None]]:
    """What is timed: the rule, its K, and how many at once."""
    own = itertools.product([NODE], plan.samples, (None, plan.samples_at_once))
    others = itertools.product(
        [name for name in MAKES if name != NODE],
        [plan.samples_of_others],
        (None, plan.samples_at_once),
    )
    for name, count, at_once in [*own, *others]:
        if at_once is None or (at_once < count and count % at_once == 0):
            yield name, count, at_once


def _at_once(count: int | None) -> str:
    return "all at once" if count is None else f"{count} at once"


def _episodic(name: str, task: Problem, **options: Any) -> tuple[Callable, tuple]:
    """One update of whole sequences, and its arguments."""
    rule = MAKES[name](task.model, optax.l2_loss, **options)
    return rule.__call__, (task.params, rule.init(task.params), task.batch)


def _memory(plan: Plan, cell: str) -> Iterator[Table | Bar]:
    """Temporary bytes of one streaming update over T."""
    most, window, rows, worst = plan.samples_of_others, plan.sampled_window, [], {}
    for name in MAKES:
        options, peaks = settings(most) | {"window": window}, []
        for steps in plan.sampled_lengths:
            task = problem(cell, plan.sampled_units, steps, plan.batch, abstract=True)
            peaks.append(Bytes(temporary_bytes(*update_of(MAKES[name], task, **options))))
        worst[name] = max(peaks) / peaks[0]
        rows.append([name, *peaks])
    title = f"Memory over T: {cell} cell, N={plan.sampled_units}, B={plan.batch}, K={most}, streams"
    note = (
        f"Temporary MiB of the compiled call, arguments and results excluded; windows of {window}."
    )
    yield Table(title, note, ["", *(f"T={steps}" for steps in plan.sampled_lengths)], rows)
    first, *_, last = plan.sampled_lengths
    name = max(worst, key=lambda name: worst[name])
    claim = f"samples, {cell}: most memory, T={first} to {last} / at T={first} (worst: {name})"
    yield Bar(claim, worst[name], 1.2)


class Share(NamedTuple):
    """What one of several devices does, as `benchmarks.devices` prints it.

    Attributes:
        rule: its name.
        recipe: how the work is divided.
        flops: of one device, a loop's body counted once.
        undivided: of the plain call on one device.
        collectives: what the devices tell each other, by operation.
        busy: processor time of all devices together, over that of one that does it all.
        error: largest difference to the same program on one device.
    """

    rule: str
    recipe: str
    flops: float
    undivided: float
    collectives: dict[str, int]
    busy: float
    error: float

    @property
    def divided(self) -> float:
        """Into how many parts the work came apart."""
        return self.undivided / self.flops


def _shares(plan: Plan) -> Iterator[Table | Bar]:
    """How an update's work divides among virtual devices, counted in a process that has them."""
    found = [Share(**share) for share in _on_virtual_devices(plan)]
    cell = plan.cells[0]
    for rule in dict.fromkeys(share.rule for share in found):
        rows = [
            [
                share.recipe,
                f"{share.flops / 1e6:.1f}",
                Ratio(share.divided),
                Ratio(share.busy),
                ", ".join(f"{n} {what}" for what, n in share.collectives.items()) or "none",
                f"{share.error:.0e}",
            ]
            for share in found
            if share.rule == rule
        ]
        most = _divided(plan)[rule]
        title = f"{rule} on {DEVICES} devices: {cell} cell, N={plan.sampled_units}, K={most}"
        sizes = f"B={_whole(plan.batch)}, T={plan.sampled_steps}"
        note = (
            f"Millions of operations of one device ({sizes}, a loop's body counted once), how "
            "often they go into one device's for the plain call, processor time of all "
            "devices over that of one, collectives, difference to one device."
        )
        header = ["", "a device", "divided", "busy", "collectives", "differs"]
        yield Table(title, note, header, rows)
    for share in found:
        if share.rule == NODE and "chunks" in share.recipe:
            least = 0.75 * DEVICES
            yield Bar(f"{NODE}, {share.recipe}: work divided by", share.divided, least, True)


def _whole(batch: int) -> int:
    """As many examples, or a few more, so that each device has as many."""
    return -(-batch // DEVICES) * DEVICES


def _divided(plan: Plan) -> dict[str, int]:
    """The K of each rule whose work is divided."""
    return {NODE: plan.samples_of_devices, "weight_perturbation": plan.samples_of_others}


def _on_virtual_devices(plan: Plan) -> list[dict[str, Any]]:
    """What `benchmarks.devices` finds, in a process of its own: their number is fixed at start."""
    told = {
        "cell": plan.cells[0],
        "units": plan.sampled_units,
        "steps": plan.sampled_steps,
        "batch": _whole(plan.batch),
        "samples": _divided(plan),
    }
    return on_virtual_devices("benchmarks.devices", told, DEVICES)
