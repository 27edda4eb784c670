"""The rivals: each a network with a rule and an optimizer, as large as its budget allows.

That is a number of parameters and, for exact RTRL, as many bytes of influence as `ROOM`, which on
all but the smallest problems leaves it a fraction of the units of the others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import localgrad
from experiments.ptncn.problems import Outputs, Problem

ADAM = (0.003, 0.01, 0.03)
NESTEROV = (0.075, 0.225, 0.675)  # from the authors' 0.075 upwards
ROOM = 64 * 2**20  # bytes of RTRL's influence on all streams


class Row(NamedTuple):
    """A network that learns by a rule.

    Attributes:
        label: its name in tables and figures.
        model: `(units, size, outputs) -> model`; the same units in every layer.
        rule: `(model, loss, batch_size, key, example) -> LearningRule`, streaming; None for one
            whose readout is fitted.
        chunk: steps between two updates; None for the whole call.
        optimizer: from a learning rate and B.
        rates: the learning rates that are tried.
        gives: what the model gives: logits, predictions, or what is taken for one.
        layers: of the network.
        room: bytes that the rule's state may take at most; the network is made smaller if need be.
    """

    label: str
    model: Callable[[int, int, Outputs], Any]
    rule: Callable[..., localgrad.LearningRule] | None
    chunk: int | None
    optimizer: Callable[[Any, int], Any]
    rates: tuple[float, ...]
    gives: str = "logits"
    layers: int = 1
    room: float = math.inf

    def loss(self, outputs: Outputs) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The loss that the rule is given."""
        return {
            "logits": outputs.of_logits,
            "predictions": outputs.of_predictions,
            "linear": optax.l2_loss,
        }[self.gives]

    def score(self, outputs: Outputs) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """`(outputs, targets) -> nats`, for the table."""
        if self.gives != "linear":
            return self.loss(outputs)
        return lambda y, target: outputs.of_predictions(outputs.as_prediction(y), target)


def adam(rate: Any, batch_size: int) -> Any:
    """Adam, after clipping the updates' global norm at 1."""
    del batch_size
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def plain(rate: Any, batch_size: int) -> Any:
    """The update itself, times the rate."""
    del batch_size
    return optax.sgd(rate)


def ptncn(units: int, size: int, outputs: Outputs) -> Any:
    """A P-TNCN of two equal layers."""
    return localgrad.PTNCN((units, units), size, output_activation=outputs.squash)


def over(cell: Callable[[int], Any]) -> Callable[[int, int, Outputs], Any]:
    """A cell with a linear readout."""
    return lambda units, size, outputs: localgrad.Network((cell(units),), readout=nn.Dense(size))


def _aligned(model: Any, loss: Any, batch_size: int, key: Any, example: Any, **options: Any) -> Any:
    return localgrad.lra(model, loss, batch_size=batch_size, reduction="sum", **options)


def _by(make: Callable[..., Any], **options: Any) -> Callable[..., localgrad.LearningRule]:
    def rule(model: Any, loss: Any, batch_size: int, key: Any, example: Any) -> Any:
        return make(model, loss, batch_size=batch_size, example=example, **options)

    return rule


def _drawing(make: Callable[..., Any], **options: Any) -> Callable[..., localgrad.LearningRule]:
    def rule(model: Any, loss: Any, batch_size: int, key: Any, example: Any) -> Any:
        return make(model, loss, batch_size=batch_size, key=key, example=example, **options)

    return rule


HORIZON, EVERY = 5, 20


def nesterov(rate: Any, batch_size: int) -> Any:
    """The authors' optimizer of an update summed over streams: it divides by B, ended or not."""
    descent = optax.sgd(rate, momentum=0.95, nesterov=True)
    return optax.chain(optax.scale(1 / batch_size), descent)


sab = functools.partial(localgrad.SABCell, slots=20, top_k=5, attend_every=5, truncate=10)


def _rivals(name: str, label: str, cell: Callable[[int], Any]) -> dict[str, Row]:
    """One kind of cell under the rules that the paper names or that stand for them."""
    make = over(cell)
    return {
        f"{name}_bptt": Row(f"{label}, BPTT", make, _by(localgrad.bptt), None, adam, ADAM),
        f"{name}_tbptt": Row(
            f"{label}, TBPTT({HORIZON})",
            make,
            _by(localgrad.tbptt, horizon=HORIZON),
            HORIZON,
            adam,
            ADAM,
        ),
        f"{name}_rtrl": Row(
            f"{label}, RTRL in {ROOM // 2**20} MiB",
            make,
            _by(localgrad.rtrl),
            EVERY,
            adam,
            ADAM,
            room=ROOM,
        ),
        f"{name}_uoro": Row(
            f"{label}, UORO, windows of {HORIZON}",
            make,
            _drawing(localgrad.uoro, window=HORIZON),
            HORIZON,
            adam,
            ADAM,
        ),
        f"{name}_eprop": Row(f"{label}, e-prop", make, _by(localgrad.eprop), 1, adam, ADAM),
    }


reservoir = over(lambda units: localgrad.ReservoirCell(units, alpha=0.5, spectral_radius=0.9))

ROWS: dict[str, Row] = {
    "ptncn": Row("P-TNCN, LRA", ptncn, _aligned, 1, nesterov, NESTEROV, "predictions", 2),
    "ptncn_prediction": Row(
        "P-TNCN, LRA, W by prediction",
        ptncn,
        functools.partial(_aligned, w_error="prediction"),
        1,
        nesterov,
        NESTEROV,
        "predictions",
        2,
    ),
    **_rivals("lstm", "LSTM", nn.LSTMCell),
    **_rivals("gru", "GRU", nn.GRUCell),
    "sab": Row("SAB", over(sab), _by(localgrad.bptt), None, adam, ADAM),
    "esn": Row("ESN, readout only", reservoir, _by(localgrad.readout_only), 1, adam, ADAM),
    "esn_force": Row(  # a call at a time gives what a step at a time does, and takes less
        "ESN, FORCE", reservoir, _by(localgrad.force), None, plain, (1.0,), "linear"
    ),
    "esn_ridge": Row("ESN, ridge", reservoir, None, None, plain, (1.0,), "linear"),
}


def parameters_of(model: Any, size: int) -> int:
    """How many numbers a model's parameters are."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(model, size)))


def abstract(model: Any, size: int) -> Any:
    """A model's parameters, without allocating any."""

    def init(key: jax.Array) -> Any:
        x = jnp.zeros((1, size))
        return model.init(key, model.initialize_carry(key, x.shape), x)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def units_for(row: Row, problem: Problem, budget: int) -> int:
    """The most units a layer with which a network has no more parameters than this.

    Nor may its rule's state take more than its room.
    """

    def fits(units: int) -> bool:
        model = row.model(units, problem.size, problem.outputs)
        if parameters_of(model, problem.size) > budget:
            return False
        if row.rule is None or row.room == math.inf:
            return True
        example = jax.ShapeDtypeStruct((problem.size,), jnp.float32)
        rule = row.rule(
            model, row.loss(problem.outputs), problem.batch_size, jax.random.key(0), example
        )
        state = jax.eval_shape(rule.init, abstract(model, problem.size))
        held = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
        return held <= row.room

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
