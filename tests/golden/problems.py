"""The two problems that several authors' codes were run on, as `Network`s of one `RateCell`.

`c0` is a plain tanh network (alpha = 1) under softmax cross-entropy. `c1` is leaky (alpha = 0.4)
with a linear readout; the code it comes from divides its squared error by the number of outputs but
not its credit, so what is descended here is the sum over outputs. Both start from a zero state. The
weights are (post, pre) where they come from, and (pre, post) here.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from tests.golden.common import Arrays, as_batch, load, squared_error

UNITS, INPUTS, OUTPUTS, STEPS = 5, 3, 2, 10
LOSSES = {"c0": optax.softmax_cross_entropy, "c1": squared_error}


@functools.cache
def problem(case: str) -> Arrays:
    return load("vanilla_rtrl", f"{case}/problem/")


def cell_of(case: str) -> localgrad.RateCell:
    alpha = float(problem(case)["alpha"])
    return localgrad.RateCell(UNITS, alpha=alpha, param_dtype=jnp.float64)


def network_of(case: str) -> localgrad.Network:
    return localgrad.Network((cell_of(case),), readout=nn.Dense(OUTPUTS))


@functools.cache  # a rule compiles once, whichever tests use it
def streaming(factory: Any, case: str) -> localgrad.LearningRule:
    return factory(network_of(case), LOSSES[case], batch_size=1, reduction="sum")


def batch_of(case: str) -> localgrad.Batch:
    return as_batch(problem(case)["X"], problem(case)["Y"])


def params_of(case: str) -> dict[str, Any]:
    return network_tree(problem(case))


def network_tree(weights: Arrays, prefix: str = "") -> dict[str, Any]:
    """Their arrays `<prefix>W_rec` and so on, which may have leading time axes, as our tree."""
    found = {key.removeprefix(prefix): value for key, value in weights.items()}
    return {"cells_0": cell_tree(found), "readout": layer(found["W_out"], found["b_out"])}


def cell_tree(weights: Arrays) -> dict[str, Any]:
    return {"i": layer(weights["W_in"], weights["b_rec"]), "h": layer(weights["W_rec"])}


def layer(kernel: np.ndarray, bias: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """(..., post, pre) and (..., post) as `nn.Dense` has them."""
    found = {"kernel": kernel.swapaxes(-1, -2)}
    return found if bias is None else found | {"bias": bias}
