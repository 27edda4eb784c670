"""Larger figures: phase portraits, the stability map, and the two beyond the theory."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap

from experiments.figures import STYLES, subplots
from localgrad import theory

KINDS = {
    "stable node": "#009E73",
    "stable spiral": "#A6DFCB",
    "saddle": "#E69F00",
    "unstable spiral": "#E3B5CE",
    "unstable node": "#CC79A7",
}
GREY = "#7F7F7F"


def look(case: dict[str, Any]) -> dict[str, Any]:
    """The style of a rule on a cell: the rate network's lines are dotted."""
    kept = {"linewidth": 1.5, **STYLES[case["rule"]]}
    if case["cell"] == "rate":
        kept["linestyle"] = (0, (1, 1))
    return kept


def marks(case: dict[str, Any]) -> dict[str, Any]:
    """The markers of a rule on a cell."""
    face = "white" if case["cell"] == "rate" else STYLES[case["rule"]]["color"]
    return {"marker": "o", "markersize": 5, "markerfacecolor": face}


def phase_portraits(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 3: flows in the (b, w) plane; the readout follows from what is conserved."""
    teacher, gain, decay = data["teacher"], data["r"], data["rho"]
    b, w = np.meshgrid(np.linspace(-2, 2, 61), np.linspace(-0.92, 0.92, 61))
    rules = {
        "BPTT, a = b": (theory.bptt(), b),
        "TBPTT(1), a² = b² + w²": (theory.tbptt(1), np.sqrt(b**2 + w**2)),
        f"RFLO, r = {gain:.2f}, rho = {decay:.2f}": (
            theory.rflo(gain, decay),
            ((w - decay) ** 2 + b**2 - decay**2) / (2 * gain),
        ),
    }
    figure, axes = subplots(1, 3, (11, 3.7), sharey=True)
    p_star, w_star = teacher.a * teacher.b, teacher.w
    for axis, (title, (rule, a)) in zip(axes[0], rules.items(), strict=True):
        down = theory.descent(rule, theory.Modes(a, w, b), theory.Endless(teacher))
        speed = np.log10(np.hypot(down.b, down.w) + 1e-9)
        axis.pcolormesh(b, w, speed, cmap="Greys", vmin=-2.5, vmax=4.5,
                        shading="gouraud", rasterized=True)  # fmt: skip
        axis.streamplot(b, w, -np.asarray(down.b), -np.asarray(down.w), color="#0072B2",
                        linewidth=0.7, density=1.1, arrowsize=0.8)  # fmt: skip
        row = np.abs(w[:, 0] - w_star).argmin()
        gap = a[row] * b[row] - p_star
        cross = np.flatnonzero(gap[:-1] * gap[1:] < 0)
        axis.plot(b[row, cross], np.full(len(cross), w_star), "*", color="#D55E00", markersize=14,
                  markeredgecolor="white", zorder=6, label="optimum: a b = p*, w = w*")  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="input b", xlim=(-2, 2), ylim=(-0.92, 0.92))
    saddles = {"color": "#E69F00", "zorder": 5, "label": "saddle: a = b = 0"}
    axes[0, 0].plot([0, 0], [-0.92, 0.92], linewidth=3, **saddles)
    axes[0, 1].plot(0, 0, "o", markersize=8, **saddles)
    axes[0, 0].set_ylabel("recurrent w")
    return figure, axes


def stability_map(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """What RFLO's optimal point (s, p*/s, w*) is, over readout s and feedback r."""
    teacher = theory.Modes(0.3, 0.8, 1.0)
    s, r = np.meshgrid(np.linspace(0.3, 2, 241), np.linspace(-0.6, 0.6, 241))
    figure, axes = subplots(1, 3, (11, 3.5), sharey=True)
    for axis, rho in zip(axes[0], (-0.4, 0.2, 0.6), strict=True):
        tau, det = (np.asarray(v) for v in theory.characteristic(theory.rflo(r, rho), s, teacher))
        turns = tau**2 < 4 * det
        chosen = [(det > 0) & (tau > 0) & ~turns, (det > 0) & (tau > 0) & turns, det <= 0,
                  (det > 0) & (tau <= 0) & turns]  # fmt: skip
        kind = np.select(chosen, range(4), 4)
        axis.pcolormesh(s, r, kind, cmap=ListedColormap(list(KINDS.values())), vmin=-0.5, vmax=4.5,
                        rasterized=True)  # fmt: skip
        line = np.linspace(0.3, 2, 200)
        limit = theory.limits(line, rho, teacher)
        axis.plot(line, limit.saddle_node, color="black", linewidth=1, label="r s³ = -p*²")
        axis.plot(line, limit.hopf, color="black", linewidth=1, linestyle="--",
                  label="change of sign of tau (Hopf)")  # fmt: skip
        axis.set_title(f"rho = {rho:g}", fontsize=10)
        axis.set(xlabel="readout s", xlim=(0.3, 2), ylim=(-0.6, 0.6))
    axes[0, 0].set_ylabel("feedback r")
    for name, colour in KINDS.items():  # for the legend alone
        axes[0, 0].plot([], [], "s", color=colour, markersize=9, label=name)
    return figure, axes


def learned_ranks(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Beyond, 16: spectra of what the cells learned on digits."""
    figure, axes = subplots(1, 3, (11.5, 3.7))
    for name, case in data["cases"].items():
        values = case["kept"][0]["values"]
        values = values / values[:, :1]
        index = np.arange(1, values.shape[1] + 1)
        axes[0, 0].semilogy(index, values.mean(0), label=name, **look(case))
        axes[0, 0].fill_between(index, values.min(0), values.max(0), alpha=0.1, linewidth=0,
                                color=look(case)["color"])  # fmt: skip
        ratio = np.stack([kept["ratio"] for kept in case["kept"]])
        inside = np.stack([kept["inside"] for kept in case["kept"]])
        for axis, found in ((axes[0, 1], ratio), (axes[0, 2], inside)):
            axis.semilogx(case["scales"], found.mean(1), **look(case), **marks(case))
            axis.fill_between(case["scales"], found.min(1), found.max(1), alpha=0.1, linewidth=0,
                              color=look(case)["color"])  # fmt: skip
    axes[0, 0].axvline(9.5, color=GREY, linewidth=0.8, linestyle=":")
    axes[0, 0].set(xlabel="singular value k of the change", ylabel="share of the largest",
                   ylim=(1e-3, 1.3))  # fmt: skip
    axes[0, 1].set(xlabel="scale of initial weights", ylabel="participation ratio", ylim=(0, None))
    axes[0, 1].axhline(9, color=GREY, linewidth=0.8, linestyle=":")
    axes[0, 2].axhline(data["floor"], color=GREY, linewidth=0.8, linestyle=":", label="chance")
    axes[0, 2].set(xlabel="scale of initial weights", ylim=(0, 1.03))
    axes[0, 2].set_ylabel("share of the change in the span\nof the feedback, or of the readout")
    return figure, axes


def learned_plateaus(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Beyond, 17: when the loss on digits falls, over the scale of the initial weights."""
    figure, axes = subplots(1, 3, (11.5, 3.7))
    waits = -np.log(data["scales"])
    for name, case in data["cases"].items():
        for axis, times in ((axes[0, 0], case["leaves"]), (axes[0, 1], case["half"])):
            shown = np.where(np.isfinite(times).all(1), times.mean(1), np.nan)
            axis.plot(waits, shown, label=name, **look(case), **marks(case))
            if np.isfinite(shown).all():
                axis.fill_between(waits, times.min(1), times.max(1), alpha=0.1, linewidth=0,
                                  color=look(case)["color"])  # fmt: skip
        if case["cell"] == "gru":
            losses = np.asarray(case["losses"])[-1]
            window = min(10, losses.shape[-1])
            kept = losses[:, : losses.shape[-1] // window * window]
            kept = kept.reshape(len(losses), -1, window).mean(-1)
            updates = window * (np.arange(kept.shape[1]) + 1)
            axes[0, 2].plot(updates, kept.mean(0), **look(case))
            axes[0, 2].fill_between(updates, kept.min(0), kept.max(0), alpha=0.1, linewidth=0,
                                    color=look(case)["color"])  # fmt: skip
    gru = data["cases"].get("GRU, BPTT")
    if gru is not None and np.isfinite(gru["leaves"]).all():
        guide = gru["leaves"].mean(1)[-1] + gru["slope"] * (waits - waits[-1])
        axes[0, 0].plot(waits[-3:], guide[-3:] + 15, color=GREY, linestyle=":",
                        label="slope of the linear theory, BPTT")  # fmt: skip
    axes[0, 0].set(xlabel="ln(1/scale) of initial weights", ylim=(0, None))
    axes[0, 0].set_ylabel("updates to .9 of chance's loss")
    axes[0, 1].set(xlabel="ln(1/scale) of initial weights", ylim=(0, None))
    axes[0, 1].set_ylabel("updates to half of chance's loss")
    axes[0, 2].set(xlabel="updates", ylabel="training loss (nats)", ylim=(0, None))
    axes[0, 2].set_title(f"GRU from {data['scales'][-1]:g} of the weights", fontsize=10)
    return figure, axes
