"""RTRL, RFLO, truncated BPTT and readout-only against the numbers of vanilla-rtrl.

The arrays come from omarschall/vanilla-rtrl, NumPy code by Owen Marschall for "A unified framework
of online learning algorithms for training recurrent neural networks" (2020), run in float64: see
README.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from tests.golden.common import Arrays, Call, as_batch, assert_close, inner_product, load, stream
from tests.golden.problems import (
    INPUTS,
    LOSSES,
    OUTPUTS,
    STEPS,
    UNITS,
    batch_of,
    cell_of,
    cell_tree,
    network_of,
    network_tree,
    params_of,
    problem,
    streaming,
)

CASES = ["c0", "c1"]
LR = 0.05  # of their `online` runs

pytestmark = pytest.mark.usefixtures("x64")


def gradients(theirs: Arrays) -> dict:
    """Their gradients at each step, [T, ...], as our tree."""
    return network_tree(theirs, "grad_")


def summed(per_step: dict, steps: slice) -> dict:
    """What a call over `steps` returns: the sum of the gradients of its steps."""
    return jax.tree.map(lambda g: g[steps].sum(0), per_step)


def joined(influence: dict[tuple[str, ...], jax.Array]) -> np.ndarray:
    """Influences (..., pre, post) of each parameter as theirs, (..., post, [W_rec, W_in, b])."""
    bias = influence["i", "bias"][..., None, :]
    parts = [influence["h", "kernel"], influence["i", "kernel"], bias]
    return np.concatenate(parts, axis=-2).swapaxes(-1, -2)


def eligibility_of(state: tuple) -> np.ndarray:
    """(5, 9), of one example and one state component a unit."""
    return joined({path[1:]: block for path, block in state.eligibility.items()})[0, 0]


def influence_of(state: tuple) -> np.ndarray:
    """(5, 45) in their order: the columns of (5, 9) one after another."""
    found = joined({path[1:]: block for path, block in state.influence["cells_0"].items()})[0]
    return found.transpose(0, 2, 1).reshape(UNITS, -1)


STATES = {"RTRL": ("state_dadw", influence_of), "RFLO": ("state_B", eligibility_of)}
RULES = {
    "RTRL": localgrad.rtrl,
    "RFLO": functools.partial(localgrad.rflo, feedback="symmetric"),
    "OnlyOut": localgrad.readout_only,
}


def assert_same_run(calls: list[Call], theirs: Arrays, name: str, case: str) -> None:
    """Gradients, losses, activities, and where the rule has them influences, of every call."""
    per_output = OUTPUTS if case == "c1" else 1
    for call in calls:
        now = call.steps.stop - 1
        assert_close(call.updates, summed(gradients(theirs), call.steps))
        assert_close(call.state.loss, theirs["loss"][call.steps].mean() * per_output)
        assert_close(call.state.carry[0][0], theirs["a"][now])
        if name in STATES:
            key, read = STATES[name]
            assert_close(read(call.state), theirs[key][now])


@pytest.mark.parametrize("case", CASES)
def test_outputs(case):
    theirs = load("vanilla_rtrl", f"{case}/frozen/RTRL/")
    evaluate = jax.jit(functools.partial(localgrad.evaluate, network_of(case), LOSSES[case]))
    _, outputs, carry = evaluate(params_of(case), batch_of(case))
    assert_close(outputs[0], theirs["z"])
    assert_close(carry[0][0], theirs["a"][-1])


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.few(6)
def test_with_frozen_weights(name, case, chunk):
    theirs = load("vanilla_rtrl", f"{case}/frozen/{name}/")
    calls, _ = stream(streaming(RULES[name], case), params_of(case), batch_of(case), chunk)
    assert_same_run(calls, theirs, name, case)


@pytest.mark.parametrize("name", RULES)
def test_learning_online(name):
    """With SGD after every step an influence mixes Jacobians at different weights, as theirs."""
    theirs = load("vanilla_rtrl", f"c0/online/{name}/")
    calls, final = stream(streaming(RULES[name], "c0"), params_of("c0"), batch_of("c0"), lr=LR)
    assert_same_run(calls, theirs, name, "c0")
    assert_close(final, network_tree(theirs, "final_"))


@pytest.mark.parametrize("name", ["RTRL", "RFLO"])
def test_learn_with_optax(name):
    theirs = load("vanilla_rtrl", f"c0/online/{name}/")
    tx = optax.chain(streaming(RULES[name], "c0"), optax.sgd(LR))
    params = params_of("c0")
    final, _, losses = localgrad.learn(tx, params, tx.init(params), batch_of("c0"), chunk=1)
    assert_close(losses, theirs["loss"])
    assert_close(final, network_tree(theirs, "final_"))


@functools.cache
def with_their_feedback(case: str) -> functools.partial:
    return functools.partial(localgrad.rflo, feedback=problem(case)["W_FB"].T)


@pytest.mark.parametrize("chunk", [1, 5])
def test_rflo_with_their_feedback_weights(chunk):
    theirs = load("vanilla_rtrl", "c0/frozen_FB/RFLO/")
    rule = streaming(with_their_feedback("c0"), "c0")
    calls, _ = stream(rule, params_of("c0"), batch_of("c0"), chunk)
    assert_same_run(calls, theirs, "RFLO", "c0")


def test_rflo_with_their_feedback_weights_and_a_leak():
    """They have no such run of c1: the error, fed back, times the eligibilities that they have."""
    theirs = load("vanilla_rtrl", "c1/frozen/RFLO/")
    error = theirs["grad_b_out"]  # [T, O]: the readout's bias takes the error as it is
    signal = error @ problem("c1")["W_FB"]
    expected = signal[:, :, None] * theirs["state_B"]  # [T, post, 9]
    theirs |= {
        "grad_W_rec": expected[..., :UNITS],
        "grad_W_in": expected[..., UNITS:-1],
        "grad_b_rec": expected[..., -1],
    }
    rule = streaming(with_their_feedback("c1"), "c1")
    calls, _ = stream(rule, params_of("c1"), batch_of("c1"))
    assert_same_run(calls, theirs, "RFLO", "c1")


def test_eprop_is_rflo_on_a_rate_cell():
    theirs = load("vanilla_rtrl", "c1/frozen/RFLO/")
    calls, _ = stream(streaming(localgrad.eprop, "c1"), params_of("c1"), batch_of("c1"))
    assert_same_run(calls, theirs, "RFLO", "c1")


@pytest.mark.parametrize(
    ("name", "factory"), [("RTRL", localgrad.rtrl), ("EBPTT_T", localgrad.bptt)]
)
def test_exact_rules_of_a_bare_cell_under_any_credit(name, factory):
    """Their runs with feedback weights differ by the credit `q` only, which the loss can hand over.

    RTRL gives a gradient at each step, BPTT all of it at the end.
    """
    theirs = load("vanilla_rtrl", f"c0/frozen_FB/{name}/")
    rule = factory(cell_of("c0"), inner_product, batch_size=1, reduction="sum")
    batch = as_batch(problem("c0")["X"], theirs["q"])
    chunk = 1 if name == "RTRL" else STEPS
    calls, _ = stream(rule, params_of("c0")["cells_0"], batch, chunk)
    expected = cell_tree({key.removeprefix("grad_"): theirs[key] for key in theirs})
    for call in calls:
        assert_close(call.updates, summed(expected, call.steps))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "chunk"), [("EBPTT_T", STEPS), ("EBPTT_5", 5)])
def test_bptt_over_calls(name, chunk, case):
    """Theirs gives zeros but at a window's end; the sums over windows are the same."""
    theirs = load("vanilla_rtrl", f"{case}/frozen/{name}/")
    calls, _ = stream(streaming(localgrad.bptt, case), params_of(case), batch_of(case), chunk)
    assert len(calls) == STEPS // chunk
    assert_same_run(calls, theirs, name, case)


