"""`force` beside weighted ridge regression in NumPy, the contract, and what it refuses.

It has no row in the conformance table, whose rules give updates that add up over a stream.
"""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.rules.force import absorbed
from tests.rules.reservoirs import (
    OUT,
    B,
    N,
    T,
    features,
    matrix,
    problem,
    regression,
    reservoir,
    residual,
    series,
)

close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-9)


def piece(batch, start, stop):
    return jax.tree.map(lambda a: a[:, start:stop], batch)


def learned(rule, params, batch, ends):
    """Parameters and rule state after calls that end there."""
    tx = optax.chain(rule, optax.sgd(1.0))
    state = tx.init(params)
    for start, end in itertools.pairwise([0, *ends]):
        updates, state = tx.update(None, state, params, batch=piece(batch, start, end))
        params = optax.apply_updates(params, updates)
    return params, state[0]


@pytest.mark.parametrize(
    ("ends", "window", "forgetting", "bias"),
    [
        ([T], None, 1.0, True),
        ([T], 3, 0.8, True),
        (range(1, T + 1), None, 0.8, True),
        ([1, 6, T], 2, 0.8, False),
        ([5, T], 20, 0.3, True),
    ],
)
@pytest.mark.few(1)
def test_it_is_ridge_regression_however_it_is_split(ends, window, forgetting, bias, x64):
    model, params, batch = problem(bias)
    options = {"forgetting": forgetting, "ridge": 0.1, "batch_size": B, "window": window}
    rule = localgrad.force(model, optax.l2_loss, **options)
    found, state = learned(rule, params, batch, ends)
    x, y, weight = features(params, batch), np.asarray(batch.targets), np.asarray(batch.mask)
    close(matrix(found), regression(x, y, weight, forgetting, 0.1, matrix(params)))
    chex.assert_trees_all_equal(found["cells_0"], params["cells_0"])
    inverse = np.linalg.inv(state.root @ state.root.T)
    seen = np.any(weight != 0, axis=0)
    expected = forgetting ** seen.sum() * 0.1 * np.eye(x.shape[-1])
    for t in range(T):
        counts = forgetting ** seen[t + 1 :].sum() * weight[:, t, None]
        expected = expected + (counts * x[:, t]).T @ x[:, t]
    close(inverse, expected)
    assert not np.any(state.learnt)


@pytest.mark.slow
def test_learning_step_by_step_in_one_scan_is_the_same(x64):
    model, params, batch = problem()
    rule = localgrad.force(model, optax.l2_loss, forgetting=0.9, batch_size=B)
    expected, _ = learned(rule, params, batch, [T])
    tx = optax.chain(rule, optax.sgd(1.0))
    learn = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=1))
    found, state, losses = learn(params, tx.init(params), batch)
    close(found, expected)
    assert losses.shape == (T,) and not np.any(optax.tree.get(state, "learnt"))


@pytest.mark.slow
def test_what_was_learnt_outlives_sequences(x64):
    """An episodic rule, and a stream that is reset by hand, go on with the same P."""
    model, params, batch = problem()
    starts = jnp.zeros((B, T), bool).at[:, [0, 5]].set(True)
    batch = batch._replace(reset=starts)
    make = functools.partial(localgrad.force, model, optax.l2_loss, forgetting=0.9)
    expected, _ = learned(make(batch_size=B), params, batch, [T])
    episodic, _ = learned(make(), params, batch, [5, T])
    close(episodic, expected)
    tx = optax.chain(make(batch_size=B), optax.sgd(1.0))
    state, stream = tx.init(params), params
    for start, stop in ((0, 5), (5, T)):
        state = localgrad.reset_state(state)
        assert not jax.tree.leaves(jax.tree.map(np.any, state[0].carry))[0]
        part = piece(batch, start, stop)._replace(reset=None)
        updates, state = tx.update(None, state, stream, batch=part)
        stream = optax.apply_updates(stream, updates)
    close(stream, expected)


@pytest.mark.slow
def test_another_loss_is_a_preconditioned_gradient(x64):
    model, params, batch = problem()
    labels = jnp.asarray(np.random.default_rng(0).integers(0, OUT, (B, T)))
    batch = batch._replace(targets=labels)
    loss = optax.softmax_cross_entropy_with_integer_labels
    make = functools.partial(localgrad.force, model, loss, forgetting=0.8, ridge=0.5)
    rule = make()
    updates, _ = rule(params, rule.init(params), batch)
    x, weight = features(params, batch), np.asarray(batch.mask)
    p = np.exp(x @ matrix(params))
    errors = p / p.sum(-1, keepdims=True) - np.eye(OUT)[labels]
    total, inverse = np.zeros((N + 1, OUT)), 0.5 * np.eye(N + 1)
    for t in range(T):
        fade = 0.8 if weight[:, t].any() else 1.0
        rows = weight[:, t, None] * x[:, t]
        total = fade * total + rows.T @ errors[:, t]
        inverse = fade * inverse + rows.T @ x[:, t]
    close(matrix(updates), np.linalg.solve(inverse, total))
    for window in (1, 4):
        close((rule := make(window=window))(params, rule.init(params), batch)[0], updates)


