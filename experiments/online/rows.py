"""The rules that are compared, each with its network, its optimizer and the rates it tries.

A rule joins by one line of `ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import localgrad

CHUNK = 5  # steps between two updates
CLIP = 1.0
RATES = (3e-3, 1e-2, 3e-2)
ALPHA = 0.2  # the leak of rate units
Cells = tuple[nn.RNNCellBase, ...]
Make = Callable[..., localgrad.LearningRule]
Family = Literal["bptt", "truncated", "exact", "local", "random", "learnt", "frozen"]


def adam(rate: Any) -> optax.GradientTransformation:
    """Adam on updates of norm 1 at most."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(rate))


def rmsprop(rate: Any) -> optax.GradientTransformation:
    """RMSprop on the same."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.rmsprop(rate))


def gru(units: int) -> Cells:
    """One layer of a stock cell."""
    return (nn.GRUCell(units),)


def grus(units: int) -> Cells:
    """Two of five eighths of the units, about as many parameters."""
    return tuple(nn.GRUCell(5 * units // 8) for _ in range(2))


def rates(units: int) -> Cells:
    """Leaky rate units."""
    return (localgrad.RateCell(units, alpha=ALPHA),)


def lru(units: int) -> Cells:
    """Units that are linear and apart, with memories of all lengths."""
    return (localgrad.LRUCell(units, r_min=0.5, r_max=0.99, max_phase=0.5),)


def rtu(units: int) -> Cells:
    """Units apart, with an activation behind their memories."""
    return (localgrad.RTUCell(units, jnp.tanh),)


def plain(factory: Make, **told: Any) -> Make:
    """A rule without a key."""
    return lambda model, loss, key, **options: factory(model, loss, **told, **options)


def keyed(factory: Make, **told: Any) -> Make:
    """A rule that draws feedback, or its updates."""
    return lambda model, loss, key, **options: factory(model, loss, key=key, **told, **options)


class Row(NamedTuple):
    """What learns.

    Attributes:
        label: its name in tables.
        family: rows of one have a colour in common.
        make: `(model, loss, key, **options) -> rule`, by `plain` or `keyed`.
        cells: of the network, from N.
        reference: the row of BPTT on such a network.
        optimizer: behind the rule, from a learning rate.
        chunk: steps between two updates; None for those of a whole call.
        rates: the learning rates that are tried, ascending; more if the best is an edge.
    """

    label: str
    family: Family
    make: Make
    cells: Callable[[int], Cells] = gru
    reference: str = "bptt"
    optimizer: Callable[[Any], optax.GradientTransformation] = adam
    chunk: int | None = CHUNK
    rates: tuple[float, ...] = RATES

    def model(self, units: int, outputs: int) -> localgrad.Network:
        """Its network."""
        return localgrad.Network(self.cells(units), readout=nn.Dense(outputs))

    def rule(
        self, model: Any, loss: Any, key: jax.Array, inputs: jax.Array, reduction: str = "mean"
    ) -> localgrad.LearningRule:
        """Its rule for streams, of which `inputs` [B, I] is a step."""
        return self.make(
            model,
            loss,
            key,
            batch_size=len(inputs),
            reduction=reduction,
            example=jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype),
        )


_bptt, _eprop = plain(localgrad.bptt), plain(localgrad.eprop)
_one = plain(localgrad.tbptt, horizon=1)
ROWS: dict[str, Row] = {
    "bptt": Row("BPTT", "bptt", _bptt, chunk=None),
    "tbptt10": Row("TBPTT(10)", "truncated", plain(localgrad.tbptt, horizon=10)),
    "tbptt1": Row("TBPTT(1)", "truncated", _one),
    "tbptt1_rmsprop": Row("TBPTT(1), RMSprop", "truncated", _one, optimizer=rmsprop),
    "rtrl": Row("RTRL", "exact", plain(localgrad.rtrl)),
    "uoro": Row("UORO", "random", keyed(localgrad.uoro)),
    "kf_rtrl": Row("KF-RTRL", "random", keyed(localgrad.kf_rtrl)),
    "dni": Row("DNI", "learnt", plain(localgrad.dni, horizon=CHUNK)),
    "snap": Row("SnAp-1", "local", plain(localgrad.snap)),
    "eprop": Row("e-prop", "local", _eprop),
    "mdgl": Row("MDGL", "local", plain(localgrad.mdgl)),
    "eprop_random": Row("e-prop, random", "local", keyed(localgrad.eprop, feedback="random")),
    "readout_only": Row("readout only", "frozen", plain(localgrad.readout_only)),
    "bptt_stack": Row("BPTT, 2 layers", "bptt", _bptt, grus, "bptt_stack", chunk=None),
    "deep_eprop": Row(
        "deep e-prop, 2 layers", "exact", plain(localgrad.deep_eprop), grus, "bptt_stack"
    ),
    "eprop_stack": Row("e-prop, 2 layers", "local", _eprop, grus, "bptt_stack"),
    "bptt_rate": Row("BPTT, rate units", "bptt", _bptt, rates, "bptt_rate", chunk=None),
    "rflo": Row(
        "RFLO, rate units", "local", keyed(localgrad.rflo, feedback="random"), rates, "bptt_rate"
    ),
    "bptt_lru": Row("BPTT, LRU", "bptt", _bptt, lru, "bptt_lru", chunk=None),
    "eprop_lru": Row("e-prop = RTRL, LRU", "exact", _eprop, lru, "bptt_lru"),
    "bptt_rtu": Row("BPTT, RTU", "bptt", _bptt, rtu, "bptt_rtu", chunk=None),
    "rtrl_rtu": Row("RTRL, RTU", "exact", plain(localgrad.rtrl), rtu, "bptt_rtu"),
}


def label_of(name: str) -> str:
    """A row's name in tables and figures."""
    return ROWS[name].label
