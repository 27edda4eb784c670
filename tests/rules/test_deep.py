"""What `deep_eprop` is in its limits, what it costs, and what it says of both."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from tests.conformance import oracles

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
B, T, IN, OUT = 2, 12, 3, 2

pytestmark = pytest.mark.usefixtures("x64")


def problem(*cells, **ends):
    """A network, parameters none of which is zero, and a batch with weights and resets."""
    rng = np.random.default_rng(0)
    readout = nn.Dense(OUT, param_dtype=float)
    model = localgrad.Network(cells, readout=readout, **ends)
    inputs = jnp.asarray(rng.normal(size=(B, T, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, inputs[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    mask, reset = rng.choice([0.0, 0.5, 1.0], (B, T)), rng.random((B, T)) < 0.1
    targets = jnp.asarray(rng.normal(size=(B, T, OUT)))
    return model, params, localgrad.Batch(inputs, targets, jnp.asarray(mask), jnp.asarray(reset))


def streamed(factory, model, params, batch, length=1, **options):
    """Updates summed over calls of this length."""
    rule = factory(model, optax.l2_loss, batch_size=B, reduction="sum", **options)
    state, total = rule.init(params), jax.tree.map(np.zeros_like, params)
    batch = jax.tree.map(np.asarray, batch)
    for at in range(0, T, length):
        piece = jax.tree.map(lambda a, at=at: a[:, at : at + length], batch)
        updates, state = rule(params, state, piece)
        total = jax.tree.map(lambda a, b: a + np.asarray(b), total, updates)
    return total


def rate(units, alpha):
    return localgrad.RateCell(units, alpha=alpha, param_dtype=float)


def three():
    """Three layers of unequal widths, leaky, gated and leaky, above an encoder."""
    cells = (rate(4, 0.3), nn.GRUCell(3, param_dtype=float), rate(2, 0.2))
    return problem(*cells, encoder=nn.Dense(5, param_dtype=float))


@pytest.mark.parametrize(
    "cell",
    [*(pytest.param(c, marks=pytest.mark.slow) for c in (nn.GRUCell, nn.LSTMCell)), nn.SimpleCell],
)
@pytest.mark.slow
def test_on_one_layer_it_is_eprop(cell):
    model, params, batch = problem(cell(4, param_dtype=float))
    for deep, shallow in (({}, localgrad.eprop), ({"autapses": True}, localgrad.snap)):
        found = streamed(localgrad.deep_eprop, model, params, batch, 5, **deep)
        close(found, streamed(shallow, model, params, batch, 5))


def diagonal(params):
    """Recurrent kernels without what a unit sends to others."""

    def thinned(path, leaf):
        layer = jax.tree_util.keystr(path)
        recurrent = any(f"['{name}']['kernel']" in layer for name in ("h", "hr", "hz", "hn"))
        return leaf * jnp.eye(len(leaf)) if recurrent else leaf

    return jax.tree_util.tree_map_with_path(thinned, params)


@pytest.mark.parametrize("window", [pytest.param(1, marks=pytest.mark.slow), 5])
@pytest.mark.slow
def test_it_is_exact_where_no_unit_feeds_another(window):
    model, params, batch = three()
    params = diagonal(params)
    exact = jax.jit(functools.partial(oracles.bptt, model))(params, oracles.steps_of(batch))
    close(
        streamed(localgrad.deep_eprop, model, params, batch, 12, autapses=True, window=window),
        exact,
    )
    shallow = streamed(localgrad.snap, model, params, batch, 12)
    gap = optax.tree.norm(optax.tree.sub(shallow["cells_0"], exact["cells_0"]))
    assert gap > 0.1 * optax.tree.norm(exact["cells_0"])


@pytest.mark.slow  # tests/golden/test_lru.py has one
def test_it_is_exact_in_stacks_of_linear_recurrent_units():
    widths = [4, 3, 2]
    model, params, batch = problem(*(localgrad.LRUCell(n, param_dtype=float) for n in widths))
    exact = jax.jit(functools.partial(oracles.bptt, model))(params, oracles.steps_of(batch))
    close(streamed(localgrad.deep_eprop, model, params, batch, 5), exact)
    shallow = streamed(localgrad.eprop, model, params, batch, 5)
    gap = optax.tree.norm(optax.tree.sub(shallow["cells_0"], exact["cells_0"]))
    assert gap > 0.1 * optax.tree.norm(exact["cells_0"])


@pytest.mark.slow
def test_three_layers_over_an_encoder_split_anywhere():
    model, params, batch = three()
    whole = streamed(localgrad.deep_eprop, model, params, batch, T)
    for length, window in ((1, None), (6, 4)):
        close(streamed(localgrad.deep_eprop, model, params, batch, length, window=window), whole)


@pytest.mark.slow
def test_without_time_it_is_eprop_and_without_space_only_the_top_learns():
    model, params, batch = three()
    within = streamed(localgrad.deep_eprop, model, params, batch, 5, temporal=False)
    close(within, streamed(localgrad.eprop, model, params, batch, 5))
    top = streamed(localgrad.deep_eprop, model, params, batch, 5, spatial=False)
    whole = streamed(localgrad.deep_eprop, model, params, batch, 5)
    for group, tree in top.items():
        same = group in ("cells_2", "readout")
        close(tree, whole[group] if same else jax.tree.map(np.zeros_like, tree))
    rule = localgrad.deep_eprop(model, optax.l2_loss, spatial=False)
    for path, said in rule.credits(params).items():
        assert said.startswith("nothing") == (path[0] not in ("cells_2", "readout"))


def test_a_state_says_how_units_respond():
    """A block is the derivative of the upper cell's state by the lower cell's parameter."""
    model, params, batch = problem(rate(4, 0.3), rate(3, 0.2))
    batch = localgrad.Batch(batch.inputs, batch.targets)
    rule = localgrad.deep_eprop(model, optax.l2_loss, batch_size=B, window=5)
    _, state = rule(params, rule.init(params), batch)

    def last(kernel, example):
        """The upper state after the last step, its recurrent layers fed by constants."""
        own = params["cells_0"] | {"i": params["cells_0"]["i"] | {"kernel": kernel}}
        h0, h1 = jnp.zeros((1, 4)), jnp.zeros((1, 3))
        for t in range(T):
            h0, _ = oracles.rate(own, h0, batch.inputs[example, t][None], "cut", 0.3)
            h1, _ = oracles.rate(params["cells_1"], h1, h0, "cut", 0.2)
        return h1[0]

    kernel = params["cells_0"]["i"]["kernel"]
    for example in range(B):
        expected = jax.jit(jax.jacrev(last))(kernel, example)
        close(state.held.influence["cells_1"]["cells_0", "i", "kernel"][example], expected)


def test_it_states_its_memory_and_refuses_what_would_not_fit():
    model, params, _ = problem(rate(4, 0.3), rate(3, 0.2))
    rule = localgrad.deep_eprop(model, optax.l2_loss, batch_size=B)
    state = jax.eval_shape(rule.init, params)
    dense = sum(leaf.size for leaf in jax.tree.leaves(state.held.influence))
    below = sum(leaf.size for leaf in jax.tree.leaves(params["cells_0"]))
    assert dense == B * 3 * below
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.held))
    first, *table = localgrad.summary(rule, params).splitlines()
    assert first.startswith("state: ") and "localgrad.eprop keeps one number" in first
    assert any("cells_0/i/kernel" in line and "the past of units above" in line for line in table)
    localgrad.deep_eprop(model, optax.l2_loss, batch_size=B, max_influence_bytes=held).init(params)
    small = localgrad.deep_eprop(model, optax.l2_loss, batch_size=B, max_influence_bytes=held - 1)
    with pytest.raises(ValueError, match=r"would take .* GiB, more than .* localgrad\.eprop"):
        small.init(params)
    assert "localgrad.eprop" not in localgrad.summary(
        localgrad.deep_eprop(model, optax.l2_loss), params
    )


@pytest.mark.parametrize("factory", [localgrad.deep_eprop, localgrad.rtrl])
def test_an_episodic_call_of_several_windows_is_limited_too(factory):
    model, params, batch = problem(rate(4, 0.3), rate(3, 0.2))
    one, several = (
        factory(model, optax.l2_loss, max_influence_bytes=0, window=window) for window in (T, 5)
    )
    one(params, one.init(params), batch)  # holds nothing
    with pytest.raises(ValueError, match="would take .* for batch_size=2 .* window=T"):
        several(params, several.init(params), batch)
    for wrong in (-1, "4GB", None, True):
        with pytest.raises(ValueError, match="max_influence_bytes must be a number of bytes"):
            factory(model, optax.l2_loss, max_influence_bytes=wrong)


def test_what_it_cannot_use_is_refused():
    class Normed(nn.RNNCellBase):
        @nn.compact
        def __call__(self, h, x):
            h = jnp.tanh(nn.LayerNorm()(nn.Dense(4, name="i")(x) + nn.Dense(4, name="h")(h)))
            return h, h

        @nn.nowrap
        def initialize_carry(self, rng, input_shape):
            return jnp.zeros((*input_shape[:-1], 4))

        num_feature_axes = 1

    model, params, batch = problem(Normed(), rate(3, 0.2))
    rule = localgrad.deep_eprop(model, optax.l2_loss, batch_size=B)
    with pytest.raises(ValueError, match="deep_eprop cannot credit cells_0 .*normalisation"):
        rule.init(params)
    for name in ("autapses", "spatial", "temporal"):
        with pytest.raises(ValueError, match=f"{name} must be True or False; got 'yes'"):
            localgrad.deep_eprop(model, optax.l2_loss, **{name: "yes"})
