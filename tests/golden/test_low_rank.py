"""UORO and KF-RTRL against the numbers of vanilla-rtrl, with the draws and the first factors fed.

At `window=1`, where the rules are the published ones step by step. See README.md.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from localgrad.rules import kronecker, uoro
from tests.golden.common import assert_close, load
from tests.golden.problems import (
    INPUTS,
    LOSSES,
    STEPS,
    batch_of,
    network_of,
    network_tree,
    params_of,
)

CASES = ["c0", "c1"]
RUNS = [("c0", "frozen"), ("c1", "frozen"), ("c0", "online")]
LR = 0.05  # of their `online` runs

pytestmark = pytest.mark.usefixtures("x64")


def as_matrix(right):
    """B of each parameter as theirs, (post, [W_rec, W_in, b])."""
    cell = {path[1:]: np.asarray(leaf)[0] for path, leaf in right.items()}
    parts = [cell["h", "kernel"], cell["i", "kernel"], cell["i", "bias"][None]]
    return np.concatenate(parts).T


def as_leaves(matrix):
    """The way back."""
    rec, inputs, bias = np.split(np.asarray(matrix), [5, 5 + INPUTS], axis=1)
    leaves = {("h", "kernel"): rec.T, ("i", "kernel"): inputs.T, ("i", "bias"): bias[:, 0]}
    return {("cells_0", *path): jnp.asarray(leaf)[None] for path, leaf in leaves.items()}


def fed(target, name, draws):
    """A rule's drawing function, replaced by one that hands out what was drawn, step by step."""
    return mock.patch.object(target, name, lambda stack, key, *_: draws(key))


def follow(rule, state, case, theirs, check, lr=0.0):
    """One step a call, gradients and states compared; returns the last parameters."""
    params, batch, per_step = params_of(case), batch_of(case), network_tree(theirs, "grad_")
    for now in range(STEPS):
        piece = localgrad.Batch(batch.inputs[:, [now]], batch.targets[:, [now]])
        updates, state = rule(params, state, piece)
        assert_close(updates, jax.tree.map(lambda g, now=now: g[now], per_step))
        assert_close(np.asarray(state.carry[0][0]), theirs["a"][now])
        check(state, now)
        params = jax.tree.map(lambda p, g: p - lr * g, params, updates)
    return params


@pytest.mark.parametrize("noise", ["discrete", "gaussian"])
@pytest.mark.parametrize(("case", "run"), RUNS)
def test_uoro(case, run, noise):
    theirs = load("low_rank", f"{case}/{run}/UORO_{noise}/")
    first = load("low_rank", f"{case}/problem/uoro_")
    nu = jnp.asarray(theirs["state_nu"])
    rule = localgrad.uoro(
        network_of(case),
        LOSSES[case],
        key=jax.random.key(0),
        batch_size=1,
        window=1,
        reduction="sum",
    )

    def check(state, now):
        assert_close(np.asarray(state.left["cells_0"])[0], theirs["state_A"][now])
        assert_close(as_matrix(state.right), theirs["state_B"][now])

    # The key of a step is the number of the step.
    keys = mock.patch.object(uoro, "step_keys", lambda key, clock, steps: clock[None])
    with keys, fed(uoro, "noise_for", lambda now: [nu[now][None]]):
        state = rule.init(params_of(case))._replace(
            left={"cells_0": jnp.asarray(first["A0"])[None]}, right=as_leaves(first["B0"])
        )
        last = follow(rule, state, case, theirs, check, LR if run == "online" else 0.0)
    if run == "online":
        assert_close(last, network_tree(theirs, "final_"))


@pytest.mark.parametrize("case", CASES)
def test_kf_rtrl(case):
    theirs = load("low_rank", f"{case}/frozen/KF_RTRL/")
    first = load("low_rank", f"{case}/problem/kf_")
    signs = jnp.asarray(theirs["state_nu"])
    rule = localgrad.kf_rtrl(
        network_of(case),
        LOSSES[case],
        key=jax.random.key(0),
        batch_size=1,
        window=1,
        reduction="sum",
    )
    ours = np.r_[5 : 5 + INPUTS, :5, 5 + INPUTS]  # [x, h, 1] out of [h, x, 1]

    def check(state, now):
        assert_close(np.asarray(state.right["cells_0"])[0, 0], theirs["state_A"][now][ours])
        assert_close(np.asarray(state.left["cells_0"])[0, 0], theirs["state_B"][now])

    keys = mock.patch.object(kronecker, "step_keys", lambda key, clock, steps: clock[None])
    feed = mock.patch.object(
        kronecker, "draws_for", lambda rule, stack, now, *_: {"cells_0": signs[now][None]}
    )
    with keys, feed:
        state = rule.init(params_of(case))._replace(
            left={"cells_0": jnp.asarray(first["B0"])[None, None]},
            right={"cells_0": jnp.asarray(first["A0"][ours])[None, None]},
        )
        follow(rule, state, case, theirs, check)
