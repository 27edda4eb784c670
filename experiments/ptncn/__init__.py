"""P-TNCN and LRA: online, without unrolling, beside the rivals that its paper names."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.choices import lookup, require_counts
from experiments.claims import claims_table, conclusion, require
from experiments.folder import claim_folder, write_results
from experiments.ptncn import continual, text, video, zeroshot
from experiments.ptncn.rows import ROWS
from experiments.ptncn.sizes import SIZES, Size, SizeName
from experiments.report import circumstances

PARTS: dict[str, Any] = {
    "video": video,
    "text": text,
    "zeroshot": zeroshot,
    "continual": continual,
}
Part = Literal["video", "text", "zeroshot", "continual"]


@dataclasses.dataclass(frozen=True)
class Config:
    """P-TNCN, which never unrolls, beside BPTT, RTRL, e-prop, echo states and SAB.

    *video*: frames of bouncing glyphs, each predicted from those before. *text*: characters, or
    words, of sentences. All rivals have the P-TNCN's number of parameters, but for exact RTRL,
    whose influence would not fit: it gets 64 MiB of that. All see the same number of frames, and
    try three learning rates, and more where the best is an edge; floors stand below. *zeroshot*:
    trained on one set of glyphs, frozen, tried on another, with the states corrected and not.
    *continual*: one task after another, and what is left of each. Prints a table and claims, of
    which any that fails ends the command with an error; writes results.json and figures. A run that
    was interrupted goes on with the same command.

    On one core that was shared, in small size: `video` 38 min (digits; nats a frame: e-prop 55.4,
    BPTT 58.5 and 59.1, P-TNCN 60.0, echo states 66, RTRL 86 and 87); `text --data-dir DIR` 98 min,
    62 of them RTRL's (Penn Treebank; bits: BPTT 2.21 and 2.22, RTRL 2.42 and 2.54, P-TNCN 2.66,
    echo states 3.01); `zeroshot` 3 min (digits never seen: P-TNCN 60.7, uncorrected 64.0, BPTT 58.9
    and 59.7); `continual` 8 min (forgotten: P-TNCN 0.3, BPTT 0.5 and -1.0). docs/papers/ptncn.md
    has all numbers.

    Attributes:
        part: what to do.
        size: `small` takes minutes to an hour, `full` has the published widths and needs an
            accelerator, `short` is a glance.
        data_dir: the folder with `mnist/`, `notmnist/`, `ptb/`, as experiments/datasets says; None
            for LOCALGRAD_DATA. Without one, scikit-learn's digits and Python's manual.
        download: whether files that are missing may be asked of tensorflow-datasets.
        source: glyphs of `video` (digits, mnist, notmnist) or the text of `text` (manual, ptb,
            ptb_words, shakespeare); None for the best there is.
        rows: which rivals, of `video` and `text`.
        epochs: in place of the size's.
        seeds: runs of each row, all in one jitted function.
        workers: rows that learn at a time.
        workdir: the folder to write to, in one for each part, source and size.
    """

    part: tyro.conf.Positional[Part]
    size: SizeName = "small"
    data_dir: Path | None = None
    download: bool = False
    source: str | None = None
    rows: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{" + ",".join(ROWS) + "}")] = tuple(
        ROWS
    )
    epochs: int | None = None
    seeds: int = 3
    workers: int = 2
    workdir: Path = Path("results/ptncn")

    @property
    def sized(self) -> Size:
        """The size, by name."""
        size = SIZES[self.size]
        return size if self.epochs is None else size._replace(epochs=self.epochs)


def run(config: Config) -> Any:
    """Runs a part; prints its table and claims, and writes JSON and figures."""
    begin = time.perf_counter()
    check(config)
    part = PARTS[config.part]
    source = part.source_of(config)
    folder = config.workdir / f"{config.part}_{source}_{config.size}"
    claim_folder(folder, config)
    print(f"P-TNCN: {config.part}, {source}, {config.size}; seeds: {config.seeds}.", flush=True)
    found = part.run(config, source, folder)
    seconds = time.perf_counter() - begin
    content = {
        **circumstances(config),
        "seconds": round(seconds, 1),
        **found.content,
        "claims": [claim._asdict() for claim in found.claims],
    }
    write_results(folder, content)
    print(f"\n{found.table}\n\n{claims_table(found.claims)}\n")
    print(f"{seconds:.0f} s in all. Results and figures: {folder}/")
    print(conclusion(found.claims))
    if config.size != "short":
        require(found.claims)
    return found


def check(config: Config) -> None:
    """Refuses a configuration that cannot run, before anything is read or compiled."""
    for name in config.rows:
        lookup("row", ROWS, name)
    if config.part in ("video", "text") and "ptncn" not in config.rows:
        raise ValueError("rows must hold ptncn, which the others are measured against.")
    require_counts(config, "seeds", "workers", *(["epochs"] if config.epochs is not None else []))
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise ValueError(f"data_dir must be a folder; got {config.data_dir}.")
