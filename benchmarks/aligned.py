"""P-TNCN: a step beside the matrix products it is made of, over depth, and an epoch beside BPTT's.

Letters: B batch, T steps, D numbers of a frame, H units of a layer, L layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import localgrad
from benchmarks.harness import Plan, compiled, interleave
from benchmarks.report import Bar, Table

SYMBOLS = 49  # of Penn Treebank, as the authors code it
BARE, UPDATE, ONLINE = "its matrix products alone", "lra, update", "lra, learning online"
NESTEROV = optax.sgd(0.075, momentum=0.95, nesterov=True)


class Streams(NamedTuple):
    """A model with parameters and one-hot symbols, each to be predicted from those before."""

    model: Any
    params: Any
    batch: localgrad.Batch


def streams(model: Any, batch: int, steps: int, symbols: int = SYMBOLS) -> Streams:
    """Random symbols for a model."""
    keys = jax.random.split(jax.random.key(0), 3)
    codes = jax.random.randint(keys[0], (batch, steps + 1), 0, symbols)
    x = jax.nn.one_hot(codes, symbols)
    carry = model.initialize_carry(keys[1], x[:, 0].shape)
    params = jax.jit(model.init)(keys[2], carry, x[:, 0])["params"]
    return Streams(model, params, localgrad.Batch(x[:, :-1], x[:, 1:]))


def network(units: int, layers: int, batch: int, steps: int, stacked: bool = False) -> Streams:
    """A P-TNCN."""
    return streams(localgrad.PTNCN((units,) * layers, SYMBOLS, stacked=stacked), batch, steps)


def online(task: Streams) -> tuple[Callable, tuple]:
    """Learning with an update every step, and its arguments."""
    batch = len(task.batch.inputs)
    rule = localgrad.lra(task.model, localgrad.categorical_cross_entropy, batch_size=batch)
    tx = optax.chain(rule, NESTEROV)
    learn = functools.partial(localgrad.learn, tx, chunk=1)
    return learn, (task.params, tx.init(task.params), task.batch)


def update(task: Streams) -> tuple[Callable, tuple]:
    """The rule's updates of all steps at fixed parameters, each step's kept apart and summed."""
    batch = len(task.batch.inputs)
    rule = localgrad.lra(task.model, localgrad.categorical_cross_entropy, batch_size=batch)
    return functools.partial(_steps, rule), (task.params, rule.init(task.params), task.batch)


def _steps(rule: Any, params: Any, state: Any, batch: localgrad.Batch) -> Any:
    def step(so_far: tuple, piece: localgrad.Batch) -> tuple[tuple, None]:
        params, state = so_far
        made, state = rule(params, state, jax.tree.map(lambda a: a[:, None], piece))
        return (optax.apply_updates(params, made), state), None

    pieces = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), batch)
    return jax.lax.scan(step, (params, state), pieces)[0]


def products(task: Streams) -> tuple[Callable, tuple]:
    """What a step multiplies and nothing else, and its arguments.

    States meet matrices, errors meet those of W transposed (as many products as with E), and outer
    products give the matrices of the next step, so that none can be left out.
    """
    size = len(task.batch.inputs)
    weights = {name: w for name, w in task.params.items() if name[0] != "E"}

    def source(width: int) -> jax.Array:  # such that a mean over rows is what is made of a matrix
        return jnp.full((size, width), 1 / (size * width) ** 0.5)

    pres = {name: source(w.shape[-2]) for name, w in weights.items()}
    errors = {name: source(w.shape[-1]) for name, w in weights.items() if name[0] == "W"}

    def run(weights: Any, pres: Any, errors: Any, steps: jax.Array) -> Any:
        def step(so_far: tuple, _: Any) -> tuple[tuple, None]:
            made = {n: _outer(pres[n], pres[n] @ w) for n, w in so_far[0].items()}
            return (made, {n: errors[n] @ made[n].mT for n in errors}), None

        first = {n: errors[n] @ weights[n].mT for n in errors}
        return jax.lax.scan(step, (weights, first), steps)[0]

    return run, (weights, pres, errors, jnp.arange(task.batch.inputs.shape[1]))


def _outer(pre: jax.Array, post: jax.Array) -> jax.Array:
    return jnp.einsum("bi,bj->ij", pre, post)


def recurrent(units: int, layers: int, batch: int, steps: int) -> Streams:
    """A stack of LSTMs."""
    cells = tuple(nn.LSTMCell(units) for _ in range(layers))
    return streams(localgrad.Network(cells, readout=nn.Dense(SYMBOLS)), batch, steps)


def bptt(task: Streams) -> tuple[Callable, tuple]:
    """BPTT through the whole call, an update at its end, and its arguments."""
    rule = localgrad.bptt(task.model, optax.softmax_cross_entropy)
    tx = optax.chain(rule, NESTEROV)

    def learn(params: Any, state: Any, batch: localgrad.Batch) -> tuple:
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return learn, (task.params, tx.init(task.params), task.batch)


def aligned(plan: Plan) -> Iterator[Table | Bar]:
    """A step beside its products, steps over depth, and an epoch beside BPTT's."""
    batch, steps = plan.aligned_batch, plan.aligned_steps
    rows = []
    for units in plan.aligned_units:
        task = network(units, 2, batch, steps)
        calls = {
            BARE: compiled(*products(task)),
            UPDATE: compiled(*update(task)),
            ONLINE: compiled(*online(task)),
        }
        found = interleave(plan, calls, BARE, dict.fromkeys(calls, steps))
        rows += [[f"H={units}, {name}", timing] for name, timing in found.items()]
        yield Bar(f"lra, H={units}, B={batch}: an online step / {BARE}", found[ONLINE].ratio, 1.5)
    title = f"P-TNCN of two layers, D={SYMBOLS}, B={batch}: one step"
    yield Table(title, "Milliseconds a step, and the ratio to the products.", ["", "a step"], rows)

    units, rows = plan.aligned_width, {}
    for layers in plan.aligned_depths:
        stack = recurrent(units, layers, batch, steps)
        calls = {"LSTM stack, BPTT": compiled(*bptt(stack))}
        for name, stacked in (("P-TNCN, listed", False), ("P-TNCN, stacked", True)):
            if layers > 1 or not stacked:
                calls[name] = compiled(*online(network(units, layers, batch, steps, stacked)))
        found = interleave(plan, calls, "LSTM stack, BPTT", dict.fromkeys(calls, steps))
        for name in ("LSTM stack, BPTT", "P-TNCN, listed", "P-TNCN, stacked"):
            rows.setdefault(name, [name]).append(found.get(name, "-"))
    title = f"Depth: H={units} a layer, B={batch}, T={steps}; the P-TNCN updates every step"
    note = "Milliseconds a step, and the ratio to BPTT of LSTMs as wide."
    yield Table(title, note, ["", *(f"{n} layers" for n in plan.aligned_depths)], [*rows.values()])

    rows = []
    for units in plan.aligned_units:
        task = network(units, 2, batch, steps)
        budget = _count(task.params)
        rival = next(
            recurrent(n, 1, batch, steps)
            for n in itertools.count(_guess(budget), -1)
            if 4 * n * (n + SYMBOLS + 1) + (n + 1) * SYMBOLS <= budget
        )
        calls = {"BPTT": compiled(*bptt(rival)), "online": compiled(*online(task))}
        found = interleave(plan, calls, "BPTT", dict.fromkeys(calls, steps))
        name = f"P-TNCN, 2 x {units}, {budget:,} parameters, online"
        rows.append([f"LSTM, {_count(rival.params):,} parameters, BPTT", found["BPTT"]])
        rows.append([name, found["online"]])
    title = f"An epoch at equal parameters: B={batch}, T={steps}"
    note = "Milliseconds for each step of the data, and the ratio to BPTT."
    yield Table(title, note, ["", "a step"], rows)


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _guess(budget: int) -> int:
    """More units than an LSTM of so many parameters has."""
    return int((budget / 4) ** 0.5) + 1
