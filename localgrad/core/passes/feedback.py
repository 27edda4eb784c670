"""How the error reaches the cells of a local rule: through the readout, or by fixed weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contract.noise import require_key
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import INPUT
from localgrad.core.params import Leaves, Path

Feedback = str | Any


class Plasticity(NamedTuple):
    """How adaptive feedback weights learn, once a call.

    Attributes:
        rate: their learning rate.
        decay: their weight decay, a rate of its own multiplied by `rate`.
    """

    rate: float
    decay: float


def require_feedback(
    rule: str,
    feedback: Feedback,
    key: jax.Array | None,
    rate: float | None = None,
    decay: float = 0.0,
) -> Plasticity | None:
    """Raises for feedback that no model can make good; returns how it learns, if it does."""
    adaptive = isinstance(feedback, str) and feedback == "adaptive"
    if isinstance(feedback, str):
        if feedback not in ("symmetric", "random", "adaptive"):
            raise ValueError(
                'feedback must be "symmetric", "random", "adaptive", or an array (N, O), or one a '
                f"cell; got {feedback!r}."
            )
        if feedback != "symmetric" and key is None:
            raise ValueError(
                f'{rule}(feedback="{feedback}") draws its weights: pass key=jax.random.key(seed).'
            )
    if key is not None:
        require_key(key)
        if not isinstance(feedback, str) or feedback == "symmetric":
            shown = repr(feedback) if isinstance(feedback, str) else "weights that are given"
            raise ValueError(
                f"{rule} got a key, but with feedback={shown} it draws nothing. Leave key out, or "
                'use feedback="random" or "adaptive".'
            )
    if not adaptive and (rate is not None or decay):
        raise ValueError(
            f"feedback_rate={rate} and feedback_decay={decay} are for weights that learn; got "
            f'feedback={feedback!r}. Use feedback="adaptive".'
        )
    if not adaptive:
        return None
    if rate is None or not (0 <= rate < np.inf and 0 <= decay < np.inf):
        raise ValueError(
            f'{rule}(feedback="adaptive") learns its weights: pass feedback_rate, 0 or more, such '
            f"as the readout's learning rate, and feedback_decay, 0 or more; got {rate}, {decay}."
        )
    return Plasticity(float(rate), float(decay))


def feedback_settings(feedback: Feedback, plasticity: Plasticity | None) -> dict[str, Any]:
    """What a rule says of its feedback."""
    rates = {} if plasticity is None else plasticity._asdict()
    return {"feedback": feedback} | {f"feedback_{name}": rate for name, rate in rates.items()}


Shapes = dict[str, Any]
"""By name of the cell, `ShapeDtypeStruct` (N, O), for each output array one."""


def cell_shapes(rule: str, stack: Stack) -> Shapes:
    """What every cell's feedback weights look like, by its name."""
    if stack.readout is None:
        raise ValueError(
            f"{rule}: feedback weights send the error of a readout to the cells, but this model "
            "has no readout. Wrap it: localgrad.Network((cell,), readout=nn.Dense(O)) (NNX: "
            'localgrad.NNXNetwork), or use feedback="symmetric".'
        )
    _require_vectors(rule, stack)
    return {
        stack.name(level): weights_for(stack.outputs, units_of(stack, level))
        for level in stack.levels
    }


