"""`dni` against the numbers of vanilla-rtrl, states as well as gradients.

The arrays come from omarschall/vanilla-rtrl, the code of Marschall, Cho and Savin (2020): see
README.md. There the step before the first is one too, with the first step's target.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from tests.golden.common import assert_close, load
from tests.golden.problems import (
    LOSSES,
    OUTPUTS,
    UNITS,
    batch_of,
    cell_of,
    network_of,
    network_tree,
    params_of,
    problem,
)

REFRESH = {"DNI": 1, "DNI_fix5": 5}
LR = 0.05  # of their `online` runs

pytestmark = pytest.mark.usefixtures("x64")


def begun(rule, params, case):
    """The state at their start: their predictor, and the step before the first."""
    state, first = rule.init(params), problem(case)["Y"][0]
    predictor = jnp.asarray(load("dni", f"{case}/problem/")["dni_A0"].T)
    seen = np.concatenate([np.zeros(UNITS), first, [1.0]])[None]
    return state._replace(predictor=predictor, held=predictor, seen=jnp.asarray(seen))


def assert_same_run(rule, case, run, name, lr=0.0):
    """Every call of one step: gradients, credit predicted, its target, and the predictors."""
    theirs = load("dni", f"{case}/{run}/{name}/")
    grads = network_tree(theirs, "grad_")
    params, batch = params_of(case), batch_of(case)
    state = begun(rule, params, case)
    for t in range(len(theirs["a"])):
        before = state
        piece = jax.tree.map(lambda a, t=t: a[:, t : t + 1], batch)
        updates, state = rule(params, state, piece)
        assert_close(updates, jax.tree.map(lambda g, t=t: g[t], grads))
        assert_close(state.carry[0][0], theirs["a"][t])
        assert_close(state.predictor.T, theirs["state_A"][t])
        if "state_A_" in theirs:
            assert_close(state.held.T, theirs["state_A_"][t])
        assert_close(state.seen[0] @ state.predictor, theirs["state_sg"][t])
        assert_close(state.known[0], theirs["q"][t])
        # Their target is told by how the predictor moved, with plain SGD at 0.01.
        error = before.seen[0] @ before.predictor - theirs["state_sg_target"][t]
        moved = -0.01 * np.outer(before.seen[0], error)
        assert_close(state.predictor - before.predictor, moved)
        params = jax.tree.map(lambda p, g: p - lr * np.asarray(g), params, updates)
    return params, theirs


@functools.cache
def dni(case, name, network=network_of):
    return localgrad.dni(
        network(case),
        LOSSES[case],
        predicts="total",
        predictor_optimizer=optax.sgd(0.01),
        refresh=REFRESH[name],
        batch_size=1,
        reduction="sum",
    )


@pytest.mark.parametrize("name", REFRESH)
@pytest.mark.parametrize("case", ["c0", "c1"])
def test_with_frozen_weights(case, name):
    assert_same_run(dni(case, name), case, "frozen", name)


@pytest.mark.parametrize("name", REFRESH)
def test_learning_online(name):
    final, theirs = assert_same_run(dni("c0", name), "c0", "online", name, lr=LR)
    assert_close(final, network_tree(theirs, "final_"))


@jax.custom_vjp
def fed_back(ys, outputs, feedback):
    """`outputs`, whose credit goes to ys by feedback weights (O, N)."""
    del ys, feedback
    return outputs


fed_back.defvjp(
    lambda ys, outputs, feedback: (outputs, feedback),
    lambda feedback, q: (q @ feedback, q, jnp.zeros_like(feedback)),
)


class FedBack(nn.Dense):
    """A readout that sends its error back by their feedback weights."""

    @nn.compact
    def __call__(self, ys):
        """Outputs."""
        exact = super().__call__(jax.lax.stop_gradient(ys))
        return fed_back(ys, exact, jnp.asarray(problem("c0")["W_FB"]))


def fed_back_network(case):
    return localgrad.Network((cell_of(case),), readout=FedBack(OUTPUTS))


def test_with_their_feedback_weights():
    assert_same_run(dni("c0", "DNI", fed_back_network), "c0", "frozen_FB", "DNI")


@pytest.mark.parametrize("chunk", [2, 5])
def test_calls_of_many_steps_are_the_same(chunk):
    """The updates of a call add up, and the state is that of the published steps."""
    rule, theirs = dni("c1", "DNI_fix5"), load("dni", "c1/frozen/DNI_fix5/")
    params, batch = params_of("c1"), batch_of("c1")
    state = begun(rule, params, "c1")
    grads = network_tree(theirs, "grad_")
    for start in range(0, 10, chunk):
        steps = slice(start, start + chunk)
        piece = jax.tree.map(lambda a, steps=steps: a[:, steps], batch)
        updates, state = rule(params, state, piece)
        assert_close(updates, jax.tree.map(lambda g, steps=steps: g[steps].sum(0), grads))
        assert_close(state.predictor.T, theirs["state_A"][steps.stop - 1])