def test_a_loss_summed_over_outputs_is_the_same_as_one_that_is_not(x64):
    model, params, batch = problem()
    summed = lambda y, z: optax.l2_loss(y, z).sum(-1)  # noqa: E731
    each, whole = (localgrad.force(model, loss) for loss in (optax.l2_loss, summed))
    found = [rule(params, rule.init(params), batch) for rule in (each, whole)]
    close(found[0][0], found[1][0])
    close(found[0][1].loss * OUT, found[1][1].loss)
    plain = localgrad.readout_only(model, optax.l2_loss)
    close(found[0][1].loss, plain(params, plain.init(params), batch)[1].loss)


def test_nothing_seen_is_nothing_learnt_or_forgotten(x64):
    model, params, batch = problem()
    rule = localgrad.force(model, optax.l2_loss, forgetting=0.5, batch_size=B)
    _, before = rule(params, rule.init(params), batch)
    unseen = batch._replace(mask=jnp.zeros((B, T)), targets=jnp.full((B, T, OUT), jnp.nan))
    updates, after = rule(params, before, unseen)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    close(after.root @ after.root.T, before.root @ before.root.T)
    assert after.loss == 0 and np.any(after.carry[0] != before.carry[0])
    wrong, _ = rule(params, before, batch._replace(mask=-jnp.ones((B, T))))
    assert np.isnan(wrong["readout"]["kernel"]).all()


@pytest.mark.slow
def test_it_follows_sinusoids_where_gradient_descent_does_not():
    model, params = reservoir()
    batch = jax.tree.map(lambda a: a.astype(jnp.float32), series(600))

    def error(rule, rate):
        tx = optax.chain(rule, optax.sgd(rate))
        learn = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=1)[2])
        return float(jnp.sqrt(2 * learn(params, tx.init(params))[-100:].mean()))

    ours = error(localgrad.force(model, optax.l2_loss, ridge=1e-3, batch_size=1), 1.0)
    plain = localgrad.readout_only(model, optax.l2_loss, batch_size=1)
    theirs = min(error(plain, rate) for rate in (0.01, 0.03, 0.1, 0.3))
    assert ours < 0.01 and theirs > 4 * ours, (ours, theirs)


@pytest.mark.slow
def test_float32_keeps_what_correlations_would_lose(x64):
    """Smooth inputs and a small penalty: P has a condition far beyond float32's digits."""
    steps, ridge = 400, 1e-6
    model, params = reservoir(jnp.float32)
    batch = jax.tree.map(lambda a: a.astype(jnp.float32), series(steps))
    tx = optax.chain(
        localgrad.force(model, optax.l2_loss, ridge=ridge, batch_size=1), optax.sgd(1.0)
    )
    found, state, _ = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=40))(
        params, tx.init(params)
    )
    wide = jax.tree.map(lambda a: a.astype(float), params)
    double, _ = reservoir(float)
    exact = localgrad.force(double, optax.l2_loss, ridge=ridge)
    update, precise = exact(wide, exact.init(wide), series(steps))
    assert np.linalg.cond(precise.root) ** 2 > 1e8
    best = optax.apply_updates(wide, jax.tree.map(jnp.negative, update))
    np.testing.assert_allclose(residual(found), residual(best), rtol=0.03)
    assert optax.tree.get(state, "root").dtype == jnp.float32


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_a_block_of_rows_of_any_size(scale):
    """Rows that say next to nothing leave the root alone; rows that say all leave little of it."""
    rng = np.random.default_rng(0)
    root = np.eye(6) + 0.3 * rng.normal(size=(6, 6))
    rows, owed = scale * rng.normal(size=(3, 6)), rng.normal(size=(3, 2))
    inverse = np.linalg.inv(np.linalg.inv(root @ root.T) + rows.T @ rows)
    new, change = absorbed(*(jnp.asarray(a, jnp.float32) for a in (root, rows, owed)))
    np.testing.assert_allclose(new @ new.T, inverse, atol=1e-5)
    np.testing.assert_allclose(change, inverse @ rows.T @ owed, rtol=1e-4, atol=1e-5 / (1 + scale))


@pytest.mark.parametrize(("forgetting", "chunk"), [(0.9, 4), (0.05, 200)])
@pytest.mark.slow
def test_a_silent_unit_does_not_overflow(forgetting, chunk):
    """Neither over a long time, nor where a window forgets more than there are numbers for."""
    model, params = reservoir(units=20)
    params["cells_0"] = jax.tree.map(lambda a: a.at[..., 0].set(0), params["cells_0"])
    batch = jax.tree.map(lambda a: a.astype(jnp.float32), series(2000))
    tx = optax.chain(
        localgrad.force(model, optax.l2_loss, forgetting=forgetting, batch_size=1, window=chunk),
        optax.sgd(1.0),
    )
    learn = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=chunk))
    found, state, losses = learn(params, tx.init(params))
    chex.assert_tree_all_finite((found, state))
    assert -2000 * np.log(forgetting) > np.log(np.finfo(np.float32).max)
    assert chunk > 4 or losses[-20:].max() < 1e-2


