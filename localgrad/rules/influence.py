"""RTRL, whole (`rtrl`) or sparsified to each parameter's own unit (`snap`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.params import Leaves, Path, accumulator, added, placed, under
from localgrad.core.passes import (
    DIAGONAL,
    assign,
    contract,
    input_credit,
    length,
    one_row,
    outer,
    pres,
    row,
    sweep,
)
from localgrad.core.rule import Frame, LearningRule, Loss, Recipe, Window, even_window, windowed_rule
from localgrad.core.stack import Pass, Stack, encoded_each, run
from localgrad.rules.eligibility import local_recipe

GIB = 1024**3


class InfluenceState(NamedTuple):
    """State of `rtrl`.

    Attributes:
        loss: mean loss of the last call.
        carry: the model's carry (streaming), or None.
        start: the model's initial carry (streaming), or None.
        influence: for each cell, by parameter path, [B, N S, ...]: how the cell's carry, flattened,
            responds to the parameter (streaming), or None.
    """

    loss: jax.Array
    carry: Any = None
    start: Any = None
    influence: Any = None

    def fresh(self) -> InfluenceState:
        """The state at the start of new sequences."""
        zeros = jax.tree.map(jnp.zeros_like, self.influence)
        return self._replace(carry=self.start, influence=zeros)


def snap(
    model: Any,
    loss: Loss,
    *,
    order: int = 1,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    """SnAp."""
    if order != 1:
        raise ValueError(
            f"order must be 1; got {order!r}. On the dense recurrent layers of Flax cells SnAp-2 "
            "and above are exact RTRL: use localgrad.rtrl."
        )
    return windowed_rule(
        model,
        loss,
        local_recipe("snap", DIAGONAL, "symmetric", None),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


def rtrl(
    model: Any,
    loss: Loss,
    *,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    max_influence_bytes: int = 4 * GIB,
    example: Any = None,
) -> LearningRule:
    """RTRL."""

    def begin(stack: Stack, params: Leaves, x: Any) -> InfluenceState:
        carry = stack.pack(stack.initial)
        influence = {
            stack.name(level): {
                path: jnp.zeros(shape, accumulator(params[path]))
                for path, shape in _blocks(stack, params, level, length(x)).items()
            }
            for level in stack.levels
        }
        return InfluenceState(jnp.zeros(()), carry, carry, influence)

    def process(frame: Frame, state: InfluenceState, window: Window) -> tuple:
        stack, params = frame.stack, frame.params
        ran = run(stack, params, stack.unpack(state.carry), window.inputs, window.reset)
        value, q_out = frame.objective.credit(ran.outputs, window.targets, window.weight)
        grads, q_y = ran.read(q_out)
        found, rows = _credit_rows(frame, ran, q_y)
        grads |= found
        influence = state.influence
        if not frame.opening:
            grads = added(grads, _recalled(stack, influence, rows))
        if not frame.closing:
            influence = _carried(frame, influence, rows, window.inputs)
        return state._replace(carry=stack.pack(ran.carries), influence=influence), grads, value

    def screen(stack: Stack, params: Leaves) -> None:
        if batch_size is None:
            return
        need = sum(
            int(np.prod(shape)) * accumulator(params[path]).itemsize
            for level in stack.levels
            for path, shape in _blocks(stack, params, level, batch_size).items()
        )
        if need > max_influence_bytes:
            raise ValueError(
                f"rtrl's influence [B, N S, P] would take {need / GIB:.3g} GiB, more than "
                f"max_influence_bytes = {max_influence_bytes / GIB:.3g} GiB. Raise that limit, "
                f"lower batch_size={batch_size} or the cells' features, or use localgrad.snap or "
                "localgrad.eprop, whose memory is one number a parameter and example."
            )

    recipe = Recipe(
        name="rtrl",
        begin=begin,
        process=process,
        idle=InfluenceState(jnp.zeros(())),
        default_window=_default_window,
        screen=screen,
    )
    return windowed_rule(
        model,
        loss,
        recipe,
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


def _size(carry: Any) -> int:
    """How many numbers one example's carry holds."""
    return sum(int(np.prod(leaf.shape[1:])) for leaf in jax.tree.leaves(carry))


