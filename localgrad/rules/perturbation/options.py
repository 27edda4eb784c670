"""What perturbation rules are told, checked before anything is drawn."""

from __future__ import annotations

from typing import Any

from localgrad.core.contract.checks import number, positive_integer, require_choice
from localgrad.core.contract.noise import NOISES
from localgrad.core.passes.disturb import Noise


def noise_of(scale: Any, kind: Any, antithetic: Any, resync: bool = False) -> Noise:
    """How a model is disturbed; raises for what no noise can be."""
    hint = "It is the noise's standard deviation; try 0.01."
    scale = number("scale", scale, "be positive and finite", hint)
    require_choice("noise", kind, NOISES)
    if not isinstance(antithetic, bool):
        raise ValueError(f"antithetic must be True or False; got {antithetic!r}.")
    return Noise(kind, scale, (1.0, -1.0) if antithetic else (1.0,), resync)


def infinitesimal(kind: Any) -> Noise:
    """Noise without a size, whose effect is a derivative."""
    require_choice("noise", kind, NOISES)
    return Noise(kind, None, (1.0,))


def require_samples(samples: Any, at_once: Any) -> None:
    """Raises unless so many samples can be drawn, so many at a time."""
    samples = positive_integer("samples", samples)
    if at_once is not None and samples % positive_integer("samples_at_once", at_once):
        raise ValueError(
            f"samples_at_once must be None or a divisor of samples={samples}; got {at_once!r}."
        )
