"""A row made ready for a problem: its network, what trains it, and what scores it.

Letters: S runs, C calls, B streams, T steps of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.datasets import scored
from experiments.ptncn.checkpoints import Run
from experiments.ptncn.problems import Problem
from experiments.ptncn.rows import Row, parameters_of, units_for
from experiments.train import one_by_one


class Learner(NamedTuple):
    """A row made ready for a problem.

    Attributes:
        row: what learns.
        problem: what is learned.
        model: its network.
        units: of a layer.
        parameters: how many.
        init: `keys [S] -> Run` of untrained networks.
        advance: `(Run, rates [S], pieces [S, C, ...]) -> (Run, losses [S, C, updates])`, compiled.
    """

    row: Row
    problem: Problem
    model: Any
    units: int
    parameters: int
    init: Callable[[jax.Array], Run]
    advance: Callable[[Run, jax.Array, Any], tuple[Run, jax.Array]]


def make_learner(row: Row, problem: Problem, budget: int) -> Learner:
    """Builds the network and what trains it.

    Args:
        row: what learns.
        problem: what is learned.
        budget: how many parameters it may have.
    """
    units = units_for(row, problem, budget)
    model = row.model(units, problem.size, problem.outputs)
    example = jax.ShapeDtypeStruct((problem.size,), jnp.float32)

    def tx_of(rate: Any, key: jax.Array) -> Any:
        assert row.rule is not None
        rule = row.rule(model, row.loss(problem.outputs), problem.batch_size, key, example)
        return optax.chain(rule, row.optimizer(rate, problem.batch_size))

    def params_of(key: jax.Array) -> Any:
        x = jnp.zeros((1, problem.size))
        return model.init(key, model.initialize_carry(key, x.shape), x)["params"]

    def init(keys: jax.Array) -> Run:
        def one(key: jax.Array) -> Run:
            param_key, rule_key = jax.random.split(key)
            params = params_of(param_key)
            state = () if row.rule is None else tx_of(1.0, rule_key).init(params)
            return Run(params, state)

        return one_by_one(one, keys)

    def advance(run: Run, rate: jax.Array, pieces: Any) -> tuple[Run, jax.Array]:
        tx = tx_of(rate, jax.random.key(0))  # a key matters to `init` alone

        def call(run: Run, piece: Any) -> tuple[Run, jax.Array]:
            batch = problem.expand(piece)
            if row.gives != "predictions":  # nothing corrects these: they see what is scored
                batch = batch._replace(mask=scored(batch))
            chunk = row.chunk or batch.targets.shape[1]
            params, opt_state, losses = localgrad.learn(tx, *run, batch, chunk)
            return Run(params, opt_state), losses

        return jax.lax.scan(call, run, pieces)

    return Learner(
        row=row,
        problem=problem,
        model=model,
        units=units,
        parameters=parameters_of(model, problem.size),
        init=init,
        advance=jax.jit(jax.vmap(advance)),
    )


def make_score(
    learner: Learner, model: Any = None, problem: Problem | None = None
) -> Callable[[Any, Any], np.ndarray]:
    """Compiles what scores networks on pieces, with frozen parameters.

    Args:
        learner: whose networks they are.
        model: what runs in place of its model, such as one that corrects more or less.
        problem: in place of its problem.

    Returns:
        `(params [S, ...], pieces [C, ...]) -> [S, T]`, the mean score of each step of a call; NaN
        where none is scored. What a sequence is scored at is the mean over steps weighted by how
        often each is, which is the last entry: [S, T + 1].
    """
    row = learner.row
    model = learner.model if model is None else model
    problem = learner.problem if problem is None else problem
    value, loss = row.score(problem.outputs), row.loss(problem.outputs)

    def score(params: Any, pieces: Any) -> jax.Array:
        def call(carry: Any, piece: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            batch = problem.expand(piece)
            _, outputs, carry = localgrad.evaluate(model, loss, params, batch, carry)
            weight = scored(batch)
            values = value(outputs, batch.targets)
            values = values.sum(-1) if values.ndim == 3 else values  # pixels
            return carry, ((values * weight).sum(0), weight.sum(0))

        size = jax.eval_shape(problem.expand, jax.tree.map(lambda a: a[0], pieces)).inputs.shape
        carry = model.initialize_carry(jax.random.key(0), (size[0], size[-1]))
        _, (values, weights) = jax.lax.scan(call, carry, pieces)
        values, weights = values.sum(0), weights.sum(0)
        values = jnp.append(values, values.sum()) / jnp.append(weights, weights.sum())
        return problem.outputs.scale * values

    compiled = jax.jit(jax.vmap(score, in_axes=(0, None)))
    return lambda params, pieces: np.asarray(compiled(params, jax.tree.map(jnp.asarray, pieces)))
