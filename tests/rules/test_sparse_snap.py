"""`snap` on sparse recurrent weights: its recursion written out, what it reads, what it refuses."""

import functools

import chex
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad
from tests.conformance import table, zoo
from tests.golden.common import assert_close

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)

pytestmark = pytest.mark.usefixtures("x64")

B, T, INPUTS, OUTPUTS, N = 2, 9, 3, 2, 5
MASK = np.eye(N, dtype=bool) | (np.random.default_rng(3).random((N, N)) < 0.2)


def _first(carry):
    return jax.tree.leaves(carry)[0]


CELLS = {
    "lstm": (lambda: nn.LSTMCell(N, param_dtype=float), lambda carry: carry[1]),
    "adaptive": (lambda: zoo.Adaptive(N), lambda carry: carry[0] * jnp.cos(carry[1])),
    "concat": (lambda: zoo.Concat(N), _first),
    "alpha": (lambda: localgrad.RateCell(N, alpha=0.4, learn_alpha=True), _first),
}
"""Cells, and their output as a function of their new carry."""


def problem(cell: nn.RNNCellBase) -> tuple:
    """A network of one cell, random parameters with the weights of `MASK`, and a batch."""
    rng = np.random.default_rng(0)
    model = localgrad.Network((cell,), readout=nn.Dense(OUTPUTS))
    inputs, targets = (jnp.asarray(rng.normal(size=(B, T, n))) for n in (INPUTS, OUTPUTS))
    mask, reset = jnp.asarray(rng.uniform(size=(B, T))), jnp.asarray(rng.uniform(size=(B, T)) < 0.1)
    carry = model.initialize_carry(jax.random.key(0), (B, INPUTS))
    params = jax.jit(model.init)(jax.random.key(1), carry, inputs[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.2 * rng.normal(size=a.shape)), params)
    return model, sparse(params), localgrad.Batch(inputs, targets, mask, reset)


def sparse(params: dict) -> dict:
    """Zeros in the recurrent kernels, and so in their gradients, where there are no weights."""

    def cut(path, leaf):
        recurrent = path[1].key[0] in "hw" and path[-1].key == "kernel"
        return leaf.at[-N:].multiply(MASK) if recurrent and path[0].key == "cells_0" else leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def recursion(model, seen, params, batch, order) -> dict:
    """m <- mask (J m + I), column by column of the cell's flat parameters."""
    cell, own = model.cells[0], params["cells_0"]
    flat, unflatten = jax.flatten_util.ravel_pytree(own)
    start = cell.initialize_carry(jax.random.key(0), (INPUTS,))
    s0, carry_of = jax.flatten_util.ravel_pytree(start)
    of_param = jax.tree.map(lambda a: jnp.broadcast_to(jnp.arange(a.shape[-1]), a.shape), own)
    column = np.asarray(jax.flatten_util.ravel_pytree(of_param)[0]) % N
    reach = np.linalg.matrix_power(MASK.astype(int), order - 1) > 0  # the diagonal is in MASK
    keep = jnp.asarray(reach[column].T[np.arange(len(s0)) % N])

    @jax.jit
    def step(s, m, x, target, weight, reset):
        s, m = jnp.where(reset, s0, s), jnp.where(reset, 0, m)

        def go(p, s):
            carry = jax.tree.map(lambda a: a[None], carry_of(s))
            new, _ = cell.apply({"params": unflatten(p)}, carry, x[None])
            return jax.flatten_util.ravel_pytree(new)[0]

        def loss(s):
            y = seen(carry_of(s)) @ params["readout"]["kernel"] + params["readout"]["bias"]
            return weight * optax.l2_loss(y, target).mean()

        immediate, jacobian = jax.jacfwd(go, (0, 1))(flat, s)
        m, s = keep * (jacobian @ m + immediate), go(flat, s)
        return s, m, jax.grad(loss)(s) @ m

    total = jnp.zeros_like(flat)
    for b in range(B):
        s, m = s0, jnp.zeros((len(s0), len(flat)))
        for t in range(T):
            x, target = batch.inputs[b, t], batch.targets[b, t]
            s, m, found = step(s, m, x, target, batch.mask[b, t], batch.reset[b, t])
            total += found
    return sparse({"cells_0": unflatten(total)})["cells_0"]


@pytest.mark.parametrize(
    "name",
    ["lstm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adaptive", "concat", "alpha"))],
)
@pytest.mark.slow
def test_it_is_the_masked_recursion(name):
    make, seen = CELLS[name]
    model, params, batch = problem(make())
    expected = recursion(model, seen, params, batch, 2)
    unlike = recursion(model, seen, params, batch, 1)
    options = {"batch_size": B, "reduction": "sum", "window": 4, "example": batch.inputs[0, 0]}
    rule = localgrad.snap(model, optax.l2_loss, order=2, **options)
    state, total = rule.init(params), jax.tree.map(jnp.zeros_like, params)
    for steps in (slice(0, 1), slice(1, T)):
        piece = jax.tree.map(lambda a, steps=steps: a[:, steps], batch)
        updates, state = rule(params, state, piece)
        total = jax.tree.map(jnp.add, total, updates)
    close(total["cells_0"], expected)
    gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected, unlike)
    assert max(jax.tree.leaves(gap)) > 1e-3


