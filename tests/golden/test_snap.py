"""SnAp-1, RTRL and D-RTRL against two more codes, on the problem `c0`.

The gradients come from the library braintrace (summed over the sequence) and from a reproduction of
"Practical real time recurrent learning with a sparse approximation" (Menick et al. 2020) (averaged
over it): see README.md. What braintrace calls D-RTRL keeps the cell's own dynamics and drops the
recurrent weights, which on a rate cell is RFLO or e-prop with symmetric feedback.
"""

import functools

import jax
import numpy as np
import pytest

import localgrad
from tests.golden.common import assert_close, load, stream
from tests.golden.problems import STEPS, batch_of, params_of, streaming

pytestmark = pytest.mark.usefixtures("x64")

LOCAL = {
    "SnAp1": localgrad.snap,
    "RTRL": localgrad.rtrl,
    "D_RTRL": functools.partial(localgrad.rflo, feedback="symmetric"),
}


def total(name: str, chunk: int) -> tuple[dict, float]:
    """The sum of the updates of every call on `c0`, and the mean loss."""
    calls, _ = stream(streaming(LOCAL[name], "c0"), params_of("c0"), batch_of("c0"), chunk)
    steps = [call.steps.stop - call.steps.start for call in calls]
    losses = [float(call.state.loss) for call in calls]
    summed = jax.tree.map(lambda *parts: sum(parts), *(call.updates for call in calls))
    return summed, np.average(losses, weights=steps)


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("name", ["SnAp1", "D_RTRL"])
def test_braintrace(name, chunk):
    theirs = load("braintrace", f"c0/{name}/")
    ours = total(name, chunk)[0]["cells_0"]
    assert_close(ours["h"]["kernel"], theirs["sum_grad_W_rec"].T)
    assert_close(ours["i"]["kernel"], theirs["sum_grad_W_in"].T)


@pytest.mark.parametrize("name", ["SnAp1", "RTRL"])
def test_snap_reproduction(name):
    theirs = load("snap_repro", f"c0/{name}/")
    ours, loss = total(name, chunk=1)
    grads = {key: STEPS * value for key, value in theirs.items() if key.startswith("grad_")}
    expected = {
        "cells_0": {
            "i": {"kernel": grads["grad_w_xh_mean_over_T"], "bias": grads["grad_b_h_mean_over_T"]},
            "h": {"kernel": grads["grad_w_hh_mean_over_T"]},
        },
        "readout": {
            "kernel": grads["grad_w_hy_mean_over_T"],
            "bias": grads["grad_b_y_mean_over_T"],
        },
    }
    assert_close(ours, expected)
    assert_close(loss, theirs["loss_mean"])
