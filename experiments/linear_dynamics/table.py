"""The table: one row a claim of the theory, with what it predicts and what networks did."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

INDENT = " " * 6


class Row(NamedTuple):
    """One claim.

    Attributes:
        number: of the phenomenon.
        claim: in words.
        theory: what is predicted.
        simulation: what networks under the library's rules did.
        error: how far apart they are.
        bar: the largest error that confirms the claim; None for what the theory does not predict.
    """

    number: str
    claim: str
    theory: str
    simulation: str
    error: float | None = None
    bar: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the claim was confirmed, or nothing was claimed."""
        return self.bar is None or (self.error is not None and self.error <= self.bar)


class Finding(NamedTuple):
    """What one phenomenon gave: rows of the table, and what its figure shows."""

    rows: list[Row]
    data: dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """The claims as a table, and below it what was measured where the theory claims nothing."""
    cells = [["", "claim", "theory", "simulation", "error", "bar", ""]]
    for row in rows:
        if row.bar is not None:
            error = "" if row.error is None else f"{row.error:.1e}"
            verdict = "holds" if row.holds else "FAILS"
            line = [row.number, row.claim, row.theory, row.simulation, error]
            cells.append([*line, f"{row.bar:.0e}", verdict])
    widths = [max(len(line[k]) for line in cells) for k in range(7)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    lines = [line.rstrip() for line in lines]
    rule = "-" * max(map(len, lines))
    found = [lines[0], rule, *lines[1:], rule] if len(lines) > 1 else []
    measured = [row for row in rows if row.bar is None]
    if measured:
        found.append("Measured beside it, where the theory claims nothing:")
    for row in measured:
        linear = f" ({row.theory})" if row.theory not in ("", "not predicted") else ""
        found.append(f"{row.number}  {row.claim}{linear}")
        found += textwrap.wrap(row.simulation, 96, initial_indent=INDENT, subsequent_indent=INDENT)
    return "\n".join(found)


def several(values: Any, digits: int = 4) -> str:
    """Numbers in one cell of the table."""
    return ", ".join(f"{float(value):.{digits}g}" for value in values)