@pytest.mark.slow
def test_units_that_reach_nobody_are_as_at_order_1():
    model, params, batch = problem(localgrad.LRUCell(N, param_dtype=float))
    updates = {}
    for order in (1, 3):
        rule = localgrad.snap(model, optax.l2_loss, order=order)
        updates[order] = rule(params, rule.init(params), batch)[0]
    assert_close(updates[3], updates[1])


@pytest.mark.slow
def test_all_weights_at_order_1_is_snap_1():
    """In a stack with an encoder and unit parameters, with feedback and rates of its own."""
    built = table.build("embed")
    options = {
        "feedback": "random",
        "key": jax.random.key(0),
        "firing_rate": localgrad.FiringRate(0.3, decay=0.8),
        "batch_size": table.B,
        "window": 8,
    }
    masks = {"cells_0/h": np.ones((table.N,) * 2), "cells_1/h": np.ones((table.N - 1,) * 2)}
    found = []
    for mask in (None, masks):
        rule = localgrad.snap(built.model, optax.l2_loss, mask=mask, **options)
        _, state = rule(built.params, rule.init(built.params), built.batch)
        updates, state = rule(built.params, state, built.batch)
        found.append((updates, state._replace(sparsity=None)))
    close(*found)


def test_it_keeps_the_contract():
    model, params, batch = problem(localgrad.RateCell(N, alpha=0.4))
    rule = snap(model)
    start = rule.init(params)
    expected, state = rule(params, start, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, state)
    fresh = localgrad.reset_state(state)
    close(fresh._replace(loss=0.0), start._replace(loss=0.0))
    again, _ = jax.jit(lambda state: rule(params, state, batch), donate_argnums=0)(fresh)
    close(again, expected)

    two = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    states = jax.vmap(snap(model, mask=MASK).init)(two)
    found, _ = jax.vmap(rule, (0, 0, None))(two, states, batch)
    close(jax.tree.map(lambda a: a[0], found), expected)


def snap(model, **options):
    return localgrad.snap(model, optax.l2_loss, **{"order": 2, "batch_size": B} | options)


def test_masks_by_layer_in_any_spelling():
    model, params, _ = problem(nn.GRUCell(N, param_dtype=float))
    found = []
    for spell in (
        lambda gate: {f"cells_0/{gate}": MASK},
        lambda gate: {"cells_0": {gate: {"kernel": MASK.astype(float)}}},
    ):
        masks: dict = {}
        for gate in ("hr", "hz", "hn"):
            for key, value in spell(gate).items():
                masks[key] = masks.get(key, {}) | value if isinstance(value, dict) else value
        found.append(snap(model, mask=masks).init(params).sparsity)
    assert_close(found[0], found[1])
    assert_close(found[0], snap(model).init(params).sparsity)


def test_a_fused_kernel_has_a_mask_of_its_own_width():
    model, params = localgrad.from_nnx(nnx.GRUCell(INPUTS, N, rngs=nnx.Rngs(0)))
    wide = np.concatenate([MASK, MASK, np.eye(N, dtype=bool)], 1)
    narrow, whole = (snap(model, mask=m).init(params).sparsity for m in (MASK, wide))
    assert_close(narrow.reach, whole.reach)
    assert narrow.kept["dense_h", "kernel"].sum() > whole.kept["dense_h", "kernel"].sum()


def test_a_mask_needs_no_numbers_and_weights_do():
    model, params, batch = problem(localgrad.RateCell(N, alpha=0.4))
    shapes = jax.eval_shape(snap(model, mask=MASK).init, params)
    assert shapes.eligibility["cells_0", "h", "kernel"].shape[1] > 1
    for traced in (jax.eval_shape, lambda f, p: jax.jit(f)(p)):
        with pytest.raises(ValueError, match=r"weights of cells_0/h are zero at init.*mask=\.\.\."):
            traced(snap(model).init, params)
    rule = snap(model)
    assert "units within 1 synapses" in localgrad.summary(rule, params)
    updates, _ = jax.jit(rule)(params, rule.init(params), batch)
    assert not np.any(np.asarray(updates["cells_0"]["h"]["kernel"])[~MASK])


def test_what_it_refuses():
    model, params, _ = problem(localgrad.RateCell(N, alpha=0.4))
    refused = functools.partial(pytest.raises, ValueError)
    with refused(match=r"order=2 on cells_0 \(RateCell\).* dense.*reaches all 5.*localgrad\.rtrl"):
        snap(model, mask=np.ones((N, N))).init(params)
    with refused(match=r"mask of cells_0/h must be of shape \(5, 5\).*got \(4, 4\)"):
        snap(model, mask=np.eye(4)).init(params)
    with refused(match=r"must name .*\['cells_0/h'\]; got \['cells_0/i'\]"):
        snap(model, mask={"cells_0": {"i": MASK}}).init(params)
    for order in (0, 1.5, True):
        with refused(match=f"order must be a positive integer; got {order}"):
            snap(model, order=order)
