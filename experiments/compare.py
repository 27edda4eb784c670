"""The main job: every learning rule on the same networks, tasks, batches and budget."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn

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
    require_seed,
)
from experiments.folder import Pieces, claim_folder, write_results
from experiments.measure import Cost, Update, compile_update, costs
from experiments.progress import progress
from experiments.report import Note
from experiments.tasks import TASKS, Task, TaskName
from experiments.train import (
    QUICKLY,
    Budget,
    Problem,
    Shared,
    Trainer,
    make_shared,
    make_trainer,
    of_first_seeds,
    train,
)

LOSS = optax.softmax_cross_entropy_with_integer_labels
GROUP = "cells_0"  # The recurrent layer; the readout's update is exact under every rule.
OPTIONS = QUICKLY | {"xla_cpu_use_fusion_emitters": False}
"""Of XLA: without its newer fusions a network of one small layer compiles in half the time and
learns as fast (of 128 units up to .4 slower; deep ones, elsewhere, compile for twice as long)."""
COMPILERS = 2  # Threads that compile ahead while the main thread trains.
COLUMNS = """\
test loss, accuracy   nats and % on held-out data after training: mean ± standard deviation of seeds
cosine, norm ratio    the recurrent layer's update to BPTT's at the same parameters and batch, mean
                      and median along the rule's own training; read them with the loss: a rule
                      stuck at chance can show a high cosine there
ms/update, temp MiB   one compiled update of one batch, without the optimizer"""
FEWER, PIECES = "fewer seeds of RTRL", "more than one window"
NOTES: tuple[Note, ...] = (
    (set(), COLUMNS),
    (
        {"rtrl", FEWER},
        "RTRL                  the first --rtrl-seeds seeds alone, since its numbers are BPTT's",
    ),
    (
        {"rtrl", PIECES},
        "RTRL                  in --windows pieces, so that it has to carry its influence",
    ),
    ({"readout_only"}, "readout only          the floor: a random recurrent layer never learns"),
    (
        {"eprop_random", "rflo"},
        "On the rate network e-prop and RFLO are one rule: with random feedback their rows are "
        "equal.",
    ),
)
"""What is said below the tables where all of these rules have a row, and the options are so."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare learning rules: a GRU and a rate network on digits and on delayed recall.

    Every rule gets the same initial parameters, batches, number of updates, learning rate and
    optimizer (Adam; RMSprop where a row says so). The learning rate suits BPTT; no rule is tuned.
    Prints a table a network; writes results.json, learning_curves.png and alignment.png.

    Takes 3 to 4 minutes on two cores. Accuracies (%), mean and standard deviation of 5 seeds:

    digits by rows, GRU: BPTT 97 ± 1, SnAp-1 95 ± 1, e-prop 95 ± 2, TBPTT(1) 90 ± 2, readout only
    77 ± 2; delayed recall, GRU: BPTT, SnAp-1 and e-prop 100 ± 0, TBPTT(4) 33 ± 7, TBPTT(1) and
    readout only 25 ± 2.

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
        rtrl_seeds: runs of RTRL, the first of those; it repeats BPTT's numbers, at many times the
            price.
        seed: where all randomness starts.
        checkpoints: how often a run is tested and compared with BPTT.
        repeats: rounds of the timing.
        workdir: the folder to write to, where the same command goes on after an interruption.
    """

    tasks: tuple[TaskName, ...] = ("digits_rows", "delayed_recall")
    cells: tuple[CellName, ...] = tuple(CELLS)
    rules: tuple[RuleName, ...] = tuple(RULES)
    steps: int = 600
    batch_size: int = 32
    learning_rate: float | None = None
    clip: float = 1.0
    features: int = 24
    alpha: float = 0.2
    horizon: int = 4
    windows: int = 2
    seeds: int = 5
    rtrl_seeds: int = 1
    seed: int = 0
    checkpoints: int = 20
    repeats: int = 20
    workdir: Path = Path("results/compare")

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
    shared: Shared
    trainer: Trainer | None = None
    update: Update | None = None
    refusal: str | None = None


class Stage(NamedTuple):
    """One task with one cell, while its rules are being compiled.

    Attributes:
        problem: the task with the network.
        cell: the cell's name.
        settings: what cell and rules are told.
        budget: what every rule gets.
        shared: what all rules share.
        entries: its rules, in order.
    """

    problem: Problem
    cell: CellName
    settings: Settings
    budget: Budget
    shared: Future[Shared]
    entries: list[Future[Entry]]


def run(config: Config) -> list[report.Panel]:
    """Runs the comparison; prints tables and writes JSON and figures."""
    begin = time.perf_counter()
    check(config)
    pieces = claim_folder(config.workdir, config)
    print(header(config), flush=True)
    rows = len(config.tasks) * len(config.cells) * len(config.rules)
    pool = ThreadPoolExecutor(COMPILERS)
    try:
        problems = [
            submit_shared(config, task, cell, pool)
            for task in config.tasks
            for cell in config.cells
        ]
        stages = [submit_rules(config, problem, pool) for problem in problems]
        with progress(total=rows * config.checkpoints, unit="segment") as bar:
            trained: list[report.Panel] = []
            for stage in stages:
                trained.append(empty_panel(stage))
                for row in train_stage(stage, pieces, bar):
                    trained[-1].rows.append(row)
                    write(config, trained, begin, finished=False)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    panels = []
    for stage, panel in zip(stages, trained, strict=True):  # Nothing else is running now.
        panels.append(with_costs(panel, stage, config.repeats))
        print("\n" + report.table(panels[-1]), flush=True)
    write(config, panels, begin)
    figures.learning_curves(panels, config.workdir / "learning_curves.png")
    figures.alignment(panels, config.workdir / "alignment.png")
    print(f"\n{footnote(config)}\n\n{time.perf_counter() - begin:.0f} s in all.", end=" ")
    print(f"Results and figures: {config.workdir}/")
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
    counts = "steps batch_size features horizon windows seeds rtrl_seeds checkpoints repeats"
    require_counts(config, *counts.split())
    for field in ("learning_rate", "clip"):
        value = getattr(config, field)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{field} must be a positive number; got {value}.")
    if not 0 < config.alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1]; got {config.alpha}.")
    require_seed(config.seed)
    _ = config.budget(config.cells[0]).segment  # Raises unless checkpoints divide the steps.


def header(config: Config) -> str:
    """What is about to happen."""
    return (
        f"Comparing {len(config.rules)} learning rules on {' and '.join(config.tasks)}, "
        f"networks {' and '.join(config.cells)} of {config.features} units:\n"
        f"{config.steps} updates on batches of {config.batch_size}, seeds: {config.seeds}. "
        f"The defaults take 3 to 4 minutes on two cores, mostly compiling."
    )


def footnote(config: Config) -> str:
    """What the columns mean, and the rows that are there."""
    rows = {*config.rules} - (set() if "rate" in config.cells else {"rflo"})
    options = [FEWER] * (config.rtrl_seeds < config.seeds) + [PIECES] * (config.windows > 1)
    return report.footnote(NOTES, rows.union(options))


def submit_shared(config: Config, task_name: TaskName, cell: CellName, pool: Executor) -> Stage:
    """Starts to make what all rules share on one task with one cell."""
    task, budget = TASKS[task_name](config.seed), config.budget(cell)
    settings = config.settings(task)
    model = localgrad.Network(cells=(CELLS[cell].make(settings),), readout=nn.Dense(task.classes))
    problem = Problem(model, LOSS, task)
    shared = pool.submit(make_shared, problem, budget, OPTIONS)
    return Stage(problem, cell, settings, budget, shared, [])


def submit_rules(config: Config, stage: Stage, pool: Executor) -> Stage:
    """Starts to compile every rule of a stage."""

    def prepared(name: RuleName) -> Entry:
        few = config.rtrl_seeds if RULES[name].row.dense else config.seeds
        return prepare(name, stage, of_first_seeds(stage.shared.result(), few))

    return stage._replace(entries=[pool.submit(prepared, name) for name in config.rules])


def prepare(name: RuleName, stage: Stage, shared: Shared) -> Entry:
    """Compiles a rule's run and its single update."""
    choice = RULES[name]

    def make_rule(key: jax.Array) -> localgrad.LearningRule:
        return choice.make(stage.problem.model, LOSS, stage.settings, key)

    params = jax.tree.map(lambda leaf: leaf[0], shared.params)
    try:
        rule = make_rule(shared.rule_keys[0])
        jax.eval_shape(rule.init, params)
    except ValueError as error:
        return Entry(name, shared, refusal=str(error))
    batch = jax.tree.map(lambda leaf: leaf[0, 0], shared.draw(0))
    return Entry(
        name,
        shared,
        trainer=make_trainer(shared, make_rule, choice.optimizer, stage.budget),
        update=compile_update(rule, params, batch),
    )


