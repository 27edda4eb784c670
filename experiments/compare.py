"""The main job: every learning rule on the same networks, tasks, batches and budget."""

from __future__ import annotations

import dataclasses
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import optax
from flax import linen as nn
from tqdm import tqdm

import localgrad
from experiments import figures, report
from experiments.choices import CELLS, RULES, CellName, RuleName, Settings, lookup
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
COMPILERS = 2  # Threads; XLA compiles one function on about one core.
FOOTNOTE = """\
test loss, accuracy   nats and % on held-out data after training: mean ± standard deviation of seeds
cosine, norm ratio    the recurrent layer's update to BPTT's at the same parameters and batch, mean
                      and median along the rule's own training; read them with the loss: a rule
                      stuck at chance can show a high cosine there
ms/update, temp MiB   one compiled update of one batch, without the optimizer
readout only          the floor of a random recurrent layer that never learns
On the rate network e-prop and RFLO are the same rule: their rows with random feedback are equal."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare learning rules: a GRU and a rate network on digits and on delayed recall.

    Every rule gets the same initial parameters, batches, number of updates, learning rate and
    optimizer (Adam; RMSprop where a row says so). The learning rate suits BPTT; no rule is tuned.
    Prints a table a network; writes results.json, learning_curves.png and alignment.png.

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
        windows: in how many pieces RTRL, SnAp-1, e-prop and RFLO go through a sequence, carrying
            their influence from one to the next.
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


def run(config: Config) -> list[report.Panel]:
    """Runs the comparison; prints tables and writes JSON and figures."""
    begin = time.perf_counter()
    check(config)
    config.results.mkdir(parents=True, exist_ok=True)
    print(header(config), flush=True)
    rows = len(config.tasks) * len(config.cells) * len(config.rules)
    panels = []
    with tqdm(total=rows * (1 + config.checkpoints), unit="segment", smoothing=0.05) as bar:
        for task in config.tasks:
            for cell in config.cells:
                panels.append(run_panel(config, task, cell, bar))
                bar.write("\n" + report.table(panels[-1]))
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
    for field in ("steps", "batch_size", "features", "seeds", "checkpoints", "repeats", "windows"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1; got {getattr(config, field)}.")
    _ = config.budget(config.cells[0]).segment  # Raises unless checkpoints divide the steps.


def header(config: Config) -> str:
    """What is about to happen."""
    return (
        f"Comparing {len(config.rules)} learning rules on {' and '.join(config.tasks)}, "
        f"networks {' and '.join(config.cells)} of {config.features} units:\n"
        f"{config.steps} updates on batches of {config.batch_size}, {config.seeds} seeds each. "
        f"As it stands by default this takes about 3 minutes on two cores, half of it compiling."
    )


def run_panel(config: Config, task_name: TaskName, cell_name: CellName, bar: Any) -> report.Panel:
    """Trains and measures every rule on one task with one cell."""
    task, budget = TASKS[task_name](config.seed), config.budget(cell_name)
    settings = config.settings(task)
    cell = CELLS[cell_name].make(settings)
    model = localgrad.Network(cells=(cell,), readout=nn.Dense(task.classes))
    shared = make_shared(Problem(model, LOSS, task), budget)

    bar.set_description(f"{task_name}, {cell_name}: compiling")
    entries = []
    with ThreadPoolExecutor(COMPILERS) as pool:
        jobs = [pool.submit(prepare, n, model, settings, shared, budget) for n in config.rules]
        for job in jobs:
            entries.append(job.result())
            bar.update(1)

    histories: dict[RuleName, History] = {}
    for entry in entries:
        bar.set_description(f"{task_name}, {cell_name}: {entry.name}")
        if entry.trainer is None:
            bar.update(config.checkpoints)
        else:
            histories[entry.name] = train(entry.trainer, shared, budget, bar.update)

    bar.set_description(f"{task_name}, {cell_name}: timing")
    updates = {entry.name: entry.update for entry in entries if entry.update is not None}
    prices: dict[RuleName, Cost] = costs(updates, config.repeats)
    rows = [
        report.Row(
            name=entry.name,
            label=RULES[entry.name].label(settings),
            history=histories.get(entry.name),
            cost=prices.get(entry.name),
            refusal=entry.refusal,
        )
        for entry in entries
    ]
    title = f"{task.title}, {CELLS[cell_name].label}"
    return report.Panel(task_name, cell_name, title, task.summary, GROUP, task.floors, rows)


def prepare(
    name: RuleName, model: Any, settings: Settings, shared: Shared, budget: Budget
) -> Entry:
    """Compiles a rule's run and its single update."""
    choice = RULES[name]

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


def write(config: Config, panels: list[report.Panel], seconds: float) -> None:
    """Writes results.json and the figures."""
    content = {
        "config": dataclasses.asdict(config),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
        },
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds, 1),
        "panels": [report.as_json(panel) for panel in panels],
    }
    report.write_json(config.results / "results.json", content)
    figures.learning_curves(panels, config.results / "learning_curves.png")
    figures.alignment(panels, config.results / "alignment.png")
