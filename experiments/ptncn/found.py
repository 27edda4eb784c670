"""What a part of the experiment found, and which data it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from experiments.claims import Claim
from experiments.datasets import root_of


class Found(NamedTuple):
    """What a part found.

    Attributes:
        table: to print.
        content: for results.json.
        claims: what it says.
    """

    table: str
    content: dict[str, Any]
    claims: list[Claim]


def best_source(named: str | None, data_dir: Path | None, real: str, default: str) -> str:
    """The source that is named, or the real one if there is a folder of data, or the default."""
    if named is not None:
        return named
    return default if root_of(data_dir) is None else real
