"""`fit_ridge`: the best linear readout of a network, in one pass over the data."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contract.checks import is_integer, require_batch
from localgrad.core.contract.objective import weights_of
from localgrad.core.contract.rule import Batch
from localgrad.core.model.stack import Stack, assemble, parts
from localgrad.core.params import Leaves, accumulator, flatten, leaves_of
from localgrad.core.passes.regression import (
    KERNEL,
    as_readout,
    regressors,
    require_linear,
    require_ridge,
    shape_of,
)
from localgrad.core.passes.run import run
from localgrad.core.steps import even_window, merge_axes
from localgrad.core.windows import Window, over_windows


def fit_ridge(
    model: Any,
    params: Any,
    batches: Batch | Iterable[Batch],
    *,
    ridge: float = 1e-6,
    washout: int = 0,
) -> Any:
    r"""Gives a network the readout that is best for its cells as they are, in closed form.

    With `x_t` [M] the highest cell's outputs and a 1 for the bias, and `d_t` the weight of a step,
    the readout W is the one that minimizes, over all steps and examples of all batches::

        sum d_t |x_t W - y_t|^2 + ridge |W|^2

    the bias penalized like the rest. It is where `localgrad.force` without forgetting arrives if
    its readout begins at 0. `ridge` is chosen by the loss on other data.

    Each batch holds whole sequences, from the initial carry. *Costs* a forward pass, M (M + O)
    numbers of memory and O(M^2) operations a step and example. The triangular factor of the rows is
    kept, and not their correlations, which in float32 would lose half of the digits.

    Args:
        model: a `localgrad.Network` whose readout is an `nn.Dense`, or a `localgrad.NNXNetwork`,
            through `localgrad.from_nnx`, whose readout is an `nnx.Linear`.
        params: its parameters; what they hold for the readout does not matter.
        batches: a `Batch`, or an iterable of some, gone through once; targets [B, T, O] floating.
        ridge: what a squared weight counts, > 0; the squared error of one step and example
            counts 1.
        washout: how many steps to leave out at the start of each sequence and after each reset,
            while the initial carry still matters.

    Returns:
        The parameters with another readout.

    Raises:
        ValueError: if the model has no readout or one that is not linear, `ridge` is not
            positive, `washout` is no integer >= 0, there is no batch, no step of them counts, a
            weight is negative, or targets are classes or do not fit the outputs.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((localgrad.ReservoirCell(50),), readout=nn.Dense(1))
        >>> x = jnp.sin(0.3 * jnp.arange(201.0)).reshape(1, -1, 1)  # [B, T, I]
        >>> batch = localgrad.Batch(x[:, :-1], x[:, 1:])
        >>> carry = model.initialize_carry(jax.random.key(0), (1, 1))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> params = localgrad.fit_ridge(model, params, batch, washout=50)
        >>> loss, outputs, _ = localgrad.evaluate(model, optax.l2_loss, params, batch)
        >>> bool(jnp.abs(outputs - batch.targets)[:, 50:].max() < 1e-2)
        True

    Reference:
        Jaeger, "The echo state approach to analysing and training recurrent neural networks", GMD
        Report 148, 2001, https://www.ai.rug.nl/minds/uploads/EchoStatesTechRep.pdf
    """
    ridge = require_ridge(ridge)
    if not is_integer(washout, 0):
        raise ValueError(f"washout must be an integer >= 0, in time steps; got {washout!r}.")
    leaves = leaves_of(params)
    require_linear("fit_ridge", parts(model)[3], leaves)
    size, outputs = shape_of(leaves)
    dtype = accumulator(leaves[KERNEL])
    start = jnp.eye(size, size + outputs, dtype=dtype) * ridge**0.5
    absorb = jax.jit(functools.partial(_absorb, model, washout))
    factor, seen = start, jnp.zeros(())
    for batch in _each(batches):
        factor, weight = absorb(leaves, factor, batch)
        seen += weight
    if factor is start:
        raise ValueError("batches holds no batch. A generator can be gone through only once.")
    if _known(seen) and not seen:
        raise ValueError(
            f"batches hold no step to learn from: with washout={washout}, and by their masks, none "
            "of any sequence counts. Give longer sequences or a shorter washout."
        )
    found = jax.scipy.linalg.solve_triangular(factor[:, :size], factor[:, size:])
    readout = as_readout(leaves, found)
    readout = {path: leaf.astype(leaves[path].dtype) for path, leaf in readout.items()}
    return flatten(params)[1](leaves | readout)


def _each(batches: Any) -> Iterator[Batch]:
    """Batch after batch; raises for what is none, and for negative weights."""
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"batches must be a localgrad.Batch or an iterable of some; got {batches!r}."
        )
    for batch in [batches] if isinstance(batches, Batch) else batches:
        if not isinstance(batch, Batch):
            raise ValueError(
                f"batches must hold localgrad.Batch(inputs, targets); got {type(batch).__name__}."
            )
        if batch.mask is not None and _known(batch.mask) and np.any(np.asarray(batch.mask) < 0):
            raise ValueError(
                f"batch.mask must be 0 or more: a step's weight; got {np.min(batch.mask)}."
            )
        yield batch


def _known(a: Any) -> bool:
    """Whether an array's numbers are there, and not traced."""
    return not isinstance(a, jax.core.Tracer)


