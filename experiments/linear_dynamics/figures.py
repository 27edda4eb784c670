"""Figures of linear networks: one a phenomenon, drawn from what was found; theory in thin lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import MEANS, STYLES, finish, subplots
from experiments.linear_dynamics import portraits
from experiments.linear_dynamics.table import Finding
from localgrad import theory

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]
GREY = "#7F7F7F"


def draw(findings: dict[str, Finding], folder: Path) -> list[Path]:
    """Draws what was found.

    Args:
        findings: by the phenomenon's name.
        folder: where the files go; made if need be.

    Returns:
        The files, one a phenomenon that has a figure, two of the window of stability.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in DRAWINGS:
        data = findings[name].data if name in findings else {}
        if data:
            path = folder / f"{figure.__name__}.png"
            finish(*figure(data), path, MEANS if name.startswith("learned") else None)
            drawn.append(path)
    return drawn


def panels(columns: int, rows: int = 1, **options: Any) -> tuple[Any, np.ndarray]:
    """An empty figure of the common size."""
    size = (1.2 + 3.3 * columns, 0.8 + (2.9 if rows == 1 else 1.9 * rows))
    return subplots(rows, columns, size, **options)


def style(name: str) -> dict[str, Any]:
    """The look of a rule, by its label."""
    low = name.lower()
    known = "tbptt" if "tbptt" in low else "bptt" if "bptt" in low else "rflo"
    if "e-prop" in low:
        known = "eprop_random" if "random" in low else "eprop"
    found = {"linewidth": 1.8, **STYLES[known]}
    return {**found, "linestyle": "-"} if known == "rflo" else found


