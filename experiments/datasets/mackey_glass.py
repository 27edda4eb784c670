"""The series of Mackey and Glass: a delay equation whose solution is chaotic, cheap to make.

    dx/dt = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x(t)

Mackey and Glass, "Oscillation and chaos in physiological control systems", 1977,
https://doi.org/10.1126/science.267326.
"""

from __future__ import annotations

import numpy as np

TAU, SUBSTEPS, WASHOUT = 17, 10, 100


def mackey_glass(steps: int, seed: int) -> np.ndarray:
    """One series, squashed by tanh(x - 1).

    Ten Euler steps a unit of time, from a history of 1.2 + 0.2 (u - 0.5), u uniform; the first 100
    units are left out.

    Args:
        steps: how many units of time.
        seed: of the history.

    Returns:
        [steps], with a mean that is not 0.
    """
    lag = TAU * SUBSTEPS
    history = 1.2 + 0.2 * (np.random.default_rng(seed).random(lag) - 0.5)
    x = np.concatenate([history, np.zeros((steps + WASHOUT) * SUBSTEPS)])
    for t in range(lag, len(x)):
        past, now = x[t - lag], x[t - 1]
        x[t] = now + (0.2 * past / (1 + past**10) - 0.1 * now) / SUBSTEPS
    return np.tanh(x[lag + WASHOUT * SUBSTEPS :: SUBSTEPS] - 1)