@pytest.mark.parametrize("case", CASES)
def test_tbptt_by_differences_of_horizons(case):
    """Their F-BPTT(3) gives at t + 2 the credit of step t; ours gives at s the credit of loss s.

    Let C(s, t) be the credit of loss s for the parameters as used at step t. Theirs, F(t), is
    C(t, t) + C(t + 1, t) + C(t + 2, t), and comes for the steps with two more to follow. A call at
    step s of our `tbptt` of horizon h gives G_h(s), the sum of C(s, t) over s - h < t <= s. So
    C(s, s - h + 1) = G_h(s) - G_{h-1}(s), with G_0 = 0, and F is made of these.
    """
    theirs = load("vanilla_rtrl", f"{case}/frozen/FBPTT_3/")
    given = {}
    for horizon in (1, 2, 3):
        factory = functools.partial(localgrad.tbptt, horizon=horizon, example=jnp.zeros(INPUTS))
        rule = streaming(factory, case)
        calls, _ = stream(rule, params_of(case), batch_of(case))
        given[horizon] = jax.tree.map(lambda *a: np.stack(a), *(call.updates for call in calls))
        for now, call in enumerate(calls):
            readout = jax.tree.map(lambda a, now=now: a[now], gradients(theirs)["readout"])
            assert_close(call.updates["readout"], readout)
            assert_close(call.state.carry[0][0], theirs["a"][now])
    given[0] = jax.tree.map(np.zeros_like, given[1])

    expected = gradients(theirs)["cells_0"]
    assert_close(summed(expected, slice(0, 2)), jax.tree.map(lambda g: 0 * g[0], expected))
    found = [jax.tree.map(np.subtract, given[h], given[h - 1])["cells_0"] for h in (1, 2, 3)]
    for now in range(STEPS - 2):
        ours = jax.tree.map(lambda *c, t=now: c[0][t] + c[1][t + 1] + c[2][t + 2], *found)
        assert_close(ours, jax.tree.map(lambda g, t=now: g[t + 2], expected))
