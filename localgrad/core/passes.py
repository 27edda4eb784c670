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
    """What the backward pass finds.

    Attributes:
        posts: credit of each drive, [W, K, B, D] ([W, B, D] when rows are summed).
        others: credit of the parameters no synapse owns: summed over the window.
        carry: credit of the carry that entered the window, leaves [K, B, N].
        direct: credit of x by ways that pass no input synapse, leaves [W, K, B, ...], or None.
    """

    posts: list[jax.Array]
    others: Leaves
    carry: Any
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
    cell: Anatomy, params: Leaves, cut: str, rows: dict[int, Any], carry: Any, x: Any, drives: list
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
            drive = graft(drive, _own_weight(own[("kernel",)], rows[i], pre))
        return drive

    return respond_to(cell.module, params, carry, x, respond)


def _own_weight(kernel: jax.Array, rows: jax.Array, pre: jax.Array) -> jax.Array:
    """What each unit sends to itself: the diagonal of each [N, N] block of the kernel."""
    columns = kernel.shape[-1]
    repeats = columns // rows.shape[0]
    weight = kernel[jnp.tile(rows, repeats), jnp.arange(columns)]
    return jnp.tile(pre[..., rows], repeats) * weight.astype(pre.dtype)[None, :]


def backward(
    cell: Anatomy,
    params: Leaves,
    tape: Tape,
    q_ys: Any,
    q_carry: Any,
    *,
    cut: str = EXACT,
    rows: dict[int, jax.Array] | None = None,
    slots: jax.Array | None = None,
    sum_rows: bool = False,
    per_example: bool = False,
) -> Credit:
    """Sends K rows of credit backward through a window of one cell.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, K', B, ...]; rows from K' on have none.
        q_carry: credit of the carry that leaves the window, leaves [K, B, N].
        cut: what recurrent synapses send back: everything (`EXACT`), nothing (`CUT`), or what each
            unit sends to itself (`DIAGONAL`).
        rows: for `DIAGONAL`, which entry of pre each unit is, by call number.
        slots: [W], the row whose credit expires at each step, or None.
        sum_rows: sum posts over the rows, [W, B, D].
        per_example: under `EXACT`, keep `others` per row and example instead of summing.

    Returns:
        The credit of drives, other parameters, carry and x.
    """
    k = length(q_carry)
    others = {path: params[path] for path in cell.others}
    wants_x = _wants_x(cell, tape.xs)

    def back(so_far: tuple, now: tuple) -> tuple[tuple, tuple]:
        q_carry, q_others = so_far
        carry, x, drives, q_y, reset_t, slot = now

        def step(carry: Any, drives: list, x_path: Any, others: Leaves) -> tuple[Any, Any]:
            seen = x_path if wants_x else x
            new, y = _replay(cell, params | others, cut, rows or {}, carry, seen, drives)
            return jax.tree.map(lambda a, b: a.astype(b.dtype), new, carry), y

        if slot is not None:
            q_carry = _forget(q_carry, jnp.arange(k) == slot)
        q_y = jax.tree.map(lambda q: _padded(q, k), q_y)
        primals = (carry, drives, x if wants_x else None)
        if cut != EXACT:
            pull = jax.vjp(lambda *at: step(*at, others), *primals)[1]
            q_now = _unit_posts(lambda o: step(*primals, o), others, (q_carry, q_y))
            q_in = jax.vmap(pull)((q_carry, q_y))
        else:
            pull = _pull(step, primals, others, per_example)
            *q_in, q_now = jax.vmap(pull)((q_carry, q_y))
            if not per_example:
                q_now = jax.tree.map(lambda q: q.sum(0), q_now)
        q_carry, posts, q_x = q_in
        if reset_t is not None:
            q_carry = _forget(q_carry, jnp.broadcast_to(reset_t, (k, *reset_t.shape)))
        if sum_rows:
            posts = [post.sum(0) for post in posts]
        q_others = jax.tree.map(lambda a, b: a + b.astype(a.dtype), q_others, q_now)
        return (q_carry, q_others), (posts, q_x)

    batch = jax.tree.leaves(q_carry)[0].shape[1]
    if cut != EXACT:
        lead = {path: (k, batch, _units(q_carry)) for path in others}
    elif per_example:
        lead = {path: (k, batch, *leaf.shape) for path, leaf in others.items()}
    else:
        lead = {path: leaf.shape for path, leaf in others.items()}
    start = {path: jnp.zeros(lead[path], accumulator(leaf)) for path, leaf in others.items()}
    along = (tape.carries, tape.xs, tape.drives, q_ys, tape.reset, slots)
    (q_carry, q_others), (posts, q_x) = jax.lax.scan(back, (q_carry, start), along, reverse=True)
    return Credit(posts, q_others, q_carry, q_x)


