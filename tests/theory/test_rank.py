"""The low rank of what RFLO learns: exact where the theory says, and broken where it says."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad import theory
from tests.theory.problems import golden, half_square

UNITS, OUTPUTS = 12, 2


FACTORIES = {
    "rflo": functools.partial(localgrad.rflo, key=jax.random.key(1)),
    "eprop, fixed": functools.partial(localgrad.eprop, feedback="random", key=jax.random.key(1)),
    "eprop": localgrad.eprop,
    "snap": functools.partial(localgrad.snap, feedback="random", key=jax.random.key(1)),
    "tbptt": functools.partial(localgrad.tbptt, horizon=1),
    "bptt": localgrad.bptt,
}


def change(
    rule: str,
    tx,
    *,
    alpha=0.4,
    activation=lambda u: u,
    scale=1.0,
    freeze=False,
    outputs=OUTPUTS,
    dtype=jnp.float64,
) -> dict:
    """Trains 60 minibatches on a random task, nothing aligned; the change of the cell's weights."""
    cell = localgrad.RateCell(UNITS, alpha=alpha, activation=activation, param_dtype=dtype)
    model = localgrad.Network((cell,), nn.Dense(outputs, use_bias=False, param_dtype=dtype))
    learner = FACTORIES[rule](model, half_square)
    rng = np.random.default_rng(0)
    inputs = scale * np.cumsum(rng.normal(size=(60, 4, 7, 3)), axis=2)  # coloured
    targets = scale * rng.normal(size=(60, 4, 7, outputs))
    inputs, targets = (jnp.asarray(v, dtype) for v in (inputs, targets))
    carry = model.initialize_carry(jax.random.key(0), (4, 3))
    params = model.init(jax.random.key(2), carry, inputs[0, :, 0])["params"]
    if freeze:
        after = optax.partition(
            {"train": tx, "freeze": optax.set_to_zero()},
            {"cells_0": "train", "readout": "freeze"},
        )
        tx = after
    chain = optax.chain(learner, tx)

    def step(so_far, now):
        params, state = so_far
        updates, state = chain.update(None, state, params, batch=localgrad.Batch(*now))
        return (optax.apply_updates(params, updates), state), None

    data = inputs, targets
    (last, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, chain.init(p)), data))(params)
    drop = {"i": {"kernel": None}, "h": {"kernel": None}}
    pick = lambda tree: {k: {"kernel": tree["cells_0"][k]["kernel"]} for k in drop}  # noqa: E731
    return theory.weight_change_rank(pick(params), pick(last), joint=True)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.004),
        optax.sgd(0.001, momentum=0.9),
        optax.chain(
            optax.clip_by_global_norm(0.1), optax.sgd(optax.linear_schedule(0.01, 0.001, 60))
        ),
    ],
    ids=["sgd", "momentum", "clipping and schedule"],
)
@pytest.mark.slow
def test_rflo_is_of_the_outputs_rank(tx):
    found = change("rflo", tx)["joint"]
    assert found.rank == theory.rank_bound("rflo", OUTPUTS, UNITS) == OUTPUTS
    assert found.singular_values[OUTPUTS] < 1e-12 * found.singular_values[0]


def test_time_constants_multiply_the_rank():
    alpha = np.repeat([0.3, 0.6, 0.9], 4)
    found = change("rflo", optax.sgd(0.004), alpha=alpha)["joint"]
    assert found.rank == theory.rank_bound("rflo", OUTPUTS, UNITS, time_constants=3) == 6


@pytest.mark.parametrize(
    "rule, tx",
    [
        ("rflo", optax.adam(0.01)),
        *((name, optax.sgd(0.004)) for name in ("bptt", "tbptt", "eprop", "snap")),
    ],
)
@pytest.mark.few(2)
def test_what_has_no_bound(rule, tx):
    assert change(rule, tx)["joint"].rank > 3 * OUTPUTS


@pytest.mark.parametrize("rule", ["tbptt", "eprop"])
def test_a_frozen_readout_is_fixed_feedback(rule):
    assert change(rule, optax.sgd(0.004), freeze=True)["joint"].rank == OUTPUTS


def test_linear_eprop_with_fixed_feedback_is_rflo():
    """The same numbers."""
    found = (change(rule, optax.sgd(0.004))["joint"] for rule in ("rflo", "eprop, fixed"))
    one, other = (spectrum.singular_values for spectrum in found)
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)


