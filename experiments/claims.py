"""Claims: what an experiment says, with what it measured; one that fails is an error."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Claim(NamedTuple):
    """One claim.

    Attributes:
        text: in words.
        measured: what was found, in words.
        holds: whether that confirms it.
    """

    text: str
    measured: str
    holds: bool


class ClaimFailed(Exception):
    """Something that was claimed is not so; the command's exit status is 1."""


def less(
    text: str, last: Mapping[str, float], low: Sequence[str], high: Sequence[str], share: float
) -> Claim | None:
    """That the worst of some rows is less than a share of the best of others; None without them."""
    if not {*low, *high} <= {*last}:
        return None
    ours, theirs = {k: last[k] for k in low}, {k: last[k] for k in high}
    measured = ", ".join(f"{k} {v:.3g}" for k, v in (ours | theirs).items())
    return Claim(text, measured, bool(max(ours.values()) < share * min(theirs.values())))


def claims_table(claims: Sequence[Claim]) -> str:
    """Claims with their verdicts."""
    lines = []
    for claim in claims:
        verdict = "holds" if claim.holds else "FAILS"
        text = f"{verdict}  {claim.text}: {claim.measured}"
        lines += textwrap.wrap(text, 118, subsequent_indent=" " * 7)
    return "\n".join(lines)


def conclusion(claims: Sequence[Claim]) -> str:
    """How many hold."""
    wrong = sum(not claim.holds for claim in claims)
    if not claims:
        return "Nothing is claimed of this."
    if wrong:
        return f"{wrong} of {len(claims)} claims FAIL."
    return f"All {len(claims)} claims hold."


def require(claims: Sequence[Claim]) -> None:
    """Raises unless all hold."""
    if not all(claim.holds for claim in claims):
        raise ClaimFailed("a claim failed; see above.")
