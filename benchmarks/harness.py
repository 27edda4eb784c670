"""What every benchmark shares: problems, the Flax baseline, interleaved timing."""

from __future__ import annotations

import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import catalogue
import localgrad

INPUTS, OUTPUTS = 32, 10
FLAX = "flax BPTT"
CELLS: dict[str, Callable[[int], Any]] = {
    "rate": lambda units: localgrad.RateCell(units, alpha=0.2),
    "GRU": nn.GRUCell,
    "LSTM": nn.LSTMCell,
    "OptimizedLSTM": nn.OptimizedLSTMCell,
    "ALIF": localgrad.ALIFCell,
    "LRU": localgrad.LRUCell,
    "RTU": localgrad.RTUCell,
}
TRAITS = {
    "rate": (),
    "GRU": ("gated",),
    "LSTM": ("gated",),
    "OptimizedLSTM": ("gated",),
    "ALIF": ("gated",),
    "LRU": ("gated", "tuned"),
    "RTU": ("gated", "tuned", "paired"),
}
"""Of the cells, as the catalogue has them."""

APART = ("LRU", "RTU")
"""Those whose units never feel each other's past, on which exact RTRL is cheap."""

HORIZONS = (1, 10)


class Candidate(NamedTuple):
    """A rule of the catalogue with settings to measure it at."""

    row: catalogue.Rule
    settings: dict[str, Any]

    def __call__(self, model: Any, loss: Any, **options: Any) -> localgrad.LearningRule:
        return self.row.make(model, loss, **self.settings, **options)


def _candidates() -> dict[str, Candidate]:
    found = {}
    for name, row in catalogue.RULES.items():
        if "stride" in row.settings:
            longest = max(HORIZONS)
            settings = {"horizon": longest, "stride": longest}
            found[f"{name}({longest})"] = Candidate(row, settings)
        elif "horizon" in row.settings:
            found |= {f"{name}({h})": Candidate(row, {"horizon": h}) for h in HORIZONS}
        elif not (row.dense or row.random):
            found[name] = Candidate(row, {})
    return found


RULES: dict[str, Candidate] = _candidates()


class Plan(NamedTuple):
    """What to measure: N units, T steps, B examples.

    Attributes:
        cells: names of `CELLS`.
        stacked: names of `CELLS`, of which stacks are measured.
        depths: the numbers of layers of those.
        widths: the N of those.
        rules: names of `RULES`.
        units: the N to time.
        steps: the T to time.
        main: the N and T of the window sweep and of the peers.
        windows: the W of the window sweep.
        exact: T of exact RTRL; and of its stepwise form, which is slow.
        memory: the two T whose peak memory is compared.
        room: bytes of a state above which a rule is left out.
        streamed: how many single steps a scan takes.
        batch: B.
        scaled_rules: the public names of the rules that are timed over N.
        scaled_units: the N over which a power of the time is fitted.
        scaled_steps: T of that; and of rules whose documented power is above 2.
        aligned_units: the H of the P-TNCNs whose steps are timed.
        aligned_width: the H of those of many layers.
        aligned_depths: their numbers of layers.
        aligned_batch: their B.
        aligned_steps: their T.
        samples: the K of the perturbation rules that are timed.
        samples_at_once: how many of them are run side by side, beside all.
        samples_of_others: the K of rules that are timed at one, and of their memory.
        samples_of_devices: the K that is divided among devices.
        sampled_units: their N.
        sampled_steps: their T.
        sampled_lengths: the T whose temporary memory is compared.
        sampled_window: the W of that, of which each T takes several.
        spread_rules: names in the catalogue of the rules whose work is divided among devices.
        spread_devices: how many there are.
        spread_units: their N.
        spread_steps: their T, one window.
        grid_rules: names in the catalogue of the rules that are set beside Flax.
        grid_units: the N of that.
        grid_batch: its B.
        grid_steps: its T.
        grid_room: bytes of a state above which a rule is left out of it.
        sizes_divided: what N, T and B of the cases away from the usual size are divided by.
        varied_units: the N of the cell whose gradient's variance is measured.
        varied_steps: its T.
        varied_windows: the W.
        varied_copies: the K that are averaged.
        varied_ranks: the R of `ok`.
        varied_draws: how many draws the variance is of.
        figures: the folder for figures, or None for none.
        seconds: how long to repeat each comparison.
        clock: the clock to read.
    """

    cells: Sequence[str] = ("rate", "GRU")
    stacked: Sequence[str] = ("rate", "ALIF")
    depths: Sequence[int] = (1, 2, 3, 4)
    widths: Sequence[int] = (32, 64, 128)
    rules: Sequence[str] = tuple(RULES)
    units: Sequence[int] = (32, 128, 256)
    steps: Sequence[int] = (1000,)
    main: tuple[int, int] = (128, 1000)
    windows: Sequence[int] = (1, 5, 10, 25, 50, 100, 200, 500, 1000)
    exact: tuple[int, int] = (128, 16)
    memory: tuple[int, int] = (1_000, 100_000)
    room: int = 2 * 2**30
    streamed: int = 1000
    batch: int = 16
    scaled_rules: Sequence[str] = tuple(row.public_name for row in catalogue.RULES.values())
    scaled_units: Sequence[int] = (32, 64, 128, 256, 512)
    scaled_steps: tuple[int, int] = (100, 8)
    aligned_units: Sequence[int] = (256, 1000)
    aligned_width: int = 128
    aligned_depths: Sequence[int] = (1, 2, 4, 8, 16, 32)
    aligned_batch: int = 50
    aligned_steps: int = 20
    samples: Sequence[int] = (1, 8, 64)
    samples_at_once: int = 4
    samples_of_others: int = 8
    samples_of_devices: int = 64
    sampled_units: int = 128
    sampled_steps: int = 100
    sampled_lengths: Sequence[int] = (100, 200, 400, 800, 1600)
    sampled_window: int = 50
    spread_rules: Sequence[str] = tuple(catalogue.RULES)
    spread_devices: Sequence[int] = (1, 2, 4, 8)
    spread_units: int = 64
    spread_steps: int = 64
    grid_rules: Sequence[str] = tuple(catalogue.RULES)
    grid_units: Sequence[int] = (128, 512, 2048)
    grid_batch: int = 32
    grid_steps: int = 256
    grid_room: int = 8 * 2**30
    sizes_divided: int = 1
    varied_units: int = 16
    varied_steps: int = 100
    varied_windows: Sequence[int] = (1, 10, 50)
    varied_copies: Sequence[int] = (1, 8)
    varied_ranks: Sequence[int] = (1, 2, 4, 8)
    varied_draws: int = 400
    figures: Path | None = None
    seconds: float = 3.0
    clock: Callable[[], float] = time.perf_counter

    def rules_for(self, cell: str) -> list[str]:
        """The rules that credit this cell."""
        return [rule for rule in self.rules if RULES[rule].row.refusal(TRAITS[cell]) is None]


