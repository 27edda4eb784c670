"""What local rules can learn in linear networks: the theory's predictions beside simulations."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from experiments.choices import lookup, require_seed
from experiments.claims import ClaimFailed
from experiments.folder import claim_folder, write_results
from experiments.linear_dynamics import aligned, beyond, figures, journeys, points, ranks
from experiments.linear_dynamics.table import Finding, Row
from experiments.linear_dynamics.table import table as as_text
from experiments.progress import progress
from experiments.report import circumstances

Name = Literal[
    "trajectories",
    "saddle",
    "rates",
    "selection",
    "plateaus",
    "detours",
    "invariants",
    "low_rank",
    "nonlinearity",
    "sizes",
    "bias",
    "window",
    "unaligned",
    "learned_ranks",
    "learned_plateaus",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Check the theory of linear networks: what BPTT, TBPTT and RFLO learn, how fast, and where.

    Every row of the table is a claim of localgrad.theory beside what networks did that the
    library's own rules trained, in float64; the last two phenomena ask the same of a GRU and a
    rate network on digits, where the theory promises nothing. Prints the table; writes
    results.json and figures.

    `python -m experiments linear_dynamics` takes 4 to 7 minutes on two cores, mostly
    compiling. All 53 claims held with seeds 0 and 1 (a claim that fails is exit status 1): networks
    follow the mode equations to 1e-12, late rates agree to 1e-3, RFLO's change has exactly the
    outputs' rank. On digits, from small weights, the GRU waits 23 updates a factor e under BPTT
    (linear theory: 19) and none under random feedback; its rank is not low.

    Reference: Williams, Payeur and Lajoie, 2026, https://arxiv.org/abs/2606.00243.

    Attributes:
        phenomena: which to look at.
        updates: gradient steps of the networks whose whole course is compared.
        seed: where randomness starts: every claim draws its strengths, weights or data by it.
        short: fewer steps and starts: a glance, for tests and notebooks.
        workdir: the folder to write to, where the same command goes on after an interruption.
    """

    phenomena: tuple[Name, ...] = get_args(Name)
    updates: int = 400
    seed: int = 0
    short: bool = False
    workdir: Path = Path("results/linear_dynamics")

    @property
    def steps(self) -> int:
        """The updates, fewer in short."""
        return min(self.updates, 100) if self.short else self.updates


PHENOMENA: dict[Name, Callable[[Any], Finding]] = {
    "trajectories": lambda config: aligned.trajectories(config.steps, config.seed),
    "saddle": lambda config: points.saddle(config.seed),
    "rates": lambda config: points.rates(config.seed),
    "selection": lambda config: points.selection(4 if config.short else 16, config.seed),
    "plateaus": lambda config: journeys.plateaus(config.seed),
    "detours": lambda config: journeys.detours(config.seed),
    "invariants": lambda config: aligned.invariants(config.steps, config.seed),
    "low_rank": lambda config: ranks.low_rank(config.steps, config.seed),
    "nonlinearity": lambda config: ranks.nonlinearity(config.steps, config.seed),
    "sizes": lambda config: ranks.sizes(ranks.COUNTS[: 2 if config.short else None], config.seed),
    "bias": lambda config: journeys.bias(config.seed),
    "window": lambda config: journeys.window(config.seed),
    "unaligned": lambda config: aligned.unaligned(5 * config.steps, config.seed),
    "learned_ranks": beyond.learned_ranks,
    "learned_plateaus": beyond.plateaus,
}


def run(config: Config) -> dict[str, Finding]:
    """Looks at each phenomenon; prints the table and writes JSON and figures.

    Raises:
        ClaimFailed: at the end, if a claim did not hold.
    """
    check(config)
    pieces = claim_folder(config.workdir, config, "diffrax")
    print(header(config), flush=True)
    findings, seconds = {}, {}
    with jax.enable_x64(True):
        with progress(config.phenomena, unit="phenomenon") as bar:
            for name in bar:
                bar.set_description(name)
                begin = time.perf_counter()
                findings[name] = pieces.made(name, functools.partial(PHENOMENA[name], config))
                seconds[name] = round(time.perf_counter() - begin, 1)
                write(config, findings, seconds, finished=False)
        rows = [row for finding in findings.values() for row in finding.rows]
        print("\n" + as_text(rows), flush=True)
        write(config, findings, seconds)
        drawn = figures.draw(findings, config.workdir)
    print(f"{sum(seconds.values()):.0f} s in all, {len(drawn)} figures. Results: {config.workdir}/")
    print(conclusion(rows))
    if not all(row.holds for row in rows):
        raise ClaimFailed("a claim failed; see above.")
    return findings


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before anything is computed."""
    if not config.phenomena:
        raise ValueError(f"no phenomenon given; choose from: {', '.join(PHENOMENA)}.")
    for name in config.phenomena:
        lookup("phenomenon", PHENOMENA, name)
    require_seed(config.seed)
    if config.updates < 20:
        raise ValueError(f"updates must be at least 20; got {config.updates}.")
    if importlib.util.find_spec("diffrax") is None:
        raise ValueError("gradient flow needs diffrax: pip install 'localgrad[theory]'.")


def header(config: Config) -> str:
    """What is about to happen."""
    return (
        f"Theory beside networks, {len(config.phenomena)} phenomena: {', '.join(config.phenomena)}."
        "\nAll of them take 4 to 7 minutes on two cores, mostly compiling."
    )


def conclusion(rows: list[Row]) -> str:
    """How many claims hold, and which do not."""
    claims = [row for row in rows if row.bar is not None]
    wrong = [row for row in claims if not row.holds]
    if not claims:
        return "Nothing is claimed of this."
    if not wrong:
        return f"All {len(claims)} claims of the theory hold."
    listed = "\n".join(f"  row {row.number}: {row.claim}" for row in wrong)
    return f"{len(wrong)} of {len(claims)} claims of the theory FAIL:\n{listed}"


def write(
    config: Config,
    findings: dict[str, Finding],
    seconds: dict[str, float],
    *,
    finished: bool = True,
) -> None:
    """Writes what was found, all of it or so far."""
    content = {
        **circumstances(config, "diffrax"),
        "seconds": seconds,
        "rows": {name: [as_json(row) for row in found.rows] for name, found in findings.items()},
    }
    write_results(config.workdir, content, finished=finished)


def as_json(row: Row) -> dict[str, Any]:
    """A row as a dictionary; JSON has no NaN, so that a broken error is null."""
    error = row.error if row.error is not None and math.isfinite(row.error) else None
    return {**row._asdict(), "error": error, "claimed": row.bar is not None, "holds": row.holds}
