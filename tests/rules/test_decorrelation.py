"""Decorrelation: what its update is, what it leaves alone, and that correlations fall.

Letters: B batch, T steps, N units.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

pytestmark = pytest.mark.usefixtures("x64")
B, T, N, IN, OUT = 3, 8, 4, 3, 2


def network(**options):
    """A decorrelated network away from the identity, and a batch with resets and a mask."""
    rng = np.random.default_rng(0)
    cell = localgrad.DecorrelatedCell(nn.SimpleCell(N, param_dtype=jnp.float64), inputs=True)
    model = localgrad.Network((cell,), readout=nn.Dense(OUT, param_dtype=jnp.float64), **options)
    x = jnp.asarray(rng.normal(size=(B, T, IN)) @ rng.normal(size=(IN, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    reset = jnp.zeros((B, T), bool).at[0, T // 2].set(True)
    mask = jnp.asarray(rng.choice([0.0, 0.5, 1.0], (B, T)))
    targets = jnp.asarray(rng.normal(size=(B, T, OUT)))
    return model, params, localgrad.Batch(x, targets, mask, reset)


def matrices(tree):
    return {name: tree["cells_0"][name]["decorrelation"] for name in ("input", "state")}


def test_it_is_the_gradient_of_correlations_times_the_inverse_of_the_covariance():
    model, params, batch = network()
    rule = localgrad.decorrelation(model, optax.l2_loss)
    found = matrices(rule(params, rule.init(params), batch)[0])["input"]
    x = batch.inputs.reshape(-1, IN)
    covariance = x.T @ x / len(x)

    def energy(kernel):
        c = kernel.T @ covariance @ kernel
        return jnp.sum((c - jnp.diag(jnp.diag(c))) ** 2) / 4

    gradient = jax.grad(energy)(matrices(params)["input"])
    np.testing.assert_allclose(covariance @ found, gradient, rtol=1e-9)


def test_it_learns_alike_whatever_basis_the_inputs_come_in():
    model, params, batch = network()
    basis = jnp.asarray(np.random.default_rng(5).normal(size=(IN, IN)))
    rule = localgrad.decorrelation(model, optax.l2_loss)
    wanted = matrices(rule(params, rule.init(params), batch)[0])["input"]
    params["cells_0"]["input"] = {
        "decorrelation": jnp.linalg.solve(basis, matrices(params)["input"])
    }
    moved = batch._replace(inputs=batch.inputs @ basis)
    found = matrices(rule(params, rule.init(params), moved)[0])["input"]
    np.testing.assert_allclose(basis @ found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
@pytest.mark.few(1)
def test_correlations_fall(form):
    model, params, batch = network()
    batch = batch._replace(reset=None)
    params["cells_0"] |= {
        name: {"decorrelation": jnp.eye(len(kernel))} for name, kernel in matrices(params).items()
    }
    rule = localgrad.decorrelation(model, optax.l2_loss, form=form)
    tx = optax.chain(rule, optax.sgd(0.05))

    def energies(params):
        """Of what D makes of the inputs, and of the states, that it changes itself."""
        _, states, _ = localgrad.evaluate(
            localgrad.Network(model.cells),
            optax.l2_loss,
            {"cells_0": params["cells_0"]},
            batch._replace(targets=jnp.zeros((B, T, N))),
        )
        given = batch.inputs @ matrices(params)["input"]
        both = [a.reshape(-1, a.shape[-1]) for a in (given, states)]
        c = [np.asarray(a.T @ a / len(a)) for a in both]
        return np.array([np.sum((a - np.diag(np.diag(a))) ** 2) for a in c])

    before, state = energies(params), tx.init(params)
    for _ in range(300):
        updates, state = tx.update(None, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    assert (energies(params) < 0.02 * before).all()


def test_only_its_matrices_learn_and_the_loss_is_measured():
    model, params, batch = network()
    rule = localgrad.decorrelation(model, optax.l2_loss)
    updates, state = rule(params, rule.init(params), batch)
    assert all(jnp.any(a) for a in matrices(updates).values())
    rest = [updates["cells_0"]["cell"], updates["readout"]]
    assert not any(jnp.any(a) for a in jax.tree.leaves(rest))
    loss, _, _ = localgrad.evaluate(model, optax.l2_loss, params, batch)
    np.testing.assert_allclose(state.loss, loss, rtol=1e-12)


@pytest.mark.parametrize("lengths", [[3, 5], [1] * T])
@pytest.mark.few(1)
def test_a_split_changes_nothing(lengths):
    model, params, batch = network()
    whole = localgrad.decorrelation(model, optax.l2_loss, reduction="sum", window=3)
    wanted, _ = whole(params, whole.init(params), batch)
    rule = localgrad.decorrelation(model, optax.l2_loss, reduction="sum", batch_size=B)
    state, total, start = rule.init(params), jax.tree.map(jnp.zeros_like, params), 0
    for length in lengths:
        piece = jax.tree.map(lambda a, s=start, n=length: a[:, s : s + n], batch)
        updates, state = rule(params, state, piece)
        total, start = jax.tree.map(jnp.add, total, updates), start + length
    chex.assert_trees_all_close(total, wanted, rtol=1e-10)


def test_a_layer_anywhere_learns_by_what_it_gives():
    rng = np.random.default_rng(1)
    readout = nn.Sequential([localgrad.Decorrelation(), nn.Dense(OUT)])
    model = localgrad.Network((nn.GRUCell(N),), encoder=localgrad.Decorrelation(), readout=readout)
    x = jnp.asarray(rng.normal(size=(B, T, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    rule = localgrad.decorrelation(model, optax.l2_loss, reduction="sum")
    updates, _ = rule(params, rule.init(params), localgrad.Batch(x, x[..., :OUT]))
    gram = np.einsum("btn,btm->nm", x, x)
    found = updates["encoder"]["decorrelation"]
    np.testing.assert_allclose(found, gram - np.diag(np.diag(gram)), rtol=1e-6)
    assert jnp.any(updates["readout"]["layers_0"]["decorrelation"])


@pytest.mark.slow
def test_to_other_rules_it_is_a_layer_as_any_other():
    model, params, batch = network()
    exact = localgrad.bptt(model, optax.l2_loss)
    forward = localgrad.rtrl(model, optax.l2_loss)
    wanted, _ = exact(params, exact.init(params), batch)
    found, _ = forward(params, forward.init(params), batch)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert all(jnp.any(a) for a in matrices(wanted).values())


def test_at_first_a_decorrelated_cell_is_the_cell():
    inner = nn.SimpleCell(N)
    x = jnp.ones((B, IN))
    carry = inner.initialize_carry(jax.random.key(0), x.shape)
    params = inner.init(jax.random.key(1), carry, x)["params"]
    cell = localgrad.DecorrelatedCell(inner, inputs=True)
    fresh = cell.init(jax.random.key(1), carry, x)["params"]
    _, found = cell.apply({"params": {**fresh, "cell": params}}, carry, x)
    chex.assert_trees_all_equal(found, inner.apply({"params": params}, carry, x)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "old"}, "form must be one of .*'old'"),
        ({"kappa": 1.5}, "kappa must be .*lie in .*got 1.5"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        localgrad.decorrelation(network()[0], optax.l2_loss, **options)


def test_models_that_it_cannot_train_are_refused():
    plain = localgrad.Network((nn.GRUCell(N),), readout=nn.Dense(OUT))
    x = jnp.ones((B, IN))
    carry = plain.initialize_carry(jax.random.key(0), x.shape)
    params = plain.init(jax.random.key(0), carry, x)["params"]
    with pytest.raises(ValueError, match="this model has none. Put a localgrad.DecorrelatedCell"):
        localgrad.decorrelation(plain, optax.l2_loss, batch_size=B).init(params)
    with pytest.raises(ValueError, match="cell must have one array .* LSTMCell is a tuple of 2"):
        localgrad.DecorrelatedCell(nn.LSTMCell(N)).initialize_carry(jax.random.key(0), x.shape)
    with pytest.raises(ValueError, match="cell must be a Flax Linen cell; got Dense"):
        localgrad.DecorrelatedCell(nn.Dense(N))
    cell = localgrad.DecorrelatedCell(Leaking(N))
    with pytest.raises(ValueError, match="cell must give its carry as its output; Leaking gives"):
        cell.init(jax.random.key(0), jnp.zeros((B, N)), x)


class Leaking(nn.SimpleCell):
    """A cell whose output is not its carry."""

    @nn.compact
    def __call__(self, carry, x):
        carry = 0.5 * carry + nn.Dense(N)(x)
        return carry, jnp.tanh(carry)


class Heir(localgrad.Decorrelation):
    """A subclass."""


@pytest.mark.parametrize("layer", [Heir, nn.remat(localgrad.Decorrelation)])
def test_a_layer_that_cannot_be_seen_is_refused(layer):
    model = localgrad.Network((nn.SimpleCell(N),), readout=nn.Sequential([layer(), nn.Dense(OUT)]))
    _, _, batch = network()
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    rule = localgrad.decorrelation(model, optax.l2_loss)
    with pytest.raises(ValueError, match="cannot learn readout/layers_0/decorrelation: it belongs"):
        rule(params, rule.init(params), batch)


@pytest.mark.slow
def test_a_cell_of_half_precision_runs_as_the_bare_one():
    x = jnp.ones((B, T, IN), jnp.float32)
    inner = nn.GRUCell(N, dtype=jnp.bfloat16)
    for cell in (inner, localgrad.DecorrelatedCell(inner)):
        ran = nn.RNN(cell)
        assert ran.apply(ran.init(jax.random.key(0), x), x).shape == (B, T, N)
