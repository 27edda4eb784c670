"""`dni` beside a program of `jax.grad`s, its limits, the contract, and what it refuses.

It has no row in the conformance table, whose rules learn nothing from what they see.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, IN, OUT = 3, 8, 2, 3
close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-12)
SGD = optax.sgd(0.05)


def problem(*cells, seed=0, steps=T, dtype=jnp.float64):
    """A network of cells, its parameters, and a batch with masked steps and resets."""
    rng = np.random.default_rng(seed)
    model = localgrad.Network(cells, readout=nn.Dense(OUT, param_dtype=dtype))
    x = jnp.asarray(rng.normal(size=(B, steps, IN)), dtype)
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(seed), carry, x[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, dtype), params)
    mask = jnp.asarray(rng.uniform(0.2, 1, (B, steps)) * (rng.uniform(size=(B, steps)) > 0.2))
    reset = jnp.asarray(rng.uniform(size=(B, steps)) < 0.15)
    y = jnp.asarray(rng.normal(size=(B, steps, OUT)), dtype)
    return model, params, localgrad.Batch(x, y, mask.astype(dtype), reset)


def piece(batch, start, stop):
    return jax.tree.map(lambda a: a[:, start:stop], batch)


def flat(carry):
    return jnp.concatenate([a.reshape(B, -1) for a in jax.tree.leaves(carry)], axis=1)


def naive(model, params, batch, horizon, refresh, total, alone):
    """The equations, a window at a time: the gradient of losses and <prediction, last carry>.

    For one cell if the total is predicted: what it outputs is the last array of its carry. If the
    call is `alone`, nothing is predicted at its end.
    """
    initial = model.initialize_carry(jax.random.key(0), (B, IN))
    initial = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), initial)

    def losses(params, carry, k):
        summed = 0.0
        for t in range(k, min(k + horizon, T)):
            fresh = batch.reset[:, t, None]
            carry = jax.tree.map(lambda a, b, fresh=fresh: jnp.where(fresh, a, b), initial, carry)
            carry, outputs = model.apply({"params": params}, carry, batch.inputs[:, t])
            each = optax.l2_loss(outputs, batch.targets[:, t]).mean(1)
            summed += jnp.sum(each * batch.mask[:, t])
        return summed, carry

    def known(carry, t):
        """What the loss of a step says of the outputs it was made from."""
        if not total:
            return jnp.zeros_like(flat(carry))
        readout = params["readout"]

        def read(carry):
            outputs = jax.tree.leaves(carry)[-1] @ readout["kernel"] + readout["bias"][None]
            each = optax.l2_loss(outputs, batch.targets[:, t]).mean(1)
            return jnp.sum(each * batch.mask[:, t])

        return flat(jax.grad(read)(carry))

    def surrogate(params, carry, k, prediction):
        summed, after = losses(params, carry, k)
        return summed + jnp.sum(prediction * flat(after))

    width = flat(initial).shape[1]
    a = held = jnp.zeros((width + OUT + 1, width))
    seen, owed = jnp.zeros((B, width + OUT + 1)), jnp.zeros((B, width))
    carry, grads, age = initial, jax.tree.map(jnp.zeros_like, params), 0
    for k in range(0, T, horizon):
        last = min(k + horizon, T) - 1
        rest = 0.0 if alone and last == T - 1 else 1.0
        _, after = losses(params, carry, k)
        told = jnp.where(batch.mask[:, last, None] != 0, batch.targets[:, last], 0)
        now, due = jnp.concatenate([flat(after), told, jnp.ones((B, 1))], 1), known(after, last)
        entered = jax.grad(surrogate, 1)(params, carry, k, rest * (now @ held - due))
        a = a - 0.05 * seen.T @ (seen @ a - owed - flat(entered)) / B
        age += 1
        held = a if age % refresh == 0 else held
        found = jax.grad(surrogate)(params, carry, k, rest * (now @ a - due))
        grads = jax.tree.map(jnp.add, grads, found)
        carry, seen, owed = after, now, due
    return grads, a, held


WIDE = {"param_dtype": jnp.float64}


@pytest.mark.parametrize(
    ("cells", "horizon", "predicts", "size"),
    [
        pytest.param((nn.LSTMCell(3, **WIDE),), 2, "total", None, marks=pytest.mark.slow),
        ((nn.GRUCell(3, **WIDE), nn.SimpleCell(2, **WIDE)), 3, "future", None),
        ((localgrad.RateCell(3, alpha=0.3, learn_alpha=True, **WIDE),), 1, "total", B),
    ],
)
@pytest.mark.slow
def test_it_is_the_naive_program(cells, horizon, predicts, size, x64):
    """Masks and resets included, over two cells, with a copy that is one prediction old."""
    model, params, batch = problem(*cells)
    rule = localgrad.dni(
        model,
        optax.l2_loss,
        horizon=horizon,
        predicts=predicts,
        predictor_optimizer=SGD,
        refresh=2,
        batch_size=size,
        reduction="sum",
    )
    found, state = rule(params, rule.init(params), batch)
    expected = naive(model, params, batch, horizon, 2, predicts == "total", size is None)
    close((found, state.predictor, state.held), expected)
    assert not np.allclose(state.predictor, 0)


def two_cells():
    return nn.SimpleCell(3, **WIDE), localgrad.RateCell(2, alpha=0.4, **WIDE)


@pytest.mark.slow
def test_splitting_a_stream_changes_nothing(x64):
    """Not even where a masked target is NaN; nor does the reduction change what is predicted."""
    model, params, batch = problem(*two_cells())
    batch = batch._replace(mask=batch.mask.at[0, 3].set(0))
    batch = batch._replace(targets=jnp.where(batch.mask[..., None] == 0, jnp.nan, batch.targets))
    make = functools.partial(localgrad.dni, model, optax.l2_loss, predicts="total", batch_size=B)
    rule = make(horizon=2, reduction="sum")
    whole, after = rule(params, rule.init(params), batch)
    state, total = rule.init(params), jax.tree.map(jnp.zeros_like, params)
    for start, stop in ((0, 4), (4, T)):
        updates, state = rule(params, state, piece(batch, start, stop))
        total = jax.tree.map(jnp.add, total, updates)
    close(total, whole)
    close(state._replace(loss=0), after._replace(loss=0))
    mean = make(horizon=2)
    updates, other = mean(params, mean.init(params), batch)
    close(updates, jax.tree.map(lambda a: a / batch.mask.sum(), whole))
    close(other, after)


def test_without_a_prediction_it_is_truncated_backpropagation(x64):
    model, params, batch = problem(*two_cells())
    options = {"batch_size": B, "reduction": "sum"}
    still = optax.sgd(0.0)
    rule = localgrad.dni(model, optax.l2_loss, horizon=4, predictor_optimizer=still, **options)
    cut = localgrad.bptt(model, optax.l2_loss, **options)
    state, expected = cut.init(params), jax.tree.map(jnp.zeros_like, params)
    for start in range(0, T, 4):
        updates, state = cut(params, state, piece(batch, start, start + 4))
        expected = jax.tree.map(jnp.add, expected, updates)
    close(rule(params, rule.init(params), batch)[0], expected)


def test_an_episode_no_longer_than_the_horizon_is_bptt(x64):
    model, params, batch = problem(*two_cells())
    exact = localgrad.bptt(model, optax.l2_loss)
    rule = localgrad.dni(model, optax.l2_loss, horizon=T, predicts="total")
    found, state = rule(params, rule.init(params), batch)
    close(found, exact(params, exact.init(params), batch)[0])
    assert not np.any(state.predictor) and state.carry is None


@pytest.mark.slow
def test_a_prediction_beats_none(x64):
    """Where credit is a linear function of what is seen, the predictor finds it."""
    rng = np.random.default_rng(0)
    model = localgrad.Network(
        (localgrad.RateCell(4, alpha=0.3, activation=lambda a: a, **WIDE),),
        readout=nn.Dense(2, **WIDE),
    )
    x = jnp.asarray(rng.normal(size=(8, 2000, 2)))
    batch = localgrad.Batch(x, jnp.roll(x, 3, 1))
    carry = model.initialize_carry(jax.random.key(0), (8, 2))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
    exact = localgrad.bptt(model, optax.l2_loss)
    params["cells_0"]["h"] = jax.tree.map(lambda a: a / 2, params["cells_0"]["h"])
    reference = exact(params, exact.init(params), batch)[0]["cells_0"]

    def cosine(optimizer):
        rule = localgrad.dni(model, optax.l2_loss, predictor_optimizer=optimizer)
        _, state = rule(params, rule.init(params), batch)
        found = rule(params, state, batch)[0]["cells_0"]
        return optax.tree.vdot(found, reference) / (
            optax.tree.norm(found) * optax.tree.norm(reference)
        )

    assert 10 * (1 - cosine(optax.sgd(0.03))) < 1 - cosine(optax.sgd(0.0))


@pytest.mark.parametrize("sees", ["targets", "error"])
@pytest.mark.slow
def test_class_ids(sees, x64):
    """Seen as one-hot vectors, or by their error alone."""
    model, params, batch = problem(nn.GRUCell(4, **WIDE))
    ids = jnp.asarray(np.random.default_rng(1).integers(0, OUT, (B, T)))
    named = optax.softmax_cross_entropy_with_integer_labels
    make = functools.partial(localgrad.dni, sees=sees, horizon=2, batch_size=B)
    rule, hot = make(model, named), make(model, optax.softmax_cross_entropy)
    found, state = rule(params, rule.init(params), batch._replace(targets=ids))
    one_hot = batch._replace(targets=jax.nn.one_hot(ids, OUT))
    close((found, state), hot(params, hot.init(params), one_hot))
    assert state.seen.shape == (B, 4 + OUT + 1)
    if sees == "targets":
        weighed = batch.mask[:, -1, None] != 0
        close(state.seen[:, 4:-1], jnp.where(weighed, jax.nn.one_hot(ids[:, -1], OUT), 0))


@pytest.mark.slow
def test_it_is_an_optax_transform_with_a_state_to_donate():
    model, params, batch = problem(nn.GRUCell(4), dtype=jnp.float32)
    rule = localgrad.dni(model, optax.l2_loss, batch_size=B)
    tx = optax.chain(rule, optax.adam(1e-2))
    learn = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=1), donate_argnums=1)
    params, state, losses = learn(params, tx.init(params))
    assert losses.shape == (T,) and optax.tree.get(state, "age") == T
    chex.assert_tree_all_finite((params, state))
    begun = localgrad.reset_state(state)
    close(begun[0].predictor, state[0].predictor)
    assert not np.any(begun[0].seen) and np.any(state[0].seen)
    learn(params, begun)
    said = localgrad.summary(rule, params)
    assert "predicted" in said and "horizon=1" in repr(rule) and "window" not in repr(rule)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(rule.init, params), rule.init(params)
    )


@pytest.mark.slow
def test_seeds_under_vmap(x64):
    several = [problem(nn.GRUCell(4, **WIDE), seed=seed)[1] for seed in range(3)]
    model, _, batch = problem(nn.GRUCell(4, **WIDE))
    rule = localgrad.dni(model, optax.l2_loss, horizon=2, batch_size=B)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *several)
    found, states = jax.vmap(lambda p: rule(p, rule.init(p), batch))(stacked)
    for k, params in enumerate(several):
        expected = rule(params, rule.init(params), batch)
        close(jax.tree.map(lambda a, k=k: a[k], (found, states)), expected)


@pytest.mark.slow
def test_dtypes():
    model, params, batch = problem(nn.LSTMCell(3), dtype=jnp.bfloat16)
    rule = localgrad.dni(model, optax.l2_loss, horizon=2, predicts="total", batch_size=B)
    updates, state = rule(params, rule.init(params), batch)
    assert {a.dtype for a in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.predictor.dtype == state.seen.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(rule(params, state, batch)[1], state)


@pytest.mark.slow
def test_memory_does_not_grow_with_time():
    model, params, _ = problem(nn.GRUCell(8), dtype=jnp.float32)
    rule = localgrad.dni(model, optax.l2_loss, horizon=4)

    def need(steps):
        x = jax.ShapeDtypeStruct((B, steps, IN), jnp.float32)
        y = jax.ShapeDtypeStruct((B, steps, OUT), jnp.float32)
        lowered = jax.jit(rule.__call__).lower(params, rule.init(params), localgrad.Batch(x, y))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert need(4096) - need(256) < 4 * (4096 - 256)  # not one number a step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be a positive integer; got 0"),
        ({"refresh": 1.5}, "refresh must be a positive integer; got 1.5"),
        ({"predicts": "all"}, r"predicts must be one of \('total', 'future'\); got 'all'"),
        ({"sees": "inputs"}, r"sees must be one of \('targets', 'error'\); got 'inputs'"),
        ({"predictor_optimizer": 0.01}, r"optax transformation, such as optax.sgd.*got 0.01"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        localgrad.dni(nn.GRUCell(4), optax.l2_loss, **options)


def test_refused_models_and_targets(x64):
    model, params, batch = problem(localgrad.LRUCell(4, **WIDE))
    rule = localgrad.dni(model, optax.l2_loss, predicts="total")
    with pytest.raises(ValueError, match="cells_0 .LRUCell.*predicts=.future"):
        rule.init(params)
    rule = localgrad.dni(model, optax.l2_loss)
    assert rule(params, rule.init(params), batch)[1].age == T
    last = localgrad.dni(model, lambda z, y: z[:, 0] * y)
    with pytest.raises(ValueError, match=r'\(3,\).*got shapes \[\(\)\].*sees="error"'):
        last(params, last.init(params), batch._replace(targets=batch.targets[..., 0]))
