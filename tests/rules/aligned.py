"""Local representation alignment written out in NumPy, layer by layer, for any depth.

An oracle without the library: one sequence batch [B, T, D], float64, fixed parameters by the
paper's names; returns predictions, last states and the sum of the clipped updates.
"""

from typing import Any

import numpy as np

Params = dict[str, np.ndarray]


def clip(update: np.ndarray, radius: float | None) -> np.ndarray:
    norm = np.sqrt((update**2).sum())
    return update if radius is None or norm <= radius else update * radius / norm


def align(
    params: Params,
    inputs: np.ndarray,
    targets: np.ndarray,
    mask: np.ndarray,
    reset: np.ndarray,
    *,
    f: Any,
    g: Any,
    beta: float = 0.1,
    alpha: float = 0.001,
    sparsity: float = 0.0,
    error_rule: str = "transpose",
    w_error: str = "residual",
    presynaptic: str = "corrected",
    gamma: float = 1.0,
    update_radius: float | None = 1.0,
) -> tuple[np.ndarray, list[np.ndarray], Params]:
    p, batch = params, len(inputs)
    top = max(int(name[1:]) for name in p)
    zeros = [np.zeros((batch, p[f"V{n}"].shape[0])) for n in range(1, top + 1)]
    y, z, outputs = list(zeros), list(zeros), []
    total = {name: np.zeros_like(matrix) for name, matrix in p.items()}
    for t in range(inputs.shape[1]):
        fresh, w = reset[:, t, None], mask[:, t, None]
        y, z = ([np.where(fresh, 0, a) for a in each] for each in (y, z))
        y_old, z_old, x = list(y), list(z), inputs[:, t]
        pre = y_old if presynaptic == "corrected" else z_old
        below, below_pre = [x, *y_old], [x, *pre]
        a = []
        for n in range(1, top + 1):
            drive = y_old[n - 1] @ p[f"V{n}"]
            if f"M{n}" in p:
                drive = drive + below[n - 1] @ p[f"M{n}"]
            if f"U{n}" in p:
                drive = drive + y_old[n] @ p[f"U{n}"]
            a.append(drive)
        z = [f(drive) for drive in a]
        mu = g(z[0] @ p["W1"])
        outputs.append(mu)
        e = [mu - targets[:, t]]
        e += [z[n - 1] @ p[f"W{n}"] - z[n - 2] for n in range(2, top + 1)]
        e = [np.where(w != 0, error, 0) for error in e]
        y = []
        for n in range(1, top + 1):
            d = e[n - 1] @ p[f"E{n}"] + sparsity * np.sign(a[n - 1])
            if n < top:
                d = d - alpha * e[n]
            y.append(np.where(w != 0, f(a[n - 1] - beta * d), z[n - 1]))
        r = [one - other for one, other in zip(z, y, strict=True)]
        change = [now - (one - other) for now, one, other in zip(r, z_old, y_old, strict=True)]
        for n in range(1, top + 1):
            wrong = e[0] if n == 1 else (r[n - 2] if w_error == "residual" else e[n - 1])
            found = {f"W{n}": clip(z[n - 1].T @ (w * wrong), update_radius)}
            found[f"M{n}"] = below_pre[n - 1].T @ (w * r[n - 1])
            found[f"V{n}"] = pre[n - 1].T @ (w * r[n - 1])
            if n < top:
                found[f"U{n}"] = pre[n].T @ (w * r[n - 1])
            found[f"E{n}"] = gamma * found[f"W{n}"].T
            if error_rule == "temporal":
                found[f"E{n}"] = -gamma * (w * e[n - 1]).T @ change[n - 1]
            for name in found.keys() & total.keys():
                total[name] = total[name] + clip(found[name], update_radius)
    return np.stack(outputs, 1), y, total
