"""SnAp-n on sparse recurrent weights, against the library braintrace: see README.md.

The problem is `c0` with the recurrent weights of a ring in which each unit feeds itself and the
next; gradients are summed over the sequence, (post, pre), and 0 where there is no weight. With 5
units, order 5 keeps all of RTRL's influence.
"""

import jax
import numpy as np
import optax
import pytest

import localgrad
from tests.golden.common import assert_close, learned, load, stream, summed
from tests.golden.problems import batch_of, network_of, params_of

pytestmark = pytest.mark.usefixtures("x64")

BATCH = batch_of("c0")


def ring() -> tuple[dict, dict]:
    """The parameters, and their arrays."""
    theirs, params = load("sparse_ring"), params_of("c0")
    cell = params["cells_0"] | {"h": {"kernel": theirs["W_rec"].T}}
    return params | {"cells_0": cell}, theirs


def snap(order: int, **options) -> localgrad.LearningRule:
    options = {"batch_size": 1, "reduction": "sum"} | options
    return localgrad.snap(network_of("c0"), optax.softmax_cross_entropy, order=order, **options)


@pytest.mark.parametrize("order", [1, 2, 4, 5])
def test_braintrace(order):
    params, theirs = ring()
    # A mask stands for what is read off the weights, which order 1 does not read.
    rule = snap(order, mask=theirs["mask"].T if order < 4 else None)
    updates = learned(rule, params, BATCH)["cells_0"]
    assert_close(updates["h"]["kernel"], theirs[f"SnAp{order}/sum_grad_W_rec"].T)
    assert_close(updates["i"]["kernel"], theirs[f"SnAp{order}/sum_grad_W_in"].T)


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("chunk", [6, None])
@pytest.mark.few(1)
def test_windows_and_calls_change_nothing(window, chunk):
    params, theirs = ring()
    rule = snap(2, window=window, batch_size=1 if chunk else None)
    updates = (
        summed(stream(rule, params, BATCH, chunk)[0]) if chunk else learned(rule, params, BATCH)
    )
    assert_close(updates["cells_0"]["h"]["kernel"], theirs["SnAp2/sum_grad_W_rec"].T)


def test_all_that_is_reached_is_rtrl():
    params, theirs = ring()
    dense = localgrad.rtrl(network_of("c0"), optax.softmax_cross_entropy, reduction="sum")
    expected = learned(dense, params, BATCH)
    expected["cells_0"]["h"]["kernel"] *= theirs["mask"].T
    for order in (5, 9):
        assert_close(learned(snap(order, batch_size=None), params, BATCH), expected)


def test_what_is_kept():
    params, theirs = ring()
    state = snap(3).init(params)
    reach = np.asarray(state.sparsity.reach["cells_0"])
    np.testing.assert_array_equal(reach[:, 0], range(5))
    assert [set(line) for line in reach.tolist()] == [
        {i, (i + 1) % 5, (i + 2) % 5} for i in range(5)
    ]
    kept = state.sparsity.kept["cells_0", "h", "kernel"]
    np.testing.assert_array_equal(kept, theirs["mask"].T)
    assert jax.tree.map(np.shape, state.eligibility)["cells_0", "h", "kernel"] == (1, 3, 5, 5)