class Problem(NamedTuple):
    """A network of cells and a Dense readout, with its parameters and a batch."""

    model: Any
    params: Any
    batch: localgrad.Batch


def problem(
    cell: str, units: int, steps: int, batch: int, abstract: bool = False, depth: int = 1
) -> Problem:
    """Random inputs and targets for cells of `CELLS`; `abstract` gives shapes without data."""
    cells = tuple(CELLS[cell](units) for _ in range(depth))
    model = localgrad.Network(cells, readout=nn.Dense(OUTPUTS))

    def data() -> tuple[Any, localgrad.Batch]:
        keys = jax.random.split(jax.random.key(0), 3)
        inputs = jax.random.normal(keys[0], (batch, steps, INPUTS))
        targets = jax.random.normal(keys[1], (batch, steps, OUTPUTS))
        carry = model.initialize_carry(keys[2], (batch, INPUTS))
        params = model.init(keys[2], carry, inputs[:, 0])["params"]
        return params, localgrad.Batch(inputs, targets)

    return Problem(model, *(jax.eval_shape(data) if abstract else jax.jit(data)()))


def streaming(make: Callable[..., Any], task: Problem, **settings: Any) -> localgrad.LearningRule:
    """A rule that streams a problem's examples."""
    batch, _, width = task.batch.inputs.shape
    example = jax.ShapeDtypeStruct((width,), task.batch.inputs.dtype)
    return make(task.model, optax.l2_loss, batch_size=batch, example=example, **settings)


def update_of(make: Callable[..., Any], task: Problem, **settings: Any) -> tuple[Callable, tuple]:
    """One streaming update of a rule, and its arguments (shapes, if the problem is abstract)."""
    rule = streaming(make, task, **settings)
    abstract = isinstance(task.batch.inputs, jax.ShapeDtypeStruct)
    state = jax.eval_shape(rule.init, task.params) if abstract else rule.init(task.params)
    return rule.__call__, (task.params, state, task.batch)


def state_bytes(make: Callable[..., Any], task: Problem, **settings: Any) -> int:
    """What the state of a stream takes; nothing is allocated."""
    state = jax.eval_shape(streaming(make, task, **settings).init, task.params)
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))


