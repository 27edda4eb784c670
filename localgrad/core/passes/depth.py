"""Eligibilities across depth and time: how the units of a cell respond to parameters below it.

With the recurrent synapses cut, the units of one cell do not meet, so a cell's own parameters keep
one number a state component (`eligibility.py`). A unit above feels every parameter below through
the layers between: those blocks, e^{l<-k}, are dense.
Letters: B batch, W steps of the window, K credit rows, N units, S live carry leaves, D drive width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.room import held_bytes
from localgrad.core.examples import over_examples
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, accumulator, added, placed, under
from localgrad.core.passes.backward import (
    Credit,
    assign,
    input_credit,
    sweep_units,
    unowned_by_example,
    unowned_by_unit,
)
from localgrad.core.passes.contraction import contract, outer, pres
from localgrad.core.passes.eligibility import (
    default_window,
    live_leaves,
    silent,
    spread,
    tape_numbers,
    to_leaf,
)
from localgrad.core.passes.forward import Method
from localgrad.core.passes.run import Level, Pass, descend, encoded_each
from localgrad.core.steps import (
    even_window,
    example_row_step,
    examples_first,
    one_row,
    row,
)


class Held(NamedTuple):
    """What a stream remembers of its parameters.

    Attributes:
        eligibility: by path, [B, S, ...]: a unit's response to its own parameters.
        influence: for each cell, by path, [B, S N, ...]: the response of its live state, flattened,
            to the parameters of the cells below and of the encoder.
    """

    eligibility: Leaves
    influence: dict[str, Leaves]


def nothing_held(stack: Stack, params: Leaves, cut: str, batch: int, across: bool = True) -> Held:
    """What B sequences remember at their start; `across` layers, or of each by itself."""
    eligibility: Leaves = {}
    influence: dict[str, Leaves] = {}
    for level, prefix in enumerate(stack.prefixes):
        cell, carry = stack.cells[level], stack.initial[level]
        carry = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), carry)
        eligibility |= placed(silent(cell, under(params, prefix), carry, cut), prefix)
        size = len(live_leaves(cell, cut)) * jax.tree.leaves(carry)[0].shape[-1]
        paths = stack.below(params, level) if size and across else []
        influence[stack.name(level)] = {
            path: jnp.zeros((batch, size, *params[path].shape), accumulator(params[path]))
            for path in paths
        }
    return Held(eligibility, influence)


def window_of(cut: str, stack: Stack, params: Leaves, steps: int, alone: bool) -> int:
    """As long as the window's posts take no more memory than twice what is held.

    Or all steps, where nothing need be held and their tapes take no more than that.
    """
    if len(stack.cells) == 1 and stack.encoder is None:
        return default_window(cut, stack, params, steps, alone)
    batch = jax.tree.leaves(stack.initial[0])[0].shape[0]
    held = held_bytes(lambda: nothing_held(stack, params, cut, batch)) // 4
    if alone and steps * tape_numbers(stack) <= held:
        return steps
    numbers = batch * max(1, sum(_posts_of_step(stack, cut)))
    return even_window(steps, max(1, min(2 * held // numbers, 128)))


def _posts_of_step(stack: Stack, cut: str) -> list[int]:
    """How many posts each cell has at a step and example: the loss's, its own, and the rows'."""
    live = [len(live_leaves(cell, cut)) for cell in stack.cells]
    carries = [jax.tree.leaves(carry)[0].shape[-1] for carry in stack.initial]
    states = [s * n for s, n in zip(live, carries, strict=True)]
    widths = [sum(math.prod(site.drive.shape[1:]) for site in cell.sites) for cell in stack.cells]
    return [
        (1 + live[level] + sum(states[level + 1 :])) * width for level, width in enumerate(widths)
    ]


class Rows(NamedTuple):
    """What a window says of each cell; the examples first.

    K rows are one for every live number of the carries of the cells above, so that they become its
    derivative. Apart from them, S probes a cell say the same of its own units, all at once.

    Attributes:
        spans: for each cell, which rows, in what is below it, are its own live numbers.
        lost: for each cell, the loss's credit of the live carry that entered the window, [B, S, N].
        entering: for each cell, the rows' credit of that carry, [B, K, S, N].
        fade: for each cell, the same of its own probes, [B, S, S, N].
        received: for each cell, pre of each synapse, [B, W, ...].
        posts: for each cell, the rows' credit of each drive, [B, K, W, D].
        own_posts: for each cell, the same of its own probes, [B, S, W, D].
        unowned: for each cell, the rows' credit of the parameters no synapse owns, [B, K, ...].
        own_unowned: for each cell, the same of its own probes, [B, S, N].
        encoded: the rows' credit of the first cell's input, leaves [B, K, W, ...], or None.
    """

    spans: list[slice]
    lost: list[jax.Array]
    entering: list[jax.Array]
    fade: list[jax.Array]
    received: list[list]
    posts: list[list]
    own_posts: list[list]
    unowned: list[Leaves]
    own_unowned: list[Leaves]
    encoded: Any


def deep_rows(
    stack: Stack,
    params: Leaves,
    ran: Pass,
    q_y: Any,
    methods: list[Method],
    closing: bool,
    feedback: Mapping[int, jax.Array] | None = None,
    signals: Mapping[str, jax.Array] | None = None,
) -> tuple[Leaves, Rows]:
    """Sends the loss, and a row for every live number of every carry, back through a window.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        ran: the forward pass.
        q_y: credit of the highest cell's outputs, leaves [W, B, ...].
        methods: for each cell, how credit passes its recurrent synapses, cut or thinned.
        closing: no rows but the loss are needed.
        feedback: of the last cell's input synapse, by its number, weights (N, D) to send credit by.
        signals: by cell, what its outputs get beside the loss's credit, [W, B, N].

    Returns:
        The gradients that the window itself gives, and the rows.
    """
    by_cell = {len(stack.cells) - 1: feedback}
    visit = functools.partial(_visit, methods, closing, by_cell, signals or {})
    grads, parts, q_x = descend(stack, params, ran.tapes, one_row(q_y), visit)
    encoded = None
    if stack.encoder is not None:
        grads |= ran.encode(row(q_x, 0))
        encoded = jax.tree.map(lambda q: example_row_step(q[:, 1:]), q_x)
    return grads, Rows(*map(list, zip(*parts, strict=True)), encoded=encoded)


def _visit(
    methods: list[Method],
    closing: bool,
    feedback: dict[int, Any],
    signals: Mapping[str, jax.Array],
    at: Level,
    q_y: Any,
) -> tuple[Leaves, tuple, Any]:
    """One cell: its gradients, its part of the rows, and the credit of its input."""
    if at.name in signals:
        q_y = q_y.at[:, 0].add(signals[at.name])
    cell, own, tape, method = at.cell, at.params, at.tape, methods[at.number]
    live, (batch, units) = live_leaves(cell, method.cut), jax.tree.leaves(tape.carries)[0].shape[1:]
    count = jax.tree.leaves(q_y)[0].shape[1]  # the loss and the rows
    left, entering = None, jnp.zeros((count, 0, batch, units))
    if live:
        probes = 0 if closing else len(live)
        left, found = sweep_units(cell, own, tape, q_y, live, probes, method)
        entering = jnp.stack(found, 1)  # [K + S, S, B, N]
    credit = assign(cell, own, tape, q_y, left)
    given, probed = _halves(left, count)
    posts, own_posts = _halves(credit.posts, count)
    received, unowned = pres(cell, own, tape), unowned_by_example(cell, own, tape, q_y, given)
    grads = contract(cell.sites, own, received, [post[:, 0] for post in posts])
    grads |= {path: q[0].sum(0) for path, q in unowned.items()}
    examples = functools.partial(jnp.moveaxis, source=2, destination=0)
    silent_units = closing or not live
    part = (
        slice(count - 1, count - 1 + (0 if silent_units else len(live) * units)),
        examples(entering[:1])[:, 0],
        examples(entering[1:count]),
        examples(entering[count:]),
        examples_first(received, 1),
        [example_row_step(post[:, 1:]) for post in posts],
        [example_row_step(post) for post in own_posts],
        {path: jnp.moveaxis(q[1:], 1, 0) for path, q in unowned.items()},
        {} if silent_units else examples_first(unowned_by_unit(cell, own, tape, probed), 1),
    )
    if not at.below:
        return grads, part, q_y
    below = functools.partial(input_credit, cell, own, tape, feedback=feedback.get(at.number))
    q_x = below(Credit(posts, _halves(credit.direct, count)[0]))
    if not silent_units:
        none = jax.tree.map(lambda q: jnp.zeros_like(q[:, :1]), q_y)
        felt = assign(cell, own, tape, none, _unit_by_unit(probed))
        q_x = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), q_x, below(felt))
    return grads, part, q_x


def _halves(tree: Any, count: int) -> tuple[Any, Any]:
    """The loss and the rows, and the cell's own probes behind them: leaves [W, K or S, B, ...]."""
    return jax.tree.map(lambda q: q[:, :count], tree), jax.tree.map(lambda q: q[:, count:], tree)


