"""Firing rates held to a target: of a call, a term of its objective; running, a causal signal."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad import FiringRate
from tests.conformance import oracles
from tests.rules.test_deep import OUT, B, T, problem, rate, streamed

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
OF_CALL, RUNNING = FiringRate(0.2, cost=3.0), FiringRate(0.2, cost=3.0, decay=0.7)

pytestmark = pytest.mark.usefixtures("x64")


def lru(units):
    return localgrad.LRUCell(units, param_dtype=float)


def lif(units):
    """As the oracles have it."""
    options = {"refractory": 1, "scale": 0.7, "dampening": 0.6, "surrogate": "sigmoid"}
    return localgrad.LIFCell(units, decay=0.8, threshold=0.5, param_dtype=float, **options)


def signals(firing_rate, net, params, steps):
    """What each cell's rates add to its learning signal, [T, B, N], in loops."""
    target, cost, decay = firing_rate
    found, reset = [], np.asarray(steps.reset)[..., None]
    for z in map(np.asarray, oracles.levels(net, params, steps, ["cut"] * len(net.cells))[0]):
        running, each = np.full(z.shape[1:], target), []
        for t in range(T):
            if decay is not None:
                running = decay * np.where(reset[t], target, running) + (1 - decay) * z[t]
            each.append(cost * ((z.mean((0, 1)) if decay is None else running) - target))
        found.append(np.broadcast_to(np.stack(each).reshape(T, -1, z.shape[-1]), z.shape))
    return found


def credited(zs, signals):
    """What has these signals as its gradient."""
    return sum(jnp.sum(z * signal) for z, signal in zip(zs, signals, strict=True))


def given(kinds, *cells):
    """A problem, its batch as the oracles take it, and its network."""
    model, params, batch = problem(*cells)
    steps = oracles.steps_of(batch)
    return model, params, batch, steps, oracles.net_of(kinds, model, steps)


@pytest.mark.few(1)
def test_the_rate_of_a_call_is_a_term_of_its_objective():
    """Exactly so where units have no recurrent synapses, and whatever the losses' weights are."""
    leaky = localgrad.LeakyCell(3, decay=0.7, scale=0.3, param_dtype=float)
    model, params, batch, steps, net = given(("lru", "leaky"), lru(4), leaky)

    def objective(params):
        zs, ys = oracles.levels(net, params, steps, [oracles.EXACT] * 2)
        rates = [z.reshape(T * B, -1).mean(0) for z in zs]
        costs = [OF_CALL.cost / 2 * jnp.sum((f - OF_CALL.target) ** 2) for f in rates]
        loss = oracles.weighed(ys, steps) / steps.weight.sum()
        return loss + sum(costs), loss

    (_, loss), expected = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    rule = localgrad.deep_eprop(model, optax.l2_loss, firing_rate=OF_CALL)
    updates, state = rule(params, rule.init(params), batch)
    close(updates, expected)
    close(state.loss, loss)  # the task's alone
    assert state.excess is None


@pytest.mark.parametrize(
    "factory, how, feedback, firing_rate, window",
    [
        (localgrad.eprop, "cut", "symmetric", OF_CALL, None),
        (localgrad.snap, "diagonal", "random", RUNNING, 5),
    ],
)
@pytest.mark.slow
def test_a_cell_hears_its_own_rate_and_those_above_if_feedback_is_symmetric(
    factory, how, feedback, firing_rate, window
):
    model, params, batch, steps, net = given(("rate", "rate"), rate(4, 0.25), rate(3, 0.25))
    options = {"feedback": feedback, "window": window}
    options |= {} if feedback == "symmetric" else {"key": jax.random.key(0)}
    rule = factory(model, optax.l2_loss, firing_rate=firing_rate, reduction="sum", **options)
    assert f"feedback={feedback!r}, firing_rate={firing_rate!r}" in repr(rule)
    state = rule.init(params)
    updates, _ = rule(params, state, batch)
    heard = signals(firing_rate, net, params, steps)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def oracle(params, level):
        held = [oracles.HELD] * level + [how] + [oracles.HELD] * (1 - level)
        zs, ys = oracles.levels(net, params, steps, held)
        if feedback == "symmetric":
            return oracles.weighed(ys, steps) + credited(zs, heard)
        error = oracles.sg(jax.grad(lambda ys: oracles.weighed(ys, steps))(ys))
        return credited([zs[level]] * 2, [heard[level], error @ state.feedback[name].T])

    for level, name in enumerate(("cells_0", "cells_1")):
        expected = oracle(params, level)
        close(updates[name], expected[name])
    if feedback == "symmetric":
        close(updates["readout"], expected["readout"])


@pytest.mark.slow
def test_in_depth_rates_are_credited_through_time():
    model, params, batch, steps, net = given(("rate", "rate"), rate(4, 0.25), rate(3, 0.25))
    heard = signals(RUNNING, net, params, steps)

    @jax.jit
    @jax.grad
    def oracle(params):
        zs, ys = oracles.levels(net, params, steps, ["cut", "cut"])
        return oracles.weighed(ys, steps) + credited(zs, heard)

    found = streamed(localgrad.deep_eprop, model, params, batch, T, firing_rate=RUNNING, window=5)
    close(found, oracle(params))


@pytest.mark.slow
def test_without_credit_between_layers_each_cell_has_its_own_rate():
    model, params, batch, steps, net = given(("rate", "rate"), rate(4, 0.25), rate(3, 0.25))
    options = {"spatial": False, "firing_rate": RUNNING}
    found = streamed(localgrad.deep_eprop, model, params, batch, T, **options)

    heard = signals(RUNNING, net, params, steps)

    @jax.jit
    @jax.grad
    def oracle(params):
        zs, _ = oracles.levels(net, params, steps, ["cut", "cut"])
        return credited(zs[:1], heard[:1])

    close(found["cells_0"], oracle(params)["cells_0"])
    rule = localgrad.deep_eprop(model, optax.l2_loss, **options)
    assert rule.credits(params)["cells_0", "i", "kernel"].startswith("its own firing rate")


