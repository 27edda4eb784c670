"""The passes over a window of one cell: forward, backward with any number of credit rows, contraction.

Every rule is written with these. The forward pass computes what x alone feeds for the whole window
in one matmul and scans the rest, saving the carry and the drives. The backward pass replays each
step from its saved drives, so it holds no forward matmul, and none at all where synapses are cut.
What a synapse learns is the layer's own VJP on the stacked (pre, post), once a window.

Letters: B batch, W steps of the window, K credit rows, N units, D width of a drive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.params import Leaves, accumulator, placed, under
from localgrad.core.synapses import (
    INPUT,
    OUTPUT,
    RECURRENT,
    Anatomy,
    Layer,
    Site,
    record,
    respond_to,
)

EXACT, CUT, DIAGONAL = "exact", "cut", "diagonal"

Entries = dict[int, tuple[int, int]]
"""By call number of a recurrent synapse: the entry of pre that is unit 0, and N."""


class Tape(NamedTuple):
    """What the forward pass of one cell leaves for the backward pass.

    Attributes:
        carries: the carry that entered each step, after any reset: leaves [W, B, N].
        xs: the inputs, leaves [W, B, ...].
        drives: the drive of each synapse call, [W, B, D].
        ys: the outputs, leaves [W, B, ...].
        reset: [W, B] bool, or None.
    """

    carries: Any
    xs: Any
    drives: list[jax.Array]
    ys: Any
    reset: jax.Array | None


class Credit(NamedTuple):
    """What the credit of a cell's states and outputs means for what feeds them.

    Attributes:
        posts: credit of each drive, [W, K, B, D].
        others: credit of the parameters that no synapse owns, summed over steps: [...] (summed over
            rows and examples), [K, B, ...] (`per_example`) or [K, B, N] (`per_unit`).
        direct: credit of x by ways that pass no input synapse, leaves [W, K, B, ...], or None.
    """

    posts: list[jax.Array]
    others: Leaves
    direct: Any


def select(reset: jax.Array, fresh: Any, old: Any) -> Any:
    """`fresh` where `reset` [..., B] says so, else `old`, leaf by leaf ([..., B, ...])."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        flags = reset.reshape(reset.shape + (1,) * (b.ndim - reset.ndim))
        return jnp.where(flags, a, b)

    return jax.tree.map(pick, fresh, old)


def merge_steps(tree: Any) -> Any:
    """[W, B, ...] -> [W * B, ...], leaf by leaf."""
    return jax.tree.map(lambda a: a.reshape((-1, *a.shape[2:])), tree)


def split_steps(tree: Any, steps: int) -> Any:
    """[W * B, ...] -> [W, B, ...], leaf by leaf."""
    return jax.tree.map(lambda a: a.reshape((steps, -1, *a.shape[1:])), tree)


def length(tree: Any) -> int:
    """The size of the leading axis."""
    return jax.tree.leaves(tree)[0].shape[0]


def one_row(tree: Any) -> Any:
    """[W, B, ...] -> [W, 1, B, ...], leaf by leaf: credit as a single row."""
    return jax.tree.map(lambda a: a[:, None], tree)


def row(tree: Any, k: int) -> Any:
    """[W, K, B, ...] -> [W, B, ...], leaf by leaf: the k-th row."""
    return jax.tree.map(lambda a: a[:, k], tree)


@jax.custom_vjp
def graft(value: jax.Array, path: jax.Array) -> jax.Array:
    """`value`, with its credit also going to `path`, which computes the same number."""
    del path
    return value


graft.defvjp(lambda value, path: (value, None), lambda _, credit: (credit, credit))


