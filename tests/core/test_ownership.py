"""Owners followed through programs: against perturbations, and where numbers show nothing."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import localgrad
from localgrad.core.ownership.walk import owners_of
from tests.conformance import oracles, zoo

B, T, N, IN = 2, 5, 4, 3


@pytest.fixture(scope="module", autouse=True)
def float64_compiled_fast():
    """These tests compile much and compute little, and numbers are compared at 1e-10."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


# ------------------------------------------------------------------------------------------------
# The analysis alone.

NOBODY, MANY = -1, "many"


def owned(f, *args, credit=False):
    """Owners of the entries of f's first output; column k of each argument belongs to k."""
    labels = [np.broadcast_to(np.arange(a.shape[-1]), a.shape) for a in args]
    out = owners_of(jax.make_jaxpr(f)(*args), labels, credit)[0]
    shape = jax.tree.leaves(jax.eval_shape(f, *args))[0].shape
    if out is None:
        return np.full(shape, NOBODY, object)
    assert out.lo.shape == out.hi.shape == shape
    one = np.where(out.hi < 0, NOBODY, out.lo).astype(object)
    return np.where(out.lo < out.hi, MANY, one)


A = np.arange(8.0).reshape(2, 4) / 7
EYE = np.eye(4)
SELF = np.arange(4)
ODD = jax.custom_jvp(lambda a: jnp.where(a > 0, a, 0.0))
ODD.defjvps(lambda t, out, a: t)
SPIKE = jax.custom_jvp(lambda a: (a > 0.5).astype(a.dtype))
SPIKE.defjvps(lambda t, out, a: t)


def loop(a):
    return lax.while_loop(lambda c: c[0].max() < 9, lambda c: (c[0] + 1, c[1] * c[0]), (a, a))


def rolled(a):
    """Each pass of a loop moves all by one."""
    return lax.fori_loop(0, 3, lambda i, c: jnp.roll(c, 1, -1), a)


def doubled_in_place(a):
    return lax.fori_loop(0, 4, lambda i, c: c.at[:, i].multiply(2.0), a)


def backwards(a):
    return lax.scan(lambda c, x: (c, x + c), jnp.zeros(2), a.T, reverse=True)[1].T


SAME = {
    "arithmetic": lambda a: jnp.tanh(2 * a - a**3) / (1 + jnp.exp(a)),
    "gates": lambda a: sum(jnp.split(jnp.concatenate([a, 2 * a], -1), 2, -1)),
    "reshaped gates": lambda a: jnp.concatenate([a, a], -1).reshape(2, 2, 4).sum(1),
    "softmax of gates": lambda a: jax.nn.softmax(jnp.stack([a, -a], 1), 1)[:, 0],
    "tiled": lambda a: jnp.tile(a, (2, 3))[2:, 4:8],
    "taken apart": lambda a: jnp.stack(jnp.unstack(a, axis=-1), -1),
    "transposed": lambda a: jnp.flip(jnp.flip(a.T, 0), 0).T,
    "padded": lambda a: jnp.pad(a, ((0, 0), (3, 1)))[:, 3:7],
    "eye and sum": lambda a: (a[:, :, None] * EYE[None]).sum(1),
    "times eye": lambda a: a @ EYE,
    "eye times": lambda a: jnp.einsum("ij,bj->bi", EYE, a),
    "where eye": lambda a: jnp.where(EYE[None] > 0, a[:, None], 0).sum(-1),
    "take": lambda a: jnp.take(a, SELF, axis=-1),
    "fancy index": lambda a: a[:, SELF],
    "rows and columns": lambda a: a[np.arange(2)[:, None], SELF],
    "along axis": lambda a: jnp.take_along_axis(a, np.broadcast_to(SELF, (2, 4)), -1),
    "set": lambda a: a.at[:, 1].set(3 * a[:, 1]),
    "set over": lambda a: jnp.roll(a, 1, -1).at[:, SELF].set(a),
    "add at": lambda a: jnp.zeros((2, 4)).at[:, SELF].add(a),
    "dynamic": lambda a: lax.dynamic_slice(lax.dynamic_update_slice(a, a, (0, 0)), (0, 0), (2, 4)),
    "known branch": lambda a: lax.cond(EYE[0, 0] > 0, jnp.sin, lambda a: a[:, ::-1], a),
    "cond": lambda a: lax.cond(a[0, 1] > 0, jnp.sin, jnp.cos, a),
    "scan": lambda a: lax.scan(lambda c, _: (0.9 * c, None), a, None, length=3)[0],
    "scan over units": lambda a: lax.scan(lambda c, x: (c, 2 * x), 0, a.T)[1].T,
    "long scan": lambda a: lax.scan(lambda c, _: (0.9 * c, None), a, None, length=1000)[0],
    "backwards": backwards,
    "in place": doubled_in_place,
    "vmap": lambda a: jax.vmap(jnp.sin, -1, -1)(a),
    "jit": lambda a: jax.jit(jnp.sin)(a),
    "checkpoint": lambda a: jax.checkpoint(jnp.sin)(a),
    "custom": lambda a: ODD(a),
    "spike": lambda a: SPIKE(a),
    "table": lambda a: jnp.interp(a, np.linspace(0, 1, 5), np.linspace(0, 1, 5) ** 2),
    "noise": lambda a: a + jax.random.normal(jax.random.key(0), (1, 4)),
    "barrier": lambda a: lax.optimization_barrier((a, a.sum()))[0],
}


