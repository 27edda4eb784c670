"""The table: every rule, every model, and what each pair is held to.

A rule or a model enters by one line; every test of this folder that takes a `case` then runs on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import localgrad

# All sizes differ, so that no axis can stand in for another; only the batch has 7 entries.
B, T, N, IN, OUT = 7, 20, 4, 2, 5
SYMBOLS = 6


class Model(NamedTuple):
    """A model of the table.

    Attributes:
        make: makes the Flax module.
        cells: the kinds of its cells, the lowest first, as `oracles.CELLS` names them.
        symbols: whether its inputs are integers, through an `Embed` encoder.
    """

    make: Callable[[], Any]
    cells: tuple[str, ...]
    symbols: bool = False


class Rule(NamedTuple):
    """A rule of the table.

    Attributes:
        make: the factory: `(model, loss, batch_size=, window=, reduction=) -> rule`.
        oracle: the function of `oracles` that says what its updates must be.
        refuses: what it refuses: a part of the message, by model.
        windowed: whether it takes `window`; otherwise each call is its horizon, and a split
            truncates.
        credits: the top-level groups of parameters it credits, or None for all of them; the
            others get exact zeros.
        plain: those that get the plain gradient where there is one step only, or None for all.
        models: the models it is tried on, or None for all.
    """

    make: Callable[..., localgrad.LearningRule]
    oracle: str
    refuses: dict[str, str]
    windowed: bool = True
    credits: tuple[str, ...] | None = None
    plain: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None


def _read(*cells: Any, **kwargs: Any) -> Callable[[], localgrad.Network]:
    """A network of these cells (made by functions, so that each call has its own) and a readout."""
    return lambda: localgrad.Network(
        tuple(make() for make in cells),
        readout=nn.Dense(OUT),
        **{k: v() for k, v in kwargs.items()},
    )


# Stock cells start away from zero, so that a reset to zeros is not mistaken for a fresh start.
_start = nn.initializers.constant(0.3)
_stock = {"carry_init": _start, "param_dtype": jnp.float64}
_leaks = np.linspace(0.2, 0.9, N)


def _rate(features: int, **kwargs: Any) -> localgrad.RateCell:
    return localgrad.RateCell(features, **{"alpha": 0.25, "param_dtype": jnp.float64} | kwargs)


def _nnx() -> dict[str, Any]:
    return {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


MODELS: dict[str, Model] = {
    "rate": Model(_read(lambda: _rate(N)), ("rate",)),
    "rate_alpha": Model(_read(lambda: _rate(N, alpha=_leaks, learn_alpha=True)), ("rate_alpha",)),
    "simple": Model(_read(lambda: nn.SimpleCell(N, **_stock)), ("simple",)),
    "gru": Model(_read(lambda: nn.GRUCell(N, **_stock)), ("gru",)),
    "lstm": Model(_read(lambda: nn.LSTMCell(N, **_stock)), ("lstm",)),
    "optimized_lstm": Model(_read(lambda: nn.OptimizedLSTMCell(N, **_stock)), ("lstm",)),
    "mgu": Model(_read(lambda: nn.MGUCell(N, **_stock)), ("mgu",)),
    "nnx_simple": Model(lambda: nnx.SimpleCell(IN, N, **_nnx()), ("nnx_simple",)),
    "nnx_gru": Model(lambda: nnx.GRUCell(IN, N, **_nnx()), ("nnx_gru",)),
    "nnx_lstm": Model(lambda: nnx.LSTMCell(IN, N, **_nnx()), ("nnx_lstm",)),
    "two_gated": Model(
        _read(lambda: nn.MGUCell(N, **_stock), lambda: nn.GRUCell(N - 1, **_stock)),
        ("mgu", "gru"),
    ),
    "two_rates": Model(
        _read(lambda: nn.SimpleCell(N, **_stock), lambda: _rate(N - 1)), ("simple", "rate")
    ),
    "embed": Model(
        _read(lambda: _rate(N), encoder=lambda: nn.Embed(SYMBOLS, IN)), ("rate",), symbols=True
    ),
}

_BARE = ("nnx_simple", "nnx_gru", "nnx_lstm")
_NO_TAPS = {"optimized_lstm": "Use nn.LSTMCell: the same parameters load unchanged"}
_NO_READOUT = dict.fromkeys(_BARE, "has no readout. Wrap it: localgrad.Network")
_GATED = dict.fromkeys(
    ("gru", "lstm", "mgu", "two_gated", "nnx_gru", "nnx_lstm"), "Use localgrad.eprop"
)

RULES: dict[str, Rule] = {
    "bptt": Rule(lambda *a, window=None, **k: localgrad.bptt(*a, **k), "bptt", {}, windowed=False),
    "tbptt": Rule(functools.partial(localgrad.tbptt, horizon=3), "tbptt", {}),
    "rtrl": Rule(localgrad.rtrl, "bptt", {}),
    "snap": Rule(localgrad.snap, "diagonal", _NO_TAPS),
    "eprop": Rule(localgrad.eprop, "cut", _NO_TAPS),
    "eprop_random": Rule(
        functools.partial(localgrad.eprop, feedback="random", key=jax.random.key(1)),
        "cut",
        _NO_TAPS | _NO_READOUT,
        plain=("readout",),
        models=("lstm", "two_rates", "embed", "optimized_lstm", "nnx_gru"),
    ),
    "rflo": Rule(
        functools.partial(localgrad.rflo, key=jax.random.key(1)),
        "cut",
        _NO_TAPS | _GATED | {"nnx_simple": _NO_READOUT["nnx_simple"]},
        plain=("readout",),
    ),
    "readout_only": Rule(
        localgrad.readout_only,
        "readout",
        dict.fromkeys(_BARE, "Wrap it: localgrad.Network"),
        credits=("readout",),
        plain=("readout",),
    ),
}


class Case(NamedTuple):
    """One pair of the table."""

    rule: str
    model: str


PAIRS = [
    Case(rule, model)
    for model in MODELS
    for rule, row in RULES.items()
    if row.models is None or model in row.models
]
CASES = [case for case in PAIRS if case.model not in RULES[case.rule].refuses]
REFUSALS = [case for case in PAIRS if case.model in RULES[case.rule].refuses]


def name_of(case: Case) -> str:
    """What pytest calls a case."""
    return f"{case.rule}-{case.model}"


class Built(NamedTuple):
    """A model ready for use, in float64.

    Attributes:
        model: what a rule takes.
        params: its parameters, all of them random, none zero.
        batch: inputs and targets of B examples and T steps.
        example: one step's input without the batch axis.
    """

    model: Any
    params: Any
    batch: localgrad.Batch
    example: Any


@functools.cache
def build(name: str) -> Built:
    """The model of that name with random parameters and data."""
    row = MODELS[name]
    rng = np.random.default_rng(0)
    if row.symbols:
        inputs = jnp.asarray(rng.integers(0, SYMBOLS, (B, T)), jnp.int32)
    else:
        inputs = jnp.asarray(rng.normal(size=(B, T, IN)))
    model = row.make()
    if isinstance(model, nnx.Module):
        model, params = localgrad.from_nnx(model)
        width = N
    else:
        carry = model.initialize_carry(jax.random.key(0), inputs[:, 0].shape)
        params = model.init(jax.random.key(0), carry, inputs[:, 0])["params"]
        width = OUT
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    targets = jnp.asarray(rng.normal(size=(B, T, width)))
    batch = localgrad.Batch(inputs, targets)
    return Built(model, params, batch, inputs[0, 0])


@functools.cache
def rule_of(
    case: Case, streaming: bool = False, window: int | None = None, reduction: str = "sum"
) -> localgrad.LearningRule:
    """The rule of a case; one object a set of arguments, so that what it compiled is shared."""
    built = build(case.model)
    batch_size = B if streaming else None
    return RULES[case.rule].make(
        built.model,
        optax.l2_loss,
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=built.example,
    )


def groups(tree: Any) -> dict[str, Any]:
    """A tree of parameters as a plain nested dict, Linen's or NNX's."""
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else dict(tree)
