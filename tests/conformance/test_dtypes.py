"""Precision: float32 and bfloat16 parameters, float64, and mixtures."""

import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from catalogue import RULES
from tests.conformance.table import by_machinery

B, T, IN, OUT = 4, 6, 2, 3
every_rule = pytest.mark.parametrize("name", by_machinery(RULES))
settled_rule = pytest.mark.parametrize(
    "name", by_machinery(n for n, row in RULES.items() if not row.random)
)


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    """Float64 is off here but where a test asks for it."""
    yield


@functools.cache
def network(tuned=True):
    """A network with float32 parameters, of which one may lie in no layer, and data in NumPy."""
    rng = np.random.default_rng(0)
    model = localgrad.Network(
        (localgrad.RateCell(4, alpha=0.3, learn_alpha=tuned),), readout=nn.Dense(OUT)
    )
    inputs = rng.normal(size=(B, T, IN)).astype(np.float32)
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = jax.jit(model.init)(jax.random.key(0), carry, inputs[:, 0])["params"]
    return model, params, inputs, rng.normal(size=(B, T, OUT)).astype(np.float32)


@functools.cache
def updated(name, dtype=jnp.float32, data=jnp.float32, x64=False):
    """Two windows of a stream: the parameters, the updates, and the states before and after."""
    with jax.enable_x64(x64):
        model, params, inputs, targets = network("tuned" not in RULES[name].refuses)
        params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
        batch = localgrad.Batch(jnp.asarray(inputs, data), jnp.asarray(targets, data))
        rule = RULES[name].make(
            model,
            optax.l2_loss,
            batch_size=B,
            window=3,
            reduction="sum",
            example=batch.inputs[0, 0],
        )
        state = fed_back(rule.init(params))
        return params, *rule(params, state, batch), state


def fed_back(state):
    """The state with feedback weights, if any, of one draw for every precision; a key's differ."""
    if getattr(state, "feedback", None) is None:
        return state
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), state.feedback)
    return state._replace(feedback=drawn)


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


MIXTURES = {
    "float32": (jnp.float32, jnp.float32, False),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16, False),
    "float64": (jnp.float64, jnp.float64, True),
    "float32 on float64 data": (jnp.float32, jnp.float64, True),
}


@every_rule
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.few(1)
def test_updates_have_their_parameters_dtype(name, mixture):
    dtype, data, x64 = MIXTURES[mixture]
    params, updates, after, before = updated(name, dtype, data, x64)
    assert set(dtypes(updates)) == set(dtypes(params)) == {jnp.dtype(dtype)}
    assert dtypes(after) == dtypes(before)
    assert after.loss.dtype == (jnp.float64 if x64 else jnp.float32)
    held = [getattr(after, field, None) for field in ("influence", "eligibility")]
    assert set(dtypes(held)) <= {jnp.promote_types(dtype, jnp.float32)}


@settled_rule
@pytest.mark.parametrize("mixture", list(MIXTURES)[1:])
@pytest.mark.few(2)
def test_precision_does_not_change_the_rule(name, mixture):
    dtype, data, x64 = MIXTURES[mixture]
    error = 0.05 if dtype == jnp.bfloat16 else 1e-4
    updates, reference = updated(name, dtype, data, x64)[1], updated(name)[1]
    for found, exact in zip(jax.tree.leaves(updates), jax.tree.leaves(reference), strict=True):
        gap = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(exact, np.float64))
        assert gap <= error * np.linalg.norm(exact)


CELLS = {"GRU": (nn.GRUCell, ("gated",)), "rate": (localgrad.RateCell, ())}


