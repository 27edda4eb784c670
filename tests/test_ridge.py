"""`fit_ridge` beside NumPy's least squares, and where `force` arrives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from tests.rules.reservoirs import (
    OUT,
    B,
    T,
    features,
    matrix,
    problem,
    regression,
    reservoir,
    residual,
    series,
)

close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-9)


def washed(batch, washout):
    """Weights that are 0 for so many steps after the start and after each reset."""
    weight, reset = np.array(batch.mask), np.asarray(batch.reset)
    for b in range(B):
        since = 0
        for t in range(weight.shape[1]):
            since = 0 if reset[b, t] else since
            weight[b, t] *= since >= washout
            since += 1
    return weight


@pytest.mark.parametrize(("bias", "washout"), [(True, 0), (False, 0), (True, 2)])
@pytest.mark.few(1)
def test_it_is_least_squares_over_all_batches(bias, washout, x64):
    model, params, first = problem(bias)
    second = jax.tree.map(lambda a: a[:, :7], problem(bias, seed=3)[2])
    found = localgrad.fit_ridge(model, params, iter([first, second]), ridge=0.01, washout=washout)
    x = np.concatenate([features(params, b) for b in (first, second)], axis=1)
    y = np.concatenate([b.targets for b in (first, second)], axis=1)
    weight = np.concatenate([washed(b, washout) for b in (first, second)], axis=1)
    close(matrix(found), regression(x, y, weight, 1.0, 0.01, np.zeros((x.shape[-1], OUT))))
    chex.assert_trees_all_equal(found["cells_0"], params["cells_0"])


def test_windows_and_plain_batches(x64):
    """Longer than a window, without weights and resets; windows are an affair of memory."""
    model, params, _ = problem()
    rng = np.random.default_rng(5)
    long = localgrad.Batch(*(jnp.asarray(rng.normal(size=(B, 300, k))) for k in (3, OUT)))
    full = long._replace(mask=jnp.ones((B, 300)), reset=jnp.zeros((B, 300), bool))
    found = localgrad.fit_ridge(model, params, long, ridge=0.1)
    x = features(params, full)
    close(
        matrix(found),
        regression(x, np.asarray(long.targets), np.ones((B, 300)), 1.0, 0.1, np.zeros((6, OUT))),
    )


def test_force_without_forgetting_arrives_there(x64):
    model, params, batch = problem()
    found = localgrad.fit_ridge(model, params, batch, ridge=0.2)
    blank = params | {"readout": jax.tree.map(jnp.zeros_like, params["readout"])}
    rule = localgrad.force(model, optax.l2_loss, ridge=0.2)
    updates, _ = rule(blank, rule.init(blank), batch)
    close(optax.apply_updates(blank, jax.tree.map(jnp.negative, updates)), found)


@pytest.mark.slow
def test_float32_keeps_what_correlations_would_lose(x64):
    wide, _ = reservoir(float)
    model, params = reservoir(jnp.float32)
    double = jax.tree.map(lambda a: a.astype(float), params)
    exact = localgrad.fit_ridge(wide, double, series(400), ridge=1e-6)
    batch = jax.tree.map(lambda a: a.astype(jnp.float32), series(400))
    found = localgrad.fit_ridge(model, params, batch, ridge=1e-6)
    assert found["readout"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(residual(found), residual(exact), rtol=0.03)


def test_seeds_under_jit_and_vmap(x64):
    model, params, batch = problem()
    fit = lambda p: localgrad.fit_ridge(model, p, [batch, batch], washout=1)  # noqa: E731
    many = jax.tree.map(lambda a: jnp.stack([a, -a]), params)
    found = jax.jit(jax.vmap(fit))(many)
    close(jax.tree.map(lambda a: a[1], found), fit(jax.tree.map(jnp.negative, params)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ridge must be .*positive and finite; got 0.0"),
        ({"washout": -1}, "washout must be an integer >= 0.*got -1"),
        ({"washout": 0.5}, "washout must be an integer >= 0.*got 0.5"),
        ({"batches": []}, "batches holds no batch"),
        ({"batches": None}, "batches must be a localgrad.Batch or an iterable.*got None"),
        ({"batches": [3]}, r"batches must hold localgrad.Batch\(inputs, targets\); got int"),
        ({"washout": T}, f"no step to learn from: with washout={T}"),
        ({"mask": jnp.zeros((B, T))}, "no step to learn from"),
        ({"mask": -jnp.ones((B, T))}, "batch.mask must be 0 or more.*got -1"),
        ({"targets": jnp.zeros((B, T), jnp.int32)}, "got int32.*jax.nn.one_hot"),
        ({"targets": jnp.zeros((B, T, OUT), jnp.int32)}, "got int32.*jax.nn.one_hot"),
        ({"targets": jnp.zeros((B, T))}, r"\(2, 11, 2\).*got shape \(2, 11\)"),
        ({"model": localgrad.RateCell(5)}, "fit_ridge .*this model has no readout"),
        ({"params": "cells"}, "fit_ridge got params without readout/kernel"),
    ],
)
@pytest.mark.few(4)
def test_refusals(options, message):
    model, params, batch = problem()
    told = {"model": model, "params": params, "batches": batch} | options
    changed = {name: told.pop(name) for name in ("targets", "mask") if name in told}
    if changed:
        told["batches"] = batch._replace(**changed)
    if told["params"] == "cells":
        told["params"] = {"cells_0": params["cells_0"]}
    with pytest.raises(ValueError, match=message):
        localgrad.fit_ridge(**told)
