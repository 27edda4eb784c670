"""Learning by random perturbations: what its variance is, and what it can learn from the past."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from experiments.choices import lookup, require_counts, require_seed
from experiments.claims import Claim, claims_table, conclusion, require
from experiments.datasets import root_of
from experiments.folder import Pieces, claim_folder, write_results
from experiments.perturbation import claims, figures, problems, report, series, variance
from experiments.perturbation.learner import Budget, compete
from experiments.perturbation.problems import Problem
from experiments.perturbation.report import Panel
from experiments.perturbation.rows import FEW, ROWS, SAMPLED
from experiments.report import circumstances

Part = Literal["variance", "credit", "mackey_glass", "copy", "weather", "units"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Perturbations in place of gradients: weight, node and activity perturbation beside BPTT.

    After Fernandez, Keemink and van Gerven, "Gradient-free training of recurrent neural networks
    using random perturbations", 2024, whose code pays the noise of a step with the loss of that
    step alone. *variance*: of one sample, over units and steps, beside theory. *credit*: two tasks
    that need the past, which tell step credit from causal credit. *mackey_glass*: predicted, and in
    the published direction, which is a memory of 15 steps. *copy*: fresh sequences in every batch.
    *weather*: 1, 24 and 48 hours ahead, on a real file. *units*: Mackey-Glass over sizes. All rules
    have the same networks, batches, updates, optimizer (Adam; SGD where a row says so) and search
    for a learning rate, which falls to 0 on a line. Series are learned in windows, so BPTT means
    the gradient of a window. Prints tables and claims, of which any that fails ends the command
    with an error; writes results.json and figures.

    `python -m experiments perturbation --data-dir DIR` takes 21 minutes on one core. Test losses
    of BPTT; of NP, and of WP, with one and with 16 samples; of ANP by step; of the published rule:
    sign .0000; .012, .0001; .11, .001; .49; .86. recall .04; .47, .24; .84, .07; 1.10; 1.37.
    Mackey-Glass ahead
    .00004; .0017, .0001; .0019, .0006; .0026; .0092 (linear filter .0108), and behind .0001; .0031,
    .0005; .0025, .0007; .0069; .0045 (0). copy .011; .033, .025; .043, .033; .033; .031 (each
    step's mean .034). Weather, with one sample alone: 1 h .0005; .0019; .0037; .0012; .0041 (linear
    regression .0006). 24 h .0038; .0063; .0086; .0048; .0075 (.0041). 48 h .0072; .011; .013;
    .0091; .012 (.0083).

    Attributes:
        parts: what to do; without data `weather` is left out.
        rows: the rules; BPTT, which others are measured against, must be one.
        seeds: runs of each rule, all in one jitted function.
        seed: where all randomness starts.
        checks: how often a run is tested.
        nets: networks of each size in `variance`.
        draws: of the noise for each of them, a multiple of 100.
        workers: rules, or sizes, at a time.
        short: few updates and draws, and no verdict: a glance, for tests and notebooks.
        data_dir: the folder with `weather_wth/`; None for LOCALGRAD_DATA.
        workdir: the folder to write to, where the same command goes on after an interruption.
    """

    parts: tuple[Part, ...] = get_args(Part)
    rows: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{" + ",".join(ROWS) + "}")] = tuple(
        ROWS
    )
    seeds: int = 5
    seed: int = 0
    checks: int = 20
    nets: int = 3
    draws: int = 4000
    workers: int = 2
    short: bool = False
    data_dir: Path | None = None
    workdir: Path = Path("results/perturbation")

    def updates(self, number: int) -> int:
        """So many, or a glance."""
        return self.checks if self.short else number