def forward(
    cell: Anatomy, params: Leaves, carry: Any, xs: Any, reset: jax.Array | None, initial: Any
) -> tuple[Any, Tape]:
    """Runs a cell over a window.

    Args:
        cell: its anatomy.
        params: its parameters.
        carry: the carry that enters the window, leaves [B, N].
        xs: inputs, leaves [W, B, ...].
        reset: [W, B] bool, forget the carry before this step; or None.
        initial: the carry to start from after a reset, leaves [B, N].

    Returns:
        The carry that leaves the window, and the tape.
    """
    steps = length(xs)
    given = split_steps(drive_inputs(cell, params, merge_steps(xs)), steps)
    initial = jax.tree.map(lambda a, b: a.astype(b.dtype), initial, carry)

    def step(carry: Any, now: tuple) -> tuple[Any, tuple]:
        x, reset_t, given_t = now
        if reset is not None:
            carry = select(reset_t, initial, carry)
        own = {}

        def respond(i: int, layer: Layer, pre: Any) -> jax.Array:
            if cell.sites[i].role == INPUT:
                return given_t[i]
            own[i] = layer.apply(under(params, layer.path), pre)
            return own[i]

        new, y = respond_to(cell.module, params, carry, x, respond)
        new = jax.tree.map(lambda a, b: a.astype(b.dtype), new, carry)
        return new, (carry, y, own)

    last, (carries, ys, own) = jax.lax.scan(step, carry, (xs, reset, given))
    drives = [given[i] if i in given else own[i] for i in range(len(cell.sites))]
    return last, Tape(carries, xs, drives, ys, reset)


def drive_inputs(cell: Anatomy, params: Leaves, x: Any) -> dict[int, jax.Array]:
    """The drives of the input synapses, by call number, for x of any batch size."""
    batch = length(x)
    blank = [jnp.zeros((batch, *s.drive.shape[1:]), s.drive.dtype) for s in cell.sites]
    carry = cell.module.initialize_carry(jax.tree.leaves(x)[0].shape)
    _, _, pres = record(cell.module, params, carry, x, blank)
    return {
        i: site.layer.apply(under(params, site.layer.path), pres[i])
        for i, site in enumerate(cell.sites)
        if site.role == INPUT
    }


def _replay(
    cell: Anatomy, params: Leaves, cut: str, entries: Entries, carry: Any, x: Any, drives: list
) -> tuple[Any, Any]:
    """One step from its saved drives; recurrent synapses pass credit as `cut` says."""
    frozen = None
    if cut != EXACT and any(s.role == RECURRENT and s.reads_x for s in cell.sites):
        frozen = record(cell.module, params, jax.lax.stop_gradient(carry), x, drives)[2]

    def respond(i: int, layer: Layer, pre: Any) -> jax.Array:
        site, drive = cell.sites[i], drives[i]
        own = under(params, layer.path)
        if site.role == INPUT:
            return drive
        if cut == EXACT or site.role == OUTPUT:
            return graft(drive, layer.apply(own, pre))
        if site.reads_x:
            drive = graft(drive, layer.apply(own, frozen[i]))
        if cut == DIAGONAL:
            drive = graft(drive, _own_weight(own[("kernel",)], *entries[i], pre))
        return drive

    return respond_to(cell.module, params, carry, x, respond)


def _own_weight(kernel: jax.Array, start: int, units: int, pre: jax.Array) -> jax.Array:
    """What each unit sends to itself: the diagonal of each [N, N] block of the kernel.

    The units are the entries `start`, `start + 1`, ... of pre.
    """
    blocks = kernel.shape[-1] // units
    square = kernel[start : start + units].reshape(units, blocks, units)
    weight = jnp.diagonal(square, axis1=0, axis2=2).reshape(1, -1).astype(pre.dtype)
    return jnp.tile(pre[..., start : start + units], blocks) * weight


