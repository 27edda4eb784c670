"""What perturbation rules are told, checked before anything is drawn."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from localgrad.core.contract.noise import NOISES
from localgrad.core.passes.disturb import Noise


def noise_of(scale: Any, kind: Any, antithetic: Any) -> Noise:
    """How a model is disturbed; raises for what no noise can be."""
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 < float(scale) < np.inf:
        raise ValueError(
            "scale must be a positive Python number, the noise's standard deviation, such as 0.01; "
            f"got {scale!r}."
        )
    require_choice("noise", kind, NOISES)
    if not isinstance(antithetic, bool):
        raise ValueError(f"antithetic must be True or False; got {antithetic!r}.")
    return Noise(kind, float(scale), (1.0, -1.0) if antithetic else (1.0,))


def infinitesimal(kind: Any) -> Noise:
    """Noise without a size, whose effect is a derivative."""
    require_choice("noise", kind, NOISES)
    return Noise(kind, None, (1.0,))


def require_samples(samples: Any, at_once: Any) -> None:
    """Raises unless so many samples can be drawn, so many at a time."""
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer; got {samples!r}.")
    if at_once is None:
        return
    whole = isinstance(at_once, int) and not isinstance(at_once, bool) and at_once > 0
    if not whole or samples % at_once:
        raise ValueError(
            f"samples_at_once must be None or a divisor of samples={samples}; got {at_once!r}."
        )


def require_lifetime(name: str, steps: Any) -> None:
    """Raises unless noise can last for so many steps; a lifetime may be None, for a sequence."""
    if steps is None and name == "lifetime":
        return
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} must be a positive number of steps; got {steps!r}.")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless a value is one of those there are."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.")
