"""e-prop and BPTT of spiking networks, against the code of the authors of e-prop.

The arrays come from IGITUGraz/eligibility_propagation, TensorFlow code for "A solution to the
learning dilemma for recurrent networks of spiking neurons" (Bellec et al. 2020), run in float64:
see README.md. Its readout is a leaky one, here a `LeakyCell` on top, so that its filtered
eligibilities are those of `deep_eprop`. Its counter of refractory steps counts down in the step of
the spike, its adaptation counts the spike in one step later, and its BPTT credits the reset.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.cells.arguments import each
from tests.golden.common import as_batch, assert_close, learned, load, squared_error, stream, summed

pytestmark = pytest.mark.usefixtures("x64")

LSNN = ("lif_alif", "lif_only")
STACKS = ("one_layer", "two_layer")


class UnmaskedALIF(localgrad.ALIFCell):
    """Their `CustomALIF`: what would be spikes but for the refractory period adapts, too."""

    @nn.compact
    def __call__(self, carry: tuple, x: jax.Array) -> tuple:
        """One step."""
        v, a, z, r = carry
        v = self._integrate(v, z, x)
        threshold = each(self.threshold, v) + each(self.beta, a) * a
        unmasked, _ = self._fire(v, threshold, jnp.zeros_like(r))
        z, r = self._fire(v, threshold, r)
        a = each(self.adaptation_decay, a) * a + unmasked
        return (v, a, z, r), z


def units(theirs: dict, make: Any, **kwargs: Any) -> Any:
    """A layer of theirs."""
    if "beta" in theirs:
        kwargs |= {"beta": theirs["beta"], "adaptation_decay": theirs["rho"]}
    return make(
        theirs["w_in" if "w_in" in theirs else "w_in_l0"].shape[1],
        decay=theirs["alpha"],
        threshold=theirs["thr"],
        refractory=int(theirs.get("n_refractory", 1)) - 1,
        dampening=float(theirs["gamma_pd"]),
        param_dtype=float,
        **kwargs,
    )


def leaky(theirs: dict, scale: Any) -> localgrad.LeakyCell:
    """Their readout."""
    outputs = theirs["w_out"].shape[1]
    return localgrad.LeakyCell(outputs, theirs["kappa"], scale, use_bias=False, param_dtype=float)


def layer(w_in: np.ndarray, w_rec: np.ndarray) -> dict:
    return {"i": {"kernel": w_in}, "h": {"kernel": w_rec}}


def forward(model: Any, params: dict, batch: localgrad.Batch) -> tuple[np.ndarray, list[tuple]]:
    """Outputs [B, T, ...] and, for each cell, the arrays of its carry [B, T, ...]."""
    initial = model.initialize_carry(jax.random.key(0), batch.inputs[:, 0].shape)

    def step(carry: Any, x: Any) -> tuple:
        carry, y = model.apply({"params": params}, carry, x)
        return carry, (y, carry)

    _, found = jax.jit(functools.partial(jax.lax.scan, step))(initial, batch.inputs.swapaxes(0, 1))
    return jax.tree.map(lambda a: np.asarray(a).swapaxes(0, 1), found)


def lsnn(case: str, **kwargs: Any) -> tuple:
    """Half of the units adapt, or none; a readout that averages; half the squared error."""
    theirs = load("eprop", f"eligalif/{case}/")
    cells = units(theirs, localgrad.ALIFCell, **kwargs), leaky(theirs, 1 - theirs["kappa"])
    params = {
        "cells_0": layer(theirs["w_in"], theirs["w_rec_raw"]),
        "cells_1": {"i": {"kernel": theirs["w_out"]}},
    }
    batch = as_batch(theirs["inputs"], theirs["y_target"])
    return theirs, localgrad.Network(cells), params, batch


def assert_same_lsnn(updates: dict, theirs: dict, grads: str) -> None:
    own = layer(theirs[grads.format("in")], theirs[grads.format("rec")])
    assert_close(updates["cells_0"], own)
    assert_close(updates["cells_1"]["i"]["kernel"], theirs["eprop_grad_out"])


@pytest.mark.parametrize("case", LSNN)
def test_states(case):
    theirs, model, params, batch = lsnn(case)
    y, ((v, a, z, _), _) = forward(model, params, batch)
    np.testing.assert_array_equal(z, theirs["z"])
    assert_close((v, a[:, :-1], y), (theirs["v"], theirs["a"][:, 1:], theirs["y"]))
    assert_close(np.asarray(squared_error(y, batch.targets).sum()), theirs["loss"])
    if case == "lif_only":  # the simpler cell gives the same
        cell = units({k: v for k, v in theirs.items() if k != "beta"}, localgrad.LIFCell)
        z, ((v, *_), _) = forward(localgrad.Network((cell, *model.cells[1:])), params, batch)
        assert_close((z, v), (theirs["y"], theirs["v"]))


@pytest.mark.parametrize("case", LSNN)
def test_whole_sequences(case):
    theirs, model, params, batch = lsnn(case)
    rule = localgrad.deep_eprop(model, squared_error, reduction="sum")
    assert_same_lsnn(learned(rule, params, batch), theirs, "eprop_grad_{}_sym")


@pytest.mark.parametrize("case", LSNN)
@pytest.mark.few(1)
def test_bptt_with_credit_through_the_reset(case):
    theirs, model, params, batch = lsnn(case, reset_credit=True)
    rule = localgrad.bptt(model, squared_error, reduction="sum")
    assert_same_lsnn(learned(rule, params, batch), theirs, "grad_{}_bptt")


@pytest.mark.parametrize("case", LSNN)
def test_step_by_step(case):
    theirs, model, params, batch = lsnn(case)
    rule = localgrad.deep_eprop(model, squared_error, batch_size=1, reduction="sum")
    calls, _ = stream(rule, params, batch)
    assert_same_lsnn(summed(calls), theirs, "eprop_grad_{}_sym")
    for call in calls:
        t, held = call.steps.start, call.state.held
        for name, kind in (("i", "in"), ("h", "rec")):
            path = ("cells_0", name, "kernel")
            apart = 1 - np.eye(4) if name == "h" else 1  # theirs are masked in e only
            found = held.eligibility[path]  # of v, and of the adaptation the next step meets
            assert found.shape[1] == 2
            assert_close(found[:, 0], theirs[f"eps_v_{kind}"][:, t] * apart)
            if call is not calls[-1]:
                assert_close(found[:, 1], theirs[f"eps_a_{kind}"][:, t + 1] * apart)
            filtered = theirs[f"eprop_ebar_{kind}"][:, t][:, None] * theirs["w_out"].T[:, None]
            assert_close(held.influence["cells_1"][path], filtered)


@pytest.mark.parametrize("feedback, streams", [("sym", None), ("random", 1)])
def test_light_lif_with_its_regulariser(feedback, streams):
    """To a loss summed over steps they add `reg / 2 sum_j (f_j - f0)^2`, f a mean over them.

    `reduction="sum"` takes the sum of both, which is B T times that: so the cost is reg / (B T).
    """
    theirs = load("eprop", "lightlif/a/")
    alpha, kappa = theirs["alpha"], theirs["kappa"]
    model = localgrad.Network(
        (units(theirs, localgrad.LIFCell, scale=1 - alpha), leaky(theirs, 1 - kappa))
    )
    params = {
        "cells_0": layer(theirs["w_in"], theirs["w_rec"]),
        "cells_1": {"i": {"kernel": theirs["w_out"]}},
    }
    batch = as_batch(theirs["inputs"], theirs["y_target"])
    y, ((v, z, _), _) = forward(model, params, batch)
    assert_close((z, v, y), (theirs["z"], theirs["v"], theirs["y"]))

    size, steps, _ = z.shape
    held = localgrad.FiringRate(float(theirs["f0"]), float(theirs["reg"]) / (size * steps))
    rule = localgrad.deep_eprop(
        model,
        squared_error,
        firing_rate=held,
        feedback=theirs["B_feedback"] if feedback == "random" else "symmetric",
        batch_size=streams,
        reduction="sum",
    )
    updates, _ = rule(params, rule.init(params), batch)
    own = layer(theirs[f"grad_in_{feedback}"], theirs[f"grad_rec_{feedback}"] * (1 - np.eye(5)))
    assert_close(updates["cells_0"], own)
    heard, of_task = np.zeros(5), np.zeros((5, 2))  # the readout learns the task alone
    for spikes, error in zip(z[0], (y - theirs["y_target"])[0], strict=True):
        heard = kappa * heard + (1 - kappa) * spikes
        of_task += np.outer(heard, error)
    assert_close(updates["cells_1"]["i"]["kernel"], of_task)


def stack_of(case: str, **kwargs: Any) -> tuple:
    """One or two layers, of which some units adapt; a leaky sum as logits of a softmax."""
    theirs = load("eprop", f"customalif/{case}/")
    depth = STACKS.index(case) + 1
    cells = [units(theirs, UnmaskedALIF, **kwargs) for _ in range(depth)]
    batch = as_batch(theirs["inputs"], theirs["labels_onehot"])
    model = localgrad.Network((*cells, leaky(theirs, 1.0)))
    return theirs, model, stack_tree(theirs, "w_in_l{}", "w_rec_l{}_raw", "w_out"), batch


def stack_tree(theirs: dict, w_in: str, w_rec: str, w_out: str) -> dict:
    """Their arrays of these names as our tree."""
    depth = sum(w_in.format(level) in theirs for level in range(2))
    cells = {
        f"cells_{level}": layer(theirs[w_in.format(level)], theirs[w_rec.format(level)])
        for level in range(depth)
    }
    return cells | {f"cells_{depth}": {"i": {"kernel": theirs[w_out]}}}


GRADS = ("grad_in_l{}", "grad_rec_l{}", "grad_out")


@pytest.mark.parametrize("case", STACKS)
def test_states_of_stacks(case):
    theirs, model, params, batch = stack_of(case)
    y, carries = forward(model, params, batch)
    theirs = load("eprop", f"customalif/{case}/bptt/")
    assert_close((y, carries[-1]), (theirs["logits"], theirs["logits"]))
    for level, (v, a, z, _) in enumerate(carries[:-1]):
        np.testing.assert_array_equal(z, theirs[f"z_l{level}"])
        assert_close((v, a[:, :-1]), (theirs[f"v_l{level}"], theirs[f"a_l{level}"][:, 1:]))
    assert_close(np.asarray(optax.softmax_cross_entropy(y, batch.targets).sum()), theirs["loss"])


@pytest.mark.parametrize("streams", [None, 1])
@pytest.mark.parametrize("case", STACKS)
@pytest.mark.few(2)
def test_stacks(case, streams):
    _, model, params, batch = stack_of(case)
    loss = optax.softmax_cross_entropy
    rule = localgrad.deep_eprop(model, loss, batch_size=streams, reduction="sum")
    theirs = load("eprop", f"customalif/{case}/symmetric/")
    assert_close(learned(rule, params, batch), stack_tree(theirs, *GRADS))


@pytest.mark.parametrize("case", STACKS)
def test_bptt_of_stacks_with_credit_through_the_reset(case):
    _, model, params, batch = stack_of(case, reset_credit=True)
    rule = localgrad.bptt(model, optax.softmax_cross_entropy, reduction="sum")
    theirs = load("eprop", f"customalif/{case}/bptt/")
    assert_close(learned(rule, params, batch), stack_tree(theirs, *GRADS))


@pytest.mark.parametrize("streams", [None, 1])
@pytest.mark.parametrize("case", LSNN)
@pytest.mark.few(2)
def test_random_feedback(case, streams):
    theirs, model, params, batch = lsnn(case)
    options = {"feedback": theirs["B_feedback"], "batch_size": streams, "reduction": "sum"}
    rule = localgrad.deep_eprop(model, squared_error, **options)
    assert_same_lsnn(learned(rule, params, batch), theirs, "eprop_grad_{}_random")


@pytest.mark.parametrize("feedback", ["random", "adaptive"])
@pytest.mark.parametrize("case", STACKS)
@pytest.mark.few(2)
def test_feedback_of_stacks(case, feedback):
    """Step by step; adaptive weights have the gradient of the readout's, which they follow."""
    theirs, model, params, batch = stack_of(case)
    adaptive = {"feedback_rate": 0.1, "feedback_decay": 0.01} if feedback == "adaptive" else {}
    rule = localgrad.deep_eprop(
        model,
        optax.softmax_cross_entropy,
        feedback=feedback,
        key=jax.random.key(0),
        reduction="sum",
        **adaptive,
    )
    state = rule.init(params)
    ((receiver, drawn),) = state.feedback.items()
    weights = theirs["B_feedback"]
    assert drawn.shape == weights.shape and receiver == f"cells_{len(params) - 2}"
    updates, after = rule(params, state._replace(feedback={receiver: weights}), batch)
    grads = load("eprop", f"customalif/{case}/{feedback}/")
    assert_close(updates, stack_tree(grads, *GRADS))
    moved = weights - 0.1 * (grads["grad_feedback"] + 0.01 * weights)
    assert_close(after.feedback[receiver], moved if adaptive else weights)
