"""`LIFCell` and `ALIFCell` against plain loops, as Flax cells, and what they refuse."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.cells.surrogates import SURROGATES, spike

CELLS = (localgrad.LIFCell, localgrad.ALIFCell)
every_cell = pytest.mark.parametrize("make", CELLS)
eye = nn.initializers.ones_init()
none = nn.initializers.zeros_init()


def ran(cell, inputs, params=None):
    """The spikes [B, T, N] and the last carry."""
    rnn = nn.RNN(cell, return_carry=True)
    if params is None:
        params = jax.jit(rnn.init)(jax.random.key(0), inputs)["params"]
    carry, spikes = jax.jit(rnn.apply)({"params": params}, inputs)
    return np.asarray(spikes), carry


def alone(make, **kwargs):
    """One unit that gets its input as it is."""
    return make(1, kernel_init=eye, recurrent_kernel_init=none, **kwargs)


def counted(current, steps, decay, threshold, refractory, beta=0.0, rho=0.0):
    """The spikes of one unit at a constant current, as a plain loop."""
    v, a, wait, last, found = 0.0, 0.0, 0, 0, []
    for _ in range(steps):
        v = decay * v + current - threshold * last
        last = int(wait == 0 and v > threshold + beta * a)
        wait = refractory if last else max(wait - 1, 0)
        a = rho * a + last
        found.append(last)
    return np.array(found)


@pytest.mark.parametrize("refractory", [0, 3])
@pytest.mark.parametrize("current", [0.11, 0.37, 1.3])
@pytest.mark.few(4)
def test_spikes_at_a_constant_current(current, refractory):
    kwargs = {"decay": 0.9, "threshold": 0.8, "refractory": refractory}
    inputs = jnp.full((1, 60, 1), current)
    expected = counted(current, 60, **kwargs)
    spikes, _ = ran(alone(localgrad.LIFCell, **kwargs), inputs)
    np.testing.assert_array_equal(spikes[0, :, 0], expected)
    assert expected.sum() > 0
    gaps = np.diff(np.flatnonzero(spikes[0, :, 0]))
    assert gaps.size and gaps.min() > refractory

    adapting = kwargs | {"beta": 0.3, "adaptation_decay": 0.97}
    fewer, (_, a, _, _) = ran(alone(localgrad.ALIFCell, **adapting), inputs)
    expected = counted(current, 60, **kwargs, beta=0.3, rho=0.97)
    np.testing.assert_array_equal(fewer[0, :, 0], expected)
    fading = 0.97 ** np.arange(60)[::-1]
    np.testing.assert_allclose(a[0, 0], (expected * fading).sum(), rtol=1e-5)


def test_adaptation_slows_a_unit_down():
    inputs = jnp.full((1, 200, 1), 0.1)
    spikes, _ = ran(alone(localgrad.ALIFCell, beta=0.2, adaptation_decay=0.99), inputs)
    gaps = np.diff(np.flatnonzero(spikes[0, :, 0]))
    assert len(gaps) > 5 and gaps[-1] > gaps[0] + 5 and np.all(np.diff(gaps) >= 0)


def test_without_adaptation_units_are_plain_ones():
    inputs = jax.random.normal(jax.random.key(0), (3, 50, 4))
    plain = localgrad.LIFCell(6, decay=0.8, refractory=1)
    params = nn.RNN(plain).init(jax.random.key(1), inputs)["params"]
    spikes, (v, z, r) = ran(plain, inputs, params)
    adapting = localgrad.ALIFCell(6, decay=0.8, refractory=1, beta=0.0)
    same, (same_v, _, same_z, same_r) = ran(adapting, inputs, params)
    assert 0 < spikes.mean() < 0.5
    for a, b in ((spikes, same), (v, same_v), (z, same_z), (r, same_r)):
        np.testing.assert_array_equal(a, b)


@every_cell
@pytest.mark.parametrize("autapses", [False, True])
def test_units_feed_themselves_only_if_told(make, autapses):
    cell = make(5, autapses=autapses)
    x = jnp.zeros((2, 3))
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    params = cell.init(jax.random.key(1), carry, x)["params"]
    kernel = params["h"]["kernel"]
    assert np.all(jnp.diagonal(kernel) != 0) == autapses
    params = {**params, "h": {"kernel": kernel + jnp.eye(5)}}
    fired = tuple(jnp.ones_like(c) if k == len(carry) - 2 else c for k, c in enumerate(carry))
    (v, *_), _ = cell.apply({"params": params}, fired, x)
    used = params["h"]["kernel"] if autapses else kernel
    np.testing.assert_allclose(v, np.broadcast_to(used.sum(0) - 1, (2, 5)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*SURROGATES, None])
@pytest.mark.few(3)
def test_surrogates(name):
    shape = SURROGATES[name] if name else lambda u: jnp.exp(-(u**2))
    u = jnp.linspace(-2, 2, 9)
    forward = jax.jvp(lambda u: spike(u, shape), (u,), (jnp.ones_like(u),))
    np.testing.assert_array_equal(forward[0], u > 0)
    np.testing.assert_allclose(forward[1], shape(u))
    np.testing.assert_allclose(jax.grad(lambda u: spike(u, shape).sum())(u), shape(u))
    assert shape(jnp.zeros(())) == 1

    cell = localgrad.LIFCell(1, threshold=0.5, surrogate=name or shape, dampening=0.4)
    rest = cell.initialize_carry(jax.random.key(0), (1, 1))
    params = cell.init(jax.random.key(1), rest, jnp.ones((1, 1)))["params"]

    def fired(v, r):
        return cell.apply({"params": params}, (v, rest[1], r), jnp.zeros((1, 1)))[1].sum()

    v = jnp.full((1, 1), 0.6)
    expected = 0.95 * 0.4 / 0.5 * shape((0.95 * v - 0.5) / 0.5)
    np.testing.assert_allclose(jax.grad(fired)(v, rest[2]), expected, rtol=1e-5)
    assert jax.grad(fired)(v, rest[2] + 1) == 0  # refractory


@pytest.mark.parametrize("reset_credit", [False, True])
def test_credit_through_the_reset(reset_credit):
    cell = localgrad.LIFCell(
        2, threshold=0.5, reset_credit=reset_credit, recurrent_kernel_init=none
    )
    rest = cell.initialize_carry(jax.random.key(0), (1, 1))
    params = cell.init(jax.random.key(1), rest, jnp.ones((1, 1)))["params"]

    def voltage(z):
        return cell.apply({"params": params}, (rest[0], z, rest[2]), jnp.zeros((1, 1)))[0][0].sum()

    np.testing.assert_allclose(jax.grad(voltage)(rest[1]), -0.5 * reset_credit)


@pytest.mark.parametrize(("make", "states"), [(localgrad.LIFCell, 1), (localgrad.ALIFCell, 2)])
@pytest.mark.slow
def test_eprop_remembers_what_it_must(make, states):
    model = localgrad.Network((make(4),), readout=nn.Dense(2))
    x = jnp.ones((3, 5, 2))
    carry = model.initialize_carry(jax.random.key(0), (3, 2))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
    state = localgrad.eprop(model, optax.l2_loss, batch_size=3).init(params)
    assert state.eligibility["cells_0", "h", "kernel"].shape == (3, states, 4, 4)


@every_cell
@pytest.mark.slow
def test_snap_sees_no_autapses_where_there_are_none(make):
    model = localgrad.Network((make(4, surrogate="sigmoid"),), readout=nn.Dense(2))
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    carry = model.initialize_carry(jax.random.key(0), (3, 2))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
    params["cells_0"]["h"]["kernel"] = jnp.ones((4, 4))
    found = [
        rule(params, rule.init(params), localgrad.Batch(x, x))[0]
        for rule in (
            make_rule(model, optax.l2_loss) for make_rule in (localgrad.snap, localgrad.eprop)
        )
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), *found)
    assert not np.any(np.diagonal(found[0]["cells_0"]["h"]["kernel"]))


@every_cell
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.few(2)
def test_precision(make, dtype):
    cell = make(4, refractory=2, dtype=dtype, param_dtype=dtype)
    inputs = jnp.full((2, 8, 3), 2, dtype)
    spikes, carry = ran(cell, inputs)
    assert {a.dtype for a in (spikes, *carry)} == {jnp.dtype(dtype)}
    assert set(np.unique(spikes.astype(float))) <= {0.0, 1.0}


@every_cell
@pytest.mark.slow
def test_many_networks_at_once(make):
    inputs = jax.random.normal(jax.random.key(0), (2, 20, 3))
    rnn = nn.RNN(make(4, threshold=0.3))
    keys = jax.random.split(jax.random.key(1), 3)
    params = jax.vmap(rnn.init, (0, None))(keys, inputs)
    together = jax.jit(jax.vmap(rnn.apply, (0, None)))(params, inputs)
    for k in range(3):
        one = rnn.apply(jax.tree.map(lambda a, k=k: a[k], params), inputs)
        np.testing.assert_array_equal(together[k], one)
    assert together.sum() > 0


def test_it_can_be_a_static_argument():
    make = functools.partial(localgrad.ALIFCell, 3, beta=np.array([0.1, 0.5, 1.0]))
    assert hash(make()) == hash(make()) and make() == make()


WRONG = [
    ({"decay": 1.2}, r"decay must lie in \[0, 1\].*got values from 1.2.*exp\(-dt / tau\)"),
    ({"decay": np.array([0.1, -0.2, 0.3])}, r"decay must lie in \[0, 1\]; got values from -0.2"),
    ({"decay": np.full(2, 0.5)}, r"decay must be a number or .* \(3,\).*got shape \(2,\)"),
    ({"decay": float("nan")}, r"decay must lie in"),
    ({"threshold": 0.0}, "threshold must be positive and finite; got values from 0.0"),
    ({"threshold": float("inf")}, "threshold must be positive"),
    ({"scale": -1.0}, "scale must be 0 or more"),
    ({"dampening": -0.1}, "dampening must be a number, 0 or more; got -0.1"),
    ({"refractory": -1}, "refractory must be a number of steps.*got -1"),
    ({"refractory": 1.5}, "refractory must be a number of steps.*got 1.5"),
    ({"surrogate": "box"}, "surrogate must be one of triangular, .*function of.*got 'box'"),
]
WRONG_ADAPTING = [
    ({"adaptation_decay": -0.1}, r"adaptation_decay must lie in \[0, 1\]"),
    ({"beta": -0.1}, "beta must be 0 or more, and finite; got values from -0.1"),
    ({"beta": np.ones((3, 1))}, r"beta must be .*\(3,\).*got shape \(3, 1\)"),
]


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [(make, *wrong) for make in CELLS for wrong in WRONG]
    + [(localgrad.ALIFCell, *wrong) for wrong in WRONG_ADAPTING],
)
def test_what_makes_no_sense_is_refused(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(3, **kwargs)
