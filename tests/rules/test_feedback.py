"""Feedback weights that learn: Kolen and Pollack's law, and what cannot be used."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from tests.rules.test_deep import OUT, B, problem, rate

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
RATE, DECAY, CALLS = 0.1, 0.05, 5

pytestmark = pytest.mark.usefixtures("x64")


def adaptive(factory, model, **options):
    """The rule with weights that learn as its readout does."""
    return factory(
        model,
        optax.l2_loss,
        feedback="adaptive",
        feedback_rate=RATE,
        feedback_decay=DECAY,
        key=jax.random.key(1),
        **options,
    )


def trained(rule, params, batch):
    """Parameters and state after some calls, all parameters decaying like the feedback."""
    tx = optax.chain(rule, optax.add_decayed_weights(DECAY), optax.sgd(RATE))
    state = tx.init(params)
    for _ in range(CALLS):
        updates, state = tx.update(None, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    return params, state[0]


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": B, "window": 5}], ids=["episodes", "stream"]
)
@pytest.mark.parametrize(
    "factory", [localgrad.eprop, pytest.param(localgrad.deep_eprop, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_feedback_comes_closer_to_the_readout_at_the_rate_of_the_decay(factory, options):
    """Both take the same steps, so that nothing but the decay changes their difference."""
    model, params, batch = problem(rate(4, 0.3), nn.GRUCell(3, param_dtype=float))
    rule = adaptive(factory, model, **options)
    gap = rule.init(params).feedback["cells_1"] - params["readout"]["kernel"]
    after, state = trained(rule, params, batch)
    left = state.feedback["cells_1"] - after["readout"]["kernel"]
    close(left, (1 - RATE * DECAY) ** CALLS * gap)
    assert not np.allclose(after["readout"]["kernel"], params["readout"]["kernel"], atol=1e-2)


@pytest.mark.slow
def test_a_leaky_readout_is_followed_too():
    model, params, batch = problem(rate(4, 0.3))
    model = localgrad.Network((*model.cells, localgrad.LeakyCell(OUT, 0.8, param_dtype=float)))
    params = {"cells_0": params["cells_0"], "cells_1": {"i": params["readout"]}}
    rule = adaptive(localgrad.deep_eprop, model, batch_size=B)
    gap = rule.init(params).feedback["cells_0"] - params["cells_1"]["i"]["kernel"]
    after, state = trained(rule, params, batch)
    left = state.feedback["cells_0"] - after["cells_1"]["i"]["kernel"]
    close(left, (1 - RATE * DECAY) ** CALLS * gap)


@pytest.mark.slow
def test_a_lower_cell_has_feedback_as_if_it_had_a_readout():
    model, params, batch = problem(rate(4, 0.3), rate(3, 0.2))
    rule = adaptive(localgrad.eprop, model, reduction="sum", window=5)
    before = rule.init(params)
    _, after = rule(params, before, batch)
    lower = localgrad.Network(model.cells[:1])
    own = {"cells_0": params["cells_0"]}
    _, ys, _ = localgrad.evaluate(lower, lambda y, t: y.sum(-1) * 0 + t.sum(-1) * 0, own, batch)
    _, outputs, _ = localgrad.evaluate(model, optax.l2_loss, params, batch)
    error = (outputs - batch.targets) / OUT * batch.mask[..., None]
    drift = jnp.einsum("btn,bto->no", ys, error)
    weights = before.feedback["cells_0"]
    close(after.feedback["cells_0"], weights - RATE * (drift + DECAY * weights))
    close(after.drift["cells_0"], jnp.zeros((4, OUT)))


@pytest.mark.slow
def test_on_one_layer_snap_is_deep_eprop_with_autapses_also_by_weights_that_learn():
    model, params, batch = problem(rate(4, 0.3))
    found = [
        rule(params, rule.init(params), batch)
        for rule in (
            adaptive(localgrad.snap, model),
            adaptive(localgrad.deep_eprop, model, autapses=True),
        )
    ]
    close(found[0][0], found[1][0])
    close(found[0][1].feedback, found[1][1].feedback)


class Heads(nn.Module):
    """Two output arrays, of one layer each."""

    @nn.compact
    def __call__(self, y):
        return {"a": nn.Dense(2, name="a")(y), "b": nn.Dense(3, name="b")(y)}


@pytest.mark.parametrize("factory", [localgrad.eprop, localgrad.deep_eprop])
def test_several_output_arrays_have_feedback_weights_each(factory):
    """As one array of them all, with the weights side by side."""
    one, params, batch = problem(rate(4, 0.3), rate(3, 0.2))
    heads = localgrad.Network(one.cells, readout=Heads())
    rng = np.random.default_rng(3)
    kernels = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=(3, 3))}
    joined = np.concatenate([kernels["a"], kernels["b"]], 1)
    cells = {name: params[name] for name in ("cells_0", "cells_1")}
    targets = rng.normal(size=(*batch.inputs.shape[:2], 5))
    split = {"a": targets[..., :2], "b": targets[..., 2:]}
    squared = lambda y, target: jnp.square(y - target).sum(-1)  # noqa: E731
    both = lambda y, target: sum(jax.tree.leaves(jax.tree.map(squared, y, target)))  # noqa: E731
    options = {"feedback": "adaptive", "feedback_rate": RATE, "key": jax.random.key(1)}
    rule = factory(heads, both, batch_size=B, window=5, **options)
    readout = {
        name: {"kernel": kernels[name], "bias": np.zeros(len(kernels[name][0]))} for name in "ab"
    }
    own = cells | {"readout": readout}
    state = rule.init(own)
    assert state.feedback["cells_1"]["b"].shape == (3, 3)
    updates, after = rule(own, state, batch._replace(targets=split))
    beside = lambda tree: {n: jnp.concatenate([w["a"], w["b"]], 1) for n, w in tree.items()}  # noqa: E731
    single = factory(
        localgrad.Network(one.cells, readout=nn.Dense(5)), squared, batch_size=B, **options
    )
    theirs = cells | {"readout": {"kernel": joined, "bias": np.zeros(5)}}
    start = single.init(theirs)
    start = start._replace(feedback=beside(state.feedback))
    expected, ended = single(theirs, start, batch._replace(targets=targets))
    close(updates["cells_0"], expected["cells_0"])
    close(updates["cells_1"], expected["cells_1"])
    close(beside(after.feedback), ended.feedback)


def test_given_feedback_has_the_structure_of_the_outputs():
    one, params, batch = problem(rate(4, 0.3))
    heads = localgrad.Network(one.cells, readout=Heads())
    own = {"cells_0": params["cells_0"]}
    own["readout"] = {
        n: {"kernel": np.ones((4, o)), "bias": np.ones(o)} for n, o in (("a", 2), ("b", 3))
    }
    make = functools.partial(localgrad.eprop, heads, optax.l2_loss)
    with pytest.raises(ValueError, match=r"must be \(N, O\) = {'a': \(4, 2\), 'b': \(4, 3\)}"):
        make(feedback=np.ones((4, 5))).init(own)
    given = {"cells_0": {"a": np.ones((4, 2)), "b": np.ones((4, 3))}}
    close(make(feedback=given).init(own).feedback, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "adaptive", "feedback_rate": 0.1}, "draws its weights: pass key"),
        ({"feedback": "adaptive"}, "pass feedback_rate, 0 or more.*got None, 0.0"),
        ({"feedback": "adaptive", "feedback_rate": -1.0}, "got -1.0, 0.0"),
        (
            {"feedback": "random", "feedback_rate": 0.1},
            'feedback_rate=0.1.*Use feedback="adaptive"',
        ),
        ({"feedback": "ramdom"}, "feedback must be .*got 'ramdom'"),
    ],
)
@pytest.mark.parametrize(
    "factory", [localgrad.eprop, localgrad.snap, localgrad.rflo, localgrad.deep_eprop]
)
def test_what_cannot_be_used_is_refused(factory, options, message):
    model, _, _ = problem(rate(4, 0.3))
    key = {} if "pass key" in message else {"key": jax.random.key(0)}
    with pytest.raises(ValueError, match=message):
        factory(model, optax.l2_loss, **options, **key)


def test_feedback_needs_something_to_stand_in_for():
    model, params, _ = problem(rate(4, 0.3))
    bare = localgrad.Network(model.cells)
    rule = localgrad.deep_eprop(bare, optax.l2_loss, feedback="random", key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"last map \(N, O\).*LeakyCell"):
        rule.init({"cells_0": params["cells_0"]})
    for factory in (localgrad.deep_eprop, localgrad.snap):
        wrong = factory(model, optax.l2_loss, feedback=np.ones((5, 2)))
        with pytest.raises(ValueError, match=r"feedback of cells_0 must be \(N, O\) = \(4, 2\)"):
            wrong.init(params)