@pytest.mark.parametrize("name", SAME)
def test_what_stays_with_its_owner(name):
    expected = np.broadcast_to(np.arange(4), (2, 4))
    np.testing.assert_array_equal(owned(SAME[name], A, credit=True), expected)


def test_what_is_known_is_nobodys():
    assert (owned(lambda a: 0 * a + jnp.ones((1, 4)), A) == NOBODY).all()
    assert (owned(lambda a: jax.random.normal(jax.random.key(0), a.shape), A) == NOBODY).all()
    assert (owned(lambda a: jnp.zeros_like(a) @ EYE, A) == NOBODY).all()


MIXED = {
    "sum": lambda a: a + a.sum(-1, keepdims=True),
    "maximum": lambda a: a - a.max(-1, keepdims=True),
    "sort": lambda a: jnp.sort(a, -1),
    "top k": lambda a: lax.top_k(a, 2)[0],
    "softmax": lambda a: jax.nn.softmax(a),
    "branch": lambda a: lax.cond(a[0, 0] > 1e9, lambda a: a + a.sum(), jnp.cos, a),
    "choice": lambda a: jnp.where(jnp.abs(a) > 1e3, a.mean(-1, keepdims=True), a),
    "product": lambda a: a @ np.ones((4, 4)),
    "outer": lambda a: jnp.einsum("bi,bj->bi", a, a),
    "looked up": lambda a: jnp.take(a, a.astype(int), axis=-1),
    "sliced": lambda a: lax.dynamic_slice(a, (0, a[0, 0].astype(int)), (2, 2)),
    "passes": lambda a: lax.fori_loop(0, 3, lambda i, c: c + jnp.roll(c, 1, -1), a),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_belongs_to_many(name):
    for credit in (False, True):
        assert (owned(MIXED[name], A, credit=credit) == MANY).all()


def test_where_parts_of_an_array_go():
    assert owned(lambda a: jnp.cumsum(a, -1), A)[0].tolist() == [0, MANY, MANY, MANY]
    assert owned(lambda a: lax.cumsum(a, 1, reverse=True), A)[0].tolist() == [MANY] * 3 + [3]
    assert owned(rolled, A)[0].tolist() == [1, 2, 3, 0]
    assert owned(lambda a: jnp.pad(a, ((0, 0), (1, 0))), A)[0].tolist() == [NOBODY, 0, 1, 2, 3]
    within = owned(lambda a: lax.pad(a, 0.0, ((0, 0, 0), (-1, 2, 1))), A)[0].tolist()
    assert within == [NOBODY, 1, NOBODY, 2, NOBODY, 3, NOBODY, NOBODY]
    assert owned(lambda a: a.at[:, 1].set(a[:, 3]), A)[0].tolist() == [0, 3, 2, 3]
    assert owned(lambda a: a.at[:, 1].add(a[:, 3]), A)[0].tolist() == [0, MANY, 2, 3]
    assert owned(lambda a: a.at[:, 1].set(0.0), A)[0].tolist() == [0, NOBODY, 2, 3]
    assert owned(lambda a: a[:, ::-2], A)[0].tolist() == [3, 1]
    assert owned(lambda a: a @ jnp.eye(4, k=1), A)[0].tolist() == [NOBODY, 0, 1, 2]


def test_what_cannot_be_read_is_left_to_trial():
    def called(a):
        return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(a.shape, a.dtype), a)

    assert (owned(called, A) == NOBODY).all()
    assert (owned(lambda a: jnp.abs(jnp.fft.fft(a)), A) == NOBODY).all()
    assert (owned(lambda a: called(a[:, 1:2]), A) == 1).all()
    assert (owned(lambda a: called(a) + a.sum(-1, keepdims=True), A) == MANY).all()
    assert owned(lambda a: loop(a)[0], A).tolist() == [[NOBODY] * 4] * 2


