"""The loss of a window: weights, shapes and structures."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, IN, OUT = 3, 5, 2, 4


@pytest.fixture(scope="module")
def problem():
    model = localgrad.Network((nn.SimpleCell(4),), readout=nn.Dense(OUT))
    keys = jax.random.split(jax.random.key(0), 3)
    batch = localgrad.Batch(
        jax.random.normal(keys[0], (B, T, IN)), jax.random.normal(keys[1], (B, T, OUT))
    )
    carry = model.initialize_carry(keys[2], (B, IN))
    return model, jax.jit(model.init)(keys[2], carry, batch.inputs[:, 0])["params"], batch


def updated(model, loss, params, batch, **options):
    rule = localgrad.eprop(model, loss, **options)
    return rule(params, rule.init(params), batch)


def test_trailing_axes_of_a_loss_are_averaged(problem):
    model, params, batch = problem
    mean = updated(model, lambda y, t: optax.l2_loss(y, t).mean(-1), params, batch)
    chex.assert_trees_all_close(updated(model, optax.l2_loss, params, batch), mean, rtol=1e-6)


def test_integer_targets_and_a_loss_with_classes(problem):
    model, params, batch = problem
    labels = jnp.argmax(batch.targets, -1)
    loss = optax.softmax_cross_entropy_with_integer_labels
    updates, state = updated(model, loss, params, batch._replace(targets=labels))
    onehot = batch._replace(targets=jax.nn.one_hot(labels, OUT))
    expected = updated(model, optax.softmax_cross_entropy, params, onehot)
    chex.assert_trees_all_close((updates, state), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [bool, int, np.float16])
def test_a_mask_of_any_real_dtype(problem, dtype):
    model, params, batch = problem
    mask = np.arange(B * T).reshape(B, T) % 3 > 0
    expected = updated(model, optax.l2_loss, params, batch._replace(mask=mask.astype(np.float32)))
    found = updated(model, optax.l2_loss, params, batch._replace(mask=mask.astype(dtype)))
    chex.assert_trees_all_equal(found, expected)


def test_a_mask_of_ones_is_no_mask(problem):
    model, params, batch = problem
    ones = batch._replace(mask=np.ones((B, T)), reset=np.zeros((B, T), bool))
    expected = updated(model, optax.l2_loss, params, batch)
    found = updated(model, optax.l2_loss, params, ones)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["bptt", "rtrl", "eprop", "readout_only"])
@pytest.mark.few(2)
def test_outputs_and_targets_may_be_trees(problem, name):
    _, params, batch = problem
    factory = getattr(localgrad, name)

    class Heads(nn.Module):
        """The readout above as two."""

        @nn.compact
        def __call__(self, z):
            y = nn.Dense(OUT, name="both")(z)
            return {"left": y[..., :1], "right": y[..., 1:]}

    def loss(outputs, targets):
        left = optax.l2_loss(outputs["left"], targets["left"])
        right = optax.l2_loss(outputs["right"], targets["right"])
        return jnp.concatenate([left, right], -1)

    plain = localgrad.Network((nn.SimpleCell(4),), readout=nn.Dense(OUT))
    forked = localgrad.Network((nn.SimpleCell(4),), readout=Heads())
    rule = factory(plain, optax.l2_loss)
    expected, _ = rule(params, rule.init(params), batch)
    split = {"left": batch.targets[..., :1], "right": batch.targets[..., 1:]}
    nested = params | {"readout": {"both": params["readout"]}}
    rule = factory(forked, loss)
    found, _ = rule(nested, rule.init(nested), batch._replace(targets=split))
    chex.assert_trees_all_close(found["cells_0"], expected["cells_0"], rtol=1e-6, atol=1e-8)
    chex.assert_trees_all_close(found["readout"]["both"], expected["readout"], rtol=1e-6, atol=1e-8)


def one_output():
    """A network with one output, which a target without that axis would broadcast over."""
    model = localgrad.Network((nn.SimpleCell(4),), readout=nn.Dense(1))
    x = jnp.ones((B, T, IN))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    return model, params, localgrad.Batch(x, jnp.ones((B, T)))


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: jnp.square(y - t).sum(-1),
        lambda y, t: jnp.square(y - t).mean(-1),
        lambda y, t: jnp.abs(y - t).max(axis=-1),
    ],
)
@pytest.mark.few(2)
def test_targets_that_broadcast_over_outputs_are_refused(loss):
    model, params, batch = one_output()
    said = "compares rows with each other.*lack the outputs' last"
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(ValueError, match=said):
            updated(model, loss, params, batch)
        with pytest.raises(ValueError, match=said):
            localgrad.evaluate(model, loss, params, batch)
    updated(model, loss, params, batch._replace(targets=batch.targets[..., None]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: jnp.square(y).sum(-1),  # no target is looked at
        lambda y, t: jnp.square(y).sum(-1) * t.sum(-1),
        lambda y, t: jax.vmap(lambda a, b: jnp.dot(a - b, a - b))(y, t),
    ],
)
def test_losses_of_one_row_at_a_time_pass(loss):
    model, params, batch = one_output()
    updated(model, loss, params, batch._replace(targets=batch.targets[..., None]))


@pytest.mark.parametrize(
    "loss", [localgrad.categorical_cross_entropy, localgrad.binary_cross_entropy]
)
def test_losses_of_probabilities(loss):
    half = jnp.asarray([[1.0, 0.0]], jnp.float16)
    assert jnp.isfinite(loss(half, half)).all() and jnp.isfinite(loss(half, 1 - half)).all()
    with pytest.raises(ValueError, match=r"one shape.*\(3, 3\) and \(3,\).*one_hot"):
        loss(jnp.full((3, 3), 1 / 3), jnp.arange(3))


def test_parameters_that_nothing_uses_are_refused(problem):
    model, params, batch = problem
    for group, said in (("cells_0", "surplus, which the cell"), ("readout", "surplus, which re")):
        given = params | {group: params[group] | {"surplus": jnp.ones(3)}}
        for make in (localgrad.bptt, localgrad.eprop, localgrad.readout_only):
            rule = make(model, optax.l2_loss)
            with pytest.raises(ValueError, match=f"params hold {said}.*would never learn"):
                rule(given, rule.init(given), batch)