def sweep(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    q_end: Any,
    *,
    slots: jax.Array | None = None,
    sum_rows: bool = False,
) -> tuple[Any, Any]:
    """Sends K rows of credit backward through a window, through every synapse.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K', B, ...]; rows from K' on have none.
        q_end: credit of the carry that leaves the window, leaves [K, B, ...].
        slots: [W], the row whose credit expires on reaching each step, or None.
        sum_rows: sum the credit that is kept over the rows.

    Returns:
        Credit of the carry that leaves each step, leaves [W, K, B, ...] (or [W, 1, B, ...]), and of
        the one that entered the window, [K, B, ...].
    """
    k = length(q_end)

    def back(q: Any, now: tuple) -> tuple[Any, Any]:
        carry, x, drives, q_y, reset, slot = now
        if slot is not None:
            q = _forget(q, jnp.arange(k) == slot)
        left = jax.tree.map(lambda a: a.sum(0, keepdims=True), q) if sum_rows else q
        _, pull = jax.vjp(lambda c: _replay(cell, params, EXACT, {}, c, x, drives), carry)
        (q,) = jax.vmap(pull)((q, jax.tree.map(lambda a: _padded(a, k), q_y)))
        if reset is not None:
            q = _forget(q, jnp.broadcast_to(reset, (k, *reset.shape)))
        return q, left

    along = (tape.carries, tape.xs, tape.drives, q_ys, tape.reset, slots)
    q_start, left = jax.lax.scan(back, q_end, along, reverse=True)
    return left, q_start


def sweep_units(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    live: list[int],
    probes: int,
    cut: str,
    entries: Entries,
) -> tuple[Any, list[jax.Array]]:
    """Sends credit backward through the unit dynamics alone: a linear recursion for each unit.

    Row 0 is the loss. Each of the `probes` rows after it starts as ones on one live carry leaf at
    the window's end, so that it becomes that leaf's derivative for the past.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, B, ...].
        live: the S carry leaves through which a unit remembers.
        probes: S, or 0 for the loss alone.
        cut: `CUT` or `DIAGONAL`.
        entries: for `DIAGONAL`, where the units lie in pre.

    Returns:
        Credit of the carry that leaves each step, leaves [W, K, B, N], and of the live leaves that
        entered the window, S of [K, B, N].
    """
    steps = length(tape.ys)
    carry, x, drives = merge_steps((tape.carries, tape.xs, tape.drives))
    leaves, treedef = jax.tree.flatten(carry)

    def step(*alive: jax.Array) -> tuple[list, Any]:
        full = list(leaves)
        for k, leaf in zip(live, alive, strict=True):
            full[k] = leaf
        whole = jax.tree.unflatten(treedef, full)
        new, y = _replay(cell, params, cut, entries, whole, x, drives)
        return [jax.tree.leaves(new)[k] for k in live], y

    (out, y), pull = jax.vjp(step, *(leaves[k] for k in live))
    none, still = [jnp.zeros_like(leaf) for leaf in out], jax.tree.map(jnp.zeros_like, y)
    entering = pull((none, merge_steps(q_ys)))  # what the outputs say of the carry, S of [WB, N]
    jacobian = [
        pull(([jnp.ones_like(leaf) if j == i else leaf for j, leaf in enumerate(none)], still))
        for i in range(len(live))
    ]  # [i][j]: how leaf i of the new carry feels leaf j of the old, [WB, N]
    if tape.reset is not None:
        flat = tape.reset.reshape(-1)
        entering, jacobian = _forget(entering, flat), _forget(jacobian, flat)
    entering, jacobian = split_steps((entering, jacobian), steps)

    def back(q: tuple, now: tuple) -> tuple[tuple, tuple]:
        entering, jacobian = now
        new = tuple(
            sum(row[j][None] * q_i for row, q_i in zip(jacobian, q, strict=True))
            + _padded(entering[j][None], 1 + probes)
            for j in range(len(live))
        )
        return new, q

    ends = tuple(
        jnp.stack([jnp.full(a.shape[1:], float(i == r), a.dtype) for r in range(-1, probes)])
        for i, a in enumerate(entering)
    )
    q_start, left = jax.lax.scan(back, ends, (entering, jacobian), reverse=True)
    every = [
        left[live.index(k)]
        if k in live
        else jnp.zeros((steps, 1 + probes, *leaf.shape[1:]), leaf.dtype)
        for k, leaf in enumerate(jax.tree.leaves(tape.carries))
    ]
    return jax.tree.unflatten(treedef, every), list(q_start)


