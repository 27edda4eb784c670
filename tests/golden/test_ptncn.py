"""P-TNCN and LRA against the authors' own code: predictions, errors, corrections and updates.

The numbers are float32, of two layers. Case A is their published recipe in small, with two layers
of 5 and 4 units: there the fifth unit of the second layer is dead, and left out here.
"""

import functools
import json
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.cells import phases
from localgrad.core.windows import Window
from localgrad.rules.lra import Options, learned
from tests.golden.common import load

pytestmark = pytest.mark.usefixtures("x64")

close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=2e-6)

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "ltanh": lambda a: 1.7159 * jnp.tanh(2 * a / 3),
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "heaviside": lambda a: (a >= 0).astype(a.dtype),
}
OUTPUTS = {
    "softmax": (jax.nn.softmax, localgrad.categorical_cross_entropy),
    "sigmoid": (jax.nn.sigmoid, localgrad.binary_cross_entropy),
}
FROZEN = ("Z_on", "Z_off")
ONLINE = [
    *("A", "F_heaviside", "F_sigmoid"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("F_ltanh", "F_gelu", "F_relu")),
]
NAMES = ("W1", "E1", "W2", "E2", "U1", "M1", "M2", "V1", "V2")
LAST_AXIS_2 = ("E2", "M2", "V2", "z2", "zf2", "y2", "d2", "e2v")
FIRST_AXIS_2 = ("W2", "U1", "V2")


class Case(NamedTuple):
    """A case of the authors' code: settings, model, loss and the arrays."""

    told: dict[str, Any]
    model: localgrad.PTNCN
    loss: Any
    arrays: dict[str, np.ndarray]

    @property
    def params(self) -> dict[str, np.ndarray]:
        return self.matrices("init")

    def matrices(self, kind: str, at: Any = ()) -> dict[str, np.ndarray]:
        return {name: self.array(f"{kind}/{name}", at) for name in NAMES}

    def array(self, key: str, at: Any = ()) -> np.ndarray:
        """An array in float64, without the units that are dead."""
        found, name = self.arrays[key].astype(np.float64), key.rpartition("/")[2]
        width = self.told["embed_h2"]
        found = found[..., :width] if name in LAST_AXIS_2 else found
        found = found[..., :width, :] if name in FIRST_AXIS_2 else found
        return found[at]

    def batch(self, sequence: int) -> localgrad.Batch:
        """Frames to be predicted from those before, from none at first."""
        targets = jnp.moveaxis(self.array(f"seq{sequence}/x"), 0, 1)
        inputs = jnp.pad(targets, [(0, 0), (1, 0), (0, 0)])[:, :-1]
        mask = jnp.asarray(self.arrays[f"seq{sequence}/mask"][..., 0].T)
        return localgrad.Batch(inputs, targets, mask)


@functools.cache
def case(name: str) -> Case:
    arrays = load("ptncn", f"{name}/")
    told = json.loads(str(arrays["cfg"]))
    g, loss = OUTPUTS[told["out"]]
    model = localgrad.PTNCN(
        (told["hid"], told["embed_h2"] or told["hid"]),
        told["x_dim"],
        activation=ACTIVATIONS[told["act"]],
        output_activation=g,
        beta=told["beta"],
        alpha=told["alpha"],
    )
    return Case(told, model, loss, arrays)


def rule_of(case: Case, **options: Any) -> localgrad.LearningRule:
    told = case.told
    made = {"gamma": told["gamma"], "update_radius": told["radius"], "reduction": "sum"} | options
    return localgrad.lra(case.model, case.loss, **made)


def piece(batch: localgrad.Batch, start: int, stop: int) -> localgrad.Batch:
    return jax.tree.map(lambda a: a[:, start:stop], batch)


def require_states(case: Case, sequence: int, step: int, carry: Any) -> None:
    """Holds a corrected carry to everything that the authors' code computed in a step."""

    def theirs(*names: str) -> list[np.ndarray]:
        return [case.array(f"seq{sequence}/{name}", step) for name in names]

    close([carry.drive.first, carry.drive.rest[0]], theirs("z1", "z2"))
    close([carry.activity.first, carry.activity.rest[0]], theirs("zf1", "zf2"))
    close([carry.output, carry.prediction[0]], theirs("x_mu", "z1_mu"))
    close([carry.state.first, carry.state.rest[0]], theirs("y1", "y2"))
    mask = case.arrays[f"seq{sequence}/mask"][step]
    target = case.array(f"seq{sequence}/x", step)
    errors = phases.compare(carry.output, carry.prediction, carry.activity, target)
    close([errors.frame * mask, errors.layers[0] * mask], theirs("ex", "e1"))


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_weights_predict_and_adapt(name):
    it = case(name)
    evaluate = jax.jit(functools.partial(localgrad.evaluate, it.model, it.loss, it.params))
    batch, steps = it.batch(0), it.array("seq0/x").shape[0]
    carry = it.model.initialize_carry(jax.random.key(0), (3, 6))
    for t in range(steps):
        _, outputs, carry = evaluate(piece(batch, t, t + 1), carry)
        close(outputs[:, 0], it.array("seq0/x_mu", t))
        require_states(it, 0, t, carry)
    _, outputs, whole = evaluate(batch)
    close(jnp.moveaxis(outputs, 0, 1), it.array("seq0/x_mu"))
    close(whole, carry)


