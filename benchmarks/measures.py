"""The rules beside Flax: time, windows, memory and the latency of one step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import localgrad
from benchmarks.harness import (
    APART,
    FLAX,
    RULES,
    Plan,
    Problem,
    check_close,
    compiled,
    flax_bptt,
    flax_recomputed,
    interleave,
    problem,
    root,
    state_bytes,
    streaming,
    temporary_bytes,
    unlimited,
    update_of,
)
from benchmarks.report import Bar, Bytes, Ratio, Table

RECOMPUTED = "flax BPTT, recomputed"
ONE_STEP = "flax one-step BPTT"
SGD = optax.sgd(1e-3)
TIMING = "Milliseconds and the ratio to {}: of medians (of minima) over interleaved repeats"


def speed(plan: Plan) -> Iterator[Table | Bar]:
    """Time of one streaming call, beside `flax.linen.RNN` BPTT of the same cell."""
    for cell, steps in itertools.product(plan.cells, plan.steps):
        found = {units: _speeds(plan, cell, units, steps) for units in plan.units}
        rows = [
            [name, *(found[units][name] for units in plan.units)] for name in found[plan.units[0]]
        ]
        title = f"Time of one call: {cell} cell, T={steps}, B={plan.batch}"
        header = ["", *(f"N={units}" for units in plan.units)]
        yield Table(title, f"{TIMING.format(FLAX)}.", header, rows)
        for units, timings in found.items():
            if (units, steps) == plan.main:
                at = f"{cell}, N={units}, T={steps}"
                for rule in [rule for rule in plan.rules_for(cell) if RULES[rule].row.fast]:
                    yield Bar(f"{rule}, {at}: time / {FLAX}", timings[rule].ratio, 1.0)


def _speeds(plan: Plan, cell: str, units: int, steps: int) -> dict[str, Any]:
    task = problem(cell, units, steps, plan.batch)
    calls = {
        FLAX: compiled(*flax_bptt(task)),
        RECOMPUTED: compiled(*flax_recomputed(task, root(steps))),
    }
    for rule in plan.rules_for(cell):
        calls[rule] = compiled(*update_of(RULES[rule], task))
    if cell in APART:
        calls["rtrl"] = compiled(*update_of(localgrad.rtrl, task))
    loss, grads = calls[FLAX]()
    same = {RECOMPUTED: calls[RECOMPUTED]()[1]}
    if "bptt" in calls:
        same["bptt"] = calls["bptt"]()[0]
    for name, found in same.items():
        check_close(found, grads, f"{name} beside {FLAX}, loss {loss:.3f}")
    return interleave(plan, calls, FLAX)


def windows(plan: Plan) -> Iterator[Table | Bar]:
    """Time of e-prop over its window, the steps that it processes together."""
    units, steps = plan.main
    sizes = {"default": None} | {str(size): size for size in plan.windows}
    found = {}
    for cell in plan.cells:
        task = problem(cell, units, steps, plan.batch)
        calls = {FLAX: compiled(*flax_bptt(task))}
        for name, window in sizes.items():
            calls[name] = compiled(*update_of(localgrad.eprop, task, window=window))
        found[cell] = interleave(plan, calls, FLAX)
    rows = [[name, *(found[cell][name] for cell in plan.cells)] for name in (FLAX, *sizes)]
    title = f"Window of eprop: N={units}, T={steps}, B={plan.batch}"
    note = f"{TIMING.format(FLAX)}. The window changes time and memory, not the result."
    yield Table(title, note, ["window", *plan.cells], rows)


def memory(plan: Plan) -> Iterator[Table | Bar]:
    """Peak temporary memory of the compiled call at two lengths, without running it."""
    (units, _), (short, long) = plan.main, plan.memory
    header = ["", f"MiB, T={short}", f"of {FLAX}", f"MiB, T={long}", "growth"]
    note = "Temporary bytes of the compiled call, arguments and results excluded."
    for cell in plan.cells:
        tasks = [problem(cell, units, steps, plan.batch, abstract=True) for steps in plan.memory]
        rules = {name: RULES[name] for name in plan.rules_for(cell)} | {"rtrl": localgrad.rtrl}
        calls: dict[str, Any] = {
            FLAX: [flax_bptt(task) for task in tasks],
            f"{RECOMPUTED} step by step": [flax_recomputed(task, 1) for task in tasks],
            f"{RECOMPUTED} by sqrt(T)": [
                flax_recomputed(task, root(steps))
                for task, steps in zip(tasks, plan.memory, strict=True)
            ],
        } | {name: [update_of(make, task) for task in tasks] for name, make in rules.items()}
        peaks = {
            name: [Bytes(temporary_bytes(*call)) for call in pair] for name, pair in calls.items()
        }
        rows = [
            [name, start, Ratio(start / peaks[FLAX][0]), end, Ratio(end / start)]
            for name, (start, end) in peaks.items()
        ]
        yield Table(f"Peak memory: {cell} cell, N={units}, B={plan.batch}", note, header, rows)
        growth = {
            name: peaks[name][1] / peaks[name][0]
            for name in rules
            if name not in RULES or RULES[name].row.windowed
        }
        worst = max(growth, key=lambda name: growth[name])
        claim = f"forward rules, {cell}: peak at T={long} / T={short} (worst: {worst})"
        yield Bar(claim, growth[worst], 1.2)


def depth(plan: Plan) -> Iterator[Table | Bar]:
    """Time and memory of e-prop in depth, beside rules that keep less or more, and Flax BPTT."""
    _, steps = plan.main
    makes: dict[str, Callable[..., Any]] = {
        "deep_eprop": localgrad.deep_eprop,
        "eprop": localgrad.eprop,
        "rtrl": localgrad.rtrl,
    }
    for cell, units in itertools.product(plan.stacked, plan.widths):
        rows = {name: [name] for name in (FLAX, *makes)}
        for layers in plan.depths:
            task = problem(cell, units, steps, plan.batch, depth=layers)
            calls, states = {FLAX: compiled(*flax_bptt(task))}, {FLAX: 0}
            for name, make in makes.items():
                state = state_bytes(make, task, **unlimited(make))
                if state <= plan.room:
                    calls[name], states[name] = compiled(*update_of(make, task)), state
            found = interleave(plan, calls, FLAX)
            for name, line in rows.items():
                line += [found[name], Bytes(states[name])] if name in found else ["-", "too large"]
        header = ["", *(f"{title}" for n in plan.depths for title in (f"{n} layers", "MiB kept"))]
        title = f"Depth: {cell} cell, N={units} a layer, T={steps}, B={plan.batch}"
        note = f"{TIMING.format(FLAX)}; what a stream's state keeps between calls."
        yield Table(title, note, header, [*rows.values()])


def latency(plan: Plan) -> Iterator[Table | Bar]:
    """One streaming step of one example, beside one-step truncated BPTT in Flax."""
    units, _ = plan.main
    limits = {"rate": 1.5}
    header = ["", "one call under jit", "a step of lax.scan", "scan / jit"]
    note = (
        f"{TIMING.format('one-step BPTT')}; the {plan.streamed} scanned steps take SGD steps too."
    )
    for cell in plan.cells:
        calls, scans = _single_steps(plan, cell, problem(cell, units, plan.streamed, batch=1))
        once = interleave(plan, calls, ONE_STEP)
        scanned = interleave(plan, scans, ONE_STEP, dict.fromkeys(scans, plan.streamed))
        rows = [
            [name, timing, scanned[name], Ratio(scanned[name].median_ms / timing.median_ms)]
            for name, timing in once.items()
        ]
        yield Table(f"Latency of one step: {cell} cell, N={units}, B=1, T=1", note, header, rows)
        for rule in [
            rule for rule in plan.rules_for(cell) if rule in once and RULES[rule].row.fast
        ]:
            yield Bar(
                f"{rule}, {cell}: latency / {ONE_STEP}", once[rule].ratio, limits.get(cell, 2.0)
            )


def _single_steps(plan: Plan, cell: str, task: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """Calls of one step, and calls of a scan over all steps of the task."""
    step, arguments = _flax_step(task)
    once = {ONE_STEP: functools.partial(jax.jit(step), *arguments)}
    scans = {ONE_STEP: compiled(*flax_scan(task, SGD))}
    first = task._replace(batch=jax.tree.map(lambda a: a[:, :1], task.batch))
    for name in plan.rules_for(cell):
        row, settings = RULES[name]
        if row.windowed and settings.get("horizon", 1) == 1:  # The horizon of one step is one.
            update, arguments = update_of(RULES[name], first)
            once[name] = functools.partial(jax.jit(update), *arguments)
            tx = optax.chain(streaming(RULES[name], first), SGD)
            learn = functools.partial(localgrad.learn, tx, chunk=1)
            scans[name] = compiled(learn, (task.params, tx.init(task.params), task.batch))
    return once, scans


def _flax_step(task: Problem) -> tuple[Callable, tuple]:
    """One-step truncated BPTT: value and gradient of one step from the carried carry."""

    def outcome(params: Any, carry: Any, x: jax.Array, target: jax.Array) -> tuple[jax.Array, Any]:
        carry, y = task.model.apply({"params": params}, carry, x)
        return optax.l2_loss(y, target).mean(), carry

    inputs, targets = task.batch.inputs[:, 0], task.batch.targets[:, 0]
    carry = task.model.initialize_carry(jax.random.key(0), inputs.shape)
    step = jax.value_and_grad(outcome, has_aux=True)
    return step, (task.params, carry, inputs, targets)


def flax_scan(task: Problem, optimizer: optax.GradientTransformation) -> tuple[Callable, tuple]:
    """The same step with an optimizer, scanned over the whole batch, and its arguments."""
    step, (params, carry, *_) = _flax_step(task)

    def run(params: Any, opt_state: Any, carry: Any, batch: localgrad.Batch) -> Any:
        def body(so_far: Any, xy: Any) -> tuple[Any, jax.Array]:
            params, opt_state, carry = so_far
            (loss, carry), grads = step(params, carry, *xy)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, carry), loss

        xs = jnp.moveaxis(batch.inputs, 1, 0), jnp.moveaxis(batch.targets, 1, 0)
        return jax.lax.scan(body, (params, opt_state, carry), xs)

    return run, (params, optimizer.init(params), carry, task.batch)
