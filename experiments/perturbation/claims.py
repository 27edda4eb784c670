"""What the experiment claims; a claim that fails ends the command with an error."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.claims import Claim, less
from experiments.perturbation.report import Panel
from experiments.perturbation.rows import MANY, SAMPLED
from experiments.perturbation.variance import KINDS, Point, over, slope

CLOSE, ERRORS = 0.05, 3.0  # of theory; or so many standard errors
FLAT, STEEP = 0.1, 0.8  # exponents of T
QUARTER, HALF = 0.25, 0.5
Names = Sequence[str]
ONE = ("np_causal", "wp")
BLIND = ("np_step", "anp_step", "readout_only")
HORIZON = ("tbptt1", *BLIND)
SINGLE = (*ONE, "anp_causal", "np_step", "anp_step", "published")


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
    resynced = [_at(points, "np_resync", node).measured / node.measured for _, node in pairs]
    return [
        *claims,
        Claim(
            "variance: over T weight perturbation's is constant, and that of node perturbation "
            "under causal and total credit grows nearly as T",
            f"exponents {said}",
            bool(flat < FLAT and min(steep) > STEEP),
        ),
        Claim(
            "variance: under step credit ANP's is less than NP's, at every size",
            f"{min(shares):.2f} to {max(shares):.2f} of it",
            bool(max(shares) < 1),
        ),
        Claim(
            "variance: of NP under step credit it is less where copies begin each step from the "
            "clean carry, at every size",
            f"{min(resynced):.2f} to {max(resynced):.2f} of it",
            bool(max(resynced) < 1),
        ),
    ]


def _at(points: Sequence[Point], kind: str, other: Point) -> Point:
    return next(p for p in points if (p.kind, p.units, p.steps) == (kind, other.units, other.steps))


def of_panel(panel: Panel) -> list[Claim]:
    """What is claimed of a problem, as far as its rows are there."""
    name, last = panel.problem.name, {k: o.final.mean() for k, o in panel.outcomes.items()}
    said = []
    if name in ("sign", "recall"):
        title = f"{name}: causal credit does better than step credit and a readout alone"
        said.append(less(f"{title}, one sample", last, ONE, BLIND, 1))
        said.append(less(f"{title} by half, {MANY} samples", last, SAMPLED, HORIZON, HALF))
    if name in ("ahead", "behind"):
        title = f"{name}: causal credit, {MANY} samples, does better than step credit"
        said.append(less(title, last, SAMPLED, HORIZON, 1))
        title = f"{name}: the published rule is ten times as far off as BPTT"
        said.append(less(title, last, ("bptt",), ("published",), 0.1))
        title = f"{name}: and farther off than the gradient that it estimates, TBPTT(1)"
        said.append(less(title, last, ("tbptt1",), ("published",), 1))
    if name == "ahead":
        floors = {"filter": panel.problem.floors["linear filter, 20 taps"]}
        title = "ahead: one sample of causal credit is half as far off as the best linear filter"
        said.append(less(title, last | floors, ONE, ("filter",), HALF))
    if name == "copy":
        floors = {"mean": panel.problem.floors["each step's mean"]}
        title = "copy: BPTT is half as far off as each step's mean"
        said.append(less(title, last | floors, ("bptt",), ("mean",), HALF))
        rows = [k for k in SINGLE if k in last]
        title = "copy: no rule of one sample is a fifth better than each step's mean"
        said.append(less(title, last | {"mean": 0.8 * floors["mean"]}, ("mean",), rows, 1))
    for one, many in zip(ONE, SAMPLED, strict=True):
        if name in ("sign", "recall", "ahead", "behind"):
            title = f"{name}: {MANY} samples of {one.partition('_')[0].upper()} do better than one"
            said.append(less(title, last, (many,), (one,), 1))
    if name.startswith("weather"):
        floors = {"linear": panel.problem.floors["linear, of now"]}
        if name != "weather_48h":
            title = f"{name}: the past is not needed: TBPTT(1) is within a tenth of BPTT"
            said.append(less(title, last, ("tbptt1",), ("bptt",), 1.1))
        title = f"{name}: node perturbation does better under step credit"
        said.append(less(title, last, ("np_step",), ("np_causal",), 1))
        title = f"{name}: no rule of one sample does better than linear regression of what is now"
        rows = [k for k in SINGLE if k in last]
        said.append(less(title, last | floors, ("linear",), rows, 1))
    elif {"published", "published_readout"} <= {*last}:
        share = last["published"] / last["published_readout"]
        said.append(
            Claim(
                f"{name}: the published rule is within a quarter of its readout learning alone",
                f"{share:.2f} of its loss",
                bool(abs(share - 1) <= QUARTER),
            )
        )
    return [claim for claim in said if claim is not None]


def of_units(panels: Sequence[Panel]) -> list[Claim]:
    """What is claimed of the number of units, if the rows are there."""
    least, most = panels[0], panels[-1]
    names = [name for name in ("bptt", "published") if name in least.outcomes]
    shares = {
        name: most.outcomes[name].final.mean() / least.outcomes[name].final.mean() for name in names
    }
    if "published" not in shares:
        return []
    sizes = f"from {least.problem.units} to {most.problem.units} units"
    return [
        Claim(
            f"units: {sizes} BPTT's loss falls by half and more, the published rule's does not",
            ", ".join(f"{name} to {share:.2f} of it" for name, share in shares.items()),
            bool(shares["bptt"] < HALF < shares["published"]),
        )
    ]