def assign(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    left: Any = None,
    *,
    per_example: bool = False,
    per_unit: bool = False,
) -> Credit:
    """What the credit of each step's outputs and new carry means within that step, all W at once.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K', B, ...]; rows from K' on have none.
        left: credit of the carry that leaves each step, leaves [W, K, B, ...], or None for none.
        per_example: keep the credit of other parameters per row and example.
        per_unit: keep it per row, example and unit.

    Returns:
        The credit of drives, other parameters and x.
    """
    others = {path: params[path] for path in cell.others}
    wants_x = _wants_x(cell, tape.xs)
    count = length(jax.tree.leaves(q_ys)[0][0] if left is None else jax.tree.leaves(left)[0][0])
    q_ys = jax.tree.map(lambda q: _padded(jnp.moveaxis(q, 1, 0), count), q_ys)
    credit = q_ys if left is None else (jax.tree.map(lambda q: jnp.moveaxis(q, 1, 0), left), q_ys)
    credit = jax.tree.map(lambda q: q.reshape(count, -1, *q.shape[3:]), credit)
    carry, x, drives = merge_steps((tape.carries, tape.xs, tape.drives))

    def step(carry: Any, x: Any, drives: list, x_path: Any, others: Leaves) -> Any:
        seen = x_path if wants_x else x
        new, y = _replay(cell, params | others, EXACT, {}, carry, seen, drives)
        if left is None:
            return y
        return jax.tree.map(lambda a, b: a.astype(b.dtype), new, carry), y

    x_path = x if wants_x else None
    _, pull = jax.vjp(lambda d, p, o: step(carry, x, d, p, o), drives, x_path, others)
    posts, direct, q_others = jax.vmap(pull)(credit)
    steps = length(tape.ys)
    if per_unit:
        at = (carry, x, drives, x_path)
        q_others = _per_unit(lambda o: step(*at, o), others, credit, steps)
    elif per_example and others:
        q_others = _per_example(step, (carry, x, drives, x_path), others, credit, steps)
    else:
        q_others = jax.tree.map(lambda q: q.sum(0), q_others)
    posts, direct = jax.tree.map(
        lambda q: jnp.moveaxis(q.reshape(count, steps, -1, *q.shape[2:]), 0, 1), (posts, direct)
    )
    return Credit(posts, q_others, direct)


def _per_example(step: Any, at: tuple, others: Leaves, credit: Any, steps: int) -> Leaves:
    """Credit of the other parameters for each row and example, [K, B, ...]."""

    def one(at: tuple, credit: Any) -> Leaves:
        return jax.vjp(lambda o: step(*at, o), others)[1](credit)[0]

    by_example = jax.vmap(one, in_axes=1)
    at = split_steps(at, steps)
    credit = jax.tree.map(lambda q: q.reshape(len(q), steps, -1, *q.shape[2:]), credit)
    return jax.vmap(by_example, in_axes=(None, 0))(at, credit)


def _per_unit(step: Any, others: Leaves, credit: Any, steps: int) -> Leaves:
    """Credit of each unit parameter for each row, example and unit, [K, B, N].

    A unit parameter touches its own unit only, so one tangent of ones shows every unit's response.
    """
    found = {}
    for path, leaf in others.items():
        along = (leaf,), (jnp.ones_like(leaf),)
        _, response = jax.jvp(lambda v, path=path: step(others | {path: v}), *along)
        felt = sum(jax.tree.leaves(jax.tree.map(lambda q, r: q * r[None], credit, response)))
        found[path] = felt.reshape(felt.shape[0], steps, -1, felt.shape[-1]).sum(1)
    return found