def _reaching(stack: Stack, params: Leaves, level: int) -> list[Path]:
    """Paths of the parameters that reach a cell's carry: its own, and all below."""
    paths = [path for path in params if path[:1] == ("encoder",) and stack.encoder is not None]
    for below in range(level):
        prefix = stack.prefixes[below]
        paths += [path for path in params if path[: len(prefix)] == prefix]
    cell, prefix = stack.cells[level], stack.prefixes[level]
    own = under(params, prefix)
    for site, reach in zip(cell.sites, cell.drives_reach, strict=True):
        if reach:
            paths += [prefix + site.layer.path + path for path in under(own, site.layer.path)]
    return list(dict.fromkeys([*paths, *(prefix + path for path in sorted(cell.others_reach))]))


def _blocks(
    stack: Stack, params: Leaves, level: int, batch: int
) -> dict[Path, tuple[int, ...]]:
    """Shapes of a cell's influence, by parameter path."""
    size = _size(stack.initial[level])
    return {
        path: (batch, size, *params[path].shape) for path in _reaching(stack, params, level)
    }


def _default_window(stack: Stack, params: Leaves, steps: int) -> int:
    """As long as the window's posts take no more memory than twice the influence."""
    rows = 1 + sum(_size(carry) for carry in stack.initial)
    width = sum(int(np.prod(site.drive.shape[1:])) for cell in stack.cells for site in cell.sites)
    held = sum(
        int(np.prod(shape))
        for level in stack.levels
        for shape in _blocks(stack, params, level, 1).values()
    )
    return even_window(steps, int(np.clip(2 * held // (rows * max(1, width)), 1, 128)))


class Rows(NamedTuple):
    """Row 0 is the loss; the rows after it are one for every number of every cell's carry.

    Attributes:
        spans: for each cell, which rows start as its carry at the window's end.
        entering: for each cell, credit of the carry that entered the window, [B, K, n].
        received: for each cell, pre of each synapse, [B, W, ...].
        posts: for each cell, credit of each drive, [B, K, W, D].
        others: for each cell, credit of the parameters no synapse owns, [B, K, ...].
        encoded: credit of the first cell's input, leaves [B, K, W, ...], or None.
    """

    spans: list[slice]
    entering: list[jax.Array]
    received: list[list]
    posts: list[list]
    others: list[Leaves]
    encoded: Any


def _credit_rows(frame: Frame, ran: Pass, q_y: Any) -> tuple[Leaves, Rows]:
    """Sends the loss, and a row for every number of every carry, back through a window.

    Returns:
        The gradients that the window itself gives, and the rows.
    """
    stack, params = frame.stack, frame.params
    grads: Leaves = {}
    cells: list[tuple] = []
    count = 1
    q_y = one_row(q_y)
    for level in reversed(stack.levels):
        cell, prefix, tape = stack.cells[level], stack.prefixes[level], ran.tapes[level]
        own = under(params, prefix)
        size = 0 if frame.closing else _size(stack.initial[level])
        left, q_start = sweep(cell, own, tape, q_y, _identity(tape.carries, count, size))
        credit = assign(cell, own, tape, q_y, left, per_example=True)
        received = pres(cell, own, tape)
        learned = contract(cell, own, received, row(credit.posts, 0))
        learned |= {path: q[0].sum(0) for path, q in credit.others.items()}
        grads |= placed(learned, prefix)
        cells.insert(0, (slice(count, count + size), _flat(q_start), received, credit))
        count += size
        if level > 0 or stack.encoder is not None:
            q_y = input_credit(cell, own, tape, credit)
    if stack.encoder is not None:
        grads |= ran.encode(row(q_y, 0))
    examples_first = lambda tree: jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tree)  # noqa: E731
    return grads, Rows(
        spans=[span for span, *_ in cells],
        entering=[jnp.moveaxis(entering, 1, 0) for _, entering, _, _ in cells],
        received=[examples_first(received) for *_, received, _ in cells],
        posts=[jax.tree.map(_example_row_step, credit.posts) for *_, credit in cells],
        others=[examples_first(credit.others) for *_, credit in cells],
        encoded=None if stack.encoder is None else jax.tree.map(_example_row_step, q_y),
    )


def _example_row_step(a: jax.Array) -> jax.Array:
    """[W, K, B, ...] -> [B, K, W, ...]."""
    return jnp.moveaxis(a, (2, 1), (0, 1))


def _identity(carries: Any, rows: int, size: int) -> Any:
    """`rows` rows of zeros, then one row for each number of the carry: leaves [K, B, ...]."""
    leaves, treedef = jax.tree.flatten(carries)
    found, at = [], rows
    for leaf in leaves:
        count = int(np.prod(leaf.shape[2:]))
        eye = np.eye(rows + size, count, -at) if size else np.zeros((rows, count))
        eye = jnp.asarray(eye, leaf.dtype).reshape(-1, 1, *leaf.shape[2:])
        found.append(jnp.broadcast_to(eye, (rows + size, *leaf.shape[1:])))
        at += count
    return jax.tree.unflatten(treedef, found)


def _flat(carry: Any) -> jax.Array:
    """Leaves [K, B, ...] side by side: [K, B, n]."""
    return jnp.concatenate([a.reshape(*a.shape[:2], -1) for a in jax.tree.leaves(carry)], axis=-1)


def _recalled(stack: Stack, influence: Any, rows: Rows) -> Leaves:
    """What the entering carries' credit adds by way of the influence."""
    grads: Leaves = {}
    for level in stack.levels:
        credit = rows.entering[level][:, 0].reshape(-1)
        for path, held in influence[stack.name(level)].items():
            flat = held.reshape(held.shape[0] * held.shape[1], -1)
            found = (credit.astype(flat.dtype) @ flat).reshape(held.shape[2:])
            grads[path] = grads[path] + found if path in grads else found
    return grads


def _carried(frame: Frame, influence: Any, rows: Rows, xs: Any) -> Any:
    """M_T = A M_0 + M_window, block by block and example by example.

    One example at a time, so that what lies between the old influence and the new stays in cache.
    """
    stack, params = frame.stack, frame.params

    def one_example(at: tuple) -> Any:
        held, rows_b, x = at
        written: Leaves = {}
        for level, prefix in enumerate(stack.prefixes):
            each = rows_b.others[level]
            if stack.cells[level].sites:
                each |= jax.vmap(
                    lambda post, level=level, prefix=prefix: outer(
                        stack.cells[level], under(params, prefix), rows_b.received[level], post
                    )
                )(rows_b.posts[level])
            written |= placed(each, prefix)
        if stack.encoder is not None:
            written |= encoded_each(stack, params, x, rows_b.encoded)
        new: dict[str, Leaves] = {}
        for level in stack.levels:
            name, span = stack.name(level), rows.spans[level]
            new[name] = {}
            for path, block in held[name].items():
                total = written[path][span].astype(block.dtype)
                for below in range(level + 1):
                    source = held[stack.name(below)].get(path)
                    if source is not None:
                        passed = rows_b.entering[below][span].astype(block.dtype)
                        total += jnp.tensordot(passed, source, 1)
                new[name][path] = total
        return new

    by_example = rows._replace(spans=[])
    return jax.lax.map(one_example, (influence, by_example, jax.tree.map(_swapped, xs)))


def _swapped(a: jax.Array) -> jax.Array:
    return jnp.moveaxis(a, 1, 0)
