"""The linear recurrent unit learnt online, against the code of "Online learning of long-range
dependencies" (Zucchet et al. 2023): see README.md.

Its `online_full_rec` credits what makes the recurrence (nu, theta, gamma) through all of the past,
and B at the same step only; its `online_1truncated` credits everything at the same step only. Its
D is one number an output, here the diagonal of a layer; loss is half the squared error, summed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from tests.golden.common import as_batch, assert_close, learned, load, squared_error, stream

pytestmark = pytest.mark.usefixtures("x64")

CELL = localgrad.LRUCell(4, outputs=3, param_dtype=jnp.float64)
RECURRENCE, OUTPUT, INPUT = ("nu_log", "theta_log", "gamma_log"), ("C_re", "C_im"), ("B_re", "B_im")
FULL = {"eprop": localgrad.eprop, "snap": localgrad.snap, "rtrl": localgrad.rtrl}


def tree(arrays: dict) -> dict:
    """Their arrays as our tree, but for D."""
    layers = {name: {"kernel": arrays[name].T} for name in (*INPUT, *OUTPUT)}
    return layers | {name: arrays[THEIRS.get(name, name)] for name in RECURRENCE}


THEIRS = {"nu_log": "nu", "theta_log": "theta"}


def problem() -> tuple[dict, localgrad.Batch]:
    theirs = load("lru")
    params = load("lru", "params/")
    skip = {"D": {"kernel": np.diag(params["D"])}}
    return tree(params) | skip, as_batch(theirs["inputs"], theirs["y_target"])


def gradients(run: str) -> tuple[dict, np.ndarray]:
    arrays = load("lru", f"online_{run}/grad_")
    return tree(arrays), arrays["D"]


def some(updates: dict, names: tuple[str, ...]) -> dict:
    return {name: updates[name] for name in names}


def test_outputs():
    params, batch = problem()
    loss, y, _ = localgrad.evaluate(CELL, squared_error, params, batch)
    assert_close(y[0], load("lru")["y"])
    assert_close(np.asarray(loss) * 7, load("lru")["online_full_rec/loss"])


@pytest.mark.parametrize("streams", [None, 1])
@pytest.mark.parametrize("name", FULL)
@pytest.mark.few(1)
def test_rules_that_are_exact_on_a_diagonal(name, streams):
    params, batch = problem()
    rule = FULL[name](CELL, squared_error, batch_size=streams, reduction="sum")
    updates = learned(rule, params, batch)
    theirs, skip = gradients("full_rec")
    known = (*RECURRENCE, *OUTPUT)
    assert_close(some(updates, known), some(theirs, known))
    assert_close(np.diagonal(updates["D"]["kernel"]), skip)

    exact = localgrad.bptt(CELL, squared_error, reduction="sum")
    assert_close(updates, learned(exact, params, batch))


def test_credit_of_the_same_step():
    params, batch = problem()
    rule = localgrad.tbptt(CELL, squared_error, horizon=1, reduction="sum")
    updates = learned(rule, params, batch)
    theirs, skip = gradients("1truncated")
    assert_close(some(updates, tuple(theirs)), theirs)
    assert_close(np.diagonal(updates["D"]["kernel"]), skip)
    assert_close(some(updates, INPUT), some(gradients("full_rec")[0], INPUT))


@pytest.mark.parametrize("name", ["eprop", "rtrl"])
def test_eligibilities(name):
    params, batch = problem()
    rule = FULL[name](CELL, squared_error, batch_size=1, reduction="sum")
    theirs = load("lru", "online_full_rec/trace_")
    rate, phase = np.exp(params["nu_log"]), np.exp(params["theta_log"])
    turn = np.exp(-rate + 1j * phase)
    by_turn = np.concatenate([np.zeros((1, 4)), theirs["lambda"]])  # none at the first step
    expected = {
        "nu_log": by_turn * turn * -rate,
        "theta_log": by_turn * turn * 1j * phase,
        "gamma_log": theirs["gamma"] * np.exp(params["gamma_log"]),
    }
    for call in stream(rule, params, batch)[0]:
        t = call.steps.start
        held = call.state.eligibility if name == "eprop" else call.state.influence["cell"]
        for leaf, traces in expected.items():
            real, imaginary = np.asarray(held[leaf,])[0]
            assert_close((real, imaginary), (traces[t].real, traces[t].imag))


@pytest.mark.slow
def test_a_stack_is_exact_under_deep_eprop():
    _, batch = problem()
    model = localgrad.Network(
        tuple(
            localgrad.LRUCell(units, outputs=3, r_min=0.5, param_dtype=jnp.float64)
            for units in (5, 4)
        )
    )
    carry = model.initialize_carry(jax.random.key(0), (1, 3))
    params = jax.jit(model.init)(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
    rule = localgrad.deep_eprop(model, squared_error, batch_size=1, reduction="sum")
    updates = learned(rule, params, batch)
    exact = localgrad.bptt(model, squared_error, reduction="sum")
    assert_close(updates, learned(exact, params, batch))
