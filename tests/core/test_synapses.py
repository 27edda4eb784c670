"""What feeds what inside a cell: read off its jaxpr, through whatever wraps it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from localgrad.core.model.modules import as_module
from localgrad.core.model.synapses import CHAINED, INPUT, OUTPUT, RECURRENT, dissect
from localgrad.core.ownership.reach import calls_out, dependencies
from localgrad.core.params import flatten

B, N, IN = 2, 4, 3


class _Cell(nn.RNNCellBase):
    """The carry of every cell below: [B, N]."""

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], N))

    @property
    def num_feature_axes(self):
        return 1


class Concatenated(_Cell):
    @nn.compact
    def __call__(self, carry, x):
        carry = jnp.tanh(nn.Dense(N, name="both")(jnp.concatenate([x, carry], -1)))
        return carry, carry


class WithReadout(_Cell):
    @nn.compact
    def __call__(self, carry, x):
        carry = jnp.tanh(nn.Dense(N, name="i")(x) + nn.Dense(N, name="h")(carry))
        return carry, nn.Dense(2, name="o")(carry)


class ResetBefore(_Cell):
    @nn.compact
    def __call__(self, carry, x):
        r = nn.sigmoid(nn.Dense(N, name="ir")(x) + nn.Dense(N, name="hr")(carry))
        carry = jnp.tanh(nn.Dense(N, name="in")(x) + nn.Dense(N, name="hn")(r * carry))
        return carry, carry


class ReadsInput(_Cell):
    @nn.compact
    def __call__(self, carry, x):
        carry = jnp.tanh(nn.Dense(N, name="i")(x) + nn.Dense(N, name="h")(carry))
        return carry, carry + x.sum(-1, keepdims=True)


class Counts(nn.RNNCellBase):
    """Half of its carry counts, and is counted, without credit."""

    @nn.compact
    def __call__(self, carry, x):
        h, n = carry[0], jax.lax.stop_gradient(carry[1])
        h = 0.5 * h + nn.Dense(N, name="i")(x) - n
        h = jnp.where(n > 3, jnp.zeros_like(h), h)
        return (h, jnp.where(h > 0, n + 1, jnp.zeros_like(n))), h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return (jnp.zeros((*input_shape[:-1], N)),) * 2

    @property
    def num_feature_axes(self):
        return 1


class InnerJit(_Cell):
    """Its gates pass through a jit that would join everything, were it not looked into."""

    @nn.compact
    def __call__(self, carry, x):
        @jax.jit
        def swap(a, b):
            return b, a

        drive, own = swap(carry, nn.Dense(N, name="i")(x))
        carry = jnp.tanh(drive + nn.Dense(N, name="h")(own))
        return carry, carry


def anatomy(cell):
    x = jnp.ones((B, IN))
    carry = cell.initialize_carry(None, x.shape)
    params, _ = flatten(cell.init(jax.random.key(0), carry, x)["params"])
    return dissect(as_module(cell), params, carry, x)


@pytest.mark.parametrize(
    ("cell", "roles"),
    [
        (Concatenated(), {"both": RECURRENT}),
        (WithReadout(), {"i": INPUT, "h": RECURRENT, "o": OUTPUT}),
        (ResetBefore(), {"ir": INPUT, "hr": RECURRENT, "in": INPUT, "hn": CHAINED}),
        (ReadsInput(), {"i": INPUT, "h": RECURRENT}),
        (InnerJit(), {"i": INPUT, "h": RECURRENT}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.few(2)
def test_roles(cell, roles):
    assert {site.layer.path[-1]: site.role for site in anatomy(cell).sites} == roles


def test_x_is_seen_where_it_passes_no_layer():
    assert anatomy(ReadsInput()).reads_x
    assert not anatomy(WithReadout()).reads_x
    assert anatomy(Concatenated()).sites[0].reads_x


def test_only_the_cell_state_of_an_lstm_lives_between_its_layers():
    cell = nn.LSTMCell(N)
    x = jnp.ones((B, IN))
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    params, _ = flatten(cell.init(jax.random.key(0), carry, x)["params"])
    assert dissect(as_module(cell), params, carry, x).live == (True, False)


def test_what_no_credit_reaches_does_not_live():
    assert anatomy(Counts()).live == (True, False)


def through(name):
    """A function (a, b) -> (uses a, uses b), wrapped in the named way."""

    def apart(a, b):
        return 2 * a, jnp.sin(b)

    if name == "jit":
        return jax.jit(apart)
    if name == "remat":
        return jax.checkpoint(apart)
    if name == "custom_jvp":
        wrapped = jax.custom_jvp(apart)
        wrapped.defjvp(lambda primals, tangents: (apart(*primals), tangents))
        return wrapped
    if name == "custom_vjp":
        wrapped = jax.custom_vjp(apart)
        wrapped.defvjp(lambda a, b: (apart(a, b), None), lambda _, q: q)
        return wrapped
    if name == "cond":
        return lambda a, b: jax.lax.cond(True, apart, lambda a, b: (a, b), a, b)
    assert name == "scan"
    return lambda a, b: jax.lax.scan(lambda c, _: (apart(*c), None), (a, b), None, length=2)[0]


@pytest.mark.parametrize("name", ["jit", "remat", "custom_jvp", "custom_vjp", "cond", "scan"])
def test_dependencies_keep_apart_what_is_apart(name):
    jaxpr = jax.make_jaxpr(through(name))(1.0, 2.0).jaxpr
    assert dependencies(jaxpr) == [{0}, {1}]


@pytest.mark.parametrize("name", ["jit", "remat", "custom_jvp", "custom_vjp", "cond", "scan"])
@pytest.mark.parametrize("end", [jax.lax.stop_gradient, lambda a: (a > 0) * 1.0])
def test_credit_ends_where_no_derivative_follows(name, end):
    jaxpr = jax.make_jaxpr(lambda a, b: through(name)(end(a), b))(1.0, 2.0).jaxpr
    assert dependencies(jaxpr) == [{0}, {1}]
    assert dependencies(jaxpr, credit=True) == [set(), {1}]


def test_a_custom_derivative_may_go_where_none_follows():
    step = jax.custom_jvp(lambda a: (a > 0) * 1.0)
    step.defjvp(lambda primals, tangents: (step(*primals), tangents[0]))
    assert dependencies(jax.make_jaxpr(step)(1.0).jaxpr, credit=True) == [{0}]


def test_a_scan_hands_on_what_one_pass_gives_the_next():
    def shift(carry, x):
        a, b, c = carry
        return (x, a, b), c

    def run(a, b, c, xs):
        return jax.lax.scan(shift, (a, b, c), xs)

    found = dependencies(jax.make_jaxpr(run)(1.0, 2.0, 3.0, jnp.ones(5)).jaxpr)
    assert found[:3] == [{3}, {0, 3}, {0, 1, 3}]


def test_a_loop_of_unknown_length_joins_everything():
    def run(a, b):
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1]), (a, b))

    assert functools.reduce(set.union, dependencies(jax.make_jaxpr(run)(1.0, 2.0).jaxpr)) == {0, 1}


def test_a_call_out_of_jax_is_found_wherever_it_is_made():
    def outside(x):
        return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct((), x.dtype), x)

    programs = {
        "plain": outside,
        "jit": jax.jit(outside),
        "scan": lambda x: jax.lax.scan(lambda c, _: (outside(c), None), x, None, 3)[0],
        "cond": lambda x: jax.lax.cond(x > 0, outside, lambda y: y, x),
        "while": lambda x: jax.lax.while_loop(lambda c: c < 0, outside, x),
    }
    for name, program in programs.items():
        assert calls_out(jax.make_jaxpr(program)(1.0).jaxpr), name
    within = lambda x: jax.jit(jnp.sin)(x) + jax.lax.fori_loop(0, 3, lambda i, a: a * 2, x)  # noqa: E731
    assert not calls_out(jax.make_jaxpr(within)(1.0).jaxpr)