@pytest.mark.parametrize("cell", ["GRU", pytest.param("rate", marks=pytest.mark.slow)])
@every_rule
@pytest.mark.slow
def test_computing_in_bfloat16_with_float32_parameters(name, cell):
    if RULES[name].refusal(CELLS[cell][1]):
        pytest.skip("the rule refuses the cell")
    _, _, inputs, targets = network()
    batch = localgrad.Batch(jnp.asarray(inputs), jnp.asarray(targets))
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = localgrad.Network((CELLS[cell][0](4, dtype=dtype),), nn.Dense(OUT, dtype=dtype))
        carry = model.initialize_carry(jax.random.key(0), (B, IN))
        params = jax.jit(model.init)(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
        rule = RULES[name].make(model, optax.l2_loss, example=batch.inputs[0, 0])
        found.append(rule(params, fed_back(rule.init(params)), batch))
    (exact, _), (updates, state) = found
    assert set(dtypes(updates)) == {jnp.dtype(jnp.float32)} and state.loss.dtype == jnp.float32
    gap = optax.tree.norm(optax.tree.sub(updates, exact))
    assert RULES[name].random or gap < 0.05 * optax.tree.norm(exact)


def spiking(name, cell, dtype):
    """Two windows of a stream through spiking units of this dtype that are fed float32."""
    rng = np.random.default_rng(0)
    model = cell(4, threshold=0.3, refractory=2, param_dtype=dtype)
    drawn = {"i": rng.integers(-64, 64, size=(IN, 4)), "h": rng.integers(-64, 64, size=(4, 4))}
    params = {layer: {"kernel": jnp.asarray(k / 64, dtype)} for layer, k in drawn.items()}  # exact
    data = [jnp.asarray(rng.normal(size=(2, 6, width)), jnp.float32) for width in (IN, 4)]
    options = {"autapses": True} if name == "deep_eprop" else {}
    rule = RULES[name].make(model, optax.l2_loss, batch_size=2, window=3, **options)
    return rule(params, rule.init(params), localgrad.Batch(*data))


@functools.cache
def spiking_in_float32(cell):
    return spiking("snap", cell, jnp.float32)[0]


SPIKING = {"LIF": (localgrad.LIFCell, jnp.bfloat16), "ALIF": (localgrad.ALIFCell, jnp.float16)}


@pytest.mark.parametrize("cell", SPIKING)
@pytest.mark.parametrize(
    "name", ["snap", pytest.param("deep_eprop", marks=pytest.mark.slow)]
)  # on one layer, with autapses, the same
@pytest.mark.slow
def test_a_carry_of_two_dtypes(name, cell):
    """Float32 inputs make voltages and spikes float32; the count of silent steps stays half."""
    cell, dtype = SPIKING[cell]
    updates, state = spiking(name, cell, dtype)
    assert set(dtypes(state.carry)) == {jnp.dtype(dtype), jnp.dtype(jnp.float32)}
    reference = jax.tree.leaves(spiking_in_float32(cell))
    for found, exact in zip(jax.tree.leaves(updates), reference, strict=True):
        gap = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(exact, np.float64))
        # That count and the kernels are exact, so that the updates alone are rounded.
        assert found.dtype == dtype
        assert 0 < np.linalg.norm(exact) and gap <= jnp.finfo(dtype).eps * np.linalg.norm(exact)


@settled_rule
@pytest.mark.few(1)
def test_bfloat16_parameters_keep_a_float32_influence_over_many_steps(name):
    """Two calls of 50 steps: .3 % from float32's updates, of which rounding them takes .17."""
    row, rng = RULES[name], np.random.default_rng(0)
    make = nn.GRUCell if "gated" not in row.refuses else localgrad.RateCell
    model = localgrad.Network((make(8),), readout=nn.Dense(OUT))
    inputs, targets = (rng.normal(size=(B, 50, n)).astype(np.float32) for n in (IN, OUT))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = jax.jit(model.init)(jax.random.key(0), carry, inputs[:, 0])["params"]
    inputs = jnp.asarray(inputs, jnp.bfloat16)
    coarse = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    found = []
    for dtype in (jnp.bfloat16, jnp.float32):
        params = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), coarse)
        batch = localgrad.Batch(inputs.astype(dtype), jnp.asarray(targets))
        rule = row.make(model, optax.l2_loss, batch_size=B, example=batch.inputs[0, 0])
        _, state = rule(params, fed_back(rule.init(params)), batch)
        updates, _ = rule(params, state, batch)
        found.append(np.concatenate([np.ravel(a).astype(float) for a in jax.tree.leaves(updates)]))
    assert np.linalg.norm(found[0] - found[1]) < 0.003 * np.linalg.norm(found[1])