def test_derivatives_end_where_values_go_on():
    def winner(a):
        return a * (a >= a.max(-1, keepdims=True))

    def steady(a):
        return a + lax.stop_gradient(a.mean(-1, keepdims=True)) + jnp.round(a.sum())

    for f in (winner, steady):
        assert (owned(f, A) == MANY).all()
        assert (owned(f, A, credit=True) == np.arange(4)).all()
    assert owned(lambda a: loop(a)[0], A, credit=True)[0].tolist() == [0, 1, 2, 3]
    assert (owned(lambda a: SPIKE(a - a.mean()), A, credit=True) == MANY).all()


STEPS = [
    lambda a, b: a + b,
    lambda a, b: a * jnp.tanh(b),
    lambda a, b: jnp.roll(a, 1, -1),
    lambda a, b: a.T.reshape(2, 4) + 0 * b,
    lambda a, b: jnp.where(b > 0.3, a, b),
    lambda a, b: a.at[:, 1].set(b[:, 2]),
    lambda a, b: a.at[0, :2].add(b[1, 2:]),
    lambda a, b: jnp.pad(a[:, 1:], ((0, 0), (0, 1))) - b,
    lambda a, b: a * np.array([[1.0, 0.0, 1.0, 0.0]]),
    lambda a, b: b @ np.eye(4, k=1) + a,
    lambda a, b: jnp.einsum("bi,ci->bc", a, b) @ np.ones((2, 4)) * np.eye(4)[[2]],
    lambda a, b: jnp.cumsum(a, 0) + b[::-1],
    lambda a, b: jnp.cumsum(a * np.array([[0.0, 0.0, 1.0, 1.0]]), -1),
    lambda a, b: jnp.sort(jnp.stack([a, b]), 0)[0],
    lambda a, b: jnp.take(a, np.array([3, 1, 1, 0]), axis=-1),
    lambda a, b: jnp.take_along_axis(a, b.argmax(-1, keepdims=True), -1) * np.eye(4)[[0]] + b,
    lambda a, b: lax.cond(b[0, 0] > 0.3, jnp.sin, lambda a: a[:, ::-1], a),
    lambda a, b: lax.scan(lambda c, x: (c + x, c * x), a[0], b)[1],
    lambda a, b: lax.top_k(a, 1)[0] * np.eye(4)[[3]] + b,
]


