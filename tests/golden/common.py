"""What the golden tests share: loading arrays, streaming a rule, and laying out parameters."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import localgrad

Arrays = dict[str, np.ndarray]


def load(name: str, prefix: str = "") -> Arrays:
    """The arrays of `<name>.npz` whose key starts with `prefix`, which is taken off."""
    with np.load(Path(__file__).parent / f"{name}.npz", allow_pickle=False) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}


class Call(NamedTuple):
    """One call of a streaming rule: the steps it saw, its updates, and its state afterwards."""

    steps: slice
    updates: Any
    state: Any


def stream(
    rule: localgrad.LearningRule,
    params: Any,
    batch: localgrad.Batch,
    chunk: int = 1,
    lr: float = 0,
    carry: Any = None,
) -> tuple[list[Call], Any]:
    """Feeds `batch` to a streaming rule, `chunk` steps a call, with plain SGD after each call.

    The stream starts from `carry` if one is given. Returns the calls and the last parameters.
    """
    state, calls = rule.init(params), []
    if carry is not None:
        state = state._replace(carry=carry, initial_carry=carry)
    total = batch.inputs.shape[1]
    for start in range(0, total, chunk):
        steps = slice(start, min(start + chunk, total))
        piece = localgrad.Batch(batch.inputs[:, steps], batch.targets[:, steps])
        updates, state = rule(params, state, piece)
        calls.append(Call(steps, updates, state))
        if lr:
            params = jax.tree.map(lambda p, g: p - lr * np.asarray(g), params, updates)
    return calls, params


def learned(rule: localgrad.LearningRule, params: Any, batch: localgrad.Batch) -> Any:
    """The updates of a whole call, or summed over calls of one step if the rule is streaming."""
    state = rule.init(params)
    if state.carry is None:
        return rule(params, state, batch)[0]
    return summed(stream(rule, params, batch)[0])


def summed(calls: list[Call]) -> Any:
    """The updates of all calls."""
    return jax.tree.map(lambda *parts: sum(parts), *(call.updates for call in calls))


def assert_close(actual: Any, desired: Any, tolerance: float = 1e-12) -> None:
    """Asserts that two trees of arrays, of one structure, agree to `tolerance`, absolutely."""
    actual, desired = jax.tree.map(np.asarray, (actual, desired))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, strict=True),
        actual,
        desired,
    )


def as_batch(inputs: np.ndarray, targets: np.ndarray) -> localgrad.Batch:
    """Arrays [B, T, ...], or [T, ...] of a single sequence, as a batch."""
    if inputs.ndim == 2:
        inputs, targets = inputs[None], targets[None]
    return localgrad.Batch(inputs, targets)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the squared error, summed over the outputs: [B]. Its credit is the error itself."""
    return 0.5 * jnp.sum((outputs - targets) ** 2, axis=-1)


def inner_product(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """A loss whose credit is `targets`, whatever the outputs: [B]."""
    return jnp.sum(outputs * targets, axis=-1)


def lstm_tree(rows: np.ndarray, gates: str) -> dict[str, dict[str, np.ndarray]]:
    """Lays out [I + N + 1, 4 N] (rows x, h, 1; a block of columns a gate) as `nn.LSTMCell` does."""
    blocks = dict(zip(gates, np.split(rows, 4, axis=1), strict=True))
    units = blocks["i"].shape[1]
    inputs = rows.shape[0] - units - 1
    tree = {f"i{gate}": {"kernel": block[:inputs]} for gate, block in blocks.items()}
    for gate, block in blocks.items():
        tree[f"h{gate}"] = {"kernel": block[inputs:-1], "bias": block[-1]}
    return tree
