"""The rules that are compared, each with its optimizer and the learning rates it tries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn

import localgrad

SCALE = 1e-3  # of all noise, as published; loss differences still have four digits in float32
CLIP = 1.0
ETA = 1e-3  # of decorrelation, beside all learning rates of weights; better than 1e-2
ADAM = (1e-3, 3e-3, 1e-2)
SGD = (3e-3, 1e-2, 3e-2)
Loss = Callable[[jax.Array, jax.Array], jax.Array]
Make = Callable[[Any, Loss, jax.Array], localgrad.LearningRule]


def adam(rate: Any) -> optax.GradientTransformation:
    """Adam on updates of norm 1 at most."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate))


class Row(NamedTuple):
    """What learns.

    Attributes:
        label: its name in tables.
        rule: the rule of a model, its loss and a key, which noise is drawn from.
        optimizer: behind the rule, from a learning rate.
        rates: the learning rates that are tried, ascending; more if the best is an edge.
        cell: the recurrent cell of N units.
    """

    label: str
    rule: Make
    optimizer: Callable[[Any], optax.GradientTransformation] = adam
    rates: tuple[float, ...] = ADAM
    cell: Callable[[int], nn.RNNCellBase] = nn.SimpleCell

    def model(self, units: int, outputs: int) -> localgrad.Network:
        """Its network."""
        return localgrad.Network((self.cell(units),), readout=nn.Dense(outputs))


def _nodes(**told: Any) -> Make:
    return lambda model, loss, key: localgrad.node_perturbation(
        model, loss, key=key, scale=SCALE, **told
    )


def _activity(**told: Any) -> Make:
    return lambda model, loss, key: localgrad.activity_perturbation(
        model, loss, key=key, scale=SCALE, **told
    )


def _weights(samples: int) -> Make:
    """Against the clean copy, so that K samples take K + 1 passes, as of the other rules."""
    return lambda model, loss, key: localgrad.weight_perturbation(
        model, loss, key=key, scale=SCALE, antithetic=False, samples=samples
    )


def decorrelated(units: int) -> nn.RNNCellBase:
    """The same cell, with decorrelated states."""
    return localgrad.DecorrelatedCell(nn.SimpleCell(units))


def _decorrelating(label: str, make: Make) -> Row:
    """A rule with decorrelation beside it."""
    labels = localgrad.label_decorrelation

    def rule(model: Any, loss: Loss, key: jax.Array) -> localgrad.LearningRule:
        plain = localgrad.decorrelation(model, loss)
        return localgrad.mix({"weights": make(model, loss, key), "decorrelation": plain}, labels)

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return optax.partition({"weights": adam(rate), "decorrelation": optax.sgd(ETA)}, labels)

    return Row(label, rule, optimizer, cell=decorrelated)


MANY = 16  # samples
ROWS: dict[str, Row] = {
    "bptt": Row("BPTT", lambda model, loss, key: localgrad.bptt(model, loss)),
    "tbptt1": Row("TBPTT(1)", lambda model, loss, key: localgrad.tbptt(model, loss, horizon=1)),
    "readout_only": Row(
        "readout only", lambda model, loss, key: localgrad.readout_only(model, loss)
    ),
    "np_causal": Row("NP, causal", _nodes(credit="causal")),
    "np_causal16": Row(f"NP, causal, x{MANY}", _nodes(credit="causal", samples=MANY)),
    "wp": Row("WP", _weights(1)),
    "wp16": Row(f"WP, x{MANY}", _weights(MANY)),
    "anp_causal": Row("ANP, causal", _activity(credit="causal")),
    "np_step": Row("NP, step", _nodes(credit="step")),
    "anp_step": Row("ANP, step", _activity(credit="step")),
    "dwp": _decorrelating("DWP", _weights(1)),
    "dnp": _decorrelating("DNP, causal", _nodes(credit="causal")),
    "danp": _decorrelating("DANP, causal", _activity(credit="causal")),
    "published": Row(
        "published ANP",
        _activity(credit="step", norm="fernandez2024", noise="gaussian"),
        optax.sgd,
        SGD,
    ),
    "published_readout": Row(
        "readout only, SGD",
        lambda model, loss, key: localgrad.readout_only(model, loss),
        optax.sgd,
        SGD,
    ),
}
FEW = ("bptt", "readout_only", "np_causal", "wp", "anp_step", "published")  # over sizes
SAMPLED = ("np_causal16", "wp16")  # which take longest; not on weather
