"""The passes of a window: forward with its two hooks, and tangents as the transpose of credit."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from localgrad.core.model.stack import assemble
from localgrad.core.params import leaves_of
from localgrad.core.passes.backward import assign, input_credit, sweep
from localgrad.core.passes.forward import CUT, DIAGONAL, WHOLE, Method, Settle
from localgrad.core.passes.heard import hear
from localgrad.core.passes.run import run
from localgrad.core.passes.tangents import push

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
B, W, N, IN, K = 2, 6, 4, 3, 3

pytestmark = pytest.mark.usefixtures("x64")


def problem(cell):
    """A cell, taken apart, with parameters, a carry, inputs and resets."""
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(size=(W, B, IN)))
    carry = cell.initialize_carry(jax.random.key(0), xs[0].shape)
    params = cell.init(jax.random.key(0), carry, xs[0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    carry = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), carry)
    stack = assemble(cell, leaves_of(params), xs[0])
    return stack, params, carry, xs, jnp.asarray(rng.random((W, B)) < 0.2)


def drawn(tree, *lead):
    """Random numbers of these shapes, with leading axes put before the batch axis."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=(*lead, *a.shape))), tree)


def inner(a, b):
    """For each row, the inner product of credit and tangents, leaves [W, K, B, ...]."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(jnp.einsum("wkx,wkx->k", *(v.reshape(*v.shape[:2], -1) for v in p)) for p in pairs)


@pytest.mark.parametrize("cut", ["exact", CUT, DIAGONAL])
@pytest.mark.parametrize(
    "cell",
    [nn.GRUCell(N, param_dtype=float), nn.LSTMCell(N, param_dtype=float)],
    ids=["gru", "lstm"],
)
@pytest.mark.few(1)
def test_tangents_are_the_transpose_of_credit(cell, cut):
    stack, params, carry, xs, reset = problem(cell)
    (anatomy,), own = stack.cells, leaves_of(params)
    (tape,) = run(stack, own, (carry,), xs, reset).tapes
    entries = {i: (0, N) for i, site in enumerate(anatomy.sites) if site.role == "recurrent"}
    method = WHOLE if cut == "exact" else Method(cut, entries)

    q_ys, q_end = drawn(tape.ys[:, None].repeat(K, 1)), drawn(carry, K)
    left, q_start = sweep(anatomy, own, tape, q_ys, q_end, method=method)
    credit = assign(anatomy, own, tape, q_ys, left)
    q_xs = input_credit(anatomy, own, tape, credit)

    d_start = drawn(jax.tree.map(lambda a: a + 1, carry), K)
    d_xs = drawn(xs[:, None].repeat(K, 1))
    d_drives = [drawn(d[:, None].repeat(K, 1)) for d in tape.drives]
    d_ys, d_end = push(anatomy, own, tape, d_start, d_drives, d_xs, method=method)
    first = functools.partial(jax.tree.map, lambda a: a[None])
    into = inner(first(q_start), first(d_start)) + inner(credit.posts, d_drives) + inner(q_xs, d_xs)
    close(inner(q_ys, d_ys) + inner(first(q_end), first(d_end)), into)


def drive_of(params, x, h):
    """What both layers of a `RateCell` give together."""
    return x @ params["i"]["kernel"] + params["i"]["bias"][None] + h @ params["h"]["kernel"]


def test_a_nudge_is_a_change_of_its_drive():
    """Adding to a drive is adding a bias of that step and example."""
    stack, params, carry, xs, reset = problem(localgrad.RateCell(N, alpha=0.3))
    own, (anatomy,) = leaves_of(params), stack.cells
    rng = np.random.default_rng(2)
    nudges = {i: jnp.asarray(rng.normal(size=(W, B, N))) for i in range(len(anatomy.sites))}
    ran = hear(stack, own, (carry,), xs, reset, [nudges])
    h, found = carry, []
    for t in range(W):
        h = jnp.where(reset[t][:, None], 0, h)
        drive = (
            xs[t] @ params["i"]["kernel"] + params["i"]["bias"][None] + h @ params["h"]["kernel"]
        )
        h = 0.7 * h + 0.3 * jnp.tanh(drive + nudges[0][t] + nudges[1][t])
        found.append(h)
    close(ran.outputs, jnp.stack(found))
    close(ran.carries[0], h)
    plain = run(stack, own, (carry,), xs, reset).tapes[0].drives
    first = jax.tree.map(lambda d: d[0], ran.parts[0].drives)
    close(first, [d[0] + nudges[i][0] for i, d in enumerate(plain)])


def test_a_carry_is_settled_once_the_target_is_seen():
    """Each step begins with a carry that its predecessor's target has moved."""
    stack, params, carry, xs, reset = problem(localgrad.RateCell(N, alpha=0.3))
    targets = jnp.asarray(np.random.default_rng(3).normal(size=(W, B, N)))
    settle = Settle(lambda h, seen: h + 0.5 * (seen - h), targets)
    ran = run(stack, leaves_of(params), (carry,), xs, reset, settle=settle)
    h, found = carry, []
    for t in range(W):
        h = jnp.where(reset[t][:, None], 0, h)
        drive = (
            xs[t] @ params["i"]["kernel"] + params["i"]["bias"][None] + h @ params["h"]["kernel"]
        )
        h = 0.7 * h + 0.3 * jnp.tanh(drive)
        found.append(h)
        h = h + 0.5 * (targets[t] - h)
    close(ran.outputs, jnp.stack(found))
    close(ran.carries[0], h)


def test_only_a_single_cell_can_be_settled():
    model = localgrad.Network((nn.SimpleCell(N), nn.SimpleCell(N)))
    xs = jnp.ones((W, B, IN))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    own = leaves_of(model.init(jax.random.key(0), carry, xs[0])["params"])
    stack = assemble(model, own, xs[0])
    with pytest.raises(ValueError, match="one cell only; this one has 2"):
        run(stack, own, carry, xs, None, settle=Settle(lambda h, seen: h, xs))