@pytest.mark.slow
def test_seeds_under_vmap_and_a_donated_state(x64):
    model, _, batch = problem()
    rule = localgrad.force(model, optax.l2_loss, batch_size=B, window=4)
    several = [problem(seed=seed)[1] for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *several)
    found, states = jax.vmap(lambda p: rule(p, rule.init(p), batch))(stacked)
    for k, params in enumerate(several):
        expected, state = rule(params, rule.init(params), batch)
        close(jax.tree.map(lambda a, k=k: a[k], found), expected)
        close(states.root[k] @ states.root[k].T, state.root @ state.root.T)
    params, state = several[0], rule.init(several[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(rule.init, params), state)
    donating = jax.jit(rule.__call__, donate_argnums=1)
    _, state = donating(params, state, batch)
    _, again = donating(params, jax.tree.map(jnp.copy, state), batch)
    close(again.carry, rule(params, state, batch)[1].carry)


@pytest.mark.slow
def test_it_is_an_optax_transform():
    model, params = reservoir(units=10)
    batch = jax.tree.map(lambda a: a.astype(jnp.float32), series(30))
    rule = localgrad.force(model, optax.l2_loss, batch_size=1)
    with jax.checking_leaks():
        tx = optax.chain(rule, optax.clip_by_global_norm(0.1), optax.sgd(1.0))
        updates, state = tx.update(None, tx.init(params), params, batch=batch)
    assert optax.tree.get(state, "loss") == rule(params, rule.init(params), batch)[1].loss
    assert optax.tree.norm(updates) < 0.1001
    said = localgrad.summary(rule, params)
    assert "recursive least squares" in said and "stays as it is" in said
    assert "reduction" not in repr(rule) and "forgetting=1.0" in repr(rule)


@pytest.mark.slow
def test_dtypes():
    model, params, batch = problem()
    params, batch = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if a.dtype != bool else a, (params, batch)
    )
    rule = localgrad.force(model, optax.l2_loss, batch_size=B)
    updates, state = rule(params, rule.init(params), batch)
    assert {a.dtype for a in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.root.dtype == state.loss.dtype == jnp.float32
    chex.assert_tree_all_finite((updates, state.root))
    chex.assert_trees_all_equal_shapes_and_dtypes(rule(params, state, batch)[1], state)


@pytest.mark.slow
def test_memory_does_not_grow_with_time():
    model, params = reservoir(units=32)
    rule = localgrad.force(model, optax.l2_loss)

    def need(steps):
        frames = jax.ShapeDtypeStruct((4, steps, 1), jnp.float32)
        batch = localgrad.Batch(frames, frames)
        compiled = jax.jit(rule.__call__).lower(params, rule.init(params), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert need(4096) - need(256) < 4 * (4096 - 256)  # not one number a step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forgetting": 0.0}, r"forgetting must .*lie in \(0, 1\]; got 0.0"),
        ({"forgetting": 1.1}, r"forgetting must .*lie in \(0, 1\]; got 1.1"),
        ({"forgetting": float("nan")}, "forgetting must .*lie"),
        ({"ridge": 0.0}, "ridge must be .*positive and finite; got 0.0"),
        ({"ridge": -1.0}, "ridge must be .*positive and finite; got -1.0"),
        ({"window": 0}, "window must be a positive integer"),
    ],
)
def test_refused_options(options, message):
    model, _ = reservoir(units=3)
    with pytest.raises(ValueError, match=message):
        localgrad.force(model, optax.l2_loss, **options)


class Twice(nn.Dense):
    """A Dense layer that does something else."""

    def __call__(self, x):
        """More."""
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        (None, "linear readout, and this model has no readout.*readout=nn.Dense"),
        (nn.Sequential([nn.Dense(3), nn.tanh]), "has Sequential for a readout.*readout_only"),
        (Twice(2), "has Twice for a readout"),
    ],
)
def test_readouts_that_are_not_linear_are_refused(readout, message):
    model = localgrad.Network((nn.GRUCell(4),), readout=readout)
    x = jnp.zeros((1, 3))
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    params = model.init(jax.random.key(1), carry, x)["params"]
    with pytest.raises(ValueError, match=f"force .*{message}"):
        localgrad.force(model, optax.l2_loss).init(params)


def test_cells_that_give_more_than_a_vector_are_refused():
    cell = nn.ConvLSTMCell(2, kernel_size=(3,))
    model = localgrad.Network((cell,), readout=nn.Dense(2))
    x = jnp.zeros((1, 4, 6, 3))
    carry = model.initialize_carry(jax.random.key(0), (1, 6, 3))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
    rule = localgrad.force(model, optax.l2_loss, example=x[0, 0])
    with pytest.raises(ValueError, match=r"cells that give \[B, N\].*\(1, 6, 2\)"):
        rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