def trajectories(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Rows 1 and 2: a, b, w and the loss of each mode."""
    figure, axes = panels(len(data["runs"]), 4, sharex=True, sharey="row")
    times = data["times"]
    for column, (label, run) in enumerate(data["runs"].items()):
        axes[0, column].set_title(label, fontsize=10)
        for axis, part in zip(axes[:3, column], ("a", "b", "w"), strict=True):
            net, flow = (np.asarray(getattr(run[key], part)) for key in ("modes", "flow"))
            for k in range(net.shape[1]):
                axis.plot(times, net[:, k], color=COLOURS[k], linewidth=3, alpha=0.4,
                          label=f"network, mode {k + 1}")  # fmt: skip
                axis.plot(times, flow[:, k], color="black", linewidth=0.8, linestyle="--",
                          label="mode equations")  # fmt: skip
        last = axes[3, column]
        last.semilogy(times[: len(run["losses"])], run["losses"], color=GREY, linewidth=3,
                      alpha=0.5, label="network, loss")  # fmt: skip
        last.semilogy(times, run["flow_loss"], color="black", linewidth=0.8, linestyle="--")
        last.set_xlabel("time (updates x learning rate)")
    for axis, name in zip(axes[:, 0], ("readout a", "input b", "recurrent w", "loss"), strict=True):
        axis.set_ylabel(name)
    return figure, axes


def rates(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 4: the rate of the last approach over s."""
    figure, axes = panels(1)
    fine = np.geomspace(0.2, 6, 200)
    for label, case in data["cases"].items():
        rate = theory.convergence_rate(case["rule"], fine, data["teacher"])
        axes[0, 0].plot(fine, rate, label=label, **{**style(label), "linewidth": 1.3})
        axes[0, 0].plot(case["s"], case["measured"], "o", color=style(label)["color"],
                        markersize=5, label=f"{label}, networks")  # fmt: skip
    axes[0, 0].set(xscale="log", yscale="log", xlabel="readout s at the optimum",
                   ylabel="rate of the last approach")  # fmt: skip
    ticks = [0.25, 0.5, 1, 2, 4]
    axes[0, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0, 0].minorticks_off()
    return figure, axes


def selection(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 5: predicted and final s, where the prediction tells one."""
    figure, axes = panels(1)
    axis, marks = axes[0, 0], "sD^v"
    for k, (label, case) in enumerate(data.items()):
        predicted, last = np.asarray(case["predicted"], float), np.asarray(case["last"])
        kept = np.isfinite(predicted) & np.asarray(case["arrived"])
        axis.plot(predicted[kept], last[kept], marks[k % 4], color=COLOURS[k], alpha=0.7,
                  markersize=6, label=f"{label}, {kept.sum()} starts")  # fmt: skip
    axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
    axis.set(xlabel="s predicted", ylabel="final s of networks")
    return figure, axes


def plateaus(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 6: time to half the loss over ln(1/scale)."""
    figure, axes = panels(1)
    for label, half in data["cases"].items():
        axes[0, 0].plot(-np.log(data["scales"]), half, marker="o", label=label, **style(label))
    axes[0, 0].set(
        xlabel="ln(1/scale) of the start", ylabel="time to half the loss", ylim=(0, None)
    )
    return figure, axes


def detours(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 7: paths in the (a, b) plane, with the hyperbola of the optimum."""
    figure, axes = panels(2)
    for axis, product, wrong in zip(axes[0], data["p"], (False, True), strict=True):
        paths = {k: v for k, v in data["paths"].items() if ("wrong" in k) == wrong}
        for k, (label, found) in enumerate(paths.items()):
            a, b = (np.ravel(getattr(found["path"], part)) for part in ("a", "b"))
            look = {"color": COLOURS[k], "label": label.replace(", wrong sign", "")}
            look["color"] = "#000000" if look["label"] == "BPTT" else look["color"]
            look["color"] = "#E69F00" if look["label"] == "RFLO" else look["color"]
            axis.plot(a, b, linewidth=1.6, **look)
            axis.plot(a[-1], b[-1], "o", color=look["color"])
            axis.plot(a[0], b[0], "s", color="white", markeredgecolor="black", zorder=5)
        x = np.geomspace(0.2, 4, 100)
        for sign in (1, -1):
            axis.plot(sign * x, sign * product / x, color=GREY, linewidth=0.8, linestyle=":",
                      label="optimum: a b = p*")  # fmt: skip
        limit = 2.6
        axis.set(xlabel="readout a", ylabel="input b", xlim=(-limit, limit), ylim=(-limit, limit))
        axis.set_title(f"p* = {product:.2f}" + (", balanced start" if wrong else ""), fontsize=10)
    return figure, axes


def invariants(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Rows 8 and 9: the drift of what is conserved, and the alignment of readout and feedback."""
    figure, axes = panels(2)
    for label, run in data.items():
        if label == "alignment":
            continue
        look = style(label) | {"alpha": 0.5 if label.endswith("0.0025") else 1.0}
        axes[0, 0].plot(run["times"][1:], run["drift"][1:], label=label, **look)
    axes[0, 0].set(xlabel="time", ylabel="drift of the conserved matrix", yscale="log")
    found = data["alignment"]
    axes[0, 1].plot(found["grown"], found["aligned"], color=style("rflo")["color"], linewidth=3)
    axes[0, 1].axline((0, 0), slope=1, color="black", linewidth=0.9, linestyle="--",
                      label="slope 1")  # fmt: skip
    axes[0, 1].set(xlabel="growth of (|W - rho|² + |B|²)/2", ylabel="growth of <R, A> (RFLO)")
    return figure, axes


def low_rank(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 10: singular values of the weight change."""
    figure, axes = panels(2, sharey=True)
    axes[0, 0].set_title("with a bound by theory", fontsize=10)
    axes[0, 1].set_title("without", fontsize=10)
    families = {"BPTT": "black", "TBPTT(1)": "#D55E00", "RFLO": "#CC79A7", "e-prop": "#009E73",
                "SnAp-1": "#56B4E9"}  # fmt: skip
    count = dict.fromkeys(families, 0)
    for label, values in data["spectra"].items():
        side, family = int(data["bounds"][label] is None), label.split(",")[0]
        axes[0, side].semilogy(
            np.arange(1, len(values) + 1),
            np.maximum(values / values[0], 1e-17),
            marker="os^v"[count[family] % 4],
            markersize=4,
            linewidth=1,
            color=families[family],
            label=label,
        )
        count[family] += 1
    for axis in axes[0]:
        axis.set(xlabel="singular value k", xlim=(0.5, data["units"] + 0.5))
        axis.axvline(data["outputs"] + 0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel("share of the largest")
    return figure, axes


def nonlinearity(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 11: what tanh adds to the rank, over the amplitude."""
    figure, axes = panels(2)
    amplitudes = data["amplitudes"]
    for k, label in enumerate(data["ratio"]):
        look = {"color": COLOURS[k], "marker": "os"[k], "label": label}
        axes[0, 0].loglog(amplitudes, np.maximum(data["ratio"][label], 1e-17), **look)
        axes[0, 1].semilogx(amplitudes, data["participation"][label], **look)
    guide = data["ratio"]["tanh"][0] * (amplitudes / amplitudes[0]) ** 2
    axes[0, 0].loglog(amplitudes, guide, "--", color="black", linewidth=0.9, label="slope 2")
    axes[0, 0].set(xlabel="amplitude", ylabel="third singular value / first")
    axes[0, 1].set(xlabel="amplitude", ylabel="participation ratio", ylim=(1, None))
    return figure, axes


def sizes(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 12: the loss over the number of units."""
    figure, axes = panels(1)
    axis, units = axes[0, 0], data["units"]
    axis.plot(
        units, data["mode"], "--", color="black", linewidth=1, label="theory of RFLO: one mode"
    )
    axis.axhline(data["floor"], color=GREY, linestyle=":", linewidth=1, label="least of one pole")
    axis.plot(units, data["rflo"], "o", color=style("rflo")["color"], label="RFLO from zero")
    axis.plot(units, data["bptt"], "s-", color="#000000", label="BPTT from small weights")
    axis.set(xscale="log", xlabel="units N", ylabel="final loss", ylim=(-0.02, None))
    axis.set_xticks(units, [str(unit) for unit in units])
    axis.minorticks_off()
    return figure, axes


def bias(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 13: where RFLO stops on a delay of one step, over its trace decay."""
    figure, axes = panels(2)
    fine = np.linspace(0.01, 0.95, 100)
    w = (-fine + np.sqrt(fine**2 + 4)) / 2
    lost = 0.5 * (1 - w**2 * (1 - w**2))  # with p = w (1 - w^2)
    told = zip(axes[0], (w, lost), (data["w"], data["losses"]), (0.5**0.5, 0.375), strict=True)
    for axis, theory_, measured, best in told:
        axis.plot(fine, theory_, color=style("rflo")["color"], label="RFLO, theory")
        axis.plot(
            data["decays"], measured, "o", color=style("rflo")["color"], label="RFLO, networks"
        )
        axis.axhline(best, color="black", linestyle=":", label="BPTT")
        axis.set_xlabel("trace decay rho")
    axes[0, 0].set_ylabel("final w")
    axes[0, 1].set_ylabel("final loss")
    return figure, axes


def window(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 14: feedback of the wrong sign inside and outside the window of stability."""
    figure, axes = panels(1)
    for k, (r, path) in enumerate(data["paths"].items()):
        axes[0, 0].plot(data["times"], np.ravel(path.a), color=COLOURS[k], label=f"r = {r:g}")
    low, high = (float(limit) for limit in data["limits"])
    axes[0, 0].set_title(f"stable for r from {low:.4f} to {high:.4f}", fontsize=10)
    axes[0, 0].set(xlabel="time", ylabel="readout a")
    return figure, axes


def unaligned(data: dict[str, Any]) -> tuple[Any, np.ndarray]:
    """Row 15: how networks from small random weights align by themselves."""
    figure, axes = panels(4)
    for label, run in data.items():
        for axis, (name, cosine) in zip(axes[0], run["alignment"].items(), strict=False):
            axis.plot(run["times"], cosine, label=label, **style(label))
            axis.set(xlabel="time", ylim=(-0.1, 1.03))
            axis.set_title(f"alignment: {name}", fontsize=9)
        count = min(len(run["times"]), len(run["losses"]))
        axes[0, 3].semilogy(run["times"][:count], run["losses"][:count], **style(label))
    axes[0, 3].set(xlabel="time", ylabel="loss")
    return figure, axes


Drawing = Callable[[dict[str, Any]], tuple[Any, np.ndarray]]
DRAWINGS: list[tuple[str, Drawing]] = [
    ("trajectories", trajectories),
    ("saddle", portraits.phase_portraits),
    ("rates", rates),
    ("selection", selection),
    ("plateaus", plateaus),
    ("detours", detours),
    ("invariants", invariants),
    ("low_rank", low_rank),
    ("nonlinearity", nonlinearity),
    ("sizes", sizes),
    ("bias", bias),
    ("window", portraits.stability_map),
    ("window", window),
    ("unaligned", unaligned),
    ("learned_ranks", portraits.learned_ranks),
    ("learned_plateaus", portraits.learned_plateaus),
]
