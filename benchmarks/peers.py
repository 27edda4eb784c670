"""The rules beside other forms of the same: stepwise recursions, and braintrace."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import localgrad
from benchmarks.harness import (
    Plan,
    Problem,
    check_close,
    compiled,
    interleave,
    problem,
    update_of,
)
from benchmarks.report import Bar, Table

STEP_TIMING = "Milliseconds a step and the ratio to localgrad: of medians (of minima)"


def peers(plan: Plan) -> Iterator[Table | Bar]:
    """Milliseconds a step beside stepwise forms that give the same gradient."""
    for cell in plan.cells:
        yield from _exact(plan, cell)
    if "rate" in plan.cells:
        yield from _traces(plan)


def _exact(plan: Plan, cell: str) -> Iterator[Table | Bar]:
    (units, _), (steps, few) = plan.main, plan.exact
    short = problem(cell, units, few, plan.batch)
    stepwise = compiled(stepwise_rtrl(short), (short.params, short.batch))
    same = compiled(*update_of(localgrad.rtrl, short))
    check_close(same()[0], stepwise(), f"localgrad rtrl beside stepwise RTRL, {cell} cell")
    ours, theirs = f"localgrad rtrl, T={steps}", f"stepwise M <- J M + I, T={few}"
    windowed = compiled(*update_of(localgrad.rtrl, problem(cell, units, steps, plan.batch)))
    calls = {ours: windowed, theirs: stepwise}
    found = interleave(plan, calls, ours, {ours: steps, theirs: few})
    title = f"Exact RTRL: {cell} cell, N={units}, B={plan.batch}"
    note = f"{STEP_TIMING}. Same gradients, checked at T={few}."
    yield Table(title, note, ["", "a step"], [[name, found[name]] for name in found])
    claim = f"rtrl, {cell}, N={units}: time of stepwise RTRL / rtrl"
    yield Bar(claim, found[theirs].ratio, 20.0, at_least=True)


def _traces(plan: Plan) -> Iterator[Table | Bar]:
    units, steps = plan.main
    task = problem("rate", units, steps, plan.batch)
    ours = "localgrad eprop"
    calls = {ours: compiled(*update_of(localgrad.eprop, task))}
    expected = calls[ours]()[0]
    rivals = {"stepwise RFLO traces": compiled(stepwise_rflo(task), (task.params, task.batch))}
    missing = importlib.util.find_spec("braintrace") is None
    if not missing:
        rivals["braintrace D_RTRL"] = braintrace_d_rtrl(task)
    for name, call in rivals.items():
        check_close(call(), expected, f"{name} beside {ours}")
    rflo = functools.partial(localgrad.rflo, feedback="symmetric")
    calls |= rivals | {"localgrad rflo": compiled(*update_of(rflo, task))}
    check_close(calls["localgrad rflo"]()[0], expected, "rflo beside eprop")
    found = interleave(plan, calls, ours, dict.fromkeys(calls, steps))
    title = f"One trace a synapse: rate cell, N={units}, B={plan.batch}, T={steps}"
    note = f"{STEP_TIMING}. Same gradients, checked."
    if missing:
        note += " Left out: braintrace D_RTRL, not installed."
    yield Table(title, note, ["", "a step"], [[name, found[name]] for name in found])
    slower = max(found[name].median_ms for name in (ours, "localgrad rflo"))
    for name in rivals:
        claim = f"eprop and rflo, rate, N={units}: time of {name} / ours"
        yield Bar(claim, found[name].median_ms / slower, 10.0, at_least=True)


def stepwise_rtrl(task: Problem) -> Callable[[Any, localgrad.Batch], Any]:
    """Exact RTRL as its recursion says: M <- J M + I, one step at a time.

    For any cell whose carry is its output. J and I come from `jax.jacrev`, one example each.
    """
    cell, readout = task.model.cells[0], task.model.readout
    assert readout is not None

    def advance(params: Any, hidden: jax.Array, x: jax.Array) -> jax.Array:
        return cell.apply({"params": params}, hidden, x)[0]

    jacobians = jax.vmap(jax.jacrev(advance, argnums=(0, 1)), (None, 0, 0))

    def gradient(params: Any, batch: localgrad.Batch) -> Any:
        own = params["cells_0"]
        examples, steps, width = batch.inputs.shape
        hidden = cell.initialize_carry(jax.random.key(0), (examples, width))
        influence = jax.tree.map(lambda p: jnp.zeros((*hidden.shape, *p.shape), p.dtype), own)

        def step(so_far: Any, xy: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            hidden, influence, grads = so_far
            immediate, jacobian = jacobians(own, hidden, xy[0])
            influence = jax.tree.map(
                lambda m, i: jnp.einsum("bij,bj...->bi...", jacobian, m) + i, influence, immediate
            )
            hidden = advance(own, hidden, xy[0])
            by_readout, credit = _readout_credit(readout, params["readout"], hidden, xy[1])
            by_cell = jax.tree.map(lambda m: jnp.einsum("bi,bi...->...", credit, m), influence)
            found = {"cells_0": by_cell, "readout": by_readout}
            return (hidden, influence, jax.tree.map(jnp.add, grads, found)), None

        start = hidden, influence, jax.tree.map(jnp.zeros_like, params)
        (_, _, grads), _ = jax.lax.scan(step, start, _time_first(batch))
        return jax.tree.map(lambda g: g / steps, grads)

    return gradient


def stepwise_rflo(task: Problem) -> Callable[[Any, localgrad.Batch], Any]:
    """RFLO with symmetric feedback as its recursion says: one trace a synapse and example."""
    cell, readout = task.model.cells[0], task.model.readout
    assert isinstance(cell, localgrad.RateCell) and readout is not None
    alpha = cell.alpha

    def gradient(params: Any, batch: localgrad.Batch) -> Any:
        own = params["cells_0"]
        weights = _rows(own)  # [N, I + N + 1]
        examples, steps, width = batch.inputs.shape
        hidden = jnp.zeros((examples, weights.shape[0]))

        def step(so_far: Any, xy: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            hidden, trace, grads, by_readout = so_far
            pre = jnp.concatenate([xy[0], hidden, jnp.ones((examples, 1))], axis=-1)
            rate = jnp.tanh(pre @ weights.T)
            immediate = (1 - rate**2)[:, :, None] * pre[:, None, :]
            trace = (1 - alpha) * trace + alpha * immediate
            hidden = (1 - alpha) * hidden + alpha * rate
            found, credit = _readout_credit(readout, params["readout"], hidden, xy[1])
            grads += jnp.einsum("bn,bnm->nm", credit, trace)
            return (hidden, trace, grads, jax.tree.map(jnp.add, by_readout, found)), None

        trace = jnp.zeros((examples, *weights.shape))
        start = (
            hidden,
            trace,
            jnp.zeros_like(weights),
            jax.tree.map(jnp.zeros_like, params["readout"]),
        )
        (*_, grads, by_readout), _ = jax.lax.scan(step, start, _time_first(batch))
        return jax.tree.map(
            lambda g: g / steps, {"cells_0": _from_rows(grads, width), "readout": by_readout}
        )

    return gradient


def _rows(own: Any) -> jax.Array:
    """A rate cell's parameters as one matrix [N, I + N + 1]."""
    return jnp.concatenate([own["i"]["kernel"], own["h"]["kernel"], own["i"]["bias"][None]]).T


