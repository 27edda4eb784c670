"""e-prop and BPTT of an LSTM, against the code of the authors of e-prop.

The arrays come from IGITUGraz/eligibility_propagation, TensorFlow code for "A solution to the
learning dilemma for recurrent networks of spiking neurons" (Bellec et al. 2020), run in float64:
see README.md. Its kernel has rows [x, h] and columns i, j, f, o (j is Flax's g) and adds a forget
bias of 1 to f. The readout has no bias; the loss is half the squared error, summed over outputs,
steps and the two sequences.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from tests.golden.common import as_batch, assert_close, load, lstm_tree, squared_error, stream

pytestmark = pytest.mark.usefixtures("x64")

UNITS, OUTPUTS, STEPS = 4, 2, 10
RULES = {"bptt": localgrad.bptt, "eprop": localgrad.eprop}
MODEL = localgrad.Network(
    (nn.LSTMCell(UNITS, param_dtype=jnp.float64),), readout=nn.Dense(OUTPUTS, use_bias=False)
)


def cell_tree(kernel: np.ndarray, bias: np.ndarray) -> dict[str, Any]:
    return lstm_tree(np.concatenate([kernel, bias[None]]), gates="igfo")


def problem() -> tuple[dict, localgrad.Batch]:
    theirs = load("eprop_lstm")
    forget = np.repeat([0, 0, theirs["forget_bias"], 0], UNITS)
    cell = cell_tree(theirs["kernel_l0"], theirs["bias_l0"] + forget)
    params = {"cells_0": cell, "readout": {"kernel": theirs["w_out"]}}
    return params, as_batch(theirs["inputs"], theirs["y_target"])


def assert_same_gradients(updates: dict, theirs: dict) -> None:
    """The cell's as they have them; the readout's, which they do not dump, from their outputs."""
    assert_close(updates["cells_0"], cell_tree(theirs["grad_kernel_l0"], theirs["grad_bias_l0"]))
    error = theirs["y"] - load("eprop_lstm")["y_target"]
    readout = np.einsum("bti,bto->io", theirs["h"], error)
    assert_close(updates["readout"]["kernel"], readout)


def test_forward():
    theirs = load("eprop_lstm", "bptt/")
    evaluate = jax.jit(functools.partial(localgrad.evaluate, MODEL, squared_error))
    _, outputs, (carry,) = evaluate(*problem())
    assert_close(outputs, theirs["y"])
    assert_close(carry, (theirs["c"][:, -1], theirs["h"][:, -1]))


@pytest.mark.parametrize("name", RULES)
def test_whole_sequences(name):
    theirs = load("eprop_lstm", f"{name}/")
    params, batch = problem()
    rule = RULES[name](MODEL, squared_error, reduction="sum")
    updates, state = rule(params, rule.init(params), batch)
    assert_same_gradients(updates, theirs)
    assert_close(state.loss * batch.inputs.shape[0] * STEPS, theirs["loss"])


@pytest.mark.parametrize("chunk", [1, 5])
def test_streamed_eprop(chunk):
    theirs = load("eprop_lstm", "eprop/")
    params, batch = problem()
    rule = localgrad.eprop(MODEL, squared_error, batch_size=2, reduction="sum")
    calls, _ = stream(rule, params, batch, chunk)
    for call in calls:
        ((c, h),) = call.state.carry
        assert_close(c, theirs["c"][:, call.steps.stop - 1])
        assert_close(h, theirs["h"][:, call.steps.stop - 1])
    total = jax.tree.map(lambda *parts: sum(parts), *(call.updates for call in calls))
    assert_same_gradients(total, theirs)
