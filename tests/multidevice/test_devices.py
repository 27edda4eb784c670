"""The same numbers on eight devices as on one. Runs in a process of its own: see `make test`."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import localgrad
from catalogue import RULES
from experiments.devices import axis_of, collectives, make_mesh, spread
from localgrad.guard import GuardState
from tests.conformance.table import by_machinery

B, T, IN, OUT = 8, 6, 4, 4

BESIDE = {
    "weight_perturbation": [("all-reduce", "pred")],  # whether any stream draws anew now
    "forward_gradient": [("all-reduce", "pred")],
    "pes": [("all-reduce", "pred"), ("all-reduce", "f32")],  # likewise; the loss, at the end
    "guard": [("all-reduce", "f32")],  # of weights, as a mean over any masked batch needs
    "kf_rtrl": [("collective-permute", "f32")],  # of signs, drawn 32 at a time for all streams
}
"""What rules tell each other beside the updates, each a few numbers."""


def told_apart(state):
    """A state without its key; of `ok` the influence, since its factors may both change sign."""
    if isinstance(state, GuardState):
        return told_apart(state.member.state), state._replace(member=None)
    state = state._replace(key=None) if hasattr(state, "key") else state
    if not isinstance(getattr(state, "left", None), dict) or state.left["cells_0"].ndim < 4:
        return state
    pairs = zip(state.left.values(), state.right.values(), strict=True)
    return state._replace(left=[np.einsum("brnd,bre->bnde", *pair) for pair in pairs], right=None)


@pytest.fixture(scope="module")
def problem():
    assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
    model = localgrad.Network((localgrad.RateCell(4, alpha=0.3),), readout=nn.Dense(OUT))
    keys = jax.random.split(jax.random.key(0), 3)
    batch = localgrad.Batch(
        jax.random.normal(keys[0], (B, T, IN)), jax.random.normal(keys[1], (B, T, OUT))
    )
    carry = model.initialize_carry(keys[2], (B, IN))
    params = model.init(keys[2], carry, batch.inputs[:, 0])["params"]
    return model, params, batch


@pytest.mark.parametrize("name", by_machinery(RULES))
def test_a_batch_spread_over_devices_is_reduced_once(name, problem):
    """The same numbers; every stream's state on one device; one all-reduce of the updates."""
    # Where singular values lie close, rounding turns the factors that `ok` draws for.
    with jax.enable_x64(name == "ok"):
        _check_a_spread_batch(name, problem)


def _check_a_spread_batch(name, problem):
    model, *arrays = problem
    params, batch = jax.tree.map(lambda a: a.astype(jnp.result_type(float)), arrays)
    # Of noise so small that only float64 tells its effect, rounding would be compared.
    large = {"scale": 1.0} if "scale" in RULES[name].settings else {}
    make = functools.partial(
        RULES[name].make, model, optax.l2_loss, reduction="mean", example=jnp.zeros(IN), **large
    )
    _check_a_spread_call(name, make, params, batch)


def _check_a_spread_call(name, make, params, batch):
    rule, streams = make(batch_size=B), axis_of(lambda n: make(batch_size=n).init(params), B, 2 * B)
    state = rule.init(params)
    updates, after = rule(params, state, batch)
    mesh = make_mesh(data=8)
    given = spread(mesh, params), spread(mesh, state, data=streams), spread(mesh, batch, data=0)
    program = jax.jit(lambda p, s, b: rule(p, s, b)).lower(*given).compile()
    found, new = program(*given)
    chex.assert_trees_all_close(*jax.device_get((found, updates)), atol=1e-6)
    for path, leaf in jax.tree.leaves_with_path(found):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8, path
    more = jax.eval_shape(lambda: make(batch_size=2 * B).init(params))
    for (path, leaf), twice in zip(
        jax.tree.leaves_with_path(new), jax.tree.leaves(more), strict=True
    ):
        share = math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert share * (8 if twice.size > leaf.size else 1) == leaf.size, path
    told = collectives(program)
    reduced, *others = sorted(told, key=lambda c: -c.bytes)
    assert reduced.operation == "all-reduce"
    assert set(reduced.kinds) == {"f64" if name == "ok" else "f32"}
    assert sorted((c.operation, *c.kinds) for c in others) == sorted(BESIDE.get(name, []))
    assert all(c.bytes <= 64 for c in others)
    new, after = map(told_apart, jax.device_get((new, after)))
    chex.assert_trees_all_close(new, after, atol=1e-6)


@pytest.mark.parametrize("name", ["uoro", pytest.param("eprop", marks=pytest.mark.slow)])
def test_a_guard_tells_one_number_more(name, problem):
    """The weight of all streams, as with any mask; who is ill, nobody is told."""
    model, params, batch = problem

    def make(batch_size):
        told = {"key": jax.random.key(3)} if RULES[name].random else {}
        return localgrad.guard(
            RULES[name].factory(model, optax.l2_loss, batch_size=batch_size, **told), max_norm=1.0
        )

    batch = batch._replace(inputs=batch.inputs.at[3, 2].set(jnp.nan))
    _check_a_spread_call("guard", make, params, batch)


