"""`mix`: each group learns as by its own rule, and noise enters nowhere else."""

import functools

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad
from localgrad.core.params import leaves_of

pytestmark = pytest.mark.usefixtures("x64")
B, T, N, IN, OUT = 3, 6, 4, 3, 2
KEY = jax.random.key(1)
LABELS = {"encoder": "below", "cells_0": "cells", "readout": "above"}


def network():
    """A network with a leak that learns, random parameters, and a batch."""
    rng = np.random.default_rng(0)
    dense = functools.partial(nn.Dense, param_dtype=jnp.float64)
    cell = localgrad.RateCell(N, alpha=0.4, learn_alpha=True, param_dtype=jnp.float64)
    model = localgrad.Network((cell,), encoder=dense(IN), readout=dense(OUT))
    x = jnp.asarray(rng.normal(size=(B, T, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    shake = lambda a: jnp.asarray(a + 0.1 * rng.normal(size=a.shape))  # noqa: E731
    reset = jnp.zeros((B, T), bool).at[0, T // 2].set(True)
    mask = jnp.asarray(rng.choice([0.0, 0.5, 1.0], (B, T)))
    targets = jnp.asarray(rng.normal(size=(B, T, OUT)))
    return model, jax.tree.map(shake, params), localgrad.Batch(x, targets, mask, reset)


def updates_of(rule, params, batch):
    return rule(params, rule.init(params), batch)[0]


def mixed(model, **options):
    """Noise below, e-prop in the cell, the exact gradient above."""
    rules = {
        "below": localgrad.node_perturbation(model, optax.l2_loss, key=KEY, samples=4, **options),
        "cells": localgrad.eprop(model, optax.l2_loss, **options),
        "above": localgrad.readout_only(model, optax.l2_loss, **options),
    }
    return rules, localgrad.mix(rules, LABELS)


def test_each_group_learns_by_its_own_rule():
    model, params, batch = network()
    rules, rule = mixed(model)
    found = updates_of(rule, params, batch)
    for group, label in (("cells_0", "cells"), ("readout", "above")):
        wanted = updates_of(rules[label], params, batch)[group]
        chex.assert_trees_all_close(found[group], wanted, rtol=1e-12)
    assert jnp.any(found["encoder"]["kernel"])


@pytest.mark.parametrize("make", [localgrad.node_perturbation, localgrad.weight_perturbation])
@pytest.mark.few(1)
def test_noise_enters_its_own_group_alone(make):
    """The variance of a weight's estimate counts the weights that are disturbed; the leak, which
    lies in no layer, is none of node perturbation's concern."""
    model, params, batch = network()
    batch, draws = batch._replace(reset=None), 2000

    def gradient(batch):
        return updates_of(localgrad.bptt(model, optax.l2_loss, reduction="sum"), params, batch)

    def one(key):
        noisy = make(model, optax.l2_loss, key=key, scale=1e-5, reduction="sum")
        rest = localgrad.eprop(model, optax.l2_loss, reduction="sum")
        labels = {"encoder": "noise", "cells_0": "rest", "readout": "rest"}
        rule = localgrad.mix({"noise": noisy, "rest": rest}, labels)
        return updates_of(rule, params, batch)["encoder"]

    found = jax.jit(lambda k: jax.lax.map(one, k, batch_size=100))(jax.random.split(KEY, draws))
    off = jax.tree.map(lambda a, b: np.asarray(a - b[None]), found, gradient(batch)["encoder"])
    for a in jax.tree.leaves(off):
        assert np.abs(a.mean(0) / a.std(0)).max() < 4.5 / np.sqrt(draws)
    if make is localgrad.weight_perturbation:  # signs: P - 1 times the square of each gradient
        alone = [gradient(jax.tree.map(lambda a, b=b: a[b : b + 1], batch)) for b in range(B)]
        squares = sum(float(optax.tree.norm(g["encoder"], squared=True)) for g in alone)
        each = sum((a**2).reshape(draws, -1).sum(1) for a in jax.tree.leaves(off))
        wanted = (IN * IN + IN - 1) * squares
        assert abs(each.mean() - wanted) < 4 * each.std() / np.sqrt(draws)


@pytest.mark.slow
def test_a_group_may_be_what_a_rule_alone_would_refuse():
    model, params, batch = network()
    noisy = localgrad.node_perturbation(model, optax.l2_loss, key=KEY)
    with pytest.raises(ValueError, match="cannot credit parameter alpha"):
        updates_of(noisy, params, batch)
    labels = {"encoder": "noise", "cells_0": {"alpha": "leak", "h": "noise", "i": "noise"}}
    rules = {"noise": noisy, "leak": localgrad.rtrl(model, optax.l2_loss)}
    found = updates_of(localgrad.mix(rules, {**labels, "readout": "noise"}), params, batch)
    exact = updates_of(localgrad.bptt(model, optax.l2_loss), params, batch)
    chex.assert_trees_all_close(found["cells_0"]["alpha"], exact["cells_0"]["alpha"], rtol=1e-10)


@pytest.mark.parametrize("lengths", [[2, 4], [1] * T])
@pytest.mark.slow
def test_a_split_changes_nothing(lengths):
    model, params, batch = network()
    whole = mixed(model, reduction="sum", window=4)[1]
    wanted, _ = whole(params, whole.init(params), batch)
    rule = mixed(model, reduction="sum", batch_size=B)[1]
    state, total, start = rule.init(params), jax.tree.map(jnp.zeros_like, params), 0
    for length in lengths:
        piece = jax.tree.map(lambda a, s=start, n=length: a[:, s : s + n], batch)
        updates, state = rule(params, state, piece)
        total, start = jax.tree.map(jnp.add, total, updates), start + length
    chex.assert_trees_all_close(total, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_it_is_a_rule_as_any_other():
    model, params, batch = network()
    rule = mixed(model, batch_size=B)[1]
    state = rule.init(params)
    updates, after = jax.jit(rule)(params, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    tx = optax.chain(rule, optax.adam(1e-2))
    params_after, opt_state, losses = jax.jit(
        lambda p, s: localgrad.learn(tx, p, s, batch, chunk=2)
    )(params, tx.init(params))
    np.testing.assert_array_equal(optax.tree.get(opt_state, "loss"), losses[-1])
    assert losses.shape == (3,) and not jnp.array_equal(
        params["encoder"]["kernel"], params_after["encoder"]["kernel"]
    )
    several = jax.vmap(rule, (0, 0, None))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), (params, state))
    chex.assert_trees_all_close(
        jax.tree.map(lambda a: a[1], several(*stacked, batch)[0]), updates, rtol=1e-9, atol=1e-12
    )
    shapes = jax.eval_shape(rule, params, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes[0], params)
    assert repr(rule).startswith("mix(Network, l2_loss, rules={'below': 'node_perturbation', ")
    assert "below: noise paid by loss differences (causal" in localgrad.summary(rule, params)


def test_a_new_sequence_forgets_what_all_members_carry():
    model, params, batch = network()
    rule = mixed(model, batch_size=B)[1]
    start = rule.init(params)
    _, state = rule(params, start, batch)
    begun = localgrad.reset_state(state)
    chex.assert_trees_all_equal(begun.carry, start.carry)
    members, blank = begun.members, start.members
    chex.assert_trees_all_equal(members["cells"].state, blank["cells"].state)
    noisy = members["below"].state
    assert not any(jnp.any(a) for a in jax.tree.leaves((noisy.deviation, noisy.eligibility)))
    assert noisy.clock == T, "keys and clocks outlive a sequence"


@pytest.mark.slow
def test_what_members_have_in_common_is_run_once():
    model, params, batch = decorrelated()
    noisy = localgrad.node_perturbation(model, optax.l2_loss, key=KEY, batch_size=B)
    plain = localgrad.decorrelation(model, optax.l2_loss, batch_size=B)
    both = localgrad.mix({"weights": noisy, "decorrelation": plain}, localgrad.label_decorrelation)

    def loops(rule):
        program = jax.jit(rule).lower(params, rule.init(params), batch).compile()
        return program.as_text().count(" while(")

    assert loops(plain) > 0 and loops(both) <= loops(noisy)


def decorrelated():
    rng = np.random.default_rng(0)
    cell = localgrad.DecorrelatedCell(nn.SimpleCell(N))
    model = localgrad.Network((cell,), readout=nn.Dense(OUT))
    x = jnp.asarray(rng.normal(size=(B, 40, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    return model, params, localgrad.Batch(x, x[..., :OUT])


@pytest.mark.parametrize(
    "make",
    [
        localgrad.node_perturbation,
        localgrad.weight_perturbation,
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (
                localgrad.activity_perturbation,
                localgrad.forward_gradient,
                functools.partial(localgrad.pes, unroll=2),
            )
        ),
    ],
)
@pytest.mark.few(1)
def test_every_rule_of_noise_goes_with_decorrelation(make):
    model, params, batch = decorrelated()
    common = {"batch_size": B}
    rules = {
        "weights": make(model, optax.l2_loss, key=KEY, **common),
        "decorrelation": localgrad.decorrelation(model, optax.l2_loss, **common),
    }
    found = updates_of(localgrad.mix(rules, localgrad.label_decorrelation), params, batch)
    alone = updates_of(rules["decorrelation"], params, batch)
    state = lambda tree: tree["cells_0"]["state"]  # noqa: E731
    chex.assert_trees_all_close(state(found), state(alone), rtol=1e-9)
    assert all(jnp.any(a) for a in leaves_of(found).values())


def test_parameters_of_nnx_are_labelled_by_a_function():
    model, params = localgrad.from_nnx(
        nnx.GRUCell(IN, N, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    )
    batch = localgrad.Batch(jnp.ones((B, T, IN)), jnp.ones((B, T, N)))

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "local" if path[0].key == "dense_h" else "exact", params
        )

    rules = {"local": localgrad.eprop, "exact": localgrad.bptt}
    rules = {label: make(model, optax.l2_loss) for label, make in rules.items()}
    found = updates_of(localgrad.mix(rules, labels), params, batch)
    for label, name in (("local", "dense_h"), ("exact", "dense_i")):
        wanted = updates_of(rules[label], params, batch)
        chex.assert_trees_all_close(
            nnx.to_pure_dict(found)[name], nnx.to_pure_dict(wanted)[name], rtol=1e-12
        )


@pytest.mark.parametrize(
    ("make", "batch_size"),
    [
        (localgrad.bptt, None),
        *(pytest.param(r, B, marks=pytest.mark.slow) for r in (localgrad.eprop, localgrad.rtrl)),
    ],
)
@pytest.mark.slow
def test_credit_ends_at_an_encoder_that_is_anothers(make, batch_size):
    class Stern(nn.Module):
        """A layer behind which nothing can be differentiated."""

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(IN, param_dtype=jnp.float64)(x)
            # The thread that calls may not have float64 switched on.
            shape = jax.ShapeDtypeStruct(h.shape, jnp.float32)
            given = h.astype(jnp.float32)
            signs = jax.pure_callback(np.sign, shape, given, vmap_method="expand_dims")
            return signs.astype(h.dtype)

    dense = functools.partial(nn.Dense, OUT, param_dtype=jnp.float64)
    cell = nn.GRUCell(N, param_dtype=jnp.float64)
    model = localgrad.Network((cell,), readout=dense(), encoder=Stern())
    _, _, batch = network()
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    # One that reads what the encoder gives; nothing else tells what the cell learns.
    alone = localgrad.Network(model.cells, readout=model.readout)
    encoded = Stern().apply({"params": params["encoder"]}, batch.inputs)
    rest = {name: params[name] for name in ("cells_0", "readout")}
    options = {"batch_size": batch_size}
    wanted = updates_of(make(alone, optax.l2_loss, **options), rest, batch._replace(inputs=encoded))
    rules = {
        "noise": localgrad.weight_perturbation(model, optax.l2_loss, key=KEY, **options),
        "local": make(model, optax.l2_loss, **options),
    }
    labels = {"encoder": "noise", "cells_0": "local", "readout": "local"}
    found = updates_of(localgrad.mix(rules, labels), params, batch)
    chex.assert_trees_all_close({name: found[name] for name in rest}, wanted, rtol=1e-9)


@pytest.mark.slow
def test_force_goes_with_a_rule_for_the_cell():
    model, params, batch = network()
    rules = {
        "cells": localgrad.eprop(model, optax.l2_loss, batch_size=B),
        "readout": localgrad.force(model, optax.l2_loss, batch_size=B),
    }
    labels = {"encoder": "cells", "cells_0": "cells", "readout": "readout"}
    found = updates_of(localgrad.mix(rules, labels), params, batch)
    for group, label in labels.items():
        wanted = updates_of(rules[label], params, batch)[group]
        chex.assert_trees_all_close(found[group], wanted, rtol=1e-12)


@pytest.mark.slow
def test_a_state_can_be_donated_and_stored():
    model, params, batch = network()
    noisy = [
        localgrad.node_perturbation(model, optax.l2_loss, key=KEY, batch_size=B),
        localgrad.weight_perturbation(model, optax.l2_loss, key=KEY, batch_size=B),
    ]
    labels = {"encoder": "a", "cells_0": "b", "readout": "b"}
    rule = localgrad.mix(dict(zip("ab", noisy, strict=True)), labels)
    step = jax.jit(lambda p, s, b: rule(p, s, b), donate_argnums=1)
    _, state = step(params, rule.init(params), batch)
    _, again = step(params, rule.init(params), batch)
    chex.assert_trees_all_equal(state.carry, again.carry)
    assert jax.random.key_data(KEY).shape == (2,), "the key is still the caller's"
    plain = jax.tree.map(
        lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a,
        state,
    )
    back = flax.serialization.from_bytes(plain, flax.serialization.to_bytes(plain))
    chex.assert_trees_all_equal(back, plain)


def test_what_does_not_fit_is_refused():
    model, params, batch = network()
    make = functools.partial(localgrad.eprop, model, optax.l2_loss)
    exact, local = localgrad.bptt(model, optax.l2_loss), make()
    two = {"a": exact, "b": local}
    refusals = {
        "two rules or more; got .'a'.": lambda: localgrad.mix({"a": local}, {}),
        "must be a localgrad rule; got Grad.*behind the mix": lambda: localgrad.mix(
            {"a": local, "b": optax.sgd(1.0)}, {}
        ),
        "same model": lambda: localgrad.mix(
            {"a": local, "b": localgrad.bptt(nn.GRUCell(3), optax.l2_loss)}, {}
        ),
        "same loss": lambda: localgrad.mix(
            {"a": local, "b": localgrad.bptt(model, optax.squared_error)}, {}
        ),
        "same batch_size; rules.'a'. has None, rules.'b'. has 3": lambda: localgrad.mix(
            {"a": local, "b": make(batch_size=B)}, {}
        ),
        "same reduction": lambda: localgrad.mix({"a": local, "b": make(reduction="sum")}, {}),
        "no mix among its rules": lambda: localgrad.mix(
            {"a": local, "b": localgrad.mix(two, LABELS)}, {}
        ),
        "cells_0/alpha the label 'cells', for which there is no rule; rules has .'a', 'b'.": (
            lambda: updates_of(localgrad.mix(two, LABELS), params, batch)
        ),
        "no parameter the label 'b'": lambda: updates_of(
            localgrad.mix(two, lambda p: jax.tree.map(lambda _: "a", p)), params, batch
        ),
        "labels have none for encoder/bias": lambda: updates_of(
            localgrad.mix(two, {"cells_0": "a", "readout": "b"}), params, batch
        ),
        "labels name head, which is no parameter; .*'cells_0', 'encoder', 'readout'": (
            lambda: updates_of(localgrad.mix(two, {**LABELS, "head": "a"}), params, batch)
        ),
        "cells_0/alpha the label 1, for which": lambda: updates_of(
            localgrad.mix(two, {**LABELS, "cells_0": 1}), params, batch
        ),
        "rules must map labels to rules.*got a list": lambda: localgrad.mix([exact, local], {}),
        "cannot be mixed: .*the network itself is noisy": lambda: localgrad.mix(
            {
                "a": local,
                "b": localgrad.node_perturbation(
                    model, optax.l2_loss, key=KEY, baseline="running_mean"
                ),
            },
            {},
        ),
        "readout_only is to learn cells_0/alpha, which it leaves as it is": lambda: updates_of(
            localgrad.mix(
                {"a": local, "b": localgrad.readout_only(model, optax.l2_loss)},
                {"encoder": "a", "cells_0": "b", "readout": "a"},
            ),
            params,
            batch,
        ),
        "mix with batch_size=None got a state that is not its own": lambda: localgrad.mix(
            two, {"encoder": "a", "cells_0": "b", "readout": "a"}
        )(params, local.init(params), batch),
        "takes no gradients": lambda: localgrad.mix(two, LABELS).update(
            params, None, params, batch=batch
        ),
    }
    for message, call in refusals.items():
        with pytest.raises(ValueError, match=message):
            call()
