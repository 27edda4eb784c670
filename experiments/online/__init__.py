"""Learning forward in time: every online rule beside BPTT, with an update every few steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import tyro

from experiments.choices import lookup, require_counts, require_seed
from experiments.claims import Claim, claims_table, conclusion, require
from experiments.folder import claim_folder, write_results
from experiments.online import claims, figures, lags, problems, report
from experiments.online.learner import Budget, compete
from experiments.online.report import Panel
from experiments.online.rows import CHUNK, ROWS
from experiments.progress import progress
from experiments.report import circumstances

ProblemName = Literal["copy", "xor", "coin", "mackey_glass", "text"]
ALIKE = ("copy", "xor", "coin")  # of one shape


@dataclasses.dataclass(frozen=True)
class Config:
    """Online rules as online learners: streams without an end, and an update every 5 steps.

    *copy*: bits over a pause that grows while they are recalled. *xor*: whether two bits differed.
    *coin*: a coin whose chances two earlier ones set, with exact floors. *mackey_glass*: one step
    ahead. *text*: characters. BPTT, which unrolls, makes an update every 40 steps. All rows have
    the same streams and the same search for a learning rate, which falls to 0 on a line. On the
    networks of *copy* also: cosines to BPTT's gradient over the lag, and what a step costs. Prints
    tables and claims, of which any that fails ends the command with an error; writes results.json
    and figures. A run that was interrupted goes on with the same command.

    `python -m experiments online` takes 45 minutes on two cores that were shared. Test losses of
    BPTT; TBPTT(10); RTRL; SnAp-1; e-prop; TBPTT(1) with Adam; with RMSprop; a readout: copy .0008;
    .0009; .0003; .036; .022; .87; .85; .66. xor below .0001 for the first five; .56, .67, .69 for
    the others. coin .469; .463; .466; .503; .514; .550; .528; .622 (floors .519, .4545).
    Mackey-Glass .00005; .00006; .00004; .00010; .00011; .00010; .00013; .0027. text, bits 2.46;
    2.40; 2.39; 2.54; 2.55; 2.63; 2.76; 3.46. KF-RTRL; UORO; DNI; MDGL: copy .0005; .20; .42; .0011;
    coin .485; .579; .482; .499; text 2.52; 3.23; 2.42; 2.44. OK(4); on sparse GRUs BPTT, SnAp-1,
    SnAp-2: copy .0008; .0028, .47, .0071; coin .480; .504, .520, .510; text 2.40; 2.55, 2.59, 2.52.
    On rate units of two types BPTT; ModProp; MDGL; e-prop: coin .582; .556; .593; .597.
    docs/papers/online.md has the rest.

    Attributes:
        problems: what is learned.
        rows: the rules; BPTT, which others are measured against, must be one, on each kind of
            network.
        units: N, of a layer.
        calls: of 40 steps, which a stream has.
        checks: how often a run is tested, and the pause of `copy` made longer.
        seeds: runs of each rule, all in one jitted function.
        seed: where all randomness starts.
        repeats: rounds of the timing.
        workers: rules at a time.
        short: few calls of small networks, and no verdict: a glance, for tests and notebooks.
        data_dir: the folder with `ptb/`; None for LOCALGRAD_DATA. Without one, Python's manual.
        workdir: the folder to write to. Rows that were finished there are not run again.
    """

    problems: tuple[ProblemName, ...] = get_args(ProblemName)
    rows: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{" + ",".join(ROWS) + "}")] = tuple(
        ROWS
    )
    units: int = 32
    calls: int = 600
    checks: int = 30
    seeds: int = 3
    seed: int = 0
    repeats: int = 20
    workers: int = 2
    short: bool = False
    data_dir: Path | None = None
    workdir: Path = Path("results/online")

    @property
    def budget(self) -> Budget:
        """What every row gets."""
        return Budget(self.units, self.calls, self.checks, self.seeds, self.seed)


def run(config: Config) -> list[Claim]:
    """Trains all rows on all problems; prints tables and claims, and writes JSON and figures."""
    begin = time.perf_counter()
    if config.short:
        config = dataclasses.replace(config, units=8, calls=4, checks=2, repeats=2)
    check(config)
    claim_folder(config.workdir, config)
    print(
        f"Online: {', '.join(config.problems)}; {config.calls * problems.STEPS} steps of "
        f"{problems.STREAMS} streams, an update every {CHUNK}; N = {config.units}; seeds: "
        f"{config.seeds}.",
        flush=True,
    )
    panels = panels_of(config)
    figures.curves(panels, config.workdir / "curves.png")
    content: dict[str, Any] = {"panels": [report.panel_as_json(panel) for panel in panels]}
    found = [claim for panel in panels for claim in claims.of_panel(panel)]
    first = panels[0]
    prices: dict[str, lags.Price] = {}
    near: dict[str, np.ndarray] = {}
    if first.problem.name == "copy":
        near = cosines_of(config, first)
        prices = lags.prices(
            config.rows, first.problem, config.budget, problems.STREAMS, config.repeats
        )
        print("\n" + report.prices_table(prices, near), flush=True)
        if near:
            figures.alignments(near, config.workdir / "lags.png")
        figures.bargains(panels, prices, config.workdir / "prices.png")
        content["cosines"] = report.cosines_as_json(near)
        content["prices"] = {name: price._asdict() for name, price in prices.items()}
        found += claims.of_lags(near) + claims.of_prices(prices)
    print("\n" + report.notes_of(panels, prices, near))
    seconds = time.perf_counter() - begin
    content |= {"seconds": round(seconds, 1), "claims": [claim._asdict() for claim in found]}
    write_results(config.workdir, {**circumstances(config), **content})
    print(f"\n{claims_table(found)}\n")
    print(f"{seconds:.0f} s in all. Results and figures: {config.workdir}/")
    print(conclusion(found))
    if not config.short:
        require(found)
    return found


def panels_of(config: Config) -> list[Panel]:
    """Every rule on every problem; prints a table of each as soon as it is there."""
    makes = {
        "copy": problems.copy,
        "xor": problems.xor,
        "coin": problems.coin,
        "mackey_glass": problems.chaos,
        "text": lambda seed: problems.characters(seed, config.data_dir),
    }
    alike = [name for name in makes if name in config.problems and name in ALIKE]
    groups = [alike] if alike else []
    groups += [[name] for name in makes if name in config.problems and name not in ALIKE]
    panels = []
    for names in groups:
        made = [makes[name](config.seed) for name in names]
        outcomes = compete(
            made,
            config.rows,
            config.budget,
            config.workers,
            problems.STREAMS,
            config.workdir / "runs",
        )
        for panel in map(Panel, made, outcomes):
            print("\n" + report.panel_table(panel), flush=True)
            panels.append(panel)
    return panels


def cosines_of(config: Config, panel: Panel) -> dict[str, np.ndarray]:
    """How near each rule that credits its cells comes to BPTT's credit."""
    names: Sequence[str] = [
        name for name in config.rows if ROWS[name].family not in ("bptt", "frozen")
    ]
    return {
        name: lags.cosines(
            name, panel.problem, panel.outcomes[ROWS[name].reference].params, config.budget
        )
        for name in progress(names, unit="row", desc="credit over lags")
    }


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before anything is compiled."""
    for name in config.rows:
        lookup("row", ROWS, name)
    for name in ("bptt", *(ROWS[name].reference for name in config.rows)):
        if name not in config.rows:
            raise ValueError(f"rows must hold {name}, which others are measured against.")
    if not config.problems:
        raise ValueError("problems is empty; name at least one.")
    require_seed(config.seed)
    require_counts(config, "units", "calls", "checks", "seeds", "repeats", "workers")
    if config.calls % config.checks:
        raise ValueError(f"checks ({config.checks}) must divide the calls ({config.calls}).")
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise ValueError(f"data_dir must be a folder; got {config.data_dir}.")
