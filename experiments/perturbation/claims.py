"""What the experiment claims; a claim that fails ends the command with an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.claims import Claim
from experiments.perturbation.learner import Outcome
from experiments.perturbation.report import Panel
from experiments.perturbation.variance import KINDS, Point, over, slope

CLOSE, ERRORS = 0.05, 3.0  # of theory; or so many standard errors
FLAT, STEEP = 0.1, 0.8  # exponents of T


def of_variance(points: Sequence[Point]) -> list[Claim]:
    """That theory holds, and what it says of N and T."""
    claims = []
    for name, kind in KINDS.items():
        own = [p for p in points if p.kind == name]
        gaps = [abs(p.measured - p.predicted) for p in own]
        worst = max(g / p.predicted for g, p in zip(gaps, own, strict=True))
        theory = "P + 1" if name == "wp" else "theory"
        claims.append(
            Claim(
                f"variance: {kind.label} is within 5 % or three standard errors of {theory}",
                f"at most {100 * worst:.1f} % away at {len(own)} sizes",
                all(
                    gap <= max(CLOSE * p.predicted, ERRORS * p.error)
                    for gap, p in zip(gaps, own, strict=True)
                ),
            )
        )
    exponents = {name: slope(over(points, name, "steps"), "steps") for name in KINDS}
    said = ", ".join(f"{KINDS[n].label} {exponents[n]:.2f}" for n in KINDS)
    flat, steep = abs(exponents["wp"]), [exponents["np_total"], exponents["np_causal"]]
    pairs = [(_at(points, "anp_step", p), p) for p in points if p.kind == "np_step"]
    shares = [anp.measured / node.measured for anp, node in pairs]
    return [
        *claims,
        Claim(
            "variance: over T weight perturbation's is constant, and that of node perturbation "
            "under causal and total credit grows nearly as T",
            f"exponents {said}",
            flat < FLAT and min(steep) > STEEP,
        ),
        Claim(
            "variance: under step credit ANP's is less than NP's, at every size",
            f"{min(shares):.2f} to {max(shares):.2f} of it",
            max(shares) < 1,
        ),
    ]


def _at(points: Sequence[Point], kind: str, other: Point) -> Point:
    return next(p for p in points if (p.kind, p.units, p.steps) == (kind, other.units, other.steps))


def of_panel(panel: Panel) -> list[Claim]:
    """What is claimed of a problem, if there is something."""
    return []


def of_units(panels: Sequence[Panel]) -> list[Claim]:
    """What is claimed of the number of units."""
    return []


def _less(text: str, low: Mapping[str, Outcome], high: Mapping[str, Outcome]) -> Claim:
    """That the worst mean of some rows is less than the best of others."""
    ours = {name: outcome.final.mean() for name, outcome in low.items()}
    theirs = {name: outcome.final.mean() for name, outcome in high.items()}
    measured = ", ".join(f"{k} {v:.4g}" for k, v in (ours | theirs).items())
    return Claim(text, measured, max(ours.values()) < min(theirs.values()))