def run(config: Config) -> list[Claim]:
    """Runs the parts; prints tables and claims, and writes JSON and figures."""
    begin = time.perf_counter()
    if config.short:
        config = dataclasses.replace(config, checks=2, nets=1, draws=100)
    check(config)
    pieces = claim_folder(config.workdir, config)
    print(f"Perturbations: {', '.join(config.parts)}; seeds: {config.seeds}.", flush=True)
    content: dict[str, Any] = {}
    found: list[Claim] = []
    if "variance" in config.parts:
        points = variance.scan_sizes(
            config.nets, config.draws, config.seed, config.workers, config.short, pieces
        )
        print("\n" + report.variance_table(points), flush=True)
        figures.variance(points, config.workdir / "variance.png")
        content["variance"] = [point._asdict() for point in points]
        found += claims.of_variance(points)
    panels: list[Panel] = []
    for panel in panels_of(config, pieces):
        panels.append(panel)
        content["panels"] = [report.panel_as_json(panel) for panel in panels]
        write_results(config.workdir, {**circumstances(config), **content}, finished=False)
    if panels:
        figures.curves(panels, config.workdir / "curves.png")
        found += [claim for panel in panels for claim in claims.of_panel(panel)]
    if "units" in config.parts:
        sized = over_units(config, panels, pieces)
        print("\n" + report.units_table(sized), flush=True)
        figures.units(sized, config.workdir / "units.png")
        content["units"] = [report.panel_as_json(panel) for panel in sized]
        found += claims.of_units(sized)
    if "panels" in content or "units" in content:
        print(f"\n{report.notes_of(panels)}")
    seconds = time.perf_counter() - begin
    content |= {"seconds": round(seconds, 1), "claims": [claim._asdict() for claim in found]}
    write_results(config.workdir, {**circumstances(config), **content})
    print(f"\n{claims_table(found)}\n")
    print(f"{seconds:.0f} s in all. Results and figures: {config.workdir}/")
    print(conclusion(found))
    if not config.short:
        require(found)
    return found


def panels_of(config: Config, pieces: Pieces) -> Iterator[Panel]:
    """Every rule on every problem of the parts; prints a table of each as soon as it is there."""
    seed, updates, every = config.seed, config.updates, config.rows
    if "credit" in config.parts:
        yield from solved(config, [problems.sign(seed, updates(1000))], every, pieces)
        yield from solved(config, [problems.recall(seed, updates(1000))], every, pieces)
    if "mackey_glass" in config.parts:
        both = [make(seed, updates(1000)) for make in (series.ahead, series.behind)]
        yield from solved(config, both, every, pieces)
    if "copy" in config.parts:
        yield from solved(config, [problems.copy(seed, updates(1000))], every, pieces)
    if "weather" in config.parts and root_of(config.data_dir) is None:
        print("\nweather is left out: say --data-dir DIR, or set LOCALGRAD_DATA=DIR.")
    elif "weather" in config.parts:
        hours = [series.forecast(seed, updates(1000), h, config.data_dir) for h in series.HOURS]
        yield from solved(config, hours, [name for name in every if name not in SAMPLED], pieces)


def solved(
    config: Config, alike: Sequence[Problem], names: Sequence[str], pieces: Pieces
) -> list[Panel]:
    """Rules on problems of the same shapes."""
    budget = Budget(config.seeds, config.checks, config.seed)
    found = compete(alike, names, budget, config.workers, pieces)
    panels = [Panel(*pair) for pair in zip(alike, found, strict=True)]
    for panel in panels:
        print("\n" + report.panel_table(panel), flush=True)
    return panels


def over_units(config: Config, panels: Sequence[Panel], pieces: Pieces) -> list[Panel]:
    """Mackey-Glass with other numbers of units, beside what is there already."""
    there = {panel.problem.units: panel for panel in panels if panel.problem.name == "ahead"}
    budget = Budget(config.seeds, config.checks, config.seed)
    names = [name for name in FEW if name in config.rows]
    sized = []
    for units in series.SIZES:
        problem = series.ahead(config.seed, config.updates(1000), units=units)
        if units in there:
            outcomes = {name: there[units].outcomes[name] for name in names}
        else:
            (outcomes,) = compete([problem], names, budget, config.workers, pieces)
        sized.append(Panel(problem, outcomes))
    return sized


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before anything is compiled."""
    for name in config.rows:
        lookup("row", ROWS, name)
    if "bptt" not in config.rows:
        raise ValueError("rows must hold bptt, which the others are measured against.")
    if not config.parts:
        raise ValueError("parts is empty; name at least one.")
    require_seed(config.seed)
    require_counts(config, "seeds", "checks", "nets", "draws", "workers")
    if config.draws % variance.AT_ONCE:
        raise ValueError(f"draws must be a multiple of {variance.AT_ONCE}; got {config.draws}.")
    if 1000 % config.checks and not config.short:
        raise ValueError(f"checks must divide the 1000 updates; got {config.checks}.")
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise ValueError(f"data_dir must be a folder; got {config.data_dir}.")