@pytest.mark.slow
def test_a_running_rate_does_not_know_where_calls_and_windows_end():
    """So it is causal: calls that do not know the later ones give what the whole call gives."""
    model, params, batch = problem(lif(4))
    assert batch.reset[:, 1:].any()
    whole, state = learned(model, params, batch, length=T, window=T)
    parts, last = learned(model, params, batch, length=6, window=3)
    close((parts, last.excess), (whole, state.excess))
    assert np.abs(state.excess["cells_0"]).min() > 0
    again = localgrad.reset_state(state)
    chex.assert_trees_all_equal(again.excess, {"cells_0": jnp.zeros((B, 4))})


def learned(model, params, batch, length, window):
    """Updates summed over calls of this length, and the last state."""
    options = {"firing_rate": RUNNING, "batch_size": B, "reduction": "sum", "window": window}
    rule = localgrad.eprop(model, optax.l2_loss, **options)
    state, total = rule.init(params), 0
    for at in range(0, T, length):
        piece = jax.tree.map(lambda a, at=at: np.asarray(a)[:, at : at + length], batch)
        updates, state = rule(params, state, piece)
        total = jax.tree.map(lambda a, b: a + b, updates, total) if at else updates
    return total, state


@pytest.mark.slow
def test_units_come_to_fire_at_their_rate():
    """While they learn a task their gap to it shrinks to a quarter; by itself it does not."""
    rng = np.random.default_rng(0)
    cell = localgrad.LIFCell(20, 0.8, 0.6, surrogate="fast_sigmoid", param_dtype=float)
    model = localgrad.Network((cell,), readout=nn.Dense(1, param_dtype=float))
    inputs = jnp.asarray(rng.random((8, 40, 5)))
    batch = localgrad.Batch(inputs, inputs[..., :1])
    carry = model.initialize_carry(jax.random.key(0), (8, 5))
    params = model.init(jax.random.key(0), carry, inputs[:, 0])["params"]

    @jax.jit
    def gap(params):
        hidden, own = localgrad.Network(model.cells), {"cells_0": params["cells_0"]}
        silence = batch._replace(targets=jnp.zeros((8, 40, 20)))
        _, z, _ = localgrad.evaluate(hidden, optax.l2_loss, own, silence)
        return jnp.sqrt(jnp.mean((z.mean((0, 1)) - 0.1) ** 2))

    def trained(firing_rate):
        rule = localgrad.eprop(model, optax.l2_loss, firing_rate=firing_rate)
        tx = optax.chain(rule, optax.adam(0.03))

        def step(at, _):
            updates, state = tx.update(None, at[1], at[0], batch=batch)
            return (optax.apply_updates(at[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=150)[0][0]

    quarter = gap(params) / 4
    assert gap(trained(FiringRate(0.1, decay=0.9))) < quarter < gap(trained(None))


@pytest.mark.parametrize(
    ("firing_rate", "message"),
    [
        (0.1, r"must be a localgrad\.FiringRate\(target\) or None; got 0.1"),
        (
            FiringRate(np.nan),
            "target of FiringRate must be .*, finite and 0 or more; got nan",
        ),
        (FiringRate(np.inf), "target of FiringRate .* got inf"),
        (FiringRate(-0.1), "target of FiringRate .* got -0.1"),
        (FiringRate(None), "target of FiringRate .* got None"),
        (
            FiringRate(0.1, cost=0),
            "cost of FiringRate must be .*, finite and > 0; got 0",
        ),
        (FiringRate(0.1, cost=np.nan), "cost of FiringRate .* got nan"),
        (FiringRate(0.1, decay=1.0), r"decay of FiringRate .* \(0, 1\); got 1.0"),
        (FiringRate(0.1, decay=0), r"decay of FiringRate .* \(0, 1\); got 0"),
        (FiringRate(0.1, decay="a"), r"decay of FiringRate .* \(0, 1\); got 'a'"),
    ],
)
@pytest.mark.parametrize("factory", [localgrad.eprop, localgrad.snap, localgrad.deep_eprop])
def test_a_rate_that_cannot_be_held_is_refused(factory, firing_rate, message):
    model = localgrad.Network((rate(4, 0.3),), readout=nn.Dense(OUT))
    with pytest.raises(ValueError, match=message):
        factory(model, optax.l2_loss, firing_rate=firing_rate)


def test_a_model_that_has_no_rates_is_refused():
    model, params, batch = problem(rate(4, 0.3))
    rule = localgrad.eprop(model, optax.l2_loss, firing_rate=OF_CALL, window=5)
    message = r"whole call, here T = 12 steps.*got window=5.*FiringRate\(decay=\.\.\.\)"
    with pytest.raises(ValueError, match=message):
        rule(params, rule.init(params), batch)
    bare = localgrad.Network(model.cells)
    rule = localgrad.eprop(bare, optax.l2_loss, firing_rate=RUNNING, batch_size=B)
    with pytest.raises(ValueError, match="one cell whose outputs are the model's. Wrap it"):
        rule.init({"cells_0": params["cells_0"]})
    model, params, batch = problem(localgrad.LRUCell(4, outputs=3, param_dtype=float))
    rule = localgrad.eprop(model, optax.l2_loss, firing_rate=OF_CALL)
    message = (
        r"one number a unit, \(12, 2, 4\), but the outputs of cells_0 have shapes \(12, 2, 3\)"
    )
    with pytest.raises(ValueError, match=message):
        rule(params, rule.init(params), batch)
