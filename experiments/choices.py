"""The cells and learning rules that experiments choose from, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import optax
from flax import linen as nn

import localgrad

CellName = Literal["gru", "rate"]
RuleName = Literal[
    "bptt",
    "rtrl",
    "snap1",
    "eprop",
    "eprop_random",
    "rflo",
    "tbptt",
    "tbptt1_rmsprop",
    "readout_only",
]

Value = TypeVar("Value")
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Settings(NamedTuple):
    """What a cell or rule may be told.

    Attributes:
        features: N, the number of units.
        alpha: the leak of the rate network's units, in (0, 1].
        horizon: how many steps `tbptt` looks back.
        window: how many steps RTRL takes at a time. In a window as long as the sequence it would
            carry no influence, cost what BPTT costs, and show nobody what its own price is.
    """

    features: int
    alpha: float
    horizon: int
    window: int


class RuleChoice(NamedTuple):
    """A row of the comparison.

    Attributes:
        label: its name in tables and figures, from the settings.
        make: `(model, loss, settings, key) -> LearningRule`.
        optimizer: the optimizer of its updates, from a learning rate.
    """

    label: Callable[[Settings], str]
    make: Callable[[Any, Loss, Settings, jax.Array], localgrad.LearningRule]
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adam


class CellChoice(NamedTuple):
    """A network of the comparison.

    Attributes:
        label: its name in tables and figures.
        make: the cell from the settings.
        learning_rate: one at which BPTT learns every task of `experiments.tasks` reliably.
    """

    label: str
    make: Callable[[Settings], nn.RNNCellBase]
    learning_rate: float


CELLS: dict[CellName, CellChoice] = {
    "gru": CellChoice("GRU", lambda s: nn.GRUCell(s.features), learning_rate=0.01),
    "rate": CellChoice(
        "rate network",
        lambda s: localgrad.RateCell(s.features, alpha=s.alpha),
        learning_rate=0.005,
    ),
}

RULES: dict[RuleName, RuleChoice] = {
    "bptt": RuleChoice(
        label=lambda s: "BPTT",
        make=lambda model, loss, s, key: localgrad.bptt(model, loss),
    ),
    "rtrl": RuleChoice(
        label=lambda s: "RTRL",
        make=lambda model, loss, s, key: localgrad.rtrl(model, loss, window=s.window),
    ),
    "snap1": RuleChoice(
        label=lambda s: "SnAp-1",
        make=lambda model, loss, s, key: localgrad.snap(model, loss, order=1),
    ),
    "eprop": RuleChoice(
        label=lambda s: "e-prop, symmetric",
        make=lambda model, loss, s, key: localgrad.eprop(model, loss),
    ),
    "eprop_random": RuleChoice(
        label=lambda s: "e-prop, random",
        make=lambda model, loss, s, key: localgrad.eprop(model, loss, feedback="random", key=key),
    ),
    "rflo": RuleChoice(
        label=lambda s: "RFLO, random",
        make=lambda model, loss, s, key: localgrad.rflo(model, loss, feedback="random", key=key),
    ),
    "tbptt": RuleChoice(
        label=lambda s: f"TBPTT({s.horizon})",
        make=lambda model, loss, s, key: localgrad.tbptt(model, loss, horizon=s.horizon),
    ),
    "tbptt1_rmsprop": RuleChoice(
        label=lambda s: "TBPTT(1) + RMSprop",
        make=lambda model, loss, s, key: localgrad.tbptt(model, loss, horizon=1),
        optimizer=optax.rmsprop,
    ),
    "readout_only": RuleChoice(
        label=lambda s: "readout only",
        make=lambda model, loss, s, key: localgrad.readout_only(model, loss),
    ),
}


def lookup(kind: str, table: Mapping[Any, Value], name: str) -> Value:
    """`table[name]`, or a `ValueError` that lists the names there are.

    Example:
        >>> lookup("cell", {"gru": 1, "rate": 2}, "lstm")
        Traceback (most recent call last):
        ...
        ValueError: unknown cell 'lstm'; choose from: gru, rate.
    """
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; choose from: {', '.join(table)}.")
    return table[name]