def input_credit(cell: Anatomy, params: Leaves, tape: Tape, credit: Credit) -> Any:
    """The credit of a cell's input x, through its input synapses and directly.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        credit: of its drives and of x.

    Returns:
        Credit of x, leaves [W, K, B, ...].
    """
    given = {i: credit.posts[i] for i, s in enumerate(cell.sites) if s.role == INPUT}
    if not given:
        return credit.direct
    steps = length(tape.ys)
    pull = jax.vjp(lambda x: drive_inputs(cell, params, x), merge_steps(tape.xs))[1]
    one_row = lambda posts: split_steps(pull(merge_steps(posts))[0], steps)  # noqa: E731
    q_x = jax.vmap(one_row, 1, 1)(given)
    return q_x if credit.direct is None else jax.tree.map(jnp.add, q_x, credit.direct)


def pres(cell: Anatomy, params: Leaves, tape: Tape) -> list[jax.Array]:
    """What each synapse received, [W, B, ...], recomputed for the whole window at once."""
    carry, x, drives = merge_steps((tape.carries, tape.xs, tape.drives))
    _, _, received = record(cell.module, params, carry, x, drives)
    return split_steps(received, length(tape.xs))


def contract(cell: Anatomy, params: Leaves, received: list, posts: list) -> Leaves:
    """What the synapses learn: each layer's own VJP on its (pre, post), summed over W and B.

    Args:
        cell: its anatomy.
        params: its parameters.
        received: pre of each synapse call, [W, B, ...].
        posts: credit of each drive, [W, B, D].

    Returns:
        A gradient for every leaf that a synapse owns, at least float32.
    """
    return outer(cell, params, merge_steps(received), merge_steps(posts))


def contract_each(cell: Anatomy, params: Leaves, received: list, posts: list) -> Leaves:
    """`contract` for each row and example: posts [W, K, B, D] give leaves [K, B, ...]."""
    if not posts:
        return {}
    # Examples first, and fixed so: XLA on CPU would otherwise transpose one factor, at 3x the time.
    received, posts = jax.lax.optimization_barrier(
        (
            [jnp.moveaxis(pre, 1, 0) for pre in received],
            [jnp.moveaxis(post, (2, 0), (0, 1)) for post in posts],
        )
    )
    by_row = jax.vmap(lambda pre, post: outer(cell, params, pre, post), (None, 1))
    return jax.vmap(by_row, out_axes=1)(received, posts)


def outer(cell: Anatomy, params: Leaves, received: list, posts: list) -> Leaves:
    """The layers' VJPs on (pre, post) with one leading axis, which they sum over.

    Args:
        cell: its anatomy.
        params: its parameters.
        received: pre of each synapse call, [M, ...].
        posts: credit of each drive, [M, D].

    Returns:
        A gradient for every leaf that a synapse owns, at least float32.
    """
    grads: Leaves = {}
    for site, pre, post in zip(cell.sites, received, posts, strict=True):
        own = {p: v.astype(accumulator(v)) for p, v in under(params, site.layer.path).items()}
        drive, pull = jax.vjp(lambda v, pre=pre, site=site: site.layer.apply(v, pre), own)
        (found,) = pull(post.astype(drive.dtype))
        for path, grad in placed(found, site.layer.path).items():
            grads[path] = grads[path] + grad if path in grads else grad
    return grads


def _wants_x(cell: Anatomy, xs: Any) -> bool:
    """Whether x earns credit beside its input synapses."""
    floating = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in jax.tree.leaves(xs))
    return floating and (
        cell.reads_x or any(site.reads_x and site.role != INPUT for site in cell.sites)
    )


def _forget(credit: Any, where: jax.Array) -> Any:
    return select(where, jax.tree.map(jnp.zeros_like, credit), credit)


def _padded(rows: jax.Array, k: int) -> jax.Array:
    return jnp.pad(rows, [(0, k - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))
