"""RTRL, whole (`rtrl`) or sparsified to each parameter's own unit (`snap`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contraction import contract, outer, pres
from localgrad.core.credit import assign, input_credit, sweep
from localgrad.core.forward import DIAGONAL
from localgrad.core.locality import require_real
from localgrad.core.params import Leaves, Path, accumulator, added, placed, under
from localgrad.core.rule import (
    Frame,
    LearningRule,
    Loss,
    Recipe,
    Window,
    even_window,
    windowed_rule,
)
from localgrad.core.stack import Pass, Stack, encoded_each, run
from localgrad.core.steps import examples_first, length, one_row, over_examples, row
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
    r"""SnAp-1: RTRL's influence with only each parameter's effect on its own unit kept.

    For a parameter of unit i, with `J_t` the full Jacobian of the step::

        m_t = J_t[i, i] m_{t-1} + ds_{t,i}/dW             update = sum_t (dL_t/ds_{t,i}) m_t

    `J_t[i, i]` holds the unit's own dynamics, as in `eprop`, and the unit's synapse onto itself:
    the diagonal of each recurrent kernel. In an LSTM that makes the trace of h live.

    *Estimates* BPTT's gradient without the paths that visit another unit in between: biased, with
    no variance; exact where the recurrent kernels are diagonal. In a stack, lower cells and the
    encoder are credited as by `eprop`. Readout parameters get their exact gradient. *Costs* what
    `eprop` costs (one eligibility for each parameter, example and state component).

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        order: 1. On dense recurrent layers SnAp-2 and above are exact RTRL.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and influence persist from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`), needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is an `EligibilityState`.

    Raises:
        ValueError: for an `order` other than 1, by name for a cell it cannot credit, and as in
            `eprop`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.snap(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> updates["cells_0"]["hn"]["kernel"].shape
        (8, 8)

    Reference:
        Menick, Elsen, Evci, Osindero, Simonyan and Graves, "A practical sparse approximation for
        real time recurrent learning", 2020, https://arxiv.org/abs/2006.07232
    """
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
    r"""Real-time recurrent learning: the exact gradient, forward in time.

    With `s_t` the model's whole carry, `J_t = ds_t/ds_{t-1}`, and `M_t = ds_t/dW` the influence::

        M_t = J_t M_{t-1} + I_t                            update = sum_t (dL_t/ds_t) M_t

    Within a window of W steps this is done in reverse (Schmidhuber): with `g` and `M_window` from W
    steps of backpropagation, `A` the window's Jacobian and `c_0` the credit of the carry that
    entered it, `g + c_0 M_0` is the same number, and the next influence is `A M_0 + M_window`.

    *Estimates* BPTT's gradient without bias or variance, however a stream is split (with parameters
    that stay fixed; while they learn, M mixes Jacobians of different parameters). *Costs*
    O(N^3 + N^4 / W) a step and example instead of O(N^4), and an influence of N S P numbers for
    each example. In a stack the influence is kept in blocks (carry of cell l) x (parameters of cell
    k <= l and of the encoder); the readout has none and gets its exact gradient.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry and influence persist from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        max_influence_bytes: refuse to allocate more than this for the influence.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`), needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is an `InfluenceState`.

    Raises:
        ValueError: if the influence would not fit, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.rtrl(model, optax.l2_loss, batch_size=4)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.influence["cells_0"][("cells_0", "hn", "kernel")].shape  # [B, N, N, N]
        (4, 8, 8, 8)

    Reference:
        Williams and Zipser, "A learning algorithm for continually running fully recurrent neural
        networks", Neural Computation, 1989, https://doi.org/10.1162/neco.1989.1.2.270;
        Schmidhuber, "A fixed size storage O(n^3) time complexity learning algorithm for fully
        recurrent continually running networks", Neural Computation, 1992,
        https://doi.org/10.1162/neco.1992.4.2.243
    """

    def begin(stack: Stack, params: Leaves, x: Any) -> InfluenceState:
        carry = stack.pack(stack.initial)
        influence = {
            stack.name(level): {
                path: jnp.zeros(shape, accumulator(params[path]))
                for path, shape in _blocks(stack, params, level, length(x)).items()
            }
            for level in stack.levels
        }
        return InfluenceState(jnp.zeros(()), carry, jax.tree.map(jnp.copy, carry), influence)

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
        for level in stack.levels:
            require_real(stack.cells[level], stack.initial[level], stack.name(level), "rtrl")
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
        credits=_credits,
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


def _blocks(stack: Stack, params: Leaves, level: int, batch: int) -> dict[Path, tuple[int, ...]]:
    """Shapes of a cell's influence, by parameter path."""
    size = _size(stack.initial[level])
    return {path: (batch, size, *params[path].shape) for path in _reaching(stack, params, level)}


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


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    remembered = {path for level in stack.levels for path in _reaching(stack, params, level)}
    return {
        path: "exact, whole past (influence)" if path in remembered else "exact, no memory needed"
        for path in params
    }


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
    return grads, Rows(
        spans=[span for span, *_ in cells],
        entering=[jnp.moveaxis(entering, 1, 0) for _, entering, _, _ in cells],
        received=[examples_first(received, 1) for *_, received, _ in cells],
        posts=[jax.tree.map(_example_row_step, credit.posts) for *_, credit in cells],
        others=[examples_first(credit.others, 1) for *_, credit in cells],
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
    """M_T = A M_0 + M_window, block by block and example by example."""
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
            written |= encoded_each(stack.encoder, params, x, rows_b.encoded)
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
    at = (influence, by_example, examples_first(xs, 1))
    return over_examples(lambda at: ((), one_example(at)), at)[1]
