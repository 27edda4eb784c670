"""The cells and learning rules that experiments choose from, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import optax
from flax import linen as nn

import catalogue
import localgrad

CellName = Literal["gru", "rate"]
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
        row: the rule, from the catalogue.
        optimizer: the optimizer of its updates, from a learning rate.
        suffix: added to the rule's label.
        horizon: how many steps it looks back, if the settings do not say.
    """

    row: catalogue.Rule
    optimizer: Callable[[float], optax.GradientTransformation] = optax.adam
    suffix: str = ""
    horizon: int | None = None

    def label(self, settings: Settings) -> str:
        """Its name in tables and figures."""
        return self.row.label.format(**self.row.settings | self.own(settings)) + self.suffix

    def make(
        self, model: Any, loss: Loss, settings: Settings, key: jax.Array
    ) -> localgrad.LearningRule:
        """The rule of a model."""
        window = settings.window if self.row.dense else None
        return self.row.make(model, loss, key=key, window=window, **self.own(settings))

    def own(self, settings: Settings) -> dict[str, int]:
        """The settings it has a use for."""
        return (
            {"horizon": self.horizon or settings.horizon} if "horizon" in self.row.settings else {}
        )


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

RULES: dict[str, RuleChoice] = {  # of networks of one layer
    name: RuleChoice(row)
    for name, row in catalogue.RULES.items()
    # What learns from noise wants rates and updates of its own; strides are truncation again; a
    # slope is chosen for a network.
    if not (row.deep or row.random or {"stride", "slope"} & row.settings.keys())
}
RULES["tbptt1_rmsprop"] = RuleChoice(
    catalogue.RULES["tbptt"], optax.rmsprop, suffix=" + RMSprop", horizon=1
)

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]  # so that --help names them and anything else is refused


def require_counts(config: Any, *fields: str) -> None:
    """Raises unless each of these fields of a configuration is at least 1."""
    for field in fields:
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1; got {getattr(config, field)}.")


def require_seed(seed: int) -> None:
    """Raises for a seed that NumPy does not take, or that JAX takes for another."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32); got {seed}.")


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
