"""The main job: every learning rule on the same networks, tasks, batches and budget."""

from __future__ import annotations

import dataclasses
import math
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn
from tqdm import tqdm

import localgrad
from experiments import figures, report
from experiments.choices import (
    CELLS,
    RULES,
    CellName,
    RuleName,
    Settings,
    lookup,
    require_counts,
)
from experiments.measure import Cost, Update, compile_update, costs
from experiments.tasks import TASKS, Task, TaskName
from experiments.train import (
    Budget,
    History,
    Problem,
    Shared,
    Trainer,
    make_shared,
    make_trainer,
    train,
)

LOSS = optax.softmax_cross_entropy_with_integer_labels
GROUP = "cells_0"  # The recurrent layer; the readout's update is exact under every rule.
COMPILERS = 2  # Threads that compile ahead while the main thread trains.
FOOTNOTE = """\
test loss, accuracy   nats and % on held-out data after training: mean ± standard deviation of seeds
cosine, norm ratio    the recurrent layer's update to BPTT's at the same parameters and batch, mean
                      and median along the rule's own training; read them with the loss: a rule
                      stuck at chance can show a high cosine there
ms/update, temp MiB   one compiled update of one batch, without the optimizer; RTRL in --windows
                      pieces, so that it has to carry its influence
readout only          the floor of a random recurrent layer that never learns
On the rate network e-prop and RFLO are the same rule: their rows with random feedback are equal."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare learning rules: a GRU and a rate network on digits and on delayed recall.

    Every rule gets the same initial parameters, batches, number of updates, learning rate and
    optimizer (Adam; RMSprop where a row says so). The learning rate suits BPTT; no rule is tuned.
    Prints a table a network; writes results.json, learning_curves.png and alignment.png.

    Takes about 220 s of CPU time, 2 to 4 minutes on two cores. Mean accuracies (%) of 3 seeds:

    digits by rows, GRU: BPTT and RTRL 97, SnAp-1 and e-prop 95, TBPTT(1) 90, readout only 73;
    delayed recall, GRU: BPTT and RTRL 100, SnAp-1 96, e-prop 84, TBPTT(1) 25, readout only 25.

    Attributes:
        tasks: what the networks learn.
        cells: the networks.
        rules: the learning rules.
        steps: updates a rule; a multiple of --checkpoints.
        batch_size: sequences an update.
        learning_rate: the optimizer's; None: 0.01 for the GRU, 0.005 for the rate network.
        clip: largest global norm of an update before the optimizer.
        features: units of the recurrent layer.
        alpha: leak of the rate network's units, in (0, 1].
        horizon: steps that the row TBPTT(h) looks back.
        windows: in how many pieces RTRL goes through a sequence, carrying its influence from one to
            the next; in one piece it would be BPTT by another name.
        seeds: runs of each rule, all in one jitted function.
        seed: where all randomness starts.
        checkpoints: how often a run is tested and compared with BPTT.
        repeats: rounds of the timing.
        results: the folder to write to.
    """

    tasks: tuple[TaskName, ...] = ("digits_rows", "delayed_recall")
    cells: tuple[CellName, ...] = tuple(CELLS)
    rules: tuple[RuleName, ...] = tuple(RULES)
    steps: int = 400
    batch_size: int = 32
    learning_rate: float | None = None
    clip: float = 1.0
    features: int = 24
    alpha: float = 0.4
    horizon: int = 4
    windows: int = 2
    seeds: int = 3
    seed: int = 0
    checkpoints: int = 20
    repeats: int = 20
    results: Path = Path("results/compare")

    def budget(self, cell: CellName) -> Budget:
        """What every rule gets on a cell."""
        return Budget(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate or CELLS[cell].learning_rate,
            clip=self.clip,
            seeds=self.seeds,
            checkpoints=self.checkpoints,
            seed=self.seed,
        )

    def settings(self, task: Task) -> Settings:
        """What cells and rules are told on a task."""
        window = -(-task.test.inputs.shape[1] // self.windows)
        return Settings(self.features, self.alpha, self.horizon, window)


class Entry(NamedTuple):
    """A rule compiled for a problem, or the library's words why it does not train it."""

    name: RuleName
    trainer: Trainer | None = None
    update: Update | None = None
    refusal: str | None = None


class Stage(NamedTuple):
    """One task with one cell, while its rules are being compiled.

    Attributes:
        task: the task.
        cell: the cell's name.
        settings: what cell and rules are told.
        budget: what every rule gets.
        shared: what its rules share.
        entries: its rules, in order.
    """

    task: Task
    cell: CellName
    settings: Settings
    budget: Budget
    shared: Future[Shared]
    entries: list[Future[Entry]]


def run(config: Config) -> list[report.Panel]:
    """Runs the comparison; prints tables and writes JSON and figures."""
    begin = time.perf_counter()
    check(config)
    config.results.mkdir(parents=True, exist_ok=True)
    print(header(config), flush=True)
    rows = len(config.tasks) * len(config.cells) * len(config.rules)
    pool = ThreadPoolExecutor(COMPILERS)
    try:
        stages = [
            submit(config, task, cell, pool) for task in config.tasks for cell in config.cells
        ]
        with tqdm(total=rows * config.checkpoints, unit="segment", smoothing=0.05) as bar:
            histories = [train_stage(stage, bar) for stage in stages]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    panels = []
    for stage, trained in zip(stages, histories, strict=True):  # Nothing else is running now.
        panels.append(make_panel(stage, trained, config.repeats))
        print("\n" + report.table(panels[-1]), flush=True)
    seconds = time.perf_counter() - begin
    write(config, panels, seconds)
    print(f"\n{FOOTNOTE}\n\n{seconds:.0f} s in all. Results and figures: {config.results}/")
    return panels


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before anything is compiled."""
    tables = (
        ("task", TASKS, config.tasks),
        ("cell", CELLS, config.cells),
        ("rule", RULES, config.rules),
    )
    for kind, table, names in tables:
        if not names:
            raise ValueError(f"no {kind} given; choose from: {', '.join(table)}.")
        for name in names:
            lookup(kind, table, name)
    counts = "steps batch_size features horizon windows seeds checkpoints repeats"
    require_counts(config, *counts.split())
    for field in ("learning_rate", "clip"):
        value = getattr(config, field)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{field} must be a positive number; got {value}.")
    if not 0 < config.alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1]; got {config.alpha}.")
    _ = config.budget(config.cells[0]).segment  # Raises unless checkpoints divide the steps.


def header(config: Config) -> str:
    """What is about to happen."""
    return (
        f"Comparing {len(config.rules)} learning rules on {' and '.join(config.tasks)}, "
        f"networks {' and '.join(config.cells)} of {config.features} units:\n"
        f"{config.steps} updates on batches of {config.batch_size}, seeds: {config.seeds}. "
        f"The defaults take about 220 s of CPU time, 2 to 4 minutes on two cores, mostly compiling."
    )


def submit(config: Config, task_name: TaskName, cell: CellName, pool: Executor) -> Stage:
    """Starts to compile every rule on one task with one cell."""
    task, budget = TASKS[task_name](config.seed), config.budget(cell)
    settings = config.settings(task)
    model = localgrad.Network(cells=(CELLS[cell].make(settings),), readout=nn.Dense(task.classes))
    shared = pool.submit(make_shared, Problem(model, LOSS, task), budget)
    entries = [pool.submit(prepare, name, model, settings, shared, budget) for name in config.rules]
    return Stage(task, cell, settings, budget, shared, entries)


def prepare(
    name: RuleName, model: Any, settings: Settings, awaited: Future[Shared], budget: Budget
) -> Entry:
    """Compiles a rule's run and its single update."""
    shared, choice = awaited.result(), RULES[name]

    def make_rule(key: jax.Array) -> localgrad.LearningRule:
        return choice.make(model, LOSS, settings, key)

    params = jax.tree.map(lambda leaf: leaf[0], shared.params)
    try:
        rule = make_rule(shared.rule_keys[0])
        jax.eval_shape(rule.init, params)
    except ValueError as error:
        return Entry(name, refusal=str(error))
    batch = jax.tree.map(lambda leaf: leaf[0, 0], shared.draw(0))
    return Entry(
        name,
        trainer=make_trainer(shared, make_rule, choice.optimizer, budget),
        update=compile_update(rule, params, batch),
    )


def train_stage(stage: Stage, bar: Any) -> dict[RuleName, History]:
    """Trains each rule of a stage as soon as it is compiled."""
    histories = {}
    for entry in stage.entries:
        bar.set_description(f"{stage.task.name}, {stage.cell}")
        name, trainer, _, _ = entry.result()
        bar.set_description(f"{stage.task.name}, {stage.cell}, {name}")
        if trainer is None:
            bar.update(stage.budget.checkpoints)
        else:
            histories[name] = train(trainer, stage.shared.result(), stage.budget, bar.update)
    return histories


def make_panel(stage: Stage, histories: dict[RuleName, History], repeats: int) -> report.Panel:
    """Measures the compiled updates of a stage, and puts all results together."""
    entries = [entry.result() for entry in stage.entries]
    updates = {entry.name: entry.update for entry in entries if entry.update is not None}
    prices: dict[RuleName, Cost] = costs(updates, repeats)
    rows = [
        report.Row(
            name=entry.name,
            label=RULES[entry.name].label(stage.settings),
            history=histories.get(entry.name),
            cost=prices.get(entry.name),
            refusal=entry.refusal,
        )
        for entry in entries
    ]
    return report.Panel(
        task=stage.task.name,
        cell=stage.cell,
        title=f"{stage.task.title}, {CELLS[stage.cell].label}",
        summary=stage.task.summary,
        group=GROUP,
        floors=stage.task.floors,
        rows=rows,
    )


def write(config: Config, panels: list[report.Panel], seconds: float) -> None:
    """Writes results.json and the figures."""
    content = {
        **report.circumstances(config),
        "seconds": round(seconds, 1),
        "panels": [report.as_json(panel) for panel in panels],
    }
    report.write_json(config.results / "results.json", content)
    figures.learning_curves(panels, config.results / "learning_curves.png")
    figures.alignment(panels, config.results / "alignment.png")