def _from_rows(rows: jax.Array, width: int) -> Any:
    columns = rows.T
    return {
        "i": {"kernel": columns[:width], "bias": columns[-1]},
        "h": {"kernel": columns[width:-1]},
    }


def _readout_credit(readout: Any, params: Any, hidden: jax.Array, target: jax.Array) -> Any:
    """Gradient of one step's mean loss by the readout's parameters and by the hidden state."""

    def loss(params: Any, hidden: jax.Array) -> jax.Array:
        return optax.l2_loss(readout.apply({"params": params}, hidden), target).mean()

    return jax.grad(loss, argnums=(0, 1))(params, hidden)


def _time_first(batch: localgrad.Batch) -> tuple[jax.Array, jax.Array]:
    return jnp.moveaxis(batch.inputs, 1, 0), jnp.moveaxis(batch.targets, 1, 0)


def braintrace_d_rtrl(task: Problem) -> Callable[[], Any]:
    """The same rate network under braintrace's D_RTRL, step by step."""
    brainstate: Any = importlib.import_module("brainstate")
    braintrace: Any = importlib.import_module("braintrace")
    own, cell = task.params["cells_0"], task.model.cells[0]
    xs, targets = _time_first(task.batch)
    steps, batch, width = xs.shape

    class Rate(brainstate.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rows = _rows(own)
            self.synapses = braintrace.nn.Linear(
                rows.shape[1] - 1, len(rows), w_init=rows.T[:-1], b_init=rows.T[-1]
            )

        def init_state(self, batch_size: int | None = None, **_: Any) -> None:
            self.hidden = brainstate.HiddenState(jnp.zeros((batch_size, cell.features)))

        def update(self, x: jax.Array) -> jax.Array:
            hidden = self.hidden.value
            rate = jnp.tanh(self.synapses(jnp.concatenate([x, hidden], axis=-1)))
            self.hidden.value = (1 - cell.alpha) * hidden + cell.alpha * rate
            return self.hidden.value

    given = task.params["readout"]
    readout = brainstate.nn.Linear(*given["kernel"].shape, given["kernel"], given["bias"])
    network = Rate()
    learner = braintrace.compile(network, braintrace.D_RTRL, xs[0], batch_size=batch)
    learned = {"cell": network.synapses.weight, "readout": readout.weight}

    def loss(x: jax.Array, target: jax.Array) -> jax.Array:
        return optax.l2_loss(readout(learner(x)), target).mean()

    @brainstate.transform.jit
    def run(xs: jax.Array, targets: jax.Array) -> Any:
        learner.reset_state(batch)
        network.hidden.value = jnp.zeros_like(network.hidden.value)
        found = learner.etrace_grad(xs, targets, step_fn=loss, weights=learned)
        rows = jnp.concatenate([found["cell"]["weight"], found["cell"]["bias"][None]]).T
        by_readout = {"kernel": found["readout"]["weight"], "bias": found["readout"]["bias"]}
        return {"cells_0": _from_rows(rows, width), "readout": by_readout}

    return functools.partial(run, xs, targets)
