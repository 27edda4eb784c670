"""`PTNCN` as a Flax cell: shapes, `nn.RNN`, `observe` and `evaluate`."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, D = 3, 5, 4
close = functools.partial(chex.assert_trees_all_close, atol=1e-6)


def built(features=(6, 5), **options):
    model = localgrad.PTNCN(features, D, **options)
    frames = jax.nn.softmax(jax.random.normal(jax.random.key(0), (B, T + 1, D)))
    carry = model.initialize_carry(jax.random.key(0), (B, D))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(1), carry, frames[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(0.7 * rng.normal(size=a.shape), a.dtype), shapes)
    return model, params, localgrad.Batch(frames[:, :-1], frames[:, 1:])


def by_hand(model, params, batch, seen=None):
    """Predict, observe, correct, in a Python loop; `seen` [B, T] where a frame is observed."""
    carry, outputs = model.initialize_carry(jax.random.key(0), (B, D)), []
    for t in range(T):
        carry, output = model.apply({"params": params}, carry, batch.inputs[:, t])
        new = model.apply({"params": params}, carry, batch.targets[:, t], method="observe")
        keep = jnp.ones(B, bool) if seen is None else seen[:, t]
        carry = jax.tree.map(
            lambda a, b, k=keep: jnp.where(k.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, carry
        )
        outputs.append(output)
    return jnp.stack(outputs, 1), carry


def test_parameters_have_the_papers_names():
    shapes = jax.tree.map(jnp.shape, built((6, 5, 3))[1])
    assert shapes == {
        **{"W1": (6, D), "W2": (5, 6), "W3": (3, 5), "V1": (6, 6), "V2": (5, 5), "V3": (3, 3)},
        **{"E1": (D, 6), "E2": (6, 5), "E3": (5, 3), "M1": (D, 6), "M2": (6, 5), "M3": (5, 3)},
        **{"U1": (5, 6), "U2": (3, 5)},
    }
    assert sorted(built((6, 5), top_down=False)[1]) == ["E1", "E2", "M1", "V1", "V2", "W1", "W2"]
    stacked = jax.tree.map(jnp.shape, built((6, 6, 6), stacked=True)[1])
    assert stacked["V"] == (2, 6, 6) and stacked["V1"] == (6, 6) and stacked["M1"] == (D, 6)


@pytest.mark.parametrize("options", [{}, {"features": (6, 6, 6), "stacked": True}])
@pytest.mark.slow
def test_under_nn_rnn_it_goes_on_uncorrected(options):
    model, params, batch = built(**options)
    runner = nn.RNN(model, return_carry=True)
    end, outputs = runner.apply({"params": {"cell": params}}, batch.inputs)
    off = model.clone(beta=0.0)
    loss = localgrad.categorical_cross_entropy
    _, expected, carry = localgrad.evaluate(off, loss, params, batch)
    close((outputs, end), (expected, carry))
    unseen = batch._replace(mask=jnp.zeros((B, T)))
    close(localgrad.evaluate(model, loss, params, unseen)[1], outputs)
    assert not np.allclose(localgrad.evaluate(model, loss, params, batch)[1], outputs, atol=1e-4)


@pytest.mark.parametrize("activation", [jnp.tanh, jnp.sign])
@pytest.mark.few(1)
def test_evaluate_predicts_observes_and_corrects(activation, x64):
    model, params, batch = built(activation=activation, beta=0.8, param_dtype=jnp.float64)
    seen = jnp.arange(B * T).reshape(B, T) % 3 != 0
    hidden = jnp.where(seen[..., None], batch.targets, jnp.nan)
    for given, mask, flags in ((batch.targets, None, None), (hidden, seen, seen)):
        batch = batch._replace(targets=given, mask=mask)
        loss, outputs, carry = localgrad.evaluate(model, optax.l2_loss, params, batch)
        close((outputs, carry), by_hand(model, params, batch, flags))
        assert jnp.isfinite(loss)


def test_every_matrix_of_a_stack_is_drawn_by_itself():
    model, *_ = built((6, 6, 6), stacked=True)
    carry = model.initialize_carry(jax.random.key(0), (B, D))
    params = model.init(jax.random.key(1), carry, jnp.zeros((B, D)))["params"]
    assert not np.allclose(params["V"][0], params["V"][1])
    np.testing.assert_allclose(np.std(params["V"]), 0.05, rtol=0.3)


def test_a_carry_may_be_observed_twice():
    model, params, batch = built()
    observe = functools.partial(model.apply, {"params": params}, method="observe")
    carry = model.initialize_carry(jax.random.key(0), (B, D))
    carry, _ = model.apply({"params": params}, carry, batch.inputs[:, 0])
    once = observe(carry, batch.targets[:, 0])
    chex.assert_trees_all_equal(observe(once, batch.targets[:, 0]), once)
    chex.assert_trees_all_equal(
        observe(observe(once, batch.targets[:, 1]), batch.targets[:, 0]), once
    )


def test_a_sequence_begins_with_an_even_guess():
    model, params, batch = built()
    empty = batch._replace(inputs=jnp.zeros_like(batch.inputs))
    _, outputs, _ = localgrad.evaluate(model, optax.l2_loss, params, empty)
    close(outputs[:, 0], jnp.full((B, D), 1 / D))


def test_evaluate_shows_an_nnx_cell_its_targets_too():
    from flax import nnx

    class Follower(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, carry, x):
            return carry * 1, carry * self.scale[...] + 0 * x

        def observe(self, carry, target):
            return carry + 0.5 * (target - carry)

        def initialize_carry(self, shape, rngs):
            return jnp.zeros(shape)

    model, params = localgrad.from_nnx(Follower())
    _, _, batch = built()
    _, outputs, _ = localgrad.evaluate(model, optax.l2_loss, params, batch)
    close(outputs[:, 1], 0.5 * batch.targets[:, 0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"features": 8}, r"features must be a sequence of widths.*got 8"),
        ({"features": ()}, r"features must be a sequence of widths.*got \(\)"),
        ({"features": (8, 0)}, "each of features must be a positive integer; got 0"),
        ({"features": (8, True)}, "each of features must be a positive integer; got True"),
        ({"features": (8,), "outputs": 0}, "outputs must be a positive integer; got 0"),
        ({"features": (8,), "activation": "tanh"}, "activation must be a function.*'tanh'"),
        ({"features": (8,), "beta": -0.1}, "beta must be .* 0 or more, and finite; got -0.1"),
        ({"features": (8,), "alpha": float("inf")}, "alpha must be .*got inf"),
        ({"features": (8,), "sparsity": "a"}, "sparsity must be a Python number.*got 'a'"),
        ({"features": (8, 7), "stacked": True}, "stacked needs.*one width"),
        ({"features": (8,), "stacked": True}, "stacked needs two or more layers"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        localgrad.PTNCN(**{"outputs": D} | kwargs)


@pytest.mark.parametrize("dtypes", [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.float16}])
@pytest.mark.slow
def test_under_nn_rnn_in_half_precision(dtypes):
    model = localgrad.PTNCN((4, 3), outputs=3, **dtypes)
    x = jnp.ones((2, 5, 3))
    (_, outputs), _ = nn.RNN(model, return_carry=True).init_with_output(jax.random.key(0), x)
    assert outputs.shape == x.shape


def test_frames_of_other_examples_are_refused():
    model = localgrad.PTNCN((6, 5), outputs=B)  # as many numbers as examples
    carry = model.initialize_carry(jax.random.key(0), (B, B))
    params = model.init(jax.random.key(0), carry, jnp.ones((B, B)))["params"]
    for frame in (jnp.arange(B), jnp.ones((1, B)), jnp.ones((B + 1, B)), jnp.ones((B, 1, B))):
        with pytest.raises(ValueError, match="must be a frame.*one_hot"):
            model.apply({"params": params}, carry, frame)
        with pytest.raises(ValueError, match="must be a frame.*one_hot"):
            model.apply({"params": params}, carry, frame, method="observe")
    classes = jnp.zeros((B, 1), jnp.int32)
    batch = localgrad.Batch(jnp.ones((B, 1, B)), classes)
    with pytest.raises(ValueError, match="must be a frame.*one_hot"):
        localgrad.evaluate(model, optax.squared_error, params, batch)


def test_evaluate_refuses_a_loss_of_logits():
    model, params, batch = built(output_activation=jax.nn.softmax)
    with pytest.raises(ValueError, match="softmax_cross_entropy.*categorical_cross_entropy"):
        localgrad.evaluate(model, optax.softmax_cross_entropy, params, batch)


@pytest.mark.parametrize("rule", [localgrad.bptt, localgrad.eprop, localgrad.readout_only])
def test_other_rules_leave_it_to_lra(rule):
    model, *_ = built()
    for given in (model, localgrad.Network((model,), readout=nn.Dense(2))):
        with pytest.raises(ValueError, match="cannot train a PTNCN.*localgrad.lra"):
            rule(given, optax.l2_loss)
