"""`lra`: its options and the contract, beside an oracle in NumPy; and what it refuses.

It has no row in the conformance table, which tries each rule on every model: it trains one.
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
from tests.rules.aligned import align
from tests.rules.programs import longest_chain

B, T, D = 3, 6, 4
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def heaviside(a):
    return (a >= 0).astype(a.dtype)


@jax.custom_jvp
def untouched(a):
    """A tanh that may be computed but not differentiated."""
    return jnp.tanh(a)


@untouched.defjvp
def _(primals, tangents):
    raise AssertionError("differentiated")


def problem(features=(5, 3, 4), seed=0, **options):
    """A model, random parameters, and a batch with weights, resets and unseen targets."""
    rng = np.random.default_rng(seed)
    options = {"output_activation": jax.nn.sigmoid, "beta": 0.4, "alpha": 0.3} | options
    model = localgrad.PTNCN(features, D, **options)
    carry = model.initialize_carry(jax.random.key(0), (B, D))
    shapes = jax.eval_shape(model.init, jax.random.key(0), carry, jnp.zeros((B, D)))["params"]
    params = jax.tree.map(lambda a: jnp.asarray(0.6 * rng.normal(size=a.shape)), shapes)
    frames = rng.random((B, T + 1, D))
    mask = rng.choice([0.0, 0.5, 1.0], (B, T))
    reset = rng.random((B, T)) < 0.2
    targets = np.where(mask[..., None] == 0, np.nan, frames[:, 1:])
    batch = localgrad.Batch(*map(jnp.asarray, (frames[:, :-1], targets, mask, reset)))
    return model, params, batch


def make(model, **options):
    loss = localgrad.binary_cross_entropy
    return localgrad.lra(model, loss, **{"reduction": "sum", **options})


def piece(batch, start, stop):
    return jax.tree.map(lambda a: a[:, start:stop], batch)


def streamed(rule, params, batch, ends):
    """The sum of the updates of calls that end there, and the last state."""
    state, total, start = rule.init(params), None, 0
    for end in ends:
        updates, state = rule(params, state, piece(batch, start, end))
        total = updates if total is None else jax.tree.map(jnp.add, total, updates)
        start = end
    return total, state


MODELS = {
    "default": {},
    "sparse": {"sparsity": 0.2},
    "bottom_up": {"top_down": False},
    "step": {"activation": heaviside, "features": (5, 5)},
    "one": {"features": (5,)},
}
RULES = {
    "default": {},
    "faster": {"gamma": 2.5, "update_radius": 0.4},
    "options": {
        "error_rule": "temporal",
        "w_error": "prediction",
        "presynaptic": "uncorrected",
        "gamma": -0.7,
        "update_radius": 0.3,
    },
    "unclipped": {"update_radius": None, "gamma": 0.5, "error_rule": "temporal"},
}


@pytest.mark.parametrize(
    ("of_model", "of_rule"),
    [("default", "options"), ("sparse", "faster"), ("step", "unclipped"), ("one", "options")]
    + [pytest.param("bottom_up", "options", marks=pytest.mark.slow)],
)
@pytest.mark.few(1)
def test_equals_the_oracle(of_model, of_rule, x64):
    model, params, batch = problem(**MODELS[of_model])
    rule = make(model, **RULES[of_rule])
    updates, state = rule(params, rule.init(params), batch)
    f = heaviside if of_model == "step" else np.tanh
    told = {name: getattr(model, name) for name in ("beta", "alpha", "sparsity")}
    arrays = jax.tree.map(np.asarray, (params, tuple(batch)))
    outputs, states, expected = align(
        arrays[0], *arrays[1], f=f, g=sigmoid, **told, **RULES[of_rule]
    )
    close(updates, expected)
    loss, found, carry = localgrad.evaluate(model, localgrad.binary_cross_entropy, params, batch)
    close(found, outputs)
    close([carry.state.first, *carry.state.rest], states)
    close(state.loss, loss)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("options", [pytest.param("default", marks=pytest.mark.slow), "options"])
def test_stacked_layers_and_any_split_give_the_same(options, x64):
    model, params, batch = problem((5, 5, 5, 5))
    rule = make(model, **RULES[options])
    expected, _ = rule(params, rule.init(params), batch)
    stacked = model.clone(stacked=True)
    at_once = {name: params[name] for name in ("W1", "E1", "M1", "V1")}
    stack = lambda kind, start: jnp.stack([params[f"{kind}{start + k}"] for k in range(3)])  # noqa: E731
    at_once |= {kind: stack(kind, 1 if kind == "U" else 2) for kind in "WEMVU"}
    rule = make(stacked, batch_size=B, window=2, **RULES[options])
    found, state = streamed(rule, at_once, batch, [1, 4, T])
    weights = stacked.gather(found)
    unstacked = {
        kind: tuple(several) if len(kind) == 1 else several
        for kind, several in weights._asdict().items()
    }
    close(model.scatter(type(weights)(**unstacked)), expected)
    carry = localgrad.evaluate(stacked, localgrad.binary_cross_entropy, at_once, batch)[2]
    close(state.carry, carry)


def test_mean_divides_what_is_clipped_by_the_weight(x64):
    model, params, batch = problem((5,))
    updates = [
        (rule := make(model, update_radius=0.1, reduction=reduction))(
            params, rule.init(params), batch
        )
        for reduction in ("mean", "sum")
    ]
    close(jax.tree.map(lambda a: a * batch.mask.sum(), updates[0][0]), updates[1][0])
    close(updates[0][1].loss, updates[1][1].loss)


def test_nothing_seen_is_nothing_learnt():
    model, params, batch = problem((5, 5))
    batch = batch._replace(mask=jnp.zeros((B, T)))
    rule = make(model, error_rule="temporal", batch_size=B, reduction="mean")
    updates, state = rule(params, rule.init(params), batch)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(state.carry.state, state.carry.activity)
    assert state.loss == 0


def test_no_activation_is_differentiated():
    options = {"activation": untouched, "output_activation": untouched}
    model, params, batch = problem((5, 5), **options)
    loss = lambda mu, x: untouched(0.5 * (mu - x) ** 2)  # noqa: E731
    tx = optax.chain(localgrad.lra(model, loss, batch_size=B), optax.sgd(0.1))
    learned, state, _ = localgrad.learn(tx, params, tx.init(params), batch, chunk=1)
    chex.assert_tree_all_finite(learned)
    assert not np.allclose(learned["V2"], params["V2"])
    localgrad.evaluate(model, loss, params, batch)
    with pytest.raises(AssertionError, match="differentiated"):  # a gradient would
        carry = model.initialize_carry(jax.random.key(0), (B, D))
        apply = lambda p: model.apply({"params": p}, carry, batch.inputs[:, 0])[1]  # noqa: E731
        jax.grad(lambda p: loss(apply(p), batch.targets[:, 0]).sum())(params)


def chain(rule, model):
    """The longest chain of products in a call of one step."""
    frame = jax.ShapeDtypeStruct((B, 1, D), jnp.float32)

    def init():
        carry = model.initialize_carry(jax.random.key(0), (B, D))
        return model.init(jax.random.key(0), carry, jnp.zeros((B, D)))["params"]

    params = jax.eval_shape(init)
    state = jax.eval_shape(rule.init, params)
    return longest_chain(rule.__call__, params, state, localgrad.Batch(frame, frame))


@pytest.mark.slow
def test_no_layer_waits_for_another():
    """The longest chain of products, whatever the depth: drive, predict, correct, learn; or, in
    place of the last, products of examples and of these, for the norm of what is learnt."""
    for depth, options in [(2, {}), (5, {}), (5, {"stacked": True})]:
        model = localgrad.PTNCN((5,) * depth, D, output_activation=jax.nn.sigmoid, **options)
        assert chain(make(model, batch_size=B, update_radius=None), model) == 4
        assert chain(make(model, batch_size=B), model) == 5
    depths = (1, 3)
    stacks = [tuple(nn.SimpleCell(5) for _ in range(depth)) for depth in depths]
    models = [localgrad.Network(cells, readout=nn.Dense(D)) for cells in stacks]
    rules = [localgrad.bptt(model, optax.l2_loss, batch_size=B) for model in models]
    shallow, deep = map(chain, rules, models)
    assert deep >= shallow + 4  # each layer forward, and back


def test_memory_does_not_grow_with_time():
    model, params, _ = problem((32, 32))
    rule = make(model, window=8)

    def need(steps):
        frames = jax.ShapeDtypeStruct((B, steps, D), jnp.float32)
        batch = localgrad.Batch(frames, frames)
        compiled = jax.jit(rule.__call__).lower(params, rule.init(params), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert need(4096) <= 1.2 * need(256)


def test_dtypes():
    model, params, batch = problem((5, 5), param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    rule = make(model, batch_size=B)
    updates, state = rule(params, rule.init(params), batch)
    assert {a.dtype for a in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.loss.dtype == jnp.float32 and jnp.isfinite(state.loss)
    assert jax.tree.map(lambda a: a.dtype, state) == jax.tree.map(
        lambda a: a.dtype, rule(params, state, batch)[1]
    )


@pytest.mark.slow
def test_it_is_an_optax_transform_under_vmap():
    model, params, batch = problem((5,))
    rule = make(model, batch_size=B)
    tx = optax.chain(rule, optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    updates, state = tx.update(None, tx.init(params), params, batch=batch)
    assert optax.tree.get(state, "loss") == rule(params, rule.init(params), batch)[1].loss
    many = jax.tree.map(lambda a: jnp.stack([a, -a]), params)
    found, _ = jax.vmap(lambda p: rule(p, rule.init(p), batch))(many)
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[0], found), rule(params, rule.init(params), batch)[0], atol=1e-6
    )
    assert "W's update, transposed" in localgrad.summary(rule, params)


def refused(**kwargs):
    model, *_ = problem((5, 5))
    return lambda: make(model, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (refused(error_rule="both"), "error_rule must be one of .*'both'"),
        (refused(w_error="e"), "w_error must be one of"),
        (refused(presynaptic=None), "presynaptic must be one of"),
        (
            refused(update_radius=0),
            "update_radius must be .*positive and finite; got 0.*None sets no limit",
        ),
        (refused(update_radius=float("inf")), "update_radius must be .*got inf"),
        (refused(gamma=float("nan")), "gamma must be .*finite; got nan"),
        (
            lambda: make(localgrad.Network((nn.GRUCell(3),), readout=nn.Dense(D))),
            "lra trains a localgrad.PTNCN.*got Network.*eprop",
        ),
        (
            lambda: localgrad.lra(problem()[0], optax.sigmoid_binary_cross_entropy),
            "sigmoid_binary_cross_entropy.*not least where outputs equal.*binary_cross_entropy",
        ),
        (
            lambda: localgrad.lra(localgrad.PTNCN((5,), 1000), optax.softmax_cross_entropy),
            "softmax_cross_entropy.*not least where outputs equal.*categorical_cross_entropy",
        ),
        (
            lambda: localgrad.lra(
                localgrad.PTNCN((5,), D, output_activation=lambda a: a),
                localgrad.binary_cross_entropy,
            ),
            "not least where outputs equal targets",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize(
    ("g", "loss"),
    [
        (jax.nn.softmax, localgrad.categorical_cross_entropy),
        (jax.nn.sigmoid, localgrad.binary_cross_entropy),
        (jax.nn.sigmoid, optax.l2_loss),
        (lambda a: a, optax.squared_error),
        (jnp.tanh, optax.huber_loss),
        (heaviside, optax.l2_loss),
    ],
)
def test_losses_that_are_least_at_the_target_pass(g, loss):
    localgrad.lra(localgrad.PTNCN((5,), D, output_activation=g), loss)


def test_targets_that_are_no_frames_are_refused():
    model, params, batch = problem((5, 5))
    rule = make(model)
    state = rule.init(params)
    with pytest.raises(ValueError, match=r"(?s)targets hold values from .* to 255.*in \[0, 1\]"):
        rule(params, state, batch._replace(targets=batch.targets * 0 + 255.0))
    with pytest.raises(ValueError, match=r"(?s)target must be a frame.*outputs = 4.*\(3, 2\)"):
        rule(params, state, batch._replace(targets=batch.targets[..., :2]))
    with pytest.raises(ValueError, match=r"(?s)outputs = 4.*one_hot"):
        rule(params, state, batch._replace(targets=jnp.zeros((B, T), jnp.int32)))
    with pytest.raises(ValueError, match=r"(?s)x must be a frame.*outputs = 4.*\(3, 7\)"):
        rule(params, state, batch._replace(inputs=jnp.zeros((B, T, 7))))
    with pytest.raises(ValueError, match=r"(?s)params do not fit PTNCN"):
        other = problem((5, 4))[1]
        rule(other, rule.init(params), batch)


@pytest.mark.parametrize("w_error", ["residual", "prediction"])
@pytest.mark.parametrize("error_rule", ["transpose", "temporal"])
@pytest.mark.few(2)
def test_what_no_correction_teaches_is_declared(w_error, error_rule):
    model, params, batch = problem((5, 5), beta=0.0)
    rule = make(model, w_error=w_error, error_rule=error_rule)
    updates, _ = rule(params, rule.init(params), batch)
    for (name,), said in rule.credits(params).items():
        assert said.startswith("nothing") == (not jnp.any(updates[name])), name
