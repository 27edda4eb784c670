"""e-prop in depth: what credit across layers and time buys, on tasks that need it or do not."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.choices import lookup, require_counts, require_seed
from experiments.claims import Claim, claims_table, conclusion, require
from experiments.deep import claims, figures, report
from experiments.deep.memory import Size, sizes
from experiments.deep.stacks import STACKS, Stack, StackName
from experiments.deep.study import Study, run_study
from experiments.deep.trials import Trial, linear_floors, run_trials
from experiments.folder import claim_folder, write_results
from experiments.report import circumstances, footnote
from experiments.tasks.crowded_cue import crowded_cue

Part = Literal["crowd", "study", "memory"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Does e-prop assign credit through a stack, does it need to, and what does it cost?

    *crowd*: a cue among many channels, which a stack loses unless its lowest layer learns, and
    learns only by credit that comes through the memory of the layers above. Rate, GRU, LRU and
    ALIF stacks of 1 to 8 layers under deep e-prop, its ablations, its rivals and BPTT. *study*: the
    task of the public study of deep e-prop, beside its numbers. *memory*: what the traces take.
    Prints tables and claims, of which any that fails ends the command with an error; writes
    results.json and figures.

    `python -m experiments deep` takes about 40 minutes on two cores. At the longest delay, two
    layers, accuracies (%) of BPTT, deep e-prop, e-prop and a frozen lower layer: rate units 100,
    99, 56, 60; GRU 99, 59, 51, 49; LRU 99, 99, 56, 57; ALIF 98, 96, 52, 55. On the study's task
    BPTT took 112 updates to 90 %, deep e-prop 440, its ablations 849 and 871 (there 95, 256, 473,
    458).
    docs/papers/deep_eprop.md has the rest.

    Attributes:
        parts: what to do.
        stacks: the kinds of networks.
        depths: numbers of layers.
        full: the depth at which every rule is tried; at the others the four that matter.
        delays: steps between pattern and answer, ascending; alignment is shown at the
            last.
        batch_size: sequences an update, in `crowd`.
        seeds: runs of each rule there.
        checkpoints: how often a run is tested.
        criterion: the accuracy that counts as learned.
        repeats: rounds of the timing, beside whatever the other workers do.
        workers: processes that train, each one stack of one depth at a time.
        study_steps: updates in `study`.
        study_seeds: runs of each rule there.
        study_checkpoints: how often a run is tested there.
        seed: where all randomness starts.
        short: few updates of a few small networks, and no verdict: a glance, for tests and
            notebooks.
        workdir: the folder to write to, where the same command goes on after an interruption.
    """

    parts: tuple[Part, ...] = get_args(Part)
    stacks: tuple[StackName, ...] = tuple(STACKS)
    depths: tuple[int, ...] = (1, 2, 4, 8)
    full: int = 2
    delays: tuple[int, ...] = (2, 6, 12)
    batch_size: int = 32
    seeds: int = 5
    checkpoints: int = 20
    criterion: float = 0.9
    repeats: int = 20
    workers: int = 2
    study_steps: int = 1500
    study_seeds: int = 8
    study_checkpoints: int = 60
    seed: int = 0
    short: bool = False
    workdir: Path = Path("results/deep")

    def steps_of(self, stack: Stack) -> int:
        """Updates that every rule gets on a stack."""
        return self.checkpoints if self.short else stack.steps


def run(config: Config) -> list[Claim]:
    """Runs the parts; prints tables and claims, and writes JSON and figures."""
    begin = time.perf_counter()
    if config.short:
        config = dataclasses.replace(config, checkpoints=2, study_steps=2, study_checkpoints=2)
    check(config)
    pieces = claim_folder(config.workdir, config)
    print(header(config), flush=True)
    trials: list[Trial] = []
    if "crowd" in config.parts:
        trials = run_trials(config, pieces, lambda done: write(config, begin, done, finished=False))
    studied = run_study(config, pieces) if "study" in config.parts else None
    sized = sizes("rate") if "memory" in config.parts else []
    found = []
    if trials:
        show_trials(config, trials)
        found += claims.of_trials(trials, config.delays)
    if studied is not None:
        print("\n" + report.study_table(studied))
        figures.study(studied, config.workdir / "study.png")
        found += claims.of_study(studied)
    if sized:
        print("\n" + report.memory_table(sized))
        figures.memory(sized, config.workdir / "memory.png")
        found += claims.of_memory(sized)
    write(config, begin, trials, studied, sized, found)
    print(f"\n{claims_table(found)}\n")
    seconds = time.perf_counter() - begin
    print(f"{seconds:.0f} s in all. Results and figures: {config.workdir}/")
    print(conclusion(found))
    if not config.short:
        require(found)
    return found


def show_trials(config: Config, trials: list[Trial]) -> None:
    """Prints a table a stack, and draws."""
    for name in config.stacks:
        own = [trial for trial in trials if trial.stack == name]
        task = crowded_cue(config.seed, channels=STACKS[name].channels, delay=config.delays[-1])
        last, whole = linear_floors(task, 200 if config.short else 8192)
        floors = {
            "chance": f"{100 * task.floors.accuracy:.1f} %",
            "linear classifier": f"of the last two inputs {100 * last:.1f} %, of all of them "
            f"{100 * whole:.1f} %",
        }
        print("\n" + report.trials_table(own, config.delays, config.criterion, floors), flush=True)
    print("\n" + footnote(report.NOTES, {rule for trial in trials for rule in trial.outcomes}))
    figures.accuracies(trials, config.delays, config.workdir / "accuracies.png")
    figures.alignments(trials, config.delays[-1], config.workdir / "alignments.png")


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before anything is compiled."""
    for name in config.stacks:
        lookup("stack", STACKS, name)
    for field in ("parts", "stacks", "depths", "delays"):
        if not getattr(config, field):
            raise ValueError(f"{field} is empty; name at least one.")
    if list(config.delays) != sorted(set(config.delays)):
        raise ValueError(f"delays must ascend; got {config.delays}.")
    if min(config.depths) < 1:
        raise ValueError(f"depths must be at least 1; got {config.depths}.")
    require_seed(config.seed)
    require_counts(
        config, "batch_size", "seeds", "checkpoints", "repeats", "workers", "study_seeds"
    )
    for steps, checkpoints in [
        *((config.steps_of(STACKS[name]), config.checkpoints) for name in config.stacks),
        (config.study_steps, config.study_checkpoints),
    ]:
        if steps % checkpoints:
            raise ValueError(f"{checkpoints} checkpoints must divide the {steps} updates.")


def header(config: Config) -> str:
    """What is about to happen."""
    parts = f"e-prop in depth: {', '.join(config.parts)}."
    if "crowd" not in config.parts:
        return parts
    layers = ", ".join(map(str, config.depths))
    return f"{parts} Stacks: {', '.join(config.stacks)}, layers: {layers}."


def write(
    config: Config,
    begin: float,
    trials: list[Trial],
    studied: Study | None = None,
    sized: Sequence[Size] = (),
    found: Sequence[Claim] = (),
    *,
    finished: bool = True,
) -> None:
    """Writes what was found since `begin`, all of it or so far."""
    content: dict[str, Any] = {
        **circumstances(config),
        "seconds": round(time.perf_counter() - begin, 1),
        "crowd": [report.trial_as_json(trial) for trial in trials],
        "study": None if studied is None else report.study_as_json(studied),
        "memory": [size._asdict() for size in sized],
        "claims": [claim._asdict() for claim in found],
    }
    write_results(config.workdir, content, finished=finished)