def unlimited(factory: Callable[..., Any]) -> dict[str, int]:
    """The setting by which a rule's influence may be of any size, if it has one."""
    takes_limit = "max_influence_bytes" in inspect.signature(factory).parameters
    return {"max_influence_bytes": 2**62} if takes_limit else {}


def flax_forward(task: Problem) -> tuple[Callable, tuple]:
    """A forward pass with its loss, as one writes it with `flax.linen.RNN`, and its arguments."""

    def loss(params: Any, batch: localgrad.Batch) -> jax.Array:
        return _run_flax(task.model, params, batch, None)[1]

    return loss, (task.params, task.batch)


def flax_bptt(task: Problem) -> tuple[Callable, tuple]:
    """BPTT as one writes it with `flax.linen.RNN`, and its arguments."""

    loss, arguments = flax_forward(task)
    return jax.value_and_grad(loss), arguments


def flax_recomputed(task: Problem, chunk: int) -> tuple[Callable, tuple]:
    """The same, but storing only every `chunk`-th carry: the rest is computed again."""

    def loss(params: Any, batch: localgrad.Batch) -> jax.Array:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def piece(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
            def cut(a: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(a, start, chunk, axis=1)

            return _run_flax(task.model, params, jax.tree.map(cut, batch), carry)

        examples, steps, width = batch.inputs.shape
        carry = task.model.initialize_carry(jax.random.key(0), (examples, width))
        return jax.lax.scan(piece, carry, jnp.arange(0, steps, chunk))[1].mean()

    return jax.value_and_grad(loss), (task.params, task.batch)


def _run_flax(model: Any, params: Any, batch: localgrad.Batch, carry: Any) -> tuple[Any, jax.Array]:
    """`nn.RNN` of each cell, the readout over all steps at once: the carries and the mean loss."""
    hidden, left = batch.inputs, []
    for level, cell in enumerate(model.cells):
        variables = {"params": {"cell": params[f"cells_{level}"]}}
        start = None if carry is None else carry[level]
        run = nn.RNN(cell, return_carry=True)
        last, hidden = run.apply(variables, hidden, initial_carry=start)
        left.append(last)
    outputs = model.readout.apply({"params": params["readout"]}, hidden)
    return tuple(left), optax.l2_loss(outputs, batch.targets).mean()


def root(steps: int) -> int:
    """The largest divisor of T up to its square root: the chunk to recompute that stores least."""
    return max(w for w in range(1, int(steps**0.5) + 1) if steps % w == 0)


def compiled(function: Callable, arguments: tuple) -> Callable[[], Any]:
    """The compiled call, ready to time: nothing donated, no arguments left."""
    return functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)


def temporary_bytes(function: Callable, arguments: tuple) -> int:
    """What the compiled call needs beside its arguments and results; nothing is run."""
    stats: Any = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return stats.temp_size_in_bytes


def check_close(found: Any, expected: Any, what: str, tolerance: float = 1e-4) -> None:
    """Raises unless every leaf agrees, relative to its largest entry."""

    def error(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    worst = max(jax.tree.leaves(jax.tree.map(error, found, expected)))
    if not worst <= tolerance:
        raise RuntimeError(f"{what}: gradients differ by {worst:.1e}, more than {tolerance:.0e}.")


class Timing(NamedTuple):
    """Milliseconds of one call, and the same over the reference's."""

    median_ms: float
    min_ms: float
    ratio: float
    ratio_of_min: float

    def __str__(self) -> str:
        return f"{self.median_ms:#.3g} ms {self.ratio:6.2f}x ({self.ratio_of_min:.2f}x)"


def interleave(
    plan: Plan,
    calls: Mapping[str, Callable[[], Any]],
    reference: str,
    per: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Times calls in turn, round after round, so that a busy machine slows all alike.

    Args:
        plan: the clock, and how long to repeat.
        calls: what to time, by name.
        reference: whose time the ratios are to.
        per: steps of each call to divide its time by; 1 if left out.

    Returns:
        The timing of each call by name.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + plan.seconds
    while len(times[reference]) < 3 or (time.perf_counter() < end and len(times[reference]) < 1000):
        for name, call in calls.items():
            begin = plan.clock()
            jax.block_until_ready(call())
            times[name].append(1e3 * (plan.clock() - begin) / (per or {}).get(name, 1))
    medians = {name: statistics.median(found) for name, found in times.items()}
    least = {name: min(found) for name, found in times.items()}
    return {
        name: Timing(
            medians[name],
            least[name],
            medians[name] / medians[reference],
            least[name] / least[reference],
        )
        for name in calls
    }
