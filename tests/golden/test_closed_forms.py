"""e-prop and SnAp-1 of the LSTM and the GRU, one step a call, against their written-out recursions.

Nobody's code here, but a few lines of NumPy a cell, forward in time, that share nothing with the
library: Bellec et al. 2020 for e-prop, Menick et al. 2020 for SnAp-1, whose traces also follow each
unit's recurrent weight on itself.

They guard against the trap of same-step dependence. An LSTM's new h = o tanh(c) depends on its new
c, so the trace of h already holds the path through c; a learning signal that credits c by way of h,
and h itself, counts that path twice. Under e-prop the gradients of the gates i, g and f are then
exactly twice too large, and look as plausible as ever.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from tests.golden.common import as_batch, assert_close, squared_error, stream

pytestmark = pytest.mark.usefixtures("x64")

BATCH, STEPS, INPUTS, UNITS = 2, 8, 3, 4
RULES = {"eprop": localgrad.eprop, "snap": localgrad.snap}

# Arrays by the name of a cell's layer ("ii" of an LSTM: from the input to gate i). A bias, where
# there is one, is the last row, below the kernel: [I, N], [N, N], [I + 1, N] or [N + 1, N].
Rows = dict[str, np.ndarray]


class Step(NamedTuple):
    """What a recursion says of one step: the gradients, and a trace [B, M, N] a state component."""

    grads: Rows
    traces: list[Rows]


def lstm(params: Any, batch: Any, carry: Any, rule: str, twice: bool = False) -> Iterator[Step]:
    """c' = f c + i g, h' = o tanh(c'): traces of c and of h. `twice` falls into the trap."""
    weights, own = rows_of(params), own_weights(params, rule)
    e_c = e_h = silent(weights)
    c, h = carry
    for x, target in steps_of(batch):
        pre = received(params, x, h)
        drive = {name: pre[name] @ weights[name] for name in pre}
        i, f, o = (sigmoid(drive["i" + gate] + drive["h" + gate]) for gate in "ifo")
        g = np.tanh(drive["ig"] + drive["hg"])
        to_c = {"i": g * i * (1 - i), "g": i * (1 - g**2), "f": c * f * (1 - f), "o": 0 * o}
        c = f * c + i * g
        h = o * np.tanh(c)
        o_to_h = np.tanh(c) * o * (1 - o)
        c_to_h = o * (1 - np.tanh(c) ** 2)
        h_to_c = sum(to_c[gate] * own[gate] for gate in "igf")
        e_c = {
            name: fade(f, e_c[name]) + fade(h_to_c, e_h[name]) + outer(pre[name], to_c[name[1]])
            for name in e_c
        }
        e_h = {
            name: fade(c_to_h, e_c[name])
            + fade(o_to_h * own["o"], e_h[name])
            + outer(pre[name], o_to_h if name[1] == "o" else 0 * o)
            for name in e_h
        }
        q = h - target
        grads = {name: fade(q, e_h[name]) + twice * fade(q * c_to_h, e_c[name]) for name in e_h}
        yield Step({name: each.sum(0) for name, each in grads.items()}, [e_c, e_h])


def gru(params: Any, batch: Any, carry: Any, rule: str) -> Iterator[Step]:
    """h' = (1 - z) n + z h, n = tanh(W x + r (U h + b)), which is reset-after: the trace of h."""
    weights, own = rows_of(params), own_weights(params, rule)
    e, h = silent(weights), carry
    for x, target in steps_of(batch):
        pre = received(params, x, h)
        drive = {name: pre[name] @ weights[name] for name in pre}
        r, z = (sigmoid(drive["i" + gate] + drive["h" + gate]) for gate in "rz")
        n = np.tanh(drive["in"] + r * drive["hn"])
        to_n = (1 - z) * (1 - n**2)
        to_r = to_n * drive["hn"] * r * (1 - r)
        to_z = (h - n) * z * (1 - z)
        to_h = {"ir": to_r, "hr": to_r, "iz": to_z, "hz": to_z, "in": to_n, "hn": to_n * r}
        kept = z + to_z * own["z"] + to_r * own["r"] + to_n * r * own["n"]
        h = (1 - z) * n + z * h
        e = {name: fade(kept, e[name]) + outer(pre[name], to_h[name]) for name in e}
        yield Step({name: fade(h - target, e[name]).sum(0) for name in e}, [e])


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def fade(factor: np.ndarray, trace: np.ndarray) -> np.ndarray:
    """A factor a unit, [B, N], times a trace [B, M, N]."""
    return factor[:, None, :] * trace


def outer(pre: np.ndarray, post: np.ndarray) -> np.ndarray:
    """[B, M] and [B, N] -> [B, M, N]."""
    return pre[:, :, None] * post[:, None, :]


def rows_of(layers: Any) -> Rows:
    """Kernels with their biases below them."""
    return {
        name: np.concatenate(
            [a["kernel"], *(a[k][..., None, :] for k in a if k == "bias")], axis=-2
        )
        for name, a in layers.items()
    }


def silent(weights: Rows) -> Rows:
    return {name: np.zeros((BATCH, *rows.shape)) for name, rows in weights.items()}


def received(params: Any, x: np.ndarray, h: np.ndarray) -> Rows:
    """What multiplies the rows of each layer: x or h, and a 1 for the bias."""
    ones = np.ones((BATCH, 1))
    return {
        name: np.concatenate([x if name[0] == "i" else h, *[ones] * ("bias" in layer)], axis=1)
        for name, layer in params.items()
    }


def own_weights(params: Any, rule: str) -> Rows:
    """Each unit's recurrent weight on itself, [N] a gate, or zeros: e-prop does not follow it."""
    followed = float(rule == "snap")
    return {
        name[1]: followed * np.diag(layer["kernel"])
        for name, layer in params.items()
        if name[0] == "h"
    }


def steps_of(batch: localgrad.Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(batch.inputs.swapaxes(0, 1), batch.targets.swapaxes(0, 1), strict=True)


CELLS = {"LSTM": (nn.LSTMCell, lstm), "GRU": (nn.GRUCell, gru)}


def example(name: str) -> tuple[nn.Module, Any, localgrad.Batch, Any]:
    """A cell, parameters all of size 0.7 (biases too), sequences, and a carry to start from."""
    cell = CELLS[name][0](UNITS, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    batch = as_batch(
        rng.normal(size=(BATCH, STEPS, INPUTS)), rng.normal(size=(BATCH, STEPS, UNITS))
    )
    carry = cell.initialize_carry(jax.random.key(0), (BATCH, INPUTS))
    variables = jax.eval_shape(cell.init, jax.random.key(0), carry, batch.inputs[:, 0])
    params, carry = jax.tree.map(
        lambda a: 0.7 * rng.normal(size=a.shape), (variables["params"], carry)
    )
    return cell, params, batch, carry


@functools.cache
def run(name: str, rule: str) -> tuple[list, list[Step]]:
    """Our calls, one step each, and the recursion's steps."""
    cell, params, batch, carry = example(name)
    ours = RULES[rule](cell, squared_error, batch_size=BATCH, reduction="sum")
    calls, _ = stream(ours, params, batch, carry=carry)
    return calls, list(CELLS[name][1](params, batch, carry, rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.few(2)
def test_every_step(name, rule):
    """Gradients, and the eligibility of each parameter for each state component that is live."""
    calls, steps = run(name, rule)
    for call, step in zip(calls, steps, strict=True):
        assert_close(rows_of(call.updates), step.grads)
        live = 2 if (name, rule) == ("LSTM", "snap") else 1  # e-prop has no use for the trace of h
        for component in range(live):
            layers: dict[str, dict] = {layer: {} for layer in step.grads}
            for (layer, kind), found in call.state.eligibility.items():
                assert found.shape[1] == live
                layers[layer][kind] = np.asarray(found[:, component])
            assert_close(rows_of(layers), step.traces[component])


@pytest.mark.parametrize("rule", RULES)
def test_lstm_gates_are_not_credited_twice(rule):
    calls, _ = run("LSTM", rule)
    _, *arguments = example("LSTM")
    trapped = lstm(*arguments, rule, twice=True)
    for call, wrong in zip(calls, trapped, strict=True):
        ours = rows_of(call.updates)
        for name in (side + gate for side in "ih" for gate in "igf"):
            assert np.linalg.norm(wrong.grads[name] - ours[name]) > 0.1 * np.linalg.norm(ours[name])
            if rule == "eprop":
                assert_close(wrong.grads[name], 2 * ours[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.few(2)
def test_first_step_is_the_plain_gradient(name, rule):
    """Before there is a past, no rule has anything to approximate: autodiff is the reference."""
    cell, params, batch, carry = example(name)

    def first_loss(params):
        _, y = cell.apply({"params": params}, carry, batch.inputs[:, 0])
        return squared_error(y, batch.targets[:, 0]).sum()

    calls, _ = run(name, rule)
    assert_close(calls[0].updates, jax.grad(first_loss)(params))
