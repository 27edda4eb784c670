"""What a compiled call allocates and computes: no more memory for 4096 steps than for 256."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import localgrad
from benchmarks.harness import problem, streaming
from catalogue import RULES
from tests.conformance.table import by_machinery

# What is allocated is up to the optimizer.
pytestmark = [pytest.mark.long, pytest.mark.optimized]
B, IN, OUT = 4, 3, 2


def temporary_bytes(name: str, steps: int) -> int:
    """Beside arguments and results."""
    model = localgrad.Network((localgrad.RateCell(8, alpha=0.3),), readout=nn.Dense(OUT))
    shape = (B, steps)
    batch = localgrad.Batch(
        jax.ShapeDtypeStruct((*shape, IN), jnp.float32),
        jax.ShapeDtypeStruct((*shape, OUT), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.bool_),
    )

    def init():
        carry = model.initialize_carry(jax.random.key(0), (B, IN))
        return model.init(jax.random.key(0), carry, jnp.zeros((B, IN)))["params"]

    params = jax.eval_shape(init)
    rule = RULES[name].make(model, optax.l2_loss, batch_size=B, example=jnp.zeros(IN))
    state = jax.eval_shape(rule.init, params)
    compiled = jax.jit(rule.__call__).lower(params, state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", by_machinery(RULES))
def test_memory_does_not_grow_with_the_length_of_a_call(name):
    short, long = temporary_bytes(name, 256), temporary_bytes(name, 4096)
    if RULES[name].windowed:
        assert long <= 1.2 * short
    else:
        assert long > 8 * short


def learning_with_adam(name, cell, units, batch):
    """Of `learn`, one update a step, as compiled for batches of `batch` streams, and the state."""
    task = problem(cell, units, 16, batch, abstract=True)
    tx = optax.chain(streaming(getattr(localgrad, name), task), optax.adam(1e-3))
    learn = functools.partial(localgrad.learn, tx, chunk=1)
    state = jax.eval_shape(tx.init, task.params)
    return jax.jit(learn).lower(task.params, state, task.batch).compile(), state


@pytest.mark.parametrize(("name", "cell"), [("snap", "LSTM"), ("eprop", "GRU"), ("eprop", "rate")])
@pytest.mark.few(1)
def test_a_trace_is_renewed_in_place(name, cell):
    compiled, state = learning_with_adam(name, cell, units=64, batch=16)
    traces = jax.tree.leaves(state[0].eligibility)
    trace = sum(a.size * a.dtype.itemsize for a in traces)
    assert compiled.memory_analysis().temp_size_in_bytes < trace / 2


def test_a_unit_s_jacobian_is_not_computed_again_for_each_of_its_synapses():
    flops = []
    for batch in (1, 2):
        compiled, _ = learning_with_adam("snap", "LSTM", units=64, batch=batch)
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[0] <= flops[1]


@pytest.mark.parametrize("name", ["bptt", "tbptt"])
@pytest.mark.few(1)
def test_weights_that_no_layer_holds_cost_what_those_of_layers_do(name):
    flops = {}
    for cell in ("LSTM", "OptimizedLSTM"):
        task = problem(cell, 32, 16, 4, abstract=True)
        rule = streaming(RULES[name].make, task)
        state = jax.eval_shape(rule.init, task.params)
        compiled = jax.jit(rule.__call__).lower(task.params, state, task.batch).compile()
        flops[cell] = compiled.cost_analysis()["flops"]
    assert flops["OptimizedLSTM"] < 1.05 * flops["LSTM"]
