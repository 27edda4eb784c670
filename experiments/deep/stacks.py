"""The stacks and the rules of the experiment, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
from flax import linen as nn

import localgrad
from localgrad import Network

LOSS = optax.softmax_cross_entropy_with_integer_labels
CROWD = 8  # Channels for each number that a frozen lowest layer lets through.

StackName = Literal["rate", "gru", "lru", "alif"]


class Stack(NamedTuple):
    """A kind of network, of any depth.

    Attributes:
        label: its name in tables and figures.
        cell: `(N, whether it is the highest) -> cell`.
        features: N, units a layer.
        readers: how many numbers a unit makes of its layer's input.
        learned: the delay up to which deep e-prop is claimed to learn.
        steps: updates that every rule gets.
        learning_rate: Adam's, for every rule.
    """

    label: str
    cell: Callable[[int, bool], nn.Module]
    features: int
    readers: int
    learned: int = 12
    steps: int = 300
    learning_rate: float = 0.005

    @property
    def channels(self) -> int:
        """D of the crowd."""
        return CROWD * self.readers * self.features

    def make(self, depth: int, features: int | None = None) -> Network:
        """A network of `depth` layers with a readout of two classes."""
        width = features or self.features
        cells = [self.cell(width, level == depth - 1) for level in range(depth)]
        return Network(cells, readout=nn.Dense(2))


def _rate(features: int, highest: bool) -> nn.Module:
    return localgrad.RateCell(features, alpha=0.05 if highest else 0.5)


def _gru(features: int, highest: bool) -> nn.Module:
    del highest  # Its gates say how fast it is.
    return nn.GRUCell(features)


def _lru(features: int, highest: bool) -> nn.Module:
    low, high = (0.9, 0.99) if highest else (0.0, 0.5)
    return localgrad.LRUCell(features, r_min=low, r_max=high, max_phase=0.3)


def _alif(features: int, highest: bool) -> nn.Module:
    decay, adaptation = (0.95, 0.98) if highest else (0.6, 0.9)
    # At a threshold of 1 no spike reaches the third layer; at 0.5 all eight fire alike.
    return localgrad.ALIFCell(features, threshold=0.5, decay=decay, adaptation_decay=adaptation)


STACKS: dict[StackName, Stack] = {
    "rate": Stack("rate units", _rate, features=12, readers=1),
    "gru": Stack("GRU", _gru, features=8, readers=3, learned=6, steps=600),
    "lru": Stack("LRU", _lru, features=8, readers=3),
    "alif": Stack("ALIF (spiking)", _alif, features=16, readers=1),
}


class Row(NamedTuple):
    """A rule of the tables.

    Attributes:
        label: its name there.
        make: the rule from a model and the options of all rules.
        windowed: whether it takes `window`.
    """

    label: str
    make: Callable[..., localgrad.LearningRule]
    windowed: bool = True

    def rule(self, model: Any) -> localgrad.LearningRule:
        """The rule of a model, for whole sequences; in one window, where it can, the cheapest."""
        return self.make(model, LOSS)

    def stream(
        self, model: Any, batch_size: int, window: int, example: Any
    ) -> localgrad.LearningRule:
        """The same of streams, in windows, so that it carries what it has to carry."""
        options: dict[str, Any] = {"window": window} if self.windowed else {}
        return self.make(model, LOSS, batch_size=batch_size, example=example, **options)


def _deep(**ablation: Any) -> Callable[..., localgrad.LearningRule]:
    def make(model: Any, loss: Any, **options: Any) -> localgrad.LearningRule:
        return localgrad.deep_eprop(model, loss, **ablation, **options)

    return make


def _tbptt(horizon: int) -> Callable[..., localgrad.LearningRule]:
    def make(model: Any, loss: Any, **options: Any) -> localgrad.LearningRule:
        return localgrad.tbptt(model, loss, horizon=horizon, **options)

    return make


def _random(model: Any, loss: Any, **options: Any) -> localgrad.LearningRule:
    return localgrad.eprop(model, loss, feedback="random", key=jax.random.key(1), **options)


ROWS: dict[str, Row] = {
    "bptt": Row("BPTT", localgrad.bptt, windowed=False),
    "rtrl": Row("RTRL", localgrad.rtrl),
    "deep_eprop": Row("deep e-prop", localgrad.deep_eprop),
    "no_temporal": Row("  no temporal path", _deep(temporal=False)),
    "no_spatial": Row("  no spatial path (frozen below)", _deep(spatial=False)),
    "eprop": Row("e-prop, symmetric", localgrad.eprop),
    "eprop_random": Row("e-prop, random", _random),
    "snap": Row("SnAp-1", localgrad.snap),
    "tbptt4": Row("TBPTT(4)", _tbptt(4)),
    "tbptt1": Row("TBPTT(1)", _tbptt(1)),
    "readout_only": Row("readout only", localgrad.readout_only),
}
FEW = ("bptt", "deep_eprop", "no_spatial", "eprop")  # at every depth


def rows_at(depth: int, full: int) -> tuple[str, ...]:
    """The rules at a depth; all of them where it is `full`."""
    if depth == 1:
        return FEW[:2]  # the others are deep e-prop there
    return tuple(ROWS) if depth == full else FEW