def train_stage(stage: Stage, pieces: Pieces, bar: Any) -> Iterator[report.Row]:
    """Trains each rule of a stage as soon as it is compiled, if it was not trained before."""
    task = stage.problem.task.name
    for entry in stage.entries:
        bar.set_description(f"{task}, {stage.cell}")
        name, shared, trainer, _, refusal = entry.result()
        bar.set_description(f"{task}, {stage.cell}, {name}")
        history, begin = None, bar.n
        if trainer is not None:
            made = functools.partial(train, trainer, shared, stage.budget, bar.update)
            history = pieces.made(f"{task}_{stage.cell}_{name}", made)
        bar.update(begin + stage.budget.checkpoints - bar.n)
        yield report.Row(name, RULES[name].label(stage.settings), history, refusal=refusal)


def empty_panel(stage: Stage) -> report.Panel:
    """A panel that waits for its rows."""
    task = stage.problem.task
    return report.Panel(
        task=task.name,
        cell=stage.cell,
        title=f"{task.title}, {CELLS[stage.cell].label}",
        summary=task.summary,
        group=GROUP,
        floors=task.floors,
        rows=[],
    )


def with_costs(panel: report.Panel, stage: Stage, repeats: int) -> report.Panel:
    """A panel whose rows have their costs, measured side by side."""
    entries = [entry.result() for entry in stage.entries]
    updates = {entry.name: entry.update for entry in entries if entry.update is not None}
    prices: Mapping[str, Cost] = costs(updates, repeats)
    return panel._replace(rows=[row._replace(cost=prices.get(row.name)) for row in panel.rows])


def write(
    config: Config, panels: list[report.Panel], begin: float, *, finished: bool = True
) -> None:
    """Writes what was found since `begin`, all of it or so far."""
    content = {
        **report.circumstances(config),
        "seconds": round(time.perf_counter() - begin, 1),
        "panels": [report.as_json(panel) for panel in panels],
    }
    write_results(config.workdir, content, finished=finished)
