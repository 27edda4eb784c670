"""e-prop in depth, against the one public implementation of it, with its ablations.

The arrays come from simonpeter02/e-prop-in-deep-networks, run in float64: see README.md. Its units
keep what they send to themselves (`autapses=True`); loss is half the squared error, summed over
outputs and steps and averaged over the 2 sequences.
"""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import localgrad
from tests.golden.common import assert_close, load, squared_error
from tests.golden.problems import layer

pytestmark = pytest.mark.usefixtures("x64")

CASES = ("L1_a0.5", "L2_a1", "L2_diag")
B, T, UNITS = 2, 10, 4
DEEP = functools.partial(localgrad.deep_eprop, autapses=True)
RULES = {
    "full": DEEP,
    "ablate_temporal": functools.partial(DEEP, temporal=False),
    "ablate_spatial": functools.partial(DEEP, spatial=False),
    "d_zero": functools.partial(localgrad.tbptt, horizon=1),
    "bptt": localgrad.bptt,
}


def tree(arrays: dict) -> dict:
    """Their arrays, by layer (post, pre), as our tree."""
    depth = sum(name.startswith("W_recs") for name in arrays)
    below = ["W_in", *(f"W_ffs.{level}" for level in range(depth - 1))]
    cells = {
        f"cells_{level}": {
            "i": layer(arrays[below[level]], arrays[f"biases.{level}"]),
            "h": layer(arrays[f"W_recs.{level}"]),
        }
        for level in range(depth)
    }
    return cells | {"readout": layer(arrays["W_out"], arrays["b_out"])}


def problem(case: str):
    """Their network, its parameters, and their data."""
    alphas = load("deep_eprop", f"{case}/")["alpha"]
    cells = tuple(localgrad.RateCell(UNITS, alpha=float(a), param_dtype=float) for a in alphas)
    data = load("deep_eprop", f"{case}/")
    batch = localgrad.Batch(data["inputs"].swapaxes(0, 1), data["targets"].swapaxes(0, 1))
    model = localgrad.Network(cells, readout=nn.Dense(2, param_dtype=float))
    return model, tree(load("deep_eprop", f"{case}/param/")), batch


def averaged(updates: dict) -> dict:
    """Over the sequences, as they do; our sum is over steps and sequences."""
    return jax.tree.map(lambda u: u / B, updates)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.few(6)
def test_whole_sequences(case, name):
    model, params, batch = problem(case)
    rule = RULES[name](model, squared_error, reduction="sum")
    updates, _ = rule(params, rule.init(params), batch)
    assert_close(averaged(updates), tree(load("deep_eprop", f"{case}/{name}/")))


@pytest.mark.parametrize("name", ["full", "ablate_temporal", "ablate_spatial"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.few(4)
def test_step_by_step(case, name):
    model, params, batch = problem(case)
    rule = RULES[name](model, squared_error, batch_size=B, reduction="sum")
    state, total = rule.init(params), jax.tree.map(np.zeros_like, params)
    for t in range(T):
        updates, state = rule(params, state, jax.tree.map(lambda a, t=t: a[:, t : t + 1], batch))
        total = jax.tree.map(lambda a, b: a + np.asarray(b), total, updates)
    assert_close(averaged(total), tree(load("deep_eprop", f"{case}/{name}/")))
    if case == "L2_diag" and name == "full":  # no unit feeds another
        assert_close(averaged(total), tree(load("deep_eprop", f"{case}/bptt/")))


def test_without_autapses_units_of_a_plain_network_keep_nothing():
    model, params, batch = problem("L2_a1")
    rule = localgrad.deep_eprop(model, squared_error, batch_size=B, reduction="sum")
    updates, _ = rule(params, rule.init(params), batch)
    assert_close(averaged(updates), tree(load("deep_eprop", "L2_a1/d_zero/")))