def weights_for(outputs: Any, units: int) -> Any:
    """What weights from outputs, leaves [B, O], to so many units look like, leaves (N, O)."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            (units, a.shape[-1]), jnp.promote_types(a.dtype, jnp.float32)
        ),
        outputs,
    )


class LastMap(NamedTuple):
    """The last map of a model, whose transpose feedback weights stand in for.

    Attributes:
        receiver: the name of the cell whose outputs it takes.
        like: what the weights look like, `ShapeDtypeStruct` (N, O), for each output array one.
        kernel: the path of its kernel, or None if it is the readout.
        site: its number among the synapses of the last cell, or None if it is the readout.
    """

    receiver: str
    like: Any
    kernel: Path | None
    site: int | None


def last_map(rule: str, stack: Stack, params: Leaves) -> LastMap:
    """The readout, or where there is none the one input synapse of the last cell."""
    _require_vectors(rule, stack)
    top = len(stack.cells) - 1
    if stack.readout is not None:
        like = weights_for(stack.outputs, units_of(stack, top))
        return LastMap(stack.name(top), like, None, None)
    cell = stack.cells[top]
    sites = [k for k, site in enumerate(cell.sites) if site.role == INPUT]
    ways = cell.reads_x + sum(site.reads_x for site in cell.sites)  # from x into the cell
    layer = cell.sites[sites[0]].layer.path if len(sites) == ways == 1 else ()
    kernel = (*stack.prefixes[top], *layer, "kernel")
    like = weights_for(stack.outputs, units_of(stack, max(top - 1, 0)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(like)]
    if not top or kernel not in params or shapes != [params[kernel].shape]:
        outputs = jax.tree.map(lambda a: a.shape[-1], stack.outputs)
        raise ValueError(
            f"{rule}: feedback weights stand in for the last map (N, O) of a model. This one ends "
            f"neither with a readout nor with a cell that one layer of O = {outputs} units feeds, "
            "such as localgrad.LeakyCell. Wrap it: localgrad.Network((cell,), readout=nn.Dense(O)) "
            '(NNX: localgrad.NNXNetwork), or use feedback="symmetric".'
        )
    return LastMap(stack.name(top - 1), like, kernel, sites[0])


def _require_vectors(rule: str, stack: Stack) -> None:
    """Raises unless all output arrays are [B, O]."""
    if any(leaf.ndim != 2 for leaf in jax.tree.leaves(stack.outputs)):
        raise ValueError(
            f"{rule}: feedback weights need output arrays [B, O]; the model gives "
            f"{jax.tree.map(jnp.shape, stack.outputs)}."
        )


def units_of(stack: Stack, level: int) -> int:
    """N of a cell."""
    return jax.tree.leaves(stack.initial[level])[0].shape[-1]


def make_feedback(
    rule: str, feedback: Feedback, key: jax.Array | None, shapes: Shapes
) -> dict[str, Any]:
    """Feedback weights by the name of the cell that receives the error.

    Random weights are drawn from N(0, 1 / N); those that adapt begin so.

    Args:
        rule: the rule's name, for messages.
        feedback: as the factory got it; not `"symmetric"`.
        key: a typed key, for weights that are drawn.
        shapes: what they look like, by name.

    Returns:
        Weights by name, leaves (N, O).
    """
    names = list(shapes)
    if isinstance(feedback, str):
        assert key is not None  # require_feedback saw to it
        keys = jax.random.split(key, len(names))
        return {name: _drawn(k, shapes[name]) for name, k in zip(names, keys, strict=True)}
    given = _by_name(rule, feedback, names)
    for name, weights in given.items():
        wanted, found = (jax.tree.map(jnp.shape, tree) for tree in (shapes[name], weights))
        if found != wanted:
            raise ValueError(
                f"{rule}: feedback of {name} must be (N, O) = {wanted}; got shape {found}."
            )
        for leaf in jax.tree.leaves(weights):
            if not isinstance(leaf, jax.core.Tracer) and not np.isfinite(np.asarray(leaf)).all():
                raise ValueError(f"{rule}: feedback of {name} holds NaN or infinity.")
    return {name: jax.tree.map(jnp.asarray, weights) for name, weights in given.items()}


def _drawn(key: jax.Array, like: Any) -> Any:
    """Random weights of a cell, leaves (N, O)."""
    leaves, treedef = jax.tree.flatten(like)
    keys = [key] if len(leaves) == 1 else jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            jax.random.normal(k, a.shape, a.dtype) / np.sqrt(a.shape[0])
            for k, a in zip(keys, leaves, strict=True)
        ],
    )


def is_symmetric(feedback: Feedback) -> bool:
    """Whether the error comes down the way the outputs came."""
    return isinstance(feedback, str) and feedback == "symmetric"


def feedback_fields(weights: Any, plasticity: Plasticity | None) -> dict[str, Any]:
    """The fields of a state that hold feedback weights, and what they have still to learn."""
    drift = None if plasticity is None else jax.tree.map(jnp.zeros_like, weights)
    return {"feedback": weights, "drift": drift}


def adapted(plasticity: Plasticity | None, state: Any) -> Any:
    """Kolen and Pollack's step, at the end of a call, of weights that learn.

    The weights follow the gradient of those they stand in for, which `state.drift` holds, summed
    over the call.
    """
    if plasticity is None:
        return state
    rate, decay = plasticity
    moved = jax.tree.map(lambda b, d: b - rate * (d + decay * b), state.feedback, state.drift)
    return state._replace(**feedback_fields(moved, plasticity))


def correlation(ys: jax.Array, q_out: Any, like: Any) -> Any:
    """What a readout of its own would learn from a cell's outputs [W, B, N]: leaves (N, O)."""

    def of(q: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.einsum("wbn,wbo->no", ys, q.astype(ys.dtype)).astype(like.dtype)

    return jax.tree.map(of, q_out, like)


def send(rule: str, name: str, q_out: Any, weights: Any, ys: Any) -> jax.Array:
    """The learning signal of a cell's outputs, the sum of B dL/d(output), [W, B, N]."""
    sent = jax.tree.map(lambda q, b: q @ b.astype(q.dtype).T, q_out, weights)
    signal = functools.reduce(jnp.add, jax.tree.leaves(sent))
    shapes = jax.tree.map(jnp.shape, ys)
    if shapes != signal.shape:
        raise ValueError(
            f"{rule}: feedback weights of {name} give one number a unit, {signal.shape}, but the "
            f"cell's outputs have shapes {shapes}. Use feedback='symmetric', or a cell whose "
            "output is its units."
        )
    return signal.astype(ys.dtype)


def _by_name(rule: str, feedback: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(feedback, Mapping):
        given = dict(feedback)
    elif isinstance(feedback, Sequence):
        given = dict(zip(names, feedback, strict=False)) if len(feedback) == len(names) else {}
    else:
        given = dict.fromkeys(names[:1], feedback)
    if sorted(given) != sorted(names):
        raise ValueError(
            f"{rule}: feedback must give one array a cell, for {names}; got "
            f"{sorted(given) or f'{len(feedback)} of them'}. With several output arrays give "
            '{"cells_0": weights in the structure of the outputs}. Cells that are not named get '
            "their credit through the model."
        )
    return given
