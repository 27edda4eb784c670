"""Sparse attentive backtracking against the authors' code (Ke et al. 2018): see README.md.

Their scores are one vector on [state; slot], here a query and a key. Their LSTM adds two biases,
whose gradients are equal; here they are one.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from tests.golden.common import as_batch, assert_close, load, stream, summed

pytestmark = pytest.mark.usefixtures("x64")

CASES = ["trunc1_top2", "full"]
N, OUTPUTS, T = 4, 3, 12
LOSS = optax.softmax_cross_entropy_with_integer_labels


def tree(arrays: dict[str, np.ndarray], bias: np.ndarray) -> dict[str, Any]:
    """Their arrays as our tree."""
    w_i, w_h = (np.split(arrays[f"lstm1.weight_{a}h"], 4) for a in "ih")
    lstm = {}
    for gate, into, back, b in zip("ifgo", w_i, w_h, np.split(bias, 4), strict=True):
        lstm |= {f"i{gate}": {"kernel": into.T}, f"h{gate}": {"kernel": back.T, "bias": b}}
    query, key = np.split(arrays["w_t"], 2)
    cell = {"lstm": lstm, "query": {"kernel": query}, "key": {"kernel": key}}
    readout = {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}
    return {"cells_0": cell, "readout": readout}


def problem(case: str, **options: Any) -> tuple:
    theirs, params = load("sab", f"{case}/"), load("sab", f"{case}/param/")
    told = {
        "top_k": int(theirs["top_k"]),
        "attend_every": int(theirs["attn_every_k"]),
        "truncate": int(theirs["truncate_length"]),
    }
    slots = T // told["attend_every"]
    cell = localgrad.SABCell(N, slots=slots, param_dtype=jnp.float64, **told | options)
    model = localgrad.Network((cell,), readout=nn.Dense(OUTPUTS, param_dtype=jnp.float64))
    params = tree(params, params["lstm1.bias_ih"] + params["lstm1.bias_hh"])
    return model, params, as_batch(theirs["inputs"], theirs["labels"]), theirs


def gradients(case: str) -> dict[str, Any]:
    grads = load("sab", f"{case}/grad/")
    assert_close(grads["lstm1.bias_ih"], grads["lstm1.bias_hh"])
    return tree(grads, grads["lstm1.bias_ih"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.few(1)
def test_outputs_and_loss(case):
    model, params, batch, theirs = problem(case)
    loss, logits, _ = localgrad.evaluate(model, LOSS, params, batch)
    assert_close((loss, logits), (theirs["loss"], theirs["logits"]))


@pytest.mark.parametrize("rule", [localgrad.bptt, localgrad.rtrl])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.few(1)
def test_gradients_by_a_rule(case, rule):
    model, params, batch, theirs = problem(case)
    rule = rule(model, LOSS)
    updates, state = rule(params, rule.init(params), batch)
    assert_close(updates, gradients(case))
    assert_close(state.loss, np.asarray(theirs["loss"], state.loss.dtype), 1e-7)


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_flax_alone(case):
    model, params, batch, _ = problem(case)

    def loss(params):
        return LOSS(nn.RNN(model).apply({"params": {"cell": params}}, batch.inputs), batch.targets)

    assert_close(jax.jit(jax.grad(lambda p: loss(p).mean()))(params), gradients(case))


@pytest.mark.slow
def test_rtrl_credits_slots_of_earlier_calls():
    """A step a call, which leaves BPTT nothing to credit but that step."""
    model, params, batch, _ = problem("trunc1_top2")

    def found(rule):
        calls, _ = stream(rule(model, LOSS, batch_size=2), params, batch)
        return jax.tree.map(lambda a: a / T, summed(calls))

    expected = gradients("trunc1_top2")
    assert_close(found(localgrad.rtrl), expected)
    assert furthest(found(localgrad.bptt), expected) > 1e-3


def test_the_cases_tell_truncation_apart():
    """Uncut, the truncated case has other gradients, and the same outputs."""
    model, params, batch, theirs = problem("trunc1_top2", truncate=None)
    rule = localgrad.bptt(model, LOSS)
    updates, state = rule(params, rule.init(params), batch)
    assert_close(state.loss, np.asarray(theirs["loss"], state.loss.dtype), 1e-7)
    assert furthest(updates, gradients("trunc1_top2")) > 1e-3


def furthest(updates: Any, expected: Any) -> float:
    """How far the gradients of the LSTM's input kernels are from those expected."""
    a, b = (tree["cells_0"]["lstm"]["ig"]["kernel"] for tree in (updates, expected))
    return float(np.abs(a - b).max())