def _unit_by_unit(probed: Any) -> Any:
    """Credit of all units at once, [W, S, B, N], as a row for each unit: [W, S N, B, N]."""

    def each(q: jax.Array) -> jax.Array:
        steps, probes, batch, units = q.shape
        alone = q[:, :, None] * jnp.eye(units, dtype=q.dtype)[None, None, :, None]
        return alone.reshape(steps, probes * units, batch, units)

    return jax.tree.map(each, probed)


def remembered(
    stack: Stack, params: Leaves, held: Held, rows: Rows, xs: Any, opening: bool, closing: bool
) -> tuple[Leaves, Held]:
    """What is held adds to the gradients, and what is held after the window.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        held: before the window.
        rows: of the window.
        xs: its inputs, leaves [W, B, ...].
        opening: what is held is known to be zero.
        closing: nothing is to be held after it.

    Returns:
        Gradients, and what is held then.
    """
    spans, rows = rows.spans, rows._replace(spans=[])

    def recall(held: Held, at: tuple[Rows, Any]) -> Leaves:
        return _recalled(stack, params, held, at[0])

    def renew(held: Held, at: tuple[Rows, Any]) -> Held:
        rows, x = at
        return _carried(stack, params, held, rows._replace(spans=spans), x, opening)

    return over_examples(
        held,
        (rows, examples_first(xs, 1)),
        None if opening else recall,
        None if closing else renew,
    )


