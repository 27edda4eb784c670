"""`modprop` beside BPTT of a program in which units hear of each other by their types, its limits.

The published code is such a program: backpropagation with each weight replaced by its types' mean
and the slope of what is fed back by a constant. What the rule is on the models of the conformance
tests, these ask.
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

B, T, N, IN, OUT = 2, 9, 6, 3, 2
TYPES = np.array([0, 1, 1, 2, 0, 1])
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)
WIDE = {"param_dtype": jnp.float64}
SLOPE, LEAK, GAIN = 0.15, 0.4, 1.3
sg = jax.lax.stop_gradient


class Voltage(nn.RNNCellBase):
    """The published cell: leaky voltages, of which a rectifier makes rates; and a gain of each."""

    normed: bool = False

    @nn.compact
    def __call__(self, v, x):
        dense = functools.partial(nn.Dense, N, **WIDE)
        drive = dense(name="i")(x) + dense(name="h")(nn.relu(v))
        drive = nn.LayerNorm(name="norm", **WIDE)(drive) if self.normed else drive
        v = (1 - LEAK) * v + LEAK * drive
        gain = self.param("gain", nn.initializers.ones, (N,), jnp.float64)
        return v, gain[None] * nn.relu(v)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], N))

    num_feature_axes = 1


def dense(p, x):
    return x @ p["kernel"] + (p["bias"] if "bias" in p else 0.0)


def voltage(p, v, x, hear, normed=False):
    drive = dense(p["i"], x) + dense(p["h"], sg(nn.relu(v)))
    if normed:
        deviation = jnp.sqrt(drive.var() + 1e-6)
        drive = (drive - sg(drive.mean())) / sg(deviation) * p["norm"]["scale"] + p["norm"]["bias"]
    v = (1 - LEAK) * v + LEAK * drive + hear(v)
    return v, p["gain"] * nn.relu(v)


def rate(p, a, x, hear, activation=jnp.tanh):
    a = (1 - LEAK) * a + LEAK * activation(dense(p["i"], x) + dense(p["h"], sg(a))) + hear(a)
    return a, a


def averaged(kernel, types):
    """Each weight as the mean of all from its type to its type; entry by entry."""
    pairs = [
        [np.flatnonzero(types == a) for a in (types[p], types[q])] for p, q in np.ndindex(N, N)
    ]
    return np.array([kernel[np.ix_(*pair)].mean() for pair in pairs]).reshape(N, N)


def expected(step, params, batch, types, slope):
    """The gradient of the program."""
    between = averaged(np.asarray(params["cells_0"]["h"]["kernel"]), np.asarray(types))

    def hear(state):
        return slope * (state - sg(state)) @ between

    def loss(params):
        total = 0.0
        for x, target, mask, reset in zip(*map(np.asarray, batch), strict=True):
            state = jnp.zeros(N)
            for t in range(T):
                state = jnp.where(reset[t], 0.0, state)
                state, y = step(params["cells_0"], state, x[t], hear)
                error = dense(params["readout"], y) - target[t]
                total += mask[t] * (error**2).mean() / 2
        return total

    return jax.grad(loss)(params)


def problem(cell, seed=0):
    """A network of a cell, its parameters, all random, and a batch."""
    rng = np.random.default_rng(seed)
    model = localgrad.Network((cell,), readout=nn.Dense(OUT, **WIDE))
    x = jnp.asarray(rng.normal(size=(B, T, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)) / 2, params)
    mask = rng.choice([0.0, 1.0, 2.0], (B, T))
    targets = jnp.asarray(rng.normal(size=(B, T, OUT)))
    return model, params, localgrad.Batch(x, targets, mask, rng.random((B, T)) < 0.15)


def summed(rule, params, batch, ends):
    """Updates added over calls."""
    state, total = rule.init(params), jax.tree.map(np.zeros_like, params)
    for piece in np.split(np.arange(T), ends):
        updates, state = rule(params, state, jax.tree.map(lambda a, p=piece: a[:, p], batch))
        total = jax.tree.map(np.add, total, updates)
    return total


@pytest.mark.parametrize(
    ("cell", "step", "window"),
    [
        (Voltage(), voltage, 4),
        (Voltage(normed=True), functools.partial(voltage, normed=True), 4),
        (localgrad.RateCell(N, alpha=LEAK, **WIDE), rate, 4),
        (Voltage(), voltage, 1),
    ],
    ids=["published", "normalised", "rate", "step_by_step"],
)
@pytest.mark.few(1)
def test_it_is_the_gradient_of_its_program(cell, step, window, x64):
    model, params, batch = problem(cell)
    rule = localgrad.modprop(
        model,
        optax.l2_loss,
        slope=SLOPE,
        types=TYPES,
        batch_size=B,
        window=window,
        reduction="sum",
        held_statistics=getattr(cell, "normed", False),
    )
    close(summed(rule, params, batch, [5, 6]), expected(step, params, batch, TYPES, SLOPE))


def update(factory, model, params, batch, **options):
    rule = factory(model, optax.l2_loss, **options)
    return rule(params, rule.init(params), batch)[0]


def test_linear_units_each_of_a_type_of_its_own_are_credited_exactly(x64):
    cell = localgrad.RateCell(N, alpha=LEAK, activation=lambda a: GAIN * a, **WIDE)
    model, params, batch = problem(cell)
    options = {"slope": LEAK * GAIN, "types": np.arange(N), "window": 4}
    exact = update(localgrad.bptt, model, params, batch)
    close(update(localgrad.modprop, model, params, batch, **options), exact)
    # And not without reason: the default, one type, is another estimate.
    one = update(localgrad.modprop, model, params, batch, slope=LEAK * GAIN)
    with pytest.raises(AssertionError):
        close(one, exact)


def test_without_a_slope_it_is_e_prop(x64):
    model, params, batch = problem(localgrad.RateCell(N, alpha=LEAK, **WIDE))
    found = update(localgrad.modprop, model, params, batch, slope=0, types=TYPES, window=4)
    close(found, update(localgrad.eprop, model, params, batch, window=4))


def test_labels_that_no_unit_has_change_nothing(x64):
    model, params, batch = problem(localgrad.RateCell(N, alpha=LEAK, **WIDE))
    found = functools.partial(update, localgrad.modprop, model, params, batch, slope=SLOPE)
    close(found(types=3 * TYPES), found(types=TYPES))


class Peeks(nn.RNNCellBase):
    """Its output is made of more than its new state."""

    @nn.compact
    def __call__(self, h, x):
        new = nn.tanh(nn.Dense(N, name="i")(x) + nn.Dense(N, name="h")(h))
        return new, new - h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], N))

    num_feature_axes = 1


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        (Peeks(), {}, r"modprop cannot credit cells_0 \(Peeks\).*output.*localgrad.eprop"),
        (nn.GRUCell(N), {}, r"GRUCell.*shapes \[\(6,\), \(6,\), \(6,\)\].*localgrad.mdgl"),
        (localgrad.RateCell(N), {"slope": -1}, "slope must be a Python number.*got -1"),
        (localgrad.RateCell(N), {"slope": float("nan")}, "slope.*got nan"),
        (localgrad.RateCell(N), {"types": [TYPES[1:]]}, r"every unit of every cell.*\(5,\)"),
        (localgrad.RateCell(N), {"types": TYPES / 2}, "integers of 0 or more"),
    ],
)
def test_what_it_refuses(cell, options, message, x64):
    model, params, _ = problem(cell)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        localgrad.modprop(model, optax.l2_loss, **{"slope": 0.1} | options).init(params)
