"""The frame, tried by throw-away rules that use what no rule of the library uses yet.

A rule that sees each target before its next step, and RTRL with the recurrent synapses cut.
"""

import functools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.core.contract.objective import Shown
from localgrad.core.contract.state import fresh, is_state
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.passes.forward import CUT, Method, Settle
from localgrad.core.passes.influence import no_influence
from localgrad.core.passes.run import run
from localgrad.rules.influence import InfluenceState, process_influence
from tests.conformance import oracles

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
B, T, N, IN, OUT, K = 2, 12, 3, 2, 2, 3

pytestmark = pytest.mark.usefixtures("x64")


def network(*cells):
    """A network of these cells, its parameters, and a batch with weights and resets."""
    rng = np.random.default_rng(0)
    model = localgrad.Network(cells, readout=nn.Dense(OUT))
    inputs = jnp.asarray(rng.normal(size=(B, T, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, inputs[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    mask, reset = rng.choice([0.0, 0.5, 1.0], (B, T)), rng.random((B, T)) < 0.1
    targets = jnp.asarray(rng.normal(size=(B, T, OUT)))
    return model, params, localgrad.Batch(inputs, targets, jnp.asarray(mask), jnp.asarray(reset))


def streamed(rule, params, batch, lengths):
    """Updates summed over calls of these lengths, and the last state."""
    state, total = rule.init(params), jax.tree.map(jnp.zeros_like, params)
    for end, n in zip(np.cumsum(lengths), lengths, strict=True):
        piece = jax.tree.map(lambda a, e=end, n=n: a[:, e - n : e], batch)
        updates, state = rule(params, state, piece)
        total = jax.tree.map(jnp.add, total, updates)
    return total, state


# ------------------------------------------------------------------------------------------------
# A rule whose carry is corrected by each target before the next step.


class SettledState(NamedTuple):
    loss: Any
    carry: Any = None
    initial_carry: Any = None

    outlives = ()


def settled_process(frame, state, window):
    settle = Settle(lambda h, seen: h + 0.2 * seen, window.targets)
    carries = frame.stack.unpack(state.carry)
    ran = run(frame.stack, frame.params, carries, window.inputs, window.reset, settle=settle)
    values = frame.objective.values(ran.outputs, window.targets, window.weight)
    shown = Shown(values, ran.outputs)
    return state._replace(carry=frame.stack.pack(ran.carries)), {}, shown


def test_a_rule_may_see_each_target_before_its_next_step():
    model, rng = localgrad.RateCell(OUT, alpha=0.4, param_dtype=float), np.random.default_rng(1)
    batch = localgrad.Batch(rng.normal(size=(B, T, IN)), rng.normal(size=(B, T, OUT)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    recipe = Recipe("settled", SettledState, settled_process, lambda stack, params: {})
    options = {"batch_size": B, "window": 5, "reduction": "sum"}
    rule = windowed_rule(model, optax.l2_loss, recipe, **options)
    _, state = streamed(rule, params, batch, [7, 5])
    _, whole = streamed(rule, params, batch, [T])
    h = carry
    for t in range(T):
        h, y = model.apply({"params": params}, h, batch.inputs[:, t])
        h = h + 0.2 * batch.targets[:, t]
    close(state.carry, h)
    close(whole.carry, h)


# ------------------------------------------------------------------------------------------------
# RTRL with the recurrent synapses cut: what e-prop in depth needs.


def cut_rtrl(model, loss, batch_size=B, window=None):
    recipe = Recipe(
        name="cut_rtrl",
        state=InfluenceState,
        process=functools.partial(process_influence, lambda frame, level: Method(CUT, {})),
        credits=lambda stack, params: {},
        remember=lambda stack, params, x: {"influence": no_influence(stack, params, len(x))},
    )
    return windowed_rule(model, loss, recipe, batch_size=batch_size, window=window, reduction="sum")


@pytest.mark.slow
def test_rtrl_without_recurrent_synapses_is_eprop_on_one_layer():
    model, params, batch = network(nn.GRUCell(N, param_dtype=float))
    eprop = localgrad.eprop(model, optax.l2_loss, reduction="sum")
    expected, _ = eprop(params, eprop.init(params), batch)
    close(streamed(cut_rtrl(model, optax.l2_loss), params, batch, [1] * T)[0], expected)


@pytest.mark.slow
def test_on_two_layers_it_credits_across_depth_and_time():
    leaky = [localgrad.RateCell(N, alpha=0.3), localgrad.RateCell(N - 1, alpha=0.2)]
    model, params, batch = network(*leaky)
    whole, _ = streamed(cut_rtrl(model, optax.l2_loss), params, batch, [T])
    for window, lengths in ((5, [T]), (None, [1] * T), (2, [7, 5])):
        close(streamed(cut_rtrl(model, optax.l2_loss, B, window), params, batch, lengths)[0], whole)

    def loss(params):
        """The network with every recurrent kernel fed by a constant."""
        h0, h1, total = jnp.zeros((B, N)), jnp.zeros((B, N - 1)), 0.0
        for t in range(T):
            h0, h1 = (jnp.where(batch.reset[:, t, None], 0, h) for h in (h0, h1))
            h0, _ = oracles.rate(params["cells_0"], h0, batch.inputs[:, t], "cut", 0.3)
            h1, _ = oracles.rate(params["cells_1"], h1, h0, "cut", 0.2)
            error = oracles.dense(params["readout"], h1) - batch.targets[:, t]
            total += jnp.sum(batch.mask[:, t] * 0.5 * (error**2).mean(-1))
        return total

    close(whole, jax.grad(loss)(params))


# ------------------------------------------------------------------------------------------------
# States.


def test_a_fresh_state_keeps_what_outlives_a_sequence():
    model, params, batch = network(localgrad.RateCell(N, alpha=0.4))
    rule = localgrad.node_perturbation(model, optax.l2_loss, key=jax.random.key(3), batch_size=B)
    _, used = streamed(rule, params, batch, [T])
    state = fresh(used)
    assert is_state(state) and not is_state(optax.EmptyState()) and int(state.clock) == T
    bare = {"clock": None, "loss": None, "key": None}
    close(state._replace(**bare), rule.init(params)._replace(**bare))
    buffers = [a.unsafe_buffer_pointer() for a in jax.tree.leaves((state.carry, used.carry))]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("make", [localgrad.readout_only, localgrad.eprop, localgrad.rtrl])
@pytest.mark.few(1)
def test_a_reset_state_can_be_donated(make):
    model, params, batch = network(localgrad.RateCell(N, alpha=0.4))
    rule = make(model, optax.l2_loss, batch_size=B)
    expected, used = rule(params, rule.init(params), batch)
    donating = jax.jit(lambda state: rule(params, state, batch), donate_argnums=0)
    close(donating(localgrad.reset_state(used))[0], expected)