def _recalled(stack: Stack, params: Leaves, held: Held, rows: Rows) -> Leaves:
    """The loss's credit of the live carries that entered, times what is held of one example."""
    grads: Leaves = {}
    for level, prefix in enumerate(stack.prefixes):
        lost = rows.lost[level][None]  # [1, S, N]
        found = {
            prefix + path: _through_units(lost, old, params[prefix + path], path, stack, level)[0]
            for path, old in under(held.eligibility, prefix).items()
        }
        for path, block in held.influence[stack.name(level)].items():
            found[path] = jnp.tensordot(lost.reshape(-1).astype(block.dtype), block, 1)
        grads = added(grads, found)
    return grads


def _through_units(
    credit: jax.Array, old: jax.Array, leaf: Any, path: Path, stack: Stack, level: int
) -> jax.Array:
    """Credit [K, S, N] of a cell's live state, times its own eligibility [S, ...]: [K, ...]."""
    terms = [spread(credit[:, s], old) * old[s][None] for s in range(len(old))]
    total = functools.reduce(jnp.add, terms)
    if path in stack.cells[level].unowned:
        return jax.vmap(lambda unit: to_leaf(unit, leaf))(total)
    return total


def _carried(stack: Stack, params: Leaves, held: Held, rows: Rows, x: Any, opening: bool) -> Held:
    """e_T = A e_0 + e_window, block by block, of one example."""
    written, own = _written(stack, params, rows, x)
    eligibility: Leaves = {}
    influence: dict[str, Leaves] = {}
    for level, prefix in enumerate(stack.prefixes):
        name, fade = stack.name(level), rows.fade[level]
        for path, old in under(held.eligibility, prefix).items():
            new = own[prefix + path].astype(old.dtype)
            if not opening:
                new += sum(spread(fade[:, s], old) * old[s][None] for s in range(len(old)))
            eligibility[prefix + path] = new
        influence[name] = {}
        for path, block in held.influence[name].items():
            new = written[path][rows.spans[level]].astype(block.dtype)
            if not opening:
                new += _fading(fade, block)
                new += _from_below(stack, params, held, rows, level, path).astype(block.dtype)
            influence[name][path] = new
    return Held(eligibility, influence)


def _written(stack: Stack, params: Leaves, rows: Rows, x: Any) -> tuple[Leaves, Leaves]:
    """What the window itself writes: by rows, leaves [K, ...], and by own probes, [S, ...]."""
    written: Leaves = {}
    own: Leaves = {}
    for level, prefix in enumerate(stack.prefixes):
        cell, leaves, received = stack.cells[level], under(params, prefix), rows.received[level]
        learn = functools.partial(outer, cell.sites, leaves, received)
        each = dict(rows.unowned[level])
        if cell.sites and level + 1 < len(stack.cells):
            each |= jax.vmap(learn)(rows.posts[level])
        written |= placed(each, prefix)
        # A loop over S, not a vmap: a product with a batch axis of 1 is a third slower on CPU.
        probes = [
            learn([post[s] for post in rows.own_posts[level]]) for s in range(len(rows.fade[level]))
        ]
        if probes:
            each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *probes)
            own |= placed(each | rows.own_unowned[level], prefix)
    if stack.encoder is not None:
        written |= encoded_each(stack.encoder, params, x, rows.encoded)
    return written, own


def _fading(fade: jax.Array, block: jax.Array) -> jax.Array:
    """A cell's own dynamics [S, S, N] on its block [S N, ...]."""
    states, _, units = fade.shape
    parts = block.reshape(states, units, -1)
    total = jnp.einsum("rsn,snp->rnp", fade.astype(block.dtype), parts)
    return total.reshape(block.shape)


def _from_below(
    stack: Stack, params: Leaves, held: Held, rows: Rows, level: int, path: Path
) -> jax.Array:
    """How a cell's live state feels a parameter through the live states of the cells below."""
    leaf, total = params[path], jnp.zeros(())
    for below in range(level):
        passed = rows.entering[below][rows.spans[level]]  # [S N of this cell, S, N]
        prefix, block = stack.prefixes[below], held.influence[stack.name(below)].get(path)
        if block is not None:
            total += jnp.tensordot(passed.reshape(len(passed), -1).astype(block.dtype), block, 1)
        elif path in held.eligibility and path[: len(prefix)] == prefix:
            old = held.eligibility[path]
            total += _through_units(passed, old, leaf, path[len(prefix) :], stack, below)
    return total
