"""Learned time constants, against FranzKnut/jax_rtrl: BPTT, RTRL, RFLO and SnAp-1.

Its leaky cell, a' = (1 - 1 / tau) a + tanh(W [x, a, 1]) / tau, has a time constant a unit and no
readout. Ours has alpha = 1 / tau, so that its gradient follows by the chain rule:
dL/dtau = -alpha^2 dL/dalpha. What that code calls 'eprop' keeps each unit's own recurrent weight,
which is SnAp-1; its 'rflo' drops it, which on this cell is e-prop too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from tests.golden.common import as_batch, assert_close, load, squared_error, stream

pytestmark = pytest.mark.usefixtures("x64")

INPUTS, STEPS = 3, 8
OURS = {  # and what it is called there
    "bptt": (localgrad.bptt, "bptt"),
    "rtrl": (localgrad.rtrl, "rtrl"),
    "rflo": (functools.partial(localgrad.rflo, feedback="symmetric"), "rflo"),
    "eprop": (localgrad.eprop, "rflo"),
    "snap": (localgrad.snap, "eprop"),
}
CALLS = [("bptt", STEPS)] + [(rule, chunk) for rule in list(OURS)[1:] for chunk in (1, 4)]


def cell_and_params(theirs: dict) -> tuple[localgrad.RateCell, dict]:
    rows, alpha = theirs["W_[x,h,1]"].T, 1 / theirs["tau"]
    cell = localgrad.RateCell(alpha.size, alpha, learn_alpha=True, param_dtype=jnp.float64)
    params = {
        "alpha": alpha,
        "i": {"kernel": rows[:INPUTS], "bias": rows[-1]},
        "h": {"kernel": rows[INPUTS:-1]},
    }
    return cell, params


@pytest.mark.parametrize(("rule", "chunk"), CALLS)
def test_gradients_of_weights_and_time_constants(rule, chunk):
    factory, name = OURS[rule]
    theirs = load("jax_rtrl")
    cell, params = cell_and_params(theirs)
    ours = factory(cell, squared_error, batch_size=1, reduction="sum")
    calls, _ = stream(ours, params, as_batch(theirs["inputs"], theirs["y_target"]), chunk)
    found = jax.tree.map(lambda *parts: sum(parts), *(call.updates for call in calls))
    weights = [found["i"]["kernel"], found["h"]["kernel"], found["i"]["bias"][None]]
    assert_close(np.concatenate(weights).T, theirs[f"{name}/grad_W"])
    assert_close(-(params["alpha"] ** 2) * found["alpha"], theirs[f"{name}/grad_tau"])
    loss = sum(call.state.loss * (call.steps.stop - call.steps.start) for call in calls)
    assert_close(loss, theirs[f"{name}/loss"])