@pytest.mark.parametrize("name", ["eprop", "node_perturbation"])
def test_the_axes_of_a_mesh_may_be_explicit(name, problem):
    """Updates lie as the parameters do, the state as it did, outputs as the inputs."""
    model, params, batch = problem
    large = {"scale": 1.0} if "scale" in RULES[name].settings else {}
    rule = RULES[name].make(model, optax.l2_loss, batch_size=B, **large)
    tx = optax.chain(rule, optax.sgd(1.0))
    keep = lambda outputs, targets: outputs  # noqa: E731
    learn = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=3, metric=keep))
    expected = learn(params, tx.init(params), batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    spread = localgrad.Batch(*(None if a is None else jax.device_put(a, split) for a in batch))
    found = learn(whole, tx.init(whole), spread)
    assert found[3].sharding.spec[0] == "data"
    for a, b in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
        chex.assert_trees_all_close(*jax.device_get((a, b)), atol=1e-6)


def test_shard_map_does_not_check_what_varies(problem):
    model, params, batch = problem
    rule = localgrad.eprop(model, optax.l2_loss)
    updates, state = rule(params, rule.init(params), batch)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(params, inputs, targets):
        found, _ = rule(params, rule.init(params), localgrad.Batch(inputs, targets))
        return jax.lax.pmean(found, "data")

    none, split = PartitionSpec(), PartitionSpec("data")
    place = functools.partial(
        jax.shard_map, step, mesh=mesh, in_specs=(none, split, split), out_specs=none
    )
    with pytest.raises(ValueError, match=r"eprop .*shard_map.*\['data'\].*check_vma=False"):
        place()(params, batch.inputs, batch.targets)
    found = jax.jit(place(check_vma=False))(params, batch.inputs, batch.targets)
    chex.assert_trees_all_close(*jax.device_get((found, updates)), atol=1e-6)


# The examples of a device draw what those of another draw: a random rule's mean is no other's.
@pytest.mark.parametrize(
    "name", by_machinery(name for name, row in RULES.items() if not row.random)
)
def test_a_pmean_over_pmapped_devices_gives_the_same(name, problem):
    model, params, batch = problem
    rule = RULES[name].make(model, optax.l2_loss)
    updates, _ = rule(params, rule.init(params), batch)
    one_each = localgrad.Batch(*(a if a is None else a[:, None] for a in batch))
    state = rule.init(params)

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0))
    def step(state, piece):
        found, _ = rule(params, state, localgrad.Batch(*piece))
        return jax.lax.pmean(found, "data")

    found = step(state, (one_each.inputs, one_each.targets))
    first = jax.tree.map(lambda a: a[0], jax.device_get(found))
    chex.assert_trees_all_close(first, jax.device_get(updates), atol=1e-6)


def larger(size: int, steps: int):
    """A GRU with its parameters and a batch."""
    model = localgrad.Network((nn.GRUCell(32),), readout=nn.Dense(OUT))
    x = jax.random.normal(jax.random.key(0), (size, steps, IN))
    carry = model.initialize_carry(jax.random.key(0), (size, IN))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
    return model, params, localgrad.Batch(x, x[..., :OUT])


@pytest.mark.parametrize("name", ["bptt", "eprop"])
def test_devices_divide_the_work_of_a_batch(name):
    """Each does an eighth; over several windows each window has its all-reduce."""
    model, params, batch = larger(32, 20)
    make = functools.partial(RULES[name].make, model, optax.l2_loss, window=5)
    rule = make(batch_size=32)
    state = rule.init(params)
    streams = axis_of(lambda n: make(batch_size=n).init(params), 32, 64)
    mesh = make_mesh(data=8)
    given = spread(mesh, params), spread(mesh, state, data=streams), spread(mesh, batch, data=0)
    step = jax.jit(lambda p, s, b: rule(p, s, b))
    program, alone = (step.lower(*a).compile() for a in (given, (params, state, batch)))
    assert program.cost_analysis()["flops"] < alone.cost_analysis()["flops"] / 6
    (reduced,) = collectives(program)
    assert reduced.operation == "all-reduce" and reduced.looped == RULES[name].windowed
    assert reduced.bytes <= 4 * (1 + 2 * sum(a.size for a in jax.tree.leaves(params)))


@pytest.mark.parametrize("name", ["eprop", "weight_perturbation"])
def test_chunks_of_a_batch_divide_the_work(name):
    """One all-reduce of the updates and nothing else; each device does its share."""
    size, chunks = 32, 8
    model, params, batch = larger(size, 20)
    whole, rule = (
        RULES[name].make(model, optax.l2_loss, batch_size=n) for n in (size, size // chunks)
    )
    pieces = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), batch)
    states = jax.vmap(lambda _: rule.init(params))(jnp.arange(chunks))

    def step(params, states, pieces):
        updates, states = jax.vmap(rule, (None, 0, 0))(params, states, pieces)
        return jax.tree.map(lambda a: a.mean(0), updates), states

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    places = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",), ("data",))]
    given = [
        jax.device_put(a, place) for a, place in zip((params, states, pieces), places, strict=True)
    ]
    program = jax.jit(step).lower(*given).compile()
    alone = jax.jit(lambda *a: whole(*a)).lower(params, whole.init(params), batch).compile()
    assert program.cost_analysis()["flops"] < alone.cost_analysis()["flops"] / 5
    assert [c.operation for c in collectives(program)] == ["all-reduce"]
    updates, after = program(*given)
    for leaf in jax.tree.leaves(after.carry):
        assert leaf.sharding.spec[0] == "data", "a state is spread as its streams are"
    if not RULES[name].random:
        expected, _ = whole(params, whole.init(params), batch)
        chex.assert_trees_all_close(*jax.device_get((updates, expected)), atol=1e-6)