def instant(
    cell: Anatomy, params: Leaves, tape: Tape, q_ys: Any
) -> tuple[list[jax.Array], Leaves, Any]:
    """Sends credit from the outputs back through the same time step only, all W steps at once.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        q_ys: credit of the outputs, leaves [W, B, ...].

    Returns:
        The posts [W, B, D], the credit of `others` summed over steps and examples, and the credit
        of x by ways that pass no input synapse, leaves [W, B, ...] or None.
    """
    steps = length(tape.xs)
    others = {path: params[path] for path in cell.others}
    wants_x = _wants_x(cell, tape.xs)
    carry, x, drives = merge_steps((tape.carries, tape.xs, tape.drives))

    def step(drives: list, x_path: Any, others: Leaves) -> Any:
        seen = x_path if wants_x else x
        return _replay(cell, params | others, EXACT, {}, carry, seen, drives)[1]

    pull = jax.vjp(step, drives, x if wants_x else None, others)[1]
    posts, q_x, q_others = pull(merge_steps(q_ys))
    return split_steps(posts, steps), q_others, split_steps(q_x, steps)


def input_credit(cell: Anatomy, params: Leaves, tape: Tape, posts: list, direct: Any) -> Any:
    """The credit of a cell's input x: through its input synapses, and `direct`ly.

    Args:
        cell: its anatomy.
        params: its parameters.
        tape: of the forward pass.
        posts: credit of each drive, [W, ..., B, D].
        direct: credit of x by other ways, leaves [W, ..., B, I], or None.

    Returns:
        Credit of x, leaves [W, ..., B, I].
    """
    steps = length(tape.xs)
    pull = jax.vjp(lambda x: drive_inputs(cell, params, x), merge_steps(tape.xs))[1]

    def one_row(posts: dict[int, jax.Array]) -> Any:
        return split_steps(pull(merge_steps(posts))[0], steps)

    given = {i: posts[i] for i, site in enumerate(cell.sites) if site.role == INPUT}
    if not given:
        return direct
    by_row = any(posts[i].ndim > tape.drives[i].ndim for i in given)
    q_x = jax.vmap(one_row, 1, 1)(given) if by_row else one_row(given)
    return q_x if direct is None else jax.tree.map(jnp.add, q_x, direct)


def pres(cell: Anatomy, params: Leaves, tape: Tape) -> list[jax.Array]:
    """What each synapse received, [W, B, ...], recomputed for the whole window at once."""
    carry, x, drives = merge_steps((tape.carries, tape.xs, tape.drives))
    _, _, received = record(cell.module, params, carry, x, drives)
    return split_steps(received, length(tape.xs))


def contract(cell: Anatomy, params: Leaves, received: list, posts: list) -> Leaves:
    """What the synapses learn: each layer's own VJP on its (pre, post), over all leading axes.

    Args:
        cell: its anatomy.
        params: its parameters.
        received: pre of each synapse call, [W, B, ...].
        posts: credit of each drive, [W, B, D].

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


def contract_each(cell: Anatomy, params: Leaves, received: list, posts: list) -> Leaves:
    """`contract` for each row and example: posts [W, K, B, D] give leaves [K, B, ...]."""
    if not posts:
        return {}
    one_example = jax.vmap(
        lambda pre, post: contract(cell, params, _lone(pre), _lone(post)), in_axes=1
    )
    return jax.vmap(one_example, in_axes=(None, 1))(received, posts)


def _lone(arrays: list) -> list:
    return [a[:, None] for a in arrays]


def _wants_x(cell: Anatomy, xs: Any) -> bool:
    """Whether x earns credit beside its input synapses."""
    floating = all(jnp.issubdtype(a.dtype, jnp.inexact) for a in jax.tree.leaves(xs))
    return floating and (
        cell.reads_x or any(site.reads_x and site.role != INPUT for site in cell.sites)
    )


def _pull(step: Any, primals: tuple, others: Leaves, per_example: bool) -> Any:
    """The VJP of a step for its primals and the other parameters, those per example if asked."""
    if not per_example or not others:
        return jax.vjp(step, *primals, others)[1]
    batch = jax.tree.leaves(primals)[0].shape[0]

    def one(*args: Any) -> Any:
        *at, others = args
        out = step(*jax.tree.map(lambda a: a[None], tuple(at)), others)
        return jax.tree.map(lambda a: a[0], out)

    copies = {p: jnp.broadcast_to(leaf, (batch, *leaf.shape)) for p, leaf in others.items()}
    return jax.vjp(jax.vmap(one), *primals, copies)[1]


def _unit_posts(step: Any, others: Leaves, credit: Any) -> Leaves:
    """Credit of each unit parameter per row, example and unit, [K, B, N].

    A unit parameter touches its own unit only, so one tangent of ones shows every unit's response.
    """
    found = {}
    for path, leaf in others.items():
        response = jax.jvp(lambda v, path=path: step(others | {path: v}), (leaf,), (jnp.ones_like(leaf),))
        felt = jax.tree.map(lambda q, r: q * r[None], credit, response[1])
        found[path] = sum(jax.tree.leaves(felt))
    return found


def _units(q_carry: Any) -> int:
    return jax.tree.leaves(q_carry)[0].shape[-1]


def _forget(credit: Any, where: jax.Array) -> Any:
    return select(where, jax.tree.map(jnp.zeros_like, credit), credit)


def _padded(rows: jax.Array, k: int) -> jax.Array:
    return jnp.pad(rows, [(0, k - rows.shape[0])] + [(0, 0)] * (rows.ndim - 1))
