"""A linear network of the library under its own rules, for comparison with the theory."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import localgrad
from localgrad import theory

RULES = ("bptt", "tbptt1", "tbptt3", "rflo")


def golden(prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of linear_theory.npz whose key starts with `prefix`, which is taken off."""
    path = Path(__file__).parents[1] / "golden" / "linear_theory.npz"
    with np.load(path, allow_pickle=False) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}


def half_square(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return 0.5 * jnp.square(outputs - targets).sum(-1)


def linear(rule: str, feedback: Any, units: int, outputs: int, alpha: float = 1.0) -> Any:
    """A rule of the library on a linear network with leak alpha; `rflo` traces decay by 1 - alpha.

    Horizons follow the name: tbptt1, tbptt3.
    """
    cell = localgrad.RateCell(
        units, alpha=alpha, activation=lambda u: u, param_dtype=jnp.float64, dtype=jnp.float64
    )
    readout = nn.Dense(outputs, use_bias=False, param_dtype=jnp.float64, dtype=jnp.float64)
    model = localgrad.Network((cell,), readout)
    given = {"reduction": "sum"}
    if rule == "rflo":
        return localgrad.rflo(model, half_square, feedback=jnp.asarray(feedback).T, **given)
    if rule.startswith("tbptt"):
        return localgrad.tbptt(model, half_square, horizon=int(rule[5:]), **given)
    return localgrad.bptt(model, half_square, **given)


def batch_of(inputs: Any, targets: Any, loss: str) -> localgrad.Batch:
    """All sequences as one batch whose summed loss is the mean over sequences."""
    examples, steps = inputs.shape[:2]
    weight = np.full((examples, steps), 1 / (examples * steps))
    if loss == "final":
        weight = np.zeros((examples, steps))
        weight[:, -1] = 1 / examples
    return localgrad.Batch(jnp.asarray(inputs), jnp.asarray(targets), mask=jnp.asarray(weight))


def direction(rule: Any, weights: theory.Weights, batch: localgrad.Batch) -> theory.Weights:
    """What the library's rule subtracts from A, W and B."""
    params = theory.to_params(weights)
    updates, _ = rule(params, rule.init(params), batch)
    return theory.from_params(updates)


def mode_rule(name: str, r: Any, rho: float) -> theory.ModeRule:
    """The theory's rule of this name."""
    if name == "rflo":
        return theory.rflo(r, rho)
    return theory.bptt() if name == "bptt" else theory.tbptt(int(name[5:]))
