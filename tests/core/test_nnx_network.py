"""`NNXNetwork`: the numbers of a `Network` of the same weights, and the way in for NNX modules."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad

B, T, IN, OUT, KEY = 2, 6, 3, 5, jax.random.key(7)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)


def networks():
    """A Linen network of two layers between two, and the same of NNX modules."""
    wide = {"param_dtype": float, "dtype": float}
    linen = localgrad.Network(
        (nn.SimpleCell(4, **wide), nn.SimpleCell(3, **wide)),
        readout=nn.Dense(OUT, **wide),
        encoder=nn.Dense(2, **wide),
    )
    options = wide | {"rngs": nnx.Rngs(0)}
    stack = localgrad.NNXNetwork(
        [nnx.SimpleCell(2, 4, **options), nnx.SimpleCell(4, 3, **options)],
        readout=nnx.Linear(3, OUT, **options),
        encoder=nnx.Linear(IN, 2, **options),
    )
    return linen, stack


def renamed(params):
    """Linen's parameters under NNX's names."""
    cells = {
        name: {f"dense_{layer}": leaf for layer, leaf in params[name].items()}
        for name in ("cells_0", "cells_1")
    }
    return {**params, **cells}


def problem():
    linen, stack = networks()
    rng = np.random.default_rng(0)
    batch = localgrad.Batch(*(jnp.asarray(rng.normal(size=(B, T, n))) for n in (IN, OUT)))
    carry = linen.initialize_carry(jax.random.key(0), (B, IN))
    params = linen.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
    model, own = localgrad.from_nnx(stack)
    nnx.replace_by_pure_dict(own, renamed(params))
    return linen, params, model, own, batch


RULES = {
    "bptt": localgrad.bptt,
    "eprop": localgrad.eprop,
    "snap": localgrad.snap,
    "rflo": functools.partial(localgrad.rflo, key=KEY),
    "eprop_random": functools.partial(localgrad.eprop, feedback="random", key=KEY),
    "deep_eprop": localgrad.deep_eprop,
    "readout_only": localgrad.readout_only,
    "rtrl": localgrad.rtrl,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.few(1)
def test_every_rule_gives_the_numbers_of_a_linen_network(name, x64):
    linen, params, model, own, batch = problem()
    found, expected = [], []
    for a_model, p, results in ((linen, params, expected), (model, own, found)):
        rule = RULES[name](a_model, optax.l2_loss, batch_size=B)
        state = rule.init(p)
        for piece in (slice(0, T // 2), slice(T // 2, T)):
            updates, state = rule(p, state, jax.tree.map(lambda a, s=piece: a[:, s], batch))
            results += [updates, state.loss]
    for mine, theirs in zip(found, expected, strict=True):
        if isinstance(mine, nnx.State):
            mine, theirs = nnx.to_pure_dict(mine), renamed(theirs)
        close(mine, theirs)


@pytest.mark.slow
def test_it_is_a_cell_of_flax(x64):
    """`nnx.RNN` runs it, and `nnx.Optimizer` updates it."""
    _, stack = networks()
    batch = problem()[-1]
    model, params = localgrad.from_nnx(stack)
    _, outputs, _ = localgrad.evaluate(model, optax.l2_loss, params, batch)
    close(nnx.RNN(stack)(batch.inputs, rngs=nnx.Rngs(0)), outputs)
    rule = localgrad.eprop(model, optax.l2_loss, feedback="random", key=KEY)
    optimizer = nnx.Optimizer(stack, optax.chain(rule, optax.sgd(0.1)), wrt=nnx.Param)
    updates, _ = rule(params, rule.init(params), batch)
    optimizer.update(stack, nnx.State({}), batch=batch)
    expected = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)  # params are their own
    close(nnx.to_pure_dict(nnx.state(stack, nnx.Param)), nnx.to_pure_dict(expected))


@pytest.mark.slow
def test_symbols_and_the_best_readout():
    rngs = nnx.Rngs(0)
    stack = localgrad.NNXNetwork(
        [nnx.GRUCell(3, 8, rngs=rngs)],
        readout=nnx.Linear(8, 1, rngs=rngs),
        encoder=nnx.Embed(6, 3, rngs=rngs),
    )
    model, params = localgrad.from_nnx(stack)
    symbols = jax.random.randint(KEY, (B, 40), 0, 6)
    batch = localgrad.Batch(symbols, (symbols == 2)[..., None].astype(float))
    rule = localgrad.eprop(model, optax.l2_loss, batch_size=B)
    updates, _ = rule(params, rule.init(params), batch)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(updates))
    fitted = localgrad.fit_ridge(model, params, batch)
    readout = localgrad.readout_only(model, optax.l2_loss)
    slope, _ = readout(fitted, readout.init(fitted), batch)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope)) < 1e-5


def cell():
    return nnx.GRUCell(4, 4, rngs=nnx.Rngs(0))


def test_both_ways_of_stacking_name_the_other():
    def refused(pattern, *args, make=localgrad.NNXNetwork, **kwargs):
        with pytest.raises(ValueError, match=pattern):
            make(*args, **kwargs)

    way = r"from_nnx\(localgrad\.NNXNetwork\(\[cell\], readout=\.\.\."
    refused(f"made of Linen modules; got GRUCell.*{way}", (cell(),), make=localgrad.Network)
    refused(r"made of NNX modules; got GRUCell.*localgrad\.Network", [nn.GRUCell(4)])
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    refused("no recurrent cell.*NNXNetwork.*as encoder or readout", layer, make=localgrad.from_nnx)
    refused("Linear is no recurrent cell", [layer])
    refused(r"got one GRUCell.*NNXNetwork\(cells=\[cell\]", cell())
    refused("cells is empty", [])
    one = cell()
    refused("same cell object twice", [one, one])
    shared = localgrad.NNXNetwork([cell()], readout=layer, encoder=layer)
    refused("readout/(bias|kernel) is a parameter of another", shared, make=localgrad.from_nnx)
