"""What the experiment claims; a claim that fails ends the command with an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.claims import Claim
from experiments.deep.memory import Size
from experiments.deep.stacks import STACKS
from experiments.deep.study import PUBLISHED, PUBLISHED_COSINES, Study
from experiments.deep.trials import Trial

LEARNED, LOST, LARGER = 0.9, 0.75, 1.5
TESTED = 512  # sequences of the crowded cue's test set


def of_trials(trials: list[Trial], delays: tuple[int, ...]) -> list[Claim]:
    """What is claimed of the crowded cue, for the stacks, depths and delays that were tried."""
    claims = []
    for name in dict.fromkeys(trial.stack for trial in trials):
        own = [trial for trial in trials if trial.stack == name]
        learned = [delay for delay in delays if delay <= STACKS[name].learned]
        claims += [_of_learning(own, learned[-1])] if learned else []
        stacked = [trial for trial in own if trial.depth > 1]
        claims += _of_depth(stacked, delays[-1]) if stacked else []
    return claims + _of_lru(trials)


def _of_learning(trials: list[Trial], delay: int) -> Claim:
    """That deep e-prop learns where BPTT does, at the longest delay claimed of the stack."""
    learned = [t for t in trials if t.outcomes["bptt"].accuracy(delay).mean() >= LEARNED]
    found = [t.outcomes["deep_eprop"].accuracy(delay).mean() for t in learned]
    depths = ", ".join(str(trial.depth) for trial in learned) or "none"
    accuracies = f": accuracy {_percent(found)} at delay {delay}" if found else ""
    return Claim(
        f"{STACKS[trials[0].stack].label}: deep e-prop learns at every depth at which BPTT does",
        f"depths {depths}{accuracies}",
        bool(found) and min(found) >= LEARNED,
    )


def _of_depth(trials: list[Trial], delay: int) -> list[Claim]:
    """What is needed for it, in stacks of several layers."""
    label = STACKS[trials[0].stack].label
    over, larger = [], []
    for trial in trials:
        frozen, deep = trial.outcomes["no_spatial"], trial.outcomes["deep_eprop"]
        # A theorem, but for the test set: three standard errors of a seed's accuracy.
        excess = frozen.accuracy(delay) - trial.ceilings
        over.append(excess.max() - 3 * np.sqrt(0.25 / TESTED))
        ratios = deep.norm_ratio[delay], trial.outcomes["eprop"].norm_ratio[delay]
        larger.append(ratios[0][:, 0].mean() / ratios[1][:, 0].mean())
    return [
        Claim(
            f"{label}: with lower layers frozen no seed passes its ceiling",
            f"at most {100 * max(over):+.1f} points beyond it and three standard errors",
            max(over) <= 0,
        ),
        _most(f"{label}: with lower layers frozen it fails", trials, "no_spatial", delay),
        _most(f"{label}: without the upper layers' past (e-prop) it fails", trials, "eprop", delay),
        Claim(
            f"{label}: deep e-prop's credit of the lowest layer is larger than e-prop's",
            f"{min(larger):.1f} to {max(larger):.0f} times",
            min(larger) >= LARGER,
        ),
    ]


def _of_lru(trials: list[Trial]) -> list[Claim]:
    gaps = [
        np.abs(1 - outcome.cosine[delay]).max()
        for trial in trials
        if trial.stack == "lru"
        for outcome in [trial.outcomes["deep_eprop"]]
        for delay in outcome.cosine
    ]
    if not gaps:
        return []
    worst = max(gaps)
    text = "LRU: deep e-prop is BPTT, layer by layer, at every depth and delay"
    return [Claim(text, f"1 - cosine at most {worst:.0e}", worst < 1e-4)]


def _most(text: str, trials: list[Trial], rule: str, delay: int) -> Claim:
    accuracies = [trial.outcomes[rule].accuracy(delay).mean() for trial in trials]
    measured = f"accuracy {_percent(accuracies)} at delay {delay}"
    return Claim(text, measured, max(accuracies) <= LOST)


def of_study(study: Study) -> list[Claim]:
    """What is claimed of the public study's task: that its findings are found again."""
    updates = {rule: study.updates(rule).mean() for rule in study.histories}
    accuracy = {rule: study.accuracy(rule).mean() for rule in study.histories}
    order = ["bptt", "deep_eprop", "no_temporal"]
    claims = [
        Claim(
            "study: BPTT reaches 90 % first, then deep e-prop, then both of its ablations",
            ", ".join(f"{rule} {updates[rule]:.0f}" for rule in [*order, "no_spatial"]),
            updates["bptt"]
            < updates["deep_eprop"]
            < min(updates["no_temporal"], updates["no_spatial"]),
        ),
        Claim(
            "study: with the lower layer frozen its task is learned: depth is not needed there",
            f"accuracy {100 * accuracy['no_spatial']:.1f} %, there 98.9",
            accuracy["no_spatial"] >= 0.95,
        ),
        Claim(
            "study: with both layers frozen it is not",
            f"accuracy {100 * accuracy['readout_only']:.1f} %, there 75.3",
            abs(accuracy["readout_only"] - PUBLISHED["readout_only"].accuracy) <= 0.06,
        ),
    ]
    for delay, there in PUBLISHED_COSINES.items():
        here = study.cosines[delay].mean(axis=0)
        claims.append(
            Claim(
                f"study: cosine to BPTT before training at delay {delay}, lower and upper layer",
                f"{here[0]:.3f}, {here[1]:.3f}; there {there[0]:.3f}, {there[1]:.3f}",
                bool(np.all(np.abs(here - there) <= 0.05)),
            )
        )
    return claims


def of_memory(sizes: Iterable[Size]) -> list[Claim]:
    """What is claimed of the traces' size."""
    deep = [size for size in sizes if size.depth > 1]
    shares = [size.deep_eprop / size.rtrl for size in deep]
    few = [size for size in sizes if size.depth == 1]
    return [
        Claim(
            "memory: one layer takes deep e-prop no more than e-prop",
            f"{max(size.deep_eprop / size.eprop for size in few):.2f} times",
            all(size.deep_eprop == size.eprop for size in few),
        ),
        Claim(
            "memory: in a stack it takes a third of RTRL's influence and more",
            f"{min(shares):.2f} to {max(shares):.2f} of it",
            min(shares) >= 0.33,
        ),
    ]


def _percent(values: list[Any]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{low:.1f} to {high:.1f} %" if len(values) > 1 else f"{low:.1f} %"
