"""What the experiment claims; a claim that fails ends the command with an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.claims import Claim, less
from experiments.online.lags import Price, lags
from experiments.online.problems import FIRST, LONGEST
from experiments.online.report import Panel

FULL = ("tbptt10", "rtrl")  # far enough back, with an update every few steps
NEAR = ("snap", "eprop")  # within a unit
ONE = ("tbptt1", "tbptt1_rmsprop")  # of their own step
BLIND = (*ONE, "readout_only")
LITTLE, MOST = 0.01, 0.8  # of chance
DRAWN = ("kf_rtrl",), ("uoro",)
SUM = ("ok",)  # of Kronecker products
WIRED = ("snap2_sparse",), ("snap_sparse",)
TOLD = ("modprop_types",), ("eprop_types",)
EXACT, ALONE = 0.999, 0.99  # cosines


def of_panel(panel: Panel) -> list[Claim]:
    """What is claimed of a problem, as far as its rows are there."""
    last = {name: outcome.final.mean() for name, outcome in panel.outcomes.items()}
    said = CLAIMS[panel.problem.name](panel, last)
    return [claim for claim in said if claim is not None]


def of_copy(panel: Panel, last: Mapping[str, float]) -> Sequence[Claim | None]:
    """Bits over a pause."""
    title = "copy: the pause grows to its limit in every network"
    shown = f"{title} under BPTT, TBPTT(10), RTRL, SnAp-1 and e-prop"
    return [
        _pauses(shown, panel, ("bptt", *FULL, *NEAR), lambda p: p.min() == LONGEST),
        _pauses(
            "copy: it stays below 4 where credit is of one step, with Adam and with RMSprop",
            panel,
            BLIND,
            lambda p: p.max() < 4,
        ),
        less("copy: MDGL is five times nearer than e-prop", last, ("mdgl",), ("eprop",), 0.2),
        less("copy: KF-RTRL is a hundred times nearer than UORO", last, *DRAWN, 0.01),
        less("copy: on wires SnAp-2 is ten times nearer than SnAp-1", last, *WIRED, 0.1),
        less(
            "copy: RTRL and OK(4) are ten times nearer than rules of one unit",
            last,
            ("rtrl", *SUM),
            NEAR,
            0.1,
        ),
        less("copy: and no farther than BPTT, which unrolls", last, ("rtrl",), ("bptt",), 1),
    ]


def of_xor(panel: Panel, last: Mapping[str, float]) -> Sequence[Claim | None]:
    """Two bits together."""
    chance = {**last, "chance": next(iter(panel.problem.floors.values()))}
    learned, lost = ("bptt", *FULL, *NEAR), (*BLIND, "bptt_lru", "eprop_lru")
    return [
        less(
            "xor: GRUs learn it under rules of one unit too", chance, learned, ("chance",), LITTLE
        ),
        _least("xor: not with credit of one step, nor where units are linear", chance, lost, MOST),
    ]


def of_coin(panel: Panel, last: Mapping[str, float]) -> Sequence[Claim | None]:
    """Two lags."""
    floors = panel.problem.floors
    known = {
        **last,
        "one": floors[f"knows that of {FIRST} steps ago"],
        "both": floors["knows both"],
    }
    middle = {**known, "middle": (known["one"] + known["both"]) / 2}
    title = "coin: full credit knows more than half of what the farther coin tells"
    return [
        less(title, middle, ("bptt", *FULL), ("middle",), 1),
        less("coin: credit of one step none of it", known, ("one",), BLIND, 1),
        less("coin: nor UORO, of rank one", known, ("one",), DRAWN[1], 1),
        less("coin: KF-RTRL and DNI more than e-prop", last, (*DRAWN[0], "dni"), NEAR[1:], 1),
        less("coin: OK(4) more than KF-RTRL", last, SUM, DRAWN[0], 1),
        less("coin: on wires SnAp-2 more than SnAp-1", last, *WIRED, 1),
        less("coin: of two types ModProp more than e-prop", last, *TOLD, 1),
    ]


def of_chaos(panel: Panel, last: Mapping[str, float]) -> Sequence[Claim | None]:
    """A series."""
    known = {**last, "line": panel.problem.floors["linear, of the last 2"]}
    learned = ("bptt", *FULL, *NEAR, *ONE)
    return [
        less(
            "Mackey-Glass: all are half as far off as a line through the last two values",
            known,
            learned,
            ("line",),
            0.5,
        ),
        less(
            "Mackey-Glass: credit of one step is ten times nearer than a readout alone",
            last,
            ONE,
            ("readout_only",),
            0.1,
        ),
    ]


def of_text(panel: Panel, last: Mapping[str, float]) -> Sequence[Claim | None]:
    """Characters."""
    known = {**last, **panel.problem.floors}
    return [
        less("text: far credit, every few steps, beats credit of one unit", last, FULL, NEAR, 1),
        less("text: which beats credit of one step", last, NEAR, ONE, 1),
        less("text: OK(4) beats KF-RTRL", last, SUM, DRAWN[0], 1),
        less("text: on wires SnAp-2 beats SnAp-1", last, *WIRED, 1),
        less("text: which beats a table of pairs", known, ONE, ("bigram",), 1),
    ]


CLAIMS: dict[str, Callable[[Panel, Mapping[str, float]], Sequence[Claim | None]]] = {
    "copy": of_copy,
    "xor": of_xor,
    "coin": of_coin,
    "mackey_glass": of_chaos,
    "text": of_text,
}


def of_lags(found: Mapping[str, np.ndarray]) -> list[Claim]:
    """What is claimed of credit over time, fresh and trained."""
    claims = []
    exact = [name for name in ("rtrl", "eprop_lru", "rtrl_rtu") if name in found]
    if exact:
        worst = min(found[name].min() for name in exact)
        text = "credit: RTRL's in chunks is BPTT's at every lag, and on linear units so is e-prop's"
        claims.append(Claim(text, f"cosine at least {worst:.5f}", bool(worst > EXACT)))
    if "tbptt10" in found:
        means = found["tbptt10"].mean(axis=(0, 2))
        short, far = means[0], means[-1]
        text = f"credit: TBPTT(10)'s is near BPTT's over {lags()[0]} steps, and not beyond 10"
        measured = f"cosine {short:.2f}, {far:.2f} over {lags()[-1]} steps"
        claims.append(Claim(text, measured, bool(short > 0.9 and far < short - 0.1)))
    return claims


def of_prices(prices: Mapping[str, Price]) -> list[Claim]:
    """What is claimed of costs."""
    if not {"rtrl", "snap", "eprop", "tbptt1"} <= {*prices}:
        return []
    share = prices["rtrl"].state / prices["snap"].state
    times = prices["rtrl"].microseconds / prices["eprop"].microseconds
    return [
        Claim(
            "price: RTRL keeps twenty times what SnAp-1 keeps, and more",
            f"{share:.0f} times",
            bool(share > 20),
        ),
        Claim("price: and takes five times as long as e-prop", f"{times:.1f} times", times > 5),
    ]


def _pauses(
    text: str, panel: Panel, names: Sequence[str], holds: Callable[[np.ndarray], bool]
) -> Claim | None:
    """Of the pauses that networks ended with; None without the rows."""
    if not {*names} <= {*panel.outcomes}:
        return None
    ends = {name: panel.outcomes[name].pauses[:, -1] for name in names}
    measured = ", ".join(f"{k} {v.min()} to {v.max()}" for k, v in ends.items())
    return Claim(text, measured, all(bool(holds(end)) for end in ends.values()))


def _least(
    text: str, last: Mapping[str, float], names: Sequence[str], share: float
) -> Claim | None:
    """That all are at least a share of chance."""
    return less(text, {**last, "chance": share * last["chance"]}, ("chance",), names, 1)