@pytest.mark.parametrize(
    "seed", [n if n < 8 else pytest.param(n, marks=pytest.mark.slow) for n in range(25)]
)
@pytest.mark.few(4)
def test_owners_are_no_fewer_than_perturbations_show(seed):
    """In random programs of readable steps: values for value, derivatives for credit."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(STEPS), size=5)
    start = rng.normal(size=(2, 4))

    def program(a):
        kept = [a, jnp.sin(a)]
        for k in chosen:
            kept.append(STEPS[k](kept[-1], kept[rng_pick[len(kept)]]))
        return kept[-1]

    rng_pick = {n: int(rng.integers(n)) for n in range(2, 9)}
    for credit in (False, True):
        found = owned(program, start, credit=credit)
        if credit:
            moves = np.asarray(jax.jacfwd(program)(start)).any(2) > 0
        else:
            moves = np.stack([_moved(program, start, u, rng) for u in range(4)], -1)
        for place in np.ndindex(2, 4):
            felt = set(np.flatnonzero(moves[place]))
            assert found[place] == MANY or felt <= {found[place]}


def _moved(program, start, unit, rng):
    """Which entries move, if the numbers of one unit do."""
    was, moved = program(start), np.zeros((2, 4), bool)
    for size in (1e-3, 1.0, 10.0):
        other = start.copy()
        other[:, unit] += size * rng.normal(size=2)
        moved |= np.asarray(program(other) != was)
    return moved


# ------------------------------------------------------------------------------------------------
# Cells whose units meet where no number tried lies.


class Coupled(zoo.Cell):
    """A leaky cell with something between its units."""

    def couple(self, h, x):
        raise NotImplementedError

    @nn.compact
    def __call__(self, h, x):
        new = zoo.leaky(h, self.layer("i")(x) + self.layer("h")(h))
        return (new := self.couple(new, x)), new

    def scalar(self, name):
        return self.param(name, nn.initializers.ones_init(), ())

    def vector(self, name):
        return self.param(name, nn.initializers.ones_init(), (self.features,))[None]


class Inhibited(Coupled):
    def couple(self, h, x):
        return h - jax.nn.relu(self.scalar("g") - 1.0) * h.sum(-1, keepdims=True)


class BehindNegative(Coupled):
    def couple(self, h, x):
        return h + jax.nn.relu(-self.vector("w")) * h.mean(-1, keepdims=True)


class FarOut(Coupled):
    def couple(self, h, x):
        return jnp.where(jnp.abs(h) > 1e3, h.mean(-1, keepdims=True), h)


class Branching(Coupled):
    def couple(self, h, x):
        return lax.cond(self.scalar("g") > 9, lambda h: h * h.sum(-1, keepdims=True), jnp.sin, h)


class Neighbours(Coupled):
    def couple(self, h, x):
        return h + jnp.roll(jax.nn.relu(h - 1e4), 1, axis=-1)


class Projected(Coupled):
    def couple(self, h, x):
        return h + jax.nn.relu(h - 1e4) @ np.ones((N, N))


class Ranked(Coupled):
    def couple(self, h, x):
        return h - jax.nn.relu(jnp.sort(h, -1)[:, -1:] - 1e4)


class Looped(Coupled):
    def couple(self, h, x):
        far = jax.nn.relu(h - 1e4)
        return lax.scan(lambda h, k: (h.at[:, k].add(far[:, k - 1]), None), h, np.arange(N))[0]


class InOldState(Coupled):
    """It is the old state that reaches others."""

    @nn.compact
    def __call__(self, h, x):
        g = jax.nn.relu(self.scalar("g") - 1.0)
        new = zoo.leaky(h, self.layer("i")(x) + self.layer("h")(h))
        return (new := new + g * h.sum(-1, keepdims=True)), new


MEET = {
    Inhibited: "layer i reaches other units than its own",
    BehindNegative: "layer i reaches other units than its own",
    FarOut: "layer i reaches other units than its own",
    Branching: "layer i reaches other units than its own",
    Neighbours: "layer i reaches other units than its own",
    Projected: "layer i reaches other units than its own",
    Ranked: "layer i reaches other units than its own",
    Looped: "layer i reaches other units than its own",
    InOldState: "the state of one unit reaches another's outside any layer",
}


def problem(model):
    """Parameters away from zero, and a batch."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(B, T, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, inputs[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    _, y = jax.eval_shape(model.apply, {"params": params}, carry, inputs[:, 0])
    return params, localgrad.Batch(inputs, jnp.asarray(rng.normal(size=(B, T, *y.shape[1:]))))


def updates(factory, model, params, batch):
    """One call of a rule."""
    rule = factory(model, optax.l2_loss, reduction="sum", example=batch.inputs[0, 0])
    return rule(params, rule.init(params), batch)[0]