def test_with_one_output_adam_keeps_rank_one_but_for_its_epsilon():
    found = [
        change("rflo", optax.adam(0.01, eps=eps), outputs=1)["joint"].singular_values
        for eps in (1e-30, 1e-8)
    ]
    ratio = [values[1] / values[0] for values in found]
    assert ratio[0] < 1e-12 < ratio[1] < 1e-3


@pytest.mark.slow
def test_rounding_is_no_rank():
    """What float32 leaves beside two directions is known for noise, and a third one is not."""
    found = change("rflo", optax.sgd(0.004), dtype=jnp.float32)
    assert found["joint"].rank == OUTPUTS
    assert found["joint"].singular_values[OUTPUTS] > 1e-9 * found["joint"].singular_values[0]
    for dtype, kept in ((np.float64, 3), (np.float32, 2), (jnp.bfloat16, 1)):
        before = {"w": jnp.zeros((3, 3), dtype)}
        after = {"w": jnp.diag(jnp.asarray([1.0, 0.01, 1e-6], dtype))}
        assert theory.weight_change_rank(before, after)["w"].rank == kept


def test_state_dimension():
    """Two of three directions vary, one with half the deviation: (1 + 1/4)^2 / (1 + 1/16)."""
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    states = np.stack([np.cos(turn), 0.5 * np.sin(turn), np.full(12, 7.0)], -1)
    turned = states @ np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    want = 1.25**2 / (1 + 1 / 16)
    np.testing.assert_allclose(theory.state_dimension(turned.reshape(3, 4, 3)), want, rtol=1e-12)
    assert theory.state_dimension(np.ones((4, 3))) == 0.0
    with pytest.raises(ValueError, match="states must be finite"):
        theory.state_dimension([[np.nan, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="two or more"):
        theory.state_dimension(np.ones(3))


def test_a_nonlinearity_breaks_it_by_the_amplitude_squared():
    ratio = []
    for scale in (1e-2, 2e-2):
        values = change("rflo", optax.sgd(0.02), activation=jnp.tanh, scale=scale)["joint"]
        ratio.append(values.singular_values[OUTPUTS] / values.singular_values[0])
    assert 1.8 < np.log2(ratio[1] / ratio[0]) < 2.2


def test_outside_numbers_and_names():
    found = theory.weight_change_rank({"w": np.zeros((2, 2))}, {"w": np.diag([3.0, 0.0])})
    assert found["w"].rank == 1 and found["w"].singular_values.tolist() == [3.0, 0.0]
    assert theory.weight_change_rank({"w": np.eye(2)}, {"w": np.eye(2)})["w"].rank == 0
    with pytest.raises(ValueError, match="params w must be finite; got 4 of 4"):
        theory.weight_change_rank({"w": np.eye(2)}, {"w": np.full((2, 2), np.nan)})
    with pytest.raises(ValueError, match=r"w must have entries; got shape \(0, 2\)"):
        theory.weight_change_rank({"w": np.ones((0, 2))}, {"w": np.ones((0, 2))})
    with pytest.raises(ValueError, match="params0 and params must be alike"):
        theory.weight_change_rank({"w": np.eye(2)}, {"w": np.eye(3)})
    with pytest.raises(ValueError, match="end in the same units"):
        two = {"w": np.ones((2, 2)), "v": np.ones((2, 3))}
        theory.weight_change_rank(two, two, joint=True)


SPECTRA = {
    "rflo_sgd": True,
    "rflo_momentum": True,
    "tbptt1_frozen_readout": True,
    "rflo_ADAM": False,
    "tbptt1_sgd": False,
    "bptt_sgd": False,
}


@pytest.mark.parametrize("name", SPECTRA)
def test_an_outside_programs_changes_have_the_same_ranks(name):
    """Its networks had 30 units and 2 outputs; only the spectra of its changes are known."""
    spectrum = golden("lowrank/")[f"{name}/singvals_dW_dB"]
    found = theory.weight_change_rank({"w": np.zeros((30, 30))}, {"w": np.diag(spectrum)})["w"]
    np.testing.assert_allclose(found.singular_values, spectrum, rtol=1e-12)
    assert (found.rank == theory.rank_bound("rflo", outputs=2, units=30)) == SPECTRA[name]


def test_an_outside_programs_tanh_breaks_the_bound_by_the_amplitude_squared():
    at = golden("lowrank/")
    slope = np.diff(np.log(at["tanh_ratio"][:2])) / np.diff(np.log(at["tanh_amps"][:2]))
    assert 1.9 < slope.item() < 2.1