@pytest.mark.parametrize("name", ONLINE)
def test_online_training_step_by_step(name):
    """States, clipped updates and weights of every step; momentum outlives a sequence."""
    it = case(name)
    rule, told = rule_of(it, batch_size=3), it.told
    momentum = {"momentum": told["mom"], "nesterov": True} if told["opt"] == "nag" else {}
    rest = optax.chain(optax.scale(1 / 3), optax.sgd(told["lr"], **momentum))
    params, opt_state, first = it.params, rest.init(it.params), told["t_prime"]
    for sequence in range(1 + ("seq1/x" in it.arrays)):
        state, batch = rule.init(params), it.batch(sequence)
        for t in range(batch.inputs.shape[1]):
            found, state = rule(params, state, piece(batch, t, t + 1))
            require_states(it, sequence, t, state.carry)
            if t < first:
                continue
            close(found, it.matrices(f"seq{sequence}/raw", t - first))
            updates, opt_state = rest.update(found, opt_state, params)
            params = optax.apply_updates(params, updates)
            close(params, it.matrices(f"seq{sequence}/after", t - first))
    close(params, it.matrices("final"))


def test_online_training_by_learn():
    """The same as the authors' recipe, inside one jit."""
    it = case("A")
    tx = optax.chain(
        rule_of(it, batch_size=3), optax.scale(1 / 3), optax.sgd(0.075, 0.95, nesterov=True)
    )
    rule = rule_of(it, batch_size=3)
    params, opt_state = it.params, tx.init(it.params)
    learn = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=1))
    for sequence in (0, 1):
        batch = it.batch(sequence)
        _, warm = rule(params, rule.init(params), piece(batch, 0, 1))  # they do not learn from it
        steps = batch.inputs.shape[1]
        params, opt_state, _ = learn(params, (warm, *opt_state[1:]), piece(batch, 1, steps))
        close(params, it.matrices(f"seq{sequence}/after", steps - 2))


@pytest.mark.parametrize("window", [1, 3])
def test_updates_of_a_whole_sequence(window):
    """Sums of clipped updates, and one step of their RMSProp for each sequence."""
    it = case("H")
    rule = rule_of(it, window=window)
    rms = optax.rmsprop(it.told["lr"], decay=0.9, eps=1e-10, initial_scale=1.0)
    params, opt_state = it.params, rms.init(it.params)
    for sequence in (0, 1):
        found, _ = rule(params, rule.init(params), it.batch(sequence))
        found = jax.tree.map(lambda a: a / 3, found)
        close(found, it.matrices(f"seq{sequence}/accum"))
        updates, opt_state = rms.update(found, opt_state, params)
        params = optax.apply_updates(params, updates)
        close(params, it.matrices(f"seq{sequence}/after"))


def test_standardised_drives_phase_by_phase():
    """Case G standardises drives over the batch, which no rule's model may: phases alone."""
    it = case("G")
    model, weights = it.model, it.model.gather(it.params)
    options = Options("transpose", "residual", "corrected", it.told["gamma"], it.told["radius"])
    batch, carry = it.batch(0), it.model.initialize_carry(jax.random.key(0), (3, 6))
    for t in range(batch.inputs.shape[1]):
        drives = phases.drive(weights, batch.inputs[:, t], carry.state)
        drives = jax.tree.map(standardised, drives)
        activity = jax.tree.map(model.activation, drives)
        output, prediction = phases.predict(weights, activity, model.output_activation)
        errors = phases.compare(output, prediction, activity, batch.targets[:, t])
        f, beta, alpha = model.activation, model.beta, model.alpha
        state = phases.correct(weights, drives, errors, f, beta, alpha, 0.0)
        now = carry._replace(
            state=state, activity=activity, drive=drives, prediction=prediction, output=output
        )
        require_states(it, 0, t, now)
        step = Window(batch.inputs[:, t], batch.targets[:, t], None, None)
        found = learned(options, weights, carry, now, errors, step)
        close(model.scatter(found), it.matrices("seq0/raw", t))
        weights, carry = model.gather(it.matrices("seq0/after", t)), now


def standardised(a: jax.Array) -> jax.Array:
    a = a - a.mean()
    return a / jnp.sqrt(jnp.mean(a**2, axis=1, keepdims=True) + 1e-12)