@pytest.mark.parametrize("cell", MEET, ids=lambda cell: cell.__name__)
@pytest.mark.parametrize("factory", [localgrad.eprop, localgrad.snap])
@pytest.mark.few(1)
def test_units_that_meet_out_of_sight_are_refused(factory, cell):
    params, batch = problem(cell())
    name = factory.__name__
    with pytest.raises(
        ValueError, match=rf"{name} cannot credit cell \({cell.__name__}\).*{MEET[cell]}"
    ):
        updates(factory, cell(), params, batch)


def test_refused_under_transformations_too():
    params, batch = problem(Inhibited())
    go = functools.partial(updates, localgrad.eprop, Inhibited())
    each = jax.tree.map(lambda a: jnp.stack([a, a]), batch)
    for transformed in (
        lambda: jax.jit(go)(params, batch),
        lambda: jax.eval_shape(go, params, batch),
        lambda: jax.vmap(go, in_axes=(None, 0))(params, each),
        lambda: jax.jacobian(lambda batch: go(params, batch)["i"]["kernel"])(batch),
    ):
        with pytest.raises(ValueError, match="layer i reaches other units"):
            transformed()


class SeesMeanFarOut(Coupled):
    """What its recurrent layer receives is each unit's own only as long as units are small."""

    @nn.compact
    def __call__(self, h, x):
        seen = h + jax.nn.relu(h.mean(-1, keepdims=True) - 1e3)
        h = zoo.leaky(h, self.layer("i")(x) + self.layer("h")(seen))
        return h, h


def test_snap_needs_a_diagonal_everywhere():
    params, batch = problem(SeesMeanFarOut())
    updates(localgrad.eprop, SeesMeanFarOut(), params, batch)
    with pytest.raises(
        ValueError, match="layer h .* does not receive the units as entries in a row"
    ):
        updates(localgrad.snap, SeesMeanFarOut(), params, batch)


# ------------------------------------------------------------------------------------------------
# Cells that must not be refused, with the numbers they must give.

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
RULES = ((localgrad.eprop, "cut"), (localgrad.snap, "diagonal"))


def compare(model, step):
    """Holds both rules to the oracle of the same equations."""
    params, batch = problem(model)
    steps = oracles.steps_of(batch)
    net = oracles.net_of((step,), model, steps)
    for factory, how in RULES:
        expected = jax.jit(lambda how=how: oracles.local(net, params, steps, how))()
        close(updates(factory, model, params, batch), expected)


def winner(h):
    return h * (h >= h.max(-1, keepdims=True)) + lax.stop_gradient(0.1 * h.sum(-1, keepdims=True))


WAYS = {"winner": winner} | {
    name: SAME[name]
    for name in ("eye and sum", "times eye", "take", "fancy index", "set over", "in place", "table")
}


class Passing(Coupled):
    """Its units pass through an operation that keeps them apart."""

    way: str = ""

    def couple(self, h, x):
        return WAYS[self.way](h)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_units_kept_apart_in_roundabout_ways(way):
    def step(p, h, x, how):
        h = zoo.leaky(h, oracles.dense(p["i"], x) + oracles.recurrent(p["h"], h, how))
        return (h := WAYS[way](h)), h

    compare(Passing(way=way), step)


class Fused(zoo.Cell):
    """A GRU with its three gates in one kernel, taken apart in one of three ways."""

    by: str = ""

    @nn.compact
    def __call__(self, h, x):
        i, g = (
            self.gates(nn.Dense(3 * N, name=name)(a))
            for name, a in (("dense_i", x), ("dense_h", h))
        )
        r, z = nn.sigmoid(i[0] + g[0]), nn.sigmoid(i[1] + g[1])
        return (h := (1 - z) * jnp.tanh(i[2] + r * g[2]) + z * h), h

    def gates(self, drive):
        if self.by == "split":
            return jnp.split(drive, 3, axis=-1)
        if self.by == "reshape":
            return jnp.moveaxis(drive.reshape(-1, 3, N), 1, 0)
        return [drive[:, k * N : (k + 1) * N] for k in range(3)]


