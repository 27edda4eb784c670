"""The rules that are compared, each with its network, its optimizer and the rates it tries.

A rule joins by one line of `ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import localgrad

CHUNK = 5  # steps between two updates
CLIP = 1.0
RATES = (3e-3, 1e-2, 3e-2)
ALPHA = 0.2  # the leak of rate units
SLOPE = 0.25  # of their activation, as far as ModProp knows
SHIFTS = (0, 1, 4, 11)  # of a sparse network: whom a unit feeds, counted from itself
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


def wiring(units: int) -> np.ndarray:
    """Of a sparse network, [pre, post]: each unit feeds itself and three others."""
    shifted = [np.roll(np.eye(units, dtype=bool), shift, axis=1) for shift in SHIFTS]
    return np.logical_or.reduce(shifted)


def wired(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Weights of variance 1 / 4 where units are wired."""
    return jnp.where(wiring(shape[0]), jax.random.normal(key, shape, dtype), 0) / len(SHIFTS) ** 0.5


def sparse(units: int) -> Cells:
    """One layer of a stock cell, wired."""
    return (nn.GRUCell(units, recurrent_kernel_init=wired),)


def all_weights(updates: Any) -> Any:
    """Those of a dense network."""
    return updates


def along_wires(updates: Any) -> Any:
    """Those of a sparse one."""

    def cut(path: tuple, update: jax.Array) -> jax.Array:
        *_, layer, leaf = (key.key for key in path)
        recurrent = leaf == "kernel" and layer in ("hr", "hz", "hn")
        return update * wiring(len(update)) if recurrent else update

    return jax.tree_util.tree_map_with_path(cut, updates)


def rates(units: int) -> Cells:
    """Leaky rate units."""
    return (localgrad.RateCell(units, alpha=ALPHA),)


def inhibitory(units: int) -> np.ndarray:
    """Of a network of two types, which units inhibit: the last fifth."""
    return np.arange(units) >= units - units // 5


def balanced(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """Weights with the sign of the unit that they come from; those that inhibit are larger."""
    minus = inhibitory(shape[0])
    sign = np.where(minus, -(~minus).sum() / max(minus.sum(), 1), 1) / (2 * shape[0] ** 0.5)
    return sign[:, None] * jnp.abs(jax.random.normal(key, shape, dtype))


def types(units: int) -> Cells:
    """Leaky rate units that excite or inhibit, to begin with."""
    return (localgrad.RateCell(units, alpha=ALPHA, recurrent_kernel_init=balanced),)


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


def snap2(model: Any, loss: Any, key: jax.Array, **options: Any) -> localgrad.LearningRule:
    """SnAp-2 along the wires of a sparse network."""
    del key
    mask = wiring(model.cells[0].features)
    return localgrad.snap(model, loss, order=2, mask=mask, **options)


def modprop(model: Any, loss: Any, key: jax.Array, **options: Any) -> localgrad.LearningRule:
    """ModProp by two types."""
    del key
    kinds = inhibitory(model.cells[0].features).astype(int)
    return localgrad.modprop(model, loss, slope=SLOPE * ALPHA, types=kinds, **options)


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
        there: sets to zero what updates say of weights that its network lacks.
    """

    label: str
    family: Family
    make: Make
    cells: Callable[[int], Cells] = gru
    reference: str = "bptt"
    optimizer: Callable[[Any], optax.GradientTransformation] = adam
    chunk: int | None = CHUNK
    rates: tuple[float, ...] = RATES
    there: Callable[[Any], Any] = all_weights

    def model(self, units: int, outputs: int) -> localgrad.Network:
        """Its network."""
        return localgrad.Network(self.cells(units), readout=nn.Dense(outputs))

    def transformation(self, rule: localgrad.LearningRule, rate: Any) -> Any:
        """A rule of it with the optimizer, at a learning rate."""
        if self.there is all_weights:
            return optax.chain(rule, self.optimizer(rate))
        there = optax.stateless(lambda updates, params: self.there(updates))
        return optax.chain(rule, there, self.optimizer(rate))

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
_snap = plain(localgrad.snap)
_one = plain(localgrad.tbptt, horizon=1)
ROWS: dict[str, Row] = {
    "bptt": Row("BPTT", "bptt", _bptt, chunk=None),
    "tbptt10": Row("TBPTT(10)", "truncated", plain(localgrad.tbptt, horizon=10)),
    "tbptt1": Row("TBPTT(1)", "truncated", _one),
    "tbptt1_rmsprop": Row("TBPTT(1), RMSprop", "truncated", _one, optimizer=rmsprop),
    "rtrl": Row("RTRL", "exact", plain(localgrad.rtrl)),
    "uoro": Row("UORO", "random", keyed(localgrad.uoro)),
    "kf_rtrl": Row("KF-RTRL", "random", keyed(localgrad.kf_rtrl)),
    "ok": Row("OK(4)", "random", keyed(localgrad.ok, rank=4)),
    "dni": Row("DNI", "learnt", plain(localgrad.dni, horizon=CHUNK)),
    "snap": Row("SnAp-1", "local", _snap),
    "eprop": Row("e-prop", "local", _eprop),
    "mdgl": Row("MDGL", "local", plain(localgrad.mdgl)),
    "eprop_random": Row("e-prop, random", "local", keyed(localgrad.eprop, feedback="random")),
    "readout_only": Row("readout only", "frozen", plain(localgrad.readout_only)),
    "bptt_stack": Row("BPTT, 2 layers", "bptt", _bptt, grus, "bptt_stack", chunk=None),
    "deep_eprop": Row(
        "deep e-prop, 2 layers", "exact", plain(localgrad.deep_eprop), grus, "bptt_stack"
    ),
    "eprop_stack": Row("e-prop, 2 layers", "local", _eprop, grus, "bptt_stack"),
    "bptt_sparse": Row(
        "BPTT, sparse", "bptt", _bptt, sparse, "bptt_sparse", chunk=None, there=along_wires
    ),
    "snap_sparse": Row("SnAp-1, sparse", "local", _snap, sparse, "bptt_sparse", there=along_wires),
    "snap2_sparse": Row("SnAp-2, sparse", "local", snap2, sparse, "bptt_sparse", there=along_wires),
    "bptt_rate": Row("BPTT, rate units", "bptt", _bptt, rates, "bptt_rate", chunk=None),
    "rflo": Row(
        "RFLO, rate units", "local", keyed(localgrad.rflo, feedback="random"), rates, "bptt_rate"
    ),
    "bptt_types": Row("BPTT, two types", "bptt", _bptt, types, "bptt_types", chunk=None),
    "modprop_types": Row("ModProp, two types", "local", modprop, types, "bptt_types"),
    "mdgl_types": Row("MDGL, two types", "local", plain(localgrad.mdgl), types, "bptt_types"),
    "eprop_types": Row("e-prop, two types", "local", _eprop, types, "bptt_types"),
    "bptt_lru": Row("BPTT, LRU", "bptt", _bptt, lru, "bptt_lru", chunk=None),
    "eprop_lru": Row("e-prop = RTRL, LRU", "exact", _eprop, lru, "bptt_lru"),
    "bptt_rtu": Row("BPTT, RTU", "bptt", _bptt, rtu, "bptt_rtu", chunk=None),
    "rtrl_rtu": Row("RTRL, RTU", "exact", plain(localgrad.rtrl), rtu, "bptt_rtu"),
}


def label_of(name: str) -> str:
    """A row's name in tables and figures."""
    return ROWS[name].label