def _absorb(
    model: Any, washout: int, leaves: Leaves, factor: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The triangular factor [M, M + O] of all rows so far and of a batch's, and the batch's weight.

    In each row inputs come before targets.
    """
    examples, steps = require_batch(batch, None)
    stack = assemble(model, leaves, jax.tree.map(lambda a: a[:, 0], batch.inputs))
    _require_targets(stack, batch.targets, (examples, steps))
    seen = stack.see(leaves)
    weight, total = weights_of(batch.mask, examples * steps)
    if washout:
        weight = _washed(washout, weight, batch)
    if weight is not None:
        total = weight.sum()

    def body(so_far: tuple, window: Window, opening: bool, closing: bool) -> tuple[tuple, None]:
        del opening, closing
        carries, factor = so_far
        ran = run(stack, seen, carries, window.inputs, window.reset)
        xs = regressors("fit_ridge", leaves, ran.tapes[-1].ys, factor.dtype)
        rows = jnp.concatenate([xs, window.targets.astype(xs.dtype)], axis=-1)
        if window.weight is not None:
            root = jnp.sqrt(window.weight.astype(xs.dtype))[..., None]
            rows = jnp.where(root == 0, 0, root * rows)
        stacked = jnp.concatenate([factor, merge_axes(rows)])
        return (ran.carries, jnp.linalg.qr(stacked, mode="r")[: len(factor)]), None

    window = even_window(steps, max(128, len(factor) // examples))
    start = (stack.initial, factor)
    (_, factor), _ = over_windows(body, start, batch, weight, min(window, steps), True)
    return factor, total


def _washed(washout: int, weight: jax.Array | None, batch: Batch) -> jax.Array:
    """Weights [B, T] that are 0 for so many steps after the start and after each reset."""
    shape = jax.tree.leaves(batch.inputs)[0].shape[:2]
    now = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    start = jnp.zeros_like(now)
    if batch.reset is not None:
        start = jax.lax.cummax(jnp.where(batch.reset, now, 0), axis=1)
    weight = jnp.ones(shape) if weight is None else weight
    return jnp.where(now - start < washout, 0, weight)


def _require_targets(stack: Stack, targets: Any, axes: tuple[int, int]) -> None:
    """Raises unless targets are floating numbers, one for each output."""
    if not isinstance(targets, jax.Array) or not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(
            "fit_ridge takes floating targets [B, T, O], one number for each output; got "
            f"{getattr(targets, 'dtype', type(targets).__name__)}. Make classes one-hot: "
            "jax.nn.one_hot(targets, O)."
        )
    wanted = (*axes, *stack.outputs.shape[1:])
    if targets.shape != wanted:
        raise ValueError(
            f"fit_ridge takes targets [B, T, O] = {wanted}, one number for each output; got shape "
            f"{targets.shape}."
        )