@pytest.mark.parametrize("by", ["split", "reshape", "slice"])
@pytest.mark.few(1)
def test_gates_in_one_kernel(by):
    compare(Fused(by=by), "nnx_gru")


def adaptive(p, carry, drive):
    """Spiking units with a threshold that adapts."""
    v, a, z = carry
    v = 0.9 * v + drive - z * (1.0 + 0.2 * a)
    z = SPIKE(v - 0.2 * jax.nn.softplus(p["beta"])[None] * a)
    return (v, 0.95 * a + z, z), v + z


def diagonal(p, carry, drive):
    """A linear recurrent unit, its complex state held as two real arrays."""
    re, im = carry
    size, angle = jnp.exp(-jnp.exp(p["nu"]))[None], jnp.exp(p["theta"])[None]
    real, imaginary = size * jnp.cos(angle), size * jnp.sin(angle)
    in_re, in_im = jnp.split(drive, 2, axis=-1)
    new = real * re - imaginary * im + in_re, real * im + imaginary * re + in_im
    return new, jnp.concatenate(new, -1)


class Shared(zoo.Cell):
    """The dynamics of units, below one layer for the input and one for the carry."""

    dynamics: str = ""

    @nn.compact
    def __call__(self, carry, x):
        names, width = {"adaptive": (["beta"], N), "diagonal": (["nu", "theta"], 2 * N)}[
            self.dynamics
        ]
        init = nn.initializers.constant(-0.5)
        own = {name: self.param(name, init, (N,)) for name in names}
        fed = nn.Dense(width, name="i")(x) + nn.Dense(width, name="h")(carry[-1])
        return DYNAMICS[self.dynamics](own, carry, fed)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        h = super().initialize_carry(rng, input_shape)
        return (h, h / 2, h / 3) if self.dynamics == "adaptive" else (h, h / 2)


DYNAMICS = {"adaptive": adaptive, "diagonal": diagonal}


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.few(1)
def test_units_with_several_states(dynamics):
    def step(p, carry, x, how):
        drive = oracles.dense(p["i"], x)
        if dynamics == "adaptive":
            drive += oracles.recurrent(p["h"], carry[-1], how)
        else:
            drive += oracles.dense(p["h"], oracles.sg(carry[-1]))
        return DYNAMICS[dynamics](p, carry, drive)

    model = Shared(dynamics=dynamics)
    if dynamics == "adaptive":
        return compare(model, step)
    params, batch = problem(model)
    steps = oracles.steps_of(batch)
    expected = oracles.local(oracles.net_of((step,), model, steps), params, steps, "cut")
    close(updates(localgrad.eprop, model, params, batch), expected)
    updates(localgrad.snap, model, params, batch)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.SimpleCell(N),
        lambda: nn.GRUCell(N),
        lambda: nn.LSTMCell(N),
        lambda: nn.MGUCell(N),
        lambda: localgrad.RateCell(N, alpha=0.2, learn_alpha=True),
        lambda: localgrad.from_nnx(nnx.SimpleCell(IN, N, rngs=nnx.Rngs(0))),
        lambda: localgrad.from_nnx(nnx.GRUCell(IN, N, rngs=nnx.Rngs(0))),
        lambda: localgrad.from_nnx(nnx.LSTMCell(IN, N, rngs=nnx.Rngs(0))),
        lambda: localgrad.from_nnx(nnx.OptimizedLSTMCell(IN, N, rngs=nnx.Rngs(0))),
    ],
)
@pytest.mark.parametrize("factory", [localgrad.eprop, localgrad.snap])
@pytest.mark.few(2)
def test_cells_of_flax_are_taken(factory, make):
    model = make()
    batch = localgrad.Batch(jnp.ones((B, T, IN)), jnp.ones((B, T, N)))
    if isinstance(model, tuple):
        model, params = model
    else:
        params = problem(model)[0]
    found = jax.eval_shape(functools.partial(updates, factory, model), params, batch)
    chex.assert_trees_all_equal_shapes(found, params)
