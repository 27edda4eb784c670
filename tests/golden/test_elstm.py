"""The element-wise LSTM learnt by exact RTRL, against the authors' own code.

The arrays come from IDSIA/rtrl-elstm, PyTorch code for "Exploring the promise and limits of
real-time recurrent learning" (Irie, Gopalakrishnan and Schmidhuber 2023): see README.md. Weights
are (post, pre) there, influences [T, B, ...]; the readout has no bias and does not learn; the loss
is half the squared error, summed. Its cell has no output gate.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from tests.golden.common import as_batch, assert_close, load, squared_error, stream

pytestmark = pytest.mark.usefixtures("x64")

CELL = localgrad.ElementwiseLSTMCell(4, output_gate=False, param_dtype=jnp.float64)
MODEL = localgrad.Network((CELL,), readout=nn.Dense(2, use_bias=False))
GATES = ("z", "f")


def tree(arrays: dict, prefix: str = "", suffix: str = "") -> dict:
    """Their arrays, which may have leading axes, as the tree of our cell."""

    def of(name: str) -> np.ndarray:
        return arrays[f"{prefix}{name}{suffix}"]

    layers = {g: {"kernel": of(f"wm_{g}").swapaxes(-1, -2), "bias": of(f"bias_{g}")} for g in GATES}
    return layers | {f"w_{g}": of(f"wv_{g}") for g in GATES}


def problem() -> tuple[dict, localgrad.Batch, dict]:
    theirs = load("elstm")
    flat = theirs | {name: theirs[name][0] for name in ("wv_z", "wv_f", "bias_z", "bias_f")}
    params = {"cells_0": tree(flat), "readout": {"kernel": theirs["w_out"].T}}
    batch = as_batch(theirs["inputs"].swapaxes(0, 1), theirs["y_target"].swapaxes(0, 1))
    return params, batch, theirs


def test_gradients_states_and_influences_of_every_step():
    params, batch, theirs = problem()
    rule = localgrad.rtrl(MODEL, squared_error, batch_size=2, reduction="sum")
    grads, influences = tree(theirs, "grad_", "_per_step"), tree(theirs, "influence_")
    for call in stream(rule, params, batch)[0]:
        t = call.steps.start
        assert_close(call.state.carry[0], theirs["h"][t])
        updates, held = call.updates["cells_0"], call.state.influence["cells_0"]
        for gate in GATES:
            for leaf in ("kernel", "bias"):
                assert_close(updates[gate][leaf], grads[gate][leaf][t])
                found = held["cells_0", gate, leaf]
                assert_close(found[:, 0], influences[gate][leaf][t])
            assert_close(updates[f"w_{gate}"], grads[f"w_{gate}"][t])
            assert_close(held["cells_0", f"w_{gate}"][:, 0], influences[f"w_{gate}"][t])


@pytest.mark.parametrize("window", [3, None])
def test_a_whole_call(window):
    params, batch, theirs = problem()
    rule = localgrad.rtrl(MODEL, squared_error, reduction="sum", window=window)
    updates, _ = rule(params, rule.init(params), batch)
    every = tree(theirs, "grad_", "_per_step")
    for gate in GATES:
        assert_close(updates["cells_0"][gate]["kernel"], every[gate]["kernel"].sum(0))
        assert_close(updates["cells_0"][f"w_{gate}"], every[f"w_{gate}"].sum(0))
