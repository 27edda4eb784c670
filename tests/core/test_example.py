"""What one step's input looks like, read off the parameters."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import localgrad
from localgrad.core.model.example import infer_example
from localgrad.core.params import leaves_of
from tests.conformance import zoo

B, N = 3, 4
REAL, SYMBOL = jnp.ones((B, 5)), jnp.zeros(B, jnp.int32)


class Senses(nn.Module):
    """Three inputs by name, one a symbol."""

    @nn.compact
    def __call__(self, x):
        seen = jnp.concatenate([x["seen"], nn.Embed(6, 2)(x["done"])], -1)
        return nn.Dense(N)(seen) + nn.Dense(N)(x["paid"])


class Joined(nn.Module):
    """Two inputs side by side."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(N)(jnp.concatenate([x["a"], x["b"]], -1))


class Coded(nn.Module):
    """A symbol that no layer sees."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(N)(jax.nn.one_hot(x, 6))


class Scanned(nn.RNNCellBase):
    """A stock cell that takes each input twice, in a loop of Flax's."""

    @nn.compact
    def __call__(self, h, x):
        axes = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        twice = nn.scan(nn.GRUCell, length=2, in_axes=nn.broadcast, **axes)
        h, _ = twice(N)(h, x)
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], N))

    num_feature_axes = 1


def network(encoder=None):
    return localgrad.Network((nn.GRUCell(N),), readout=nn.Dense(2), encoder=encoder)


KNOWN = {
    "array": (network(), REAL),
    "symbols": (network(nn.Embed(6, N)), SYMBOL),
    "with the carry": (zoo.Concat(N), REAL),
    "one number with the carry": (zoo.Concat(N), REAL[:, :1]),
    "as wide as the carry": (zoo.Concat(5), REAL),
    "by name": (network(Senses()), {"seen": REAL, "done": SYMBOL, "paid": REAL[:, :1]}),
    "no layers": (nn.OptimizedLSTMCell(N), REAL),
    "layers in a loop": (Scanned(), REAL),
}
UNKNOWN = {
    "side by side": (network(Joined()), {"a": REAL, "b": REAL}),
    "coded": (network(Coded()), SYMBOL),
}


def params_of(model, x):
    carry = model.initialize_carry(jax.random.key(0), (B, 1)[: 1 + model.num_feature_axes])
    return jax.eval_shape(model.init, jax.random.key(0), carry, x)["params"]


@pytest.mark.parametrize("name", KNOWN)
def test_layers_tell_what_they_take(name):
    model, x = KNOWN[name]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = infer_example(model, leaves_of(params_of(model, x)), B)
    assert not warned
    assert found == jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_known_is_not_guessed(name):
    model, x = UNKNOWN[name]
    assert infer_example(model, leaves_of(params_of(model, x)), B) is None


class Named(nnx.Module):
    """An NNX cell of two inputs."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(5, N, rngs=rngs), nnx.Linear(2, N, rngs=rngs)

    def __call__(self, h, x):
        h = jnp.tanh(0.5 * h + self.a(x["a"]) + self.b(x["b"]))
        return h, h

    def initialize_carry(self, input_shape, rngs):
        return jnp.zeros((input_shape[0], N))


def test_a_stream_that_keeps_inputs_needs_no_example():
    """Of an NNX cell with inputs by name, and beside the same rule with an example."""
    model, params = localgrad.from_nnx(Named())
    inputs = {"a": jnp.ones((B, 4, 5)), "b": jnp.ones((B, 4, 2))}
    batch = localgrad.Batch(inputs, jnp.ones((B, 4, N)))
    found = []
    for example in (None, jax.tree.map(lambda a: a[0, 0], inputs)):
        rule = localgrad.tbptt(model, optax.l2_loss, horizon=3, batch_size=B, example=example)
        found.append(rule(params, rule.init(params), batch))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), *found))
