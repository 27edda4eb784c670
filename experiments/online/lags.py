"""How much of BPTT's credit a rule finds, by how long ago its cause was; and what a step costs.

The networks of `copy`, before training and as BPTT trained them, are shown episodes of one pause,
in the calls and chunks that they would learn in, but their parameters stay. What a rule says of
the cells, added up over the call, is held against the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.deep.memory import beside_carry, bytes_of
from experiments.measure import Update, costs
from experiments.online.learner import Budget, keys_of
from experiments.online.problems import LENGTH, STEPS, Problem, copied
from experiments.online.rows import ROWS, Row
from experiments.train import one_by_one

PAUSES = (1, 2, 4, 8, 16, 32)
SIZE = 16  # episodes side by side


class Price(NamedTuple):
    """What a row takes, on the shapes of `copy`.

    Attributes:
        microseconds: of a step of all streams.
        state: bytes that a stream carries beside the carry of its network.
        parameters: of the network.
    """

    microseconds: float
    state: float
    parameters: int


class TotalState(NamedTuple):
    """The sum of all updates so far."""

    total: Any


def add_up() -> optax.GradientTransformation:
    """Adds updates up in its state, as `total`, and lets none through."""

    def init(params: Any) -> TotalState:
        return TotalState(optax.tree.zeros_like(params))

    def update(updates: Any, state: TotalState, params: Any = None) -> tuple[Any, TotalState]:
        del params
        total = optax.tree.add(state.total, updates)
        return optax.tree.zeros_like(updates), TotalState(total)

    return optax.GradientTransformation(
        lambda params: TotalState(optax.tree.zeros_like(params)), update
    )


def credit(row: Row, model: Any, loss: Any, params: Any, key: jax.Array, batch: Any) -> Any:
    """What a rule says of parameters that stay, over a whole call."""
    tx = optax.chain(row.rule(model, loss, key, batch.inputs[:, 0], reduction="sum"), add_up())
    _, state, _ = localgrad.learn(tx, params, tx.init(params), batch, row.chunk or STEPS)
    return optax.tree.get(state, "total")


def cosines(name: str, problem: Problem, trained: Any, budget: Budget) -> np.ndarray:
    """Of a row's credit of the cells to BPTT's, [2, pauses, S]: fresh networks, trained ones.

    Args:
        name: of the row.
        problem: `copy`.
        trained: parameters of its kind of network, [S, ...].
        budget: what every row got.
    """
    row, exact = ROWS[name], ROWS["bptt"]
    model = row.model(budget.units, problem.outputs)
    x = problem.test.inputs[:1, 0]

    def init(key: jax.Array) -> Any:
        return model.init(key, model.initialize_carry(key, x.shape), x)["params"]

    param_keys, rule_keys, data_keys = (keys[: budget.seeds] for keys in keys_of(budget))
    fresh = one_by_one(init, param_keys)

    def at(given: tuple) -> jax.Array:
        params, rule_key, data_key, pause = given
        batch = copied(data_key, SIZE, pause)
        said, true = (
            row.there(credit(each, model, problem.loss, params, rule_key, batch))
            for each in (row, exact)
        )
        return localgrad.compare(_cells(said), _cells(true))["all"].cosine

    def of(params: Any) -> np.ndarray:
        found = [
            jax.block_until_ready(over((params, rule_keys, data_keys, jnp.full(budget.seeds, p))))
            for p in PAUSES
        ]
        return np.stack(found)

    over = jax.jit(lambda given: jax.lax.map(at, given))
    return np.stack([of(fresh), of(trained)])


def _cells(params: Any) -> dict[str, Any]:
    return {name: leaves for name, leaves in params.items() if name.startswith("cells")}


def lags() -> np.ndarray:
    """Steps from a bit to the question for it."""
    return LENGTH + np.array(PAUSES)


def prices(
    names: Sequence[str], problem: Problem, budget: Budget, streams: int, repeats: int
) -> dict[str, Price]:
    """What a call of each row takes, its updates and optimizer included, all timed in turn."""
    made, held = {}, {}
    for name in names:
        row = ROWS[name]
        model = row.model(budget.units, problem.outputs)
        x = jnp.zeros((streams, problem.test.inputs.shape[-1]))
        rule = row.rule(model, problem.loss, jax.random.key(0), x)
        carry = model.initialize_carry(jax.random.key(0), x.shape)
        params = jax.jit(model.init)(jax.random.key(1), carry, x)["params"]
        made[name] = _compiled(row.transformation(rule, row.rates[0]), row, params, streams)
        weights = row.there(jax.tree.map(np.ones_like, params))
        size = int(sum(leaf.sum() for leaf in jax.tree.leaves(weights)))
        held[name] = bytes_of(beside_carry(rule, params)) / streams, size
    took = costs(made, repeats)
    return {name: Price(1e3 * took[name].milliseconds / STEPS, *held[name]) for name in names}


def _compiled(tx: Any, row: Row, params: Any, streams: int) -> Update:
    """A call of `copy` under `learn`."""

    def call(params: Any, state: Any, batch: localgrad.Batch) -> Any:
        return localgrad.learn(tx, params, state, batch, row.chunk or STEPS)

    arguments = params, tx.init(params), copied(jax.random.key(2), streams, 4)
    return Update(jax.jit(call).lower(*arguments).compile(), arguments)
