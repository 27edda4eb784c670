"""Tables to read, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Timing


class Ratio(float):
    """A number that reads as a factor."""

    def __str__(self) -> str:
        return f"{float(self):.3g}x"


class Bytes(int):
    """A number of bytes that reads in MiB."""

    def __str__(self) -> str:
        return f"{self / 2**20:.2f}"


class Bar(NamedTuple):
    """A claim: a ratio that must not be passed, upwards or downwards."""

    claim: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the ratio, as printed, keeps to the limit."""
        found = round(self.measured, 2)
        return found >= self.limit if self.at_least else found <= self.limit


class Table(NamedTuple):
    """Rows of cells under a title and one line of explanation."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __str__(self) -> str:
        lines = [list(self.header), *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        return "\n".join(
            ["", self.title, self.note, aligned[0], "-" * len(aligned[0])] + aligned[1:]
        )

    @property
    def markdown(self) -> str:
        """The same for a page."""
        lines = [self.header, ["---"] + ["--:"] * (len(self.header) - 1), *self.rows]
        table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        return f"### {self.title}\n\n{table}\n\n{self.note}\n"


def write_json(path: Path, device: str, sections: Mapping[str, Sequence[Table | Bar]]) -> None:
    """Writes every table and bar: times in milliseconds, memory in bytes."""

    def plain(value: Any) -> Any:
        if isinstance(value, Timing | Table):
            return {key: plain(item) for key, item in value._asdict().items()}
        if isinstance(value, Bar):
            return value._asdict() | {"met": value.met}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    found = {name: plain(list(section)) for name, section in sections.items()}
    path.write_text(json.dumps({"device": device, "sections": found}, indent=2) + "\n")


def table_of_bars(bars: Sequence[Bar]) -> Table:
    """The verdicts: a bar, what was measured, met or not."""
    rows = [
        [
            bar.claim,
            f"at {'least' if bar.at_least else 'most'} {bar.limit:g}x",
            f"{bar.measured:.2f}x",
            "met" if bar.met else "MISSED",
        ]
        for bar in bars
    ]
    return Table("Bars", "Ratios of medians.", ["claim", "bar", "measured", ""], rows)
