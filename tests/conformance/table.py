"""The table: every rule, every model, and what each pair is held to.

A rule or a model enters by one line, with its traits: every test of this folder that takes a `case`
or every rule then runs on it, and what a rule refuses follows from the traits of the models.
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
import pytest
from flax import nnx

import localgrad

# All sizes differ, so that no axis can stand in for another; only the batch has 7 entries.
B, T, N, IN, OUT = 7, 20, 4, 2, 5
SYMBOLS = 6


TRAITS = {
    "untapped": "Use nn.LSTMCell: the same parameters load unchanged",
    "gated": "Use localgrad.eprop",
    "bare": "readout.*Wrap it: localgrad.Network",
    "complex": "carry is complex128.* two real arrays",
}
"""What some rules refuse in a model, and a part of the message: no layer of its own a gate, a leak
that depends on the data, no readout, a complex carry."""


class Model(NamedTuple):
    """A model of the table.

    Attributes:
        make: makes the Flax module.
        cells: the kinds of its cells, the lowest first, as `oracles.CELLS` names them.
        traits: those of `TRAITS` it has.
        symbols: whether its inputs are integers, through an `Embed` encoder.
    """

    make: Callable[[], Any]
    cells: tuple[str, ...]
    traits: tuple[str, ...] = ()
    symbols: bool = False


TELLING = ("embed", "two_gated", "nnx_gru")
"""The models each rule is tried on: an encoder, a stack and unit parameters; a stack of gated cells
with two carries; a bare NNX cell with its gates in one kernel. The other pairs are slow tests."""


class Rule(NamedTuple):
    """A rule of the table.

    Attributes:
        make: the factory: `(model, loss, batch_size=, window=, reduction=, example=) -> rule`.
        expectation: the function of `oracles` that says what its updates must be, or for a `random`
            rule what their mean over draws must be.
        refuses: the traits of models it refuses; the first that a model has is what it says.
        windowed: whether it takes `window`; otherwise each call is its horizon, and a split
            truncates.
        credits: the top-level groups of parameters it credits, or None for all of them; the
            others get exact zeros.
        plain: those that get the plain gradient where there is one step only, or None for all.
        models: the models it is always tried on, or None for all.
        keyed: for a rule that draws numbers, the factory by its key; `make` is one of them.
        random: whether the updates themselves are drawn, and not just the feedback weights.
        public_name: what its messages call it, if not by its name in the table.
    """

    make: Callable[..., localgrad.LearningRule]
    expectation: str
    refuses: tuple[str, ...] = ()
    windowed: bool = True
    credits: tuple[str, ...] | None = None
    plain: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = TELLING
    keyed: Callable[[jax.Array], Callable[..., localgrad.LearningRule]] | None = None
    random: bool = False
    public_name: str | None = None

    def refusal(self, traits: tuple[str, ...]) -> str | None:
        """What it says to a model of these traits, or None if it takes it."""
        return next((TRAITS[trait] for trait in self.refuses if trait in traits), None)


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
    "gru": Model(_read(lambda: nn.GRUCell(N, **_stock)), ("gru",), ("gated",)),
    "lstm": Model(_read(lambda: nn.LSTMCell(N, **_stock)), ("lstm",), ("gated",)),
    "optimized_lstm": Model(
        _read(lambda: nn.OptimizedLSTMCell(N, **_stock)), ("lstm",), ("gated", "untapped")
    ),
    "mgu": Model(_read(lambda: nn.MGUCell(N, **_stock)), ("mgu",), ("gated",)),
    "nnx_simple": Model(lambda: nnx.SimpleCell(IN, N, **_nnx()), ("nnx_simple",), ("bare",)),
    "nnx_gru": Model(lambda: nnx.GRUCell(IN, N, **_nnx()), ("nnx_gru",), ("gated", "bare")),
    "nnx_lstm": Model(lambda: nnx.LSTMCell(IN, N, **_nnx()), ("nnx_lstm",), ("gated", "bare")),
    "two_gated": Model(
        _read(lambda: nn.LSTMCell(N, **_stock), lambda: nn.GRUCell(N - 1, **_stock)),
        ("lstm", "gru"),
        ("gated",),
    ),
    "two_rates": Model(
        _read(lambda: nn.SimpleCell(N, **_stock), lambda: _rate(N - 1)), ("simple", "rate")
    ),
    "embed": Model(
        _read(
            lambda: _rate(N, alpha=_leaks, learn_alpha=True),
            lambda: nn.SimpleCell(N - 1, **_stock),
            encoder=lambda: nn.Embed(SYMBOLS, IN),
        ),
        ("rate_alpha", "simple"),
        symbols=True,
    ),
}


def _eprop_random(key: jax.Array) -> Callable[..., localgrad.LearningRule]:
    return functools.partial(localgrad.eprop, feedback="random", key=key)


def _rflo(key: jax.Array) -> Callable[..., localgrad.LearningRule]:
    return functools.partial(localgrad.rflo, key=key)


_KEY = jax.random.key(1)
_LOCAL = ("untapped", "complex")

RULES: dict[str, Rule] = {
    "bptt": Rule(
        lambda *a, window=None, **k: localgrad.bptt(*a, **k), "bptt", windowed=False, models=None
    ),
    "tbptt": Rule(functools.partial(localgrad.tbptt, horizon=3), "tbptt"),
    "rtrl": Rule(localgrad.rtrl, "bptt", ("complex",), models=None),
    "snap": Rule(localgrad.snap, "diagonal", _LOCAL),
    "eprop": Rule(localgrad.eprop, "cut", _LOCAL, models=None),
    "eprop_random": Rule(
        _eprop_random(_KEY),
        "cut",
        (*_LOCAL, "bare"),
        plain=("readout",),
        models=("embed", "two_gated", "lstm"),
        keyed=_eprop_random,
        public_name="eprop",
    ),
    "rflo": Rule(
        _rflo(_KEY),
        "cut",
        (*_LOCAL, "gated", "bare"),
        plain=("readout",),
        models=("embed", "two_rates", "simple"),
        keyed=_rflo,
    ),
    "readout_only": Rule(
        localgrad.readout_only,
        "readout",
        ("bare",),
        credits=("readout",),
        plain=("readout",),
        models=("embed", "two_gated", "optimized_lstm"),
    ),
}


class Case(NamedTuple):
    """One pair of the table."""

    rule: str
    model: str


def _refusal(case: Case) -> str | None:
    return RULES[case.rule].refusal(MODELS[case.model].traits)


def _always(case: Case) -> bool:
    """Whether a pair is no slow test: a telling model, or the first that is refused for a trait."""
    models, refusal = RULES[case.rule].models, _refusal(case)
    if refusal is None:
        return models is None or case.model in models
    return case == next(c for c in PAIRS if c.rule == case.rule and _refusal(c) == refusal)


PAIRS = [Case(rule, model) for model in MODELS for rule in RULES]
CASES = [case for case in PAIRS if _refusal(case) is None]
REFUSALS = [case for case in PAIRS if _refusal(case) is not None]
EVERYWHERE = [name for name, row in RULES.items() if row.models is None]
"""The rules that every model is tried under: exact backwards, exact forwards, and local."""


def cases_of(cases: list[Case]) -> list[Any]:
    """The cases as pytest takes them; those that are not always tried are slow."""
    return [
        pytest.param(case, id="-".join(case), marks=() if _always(case) else pytest.mark.slow)
        for case in cases
    ]


def message_of(case: Case) -> str:
    """The message, as a pattern, by which the case's rule refuses its model."""
    return f"(?s){RULES[case.rule].public_name or case.rule}.*{_refusal(case)}"


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
        params = jax.jit(model.init)(jax.random.key(0), carry, inputs[:, 0])["params"]
        width = OUT
    params = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.3 * rng.normal(size=a.shape)), params
    )
    targets = jnp.asarray(rng.normal(size=(B, T, width)))
    batch = localgrad.Batch(inputs, targets)
    return Built(model, params, batch, inputs[0, 0])


def made(
    case: Case,
    factory: Callable[..., localgrad.LearningRule],
    streaming: bool = False,
    window: int | None = None,
    reduction: str = "sum",
) -> localgrad.LearningRule:
    """The rule that a factory makes for the model of a case."""
    built = build(case.model)
    return factory(
        built.model,
        optax.l2_loss,
        batch_size=B if streaming else None,
        window=window,
        reduction=reduction,
        example=built.example,
    )


@functools.cache
def rule_of(
    case: Case, streaming: bool = False, window: int | None = None, reduction: str = "sum"
) -> localgrad.LearningRule:
    """The rule of a case; one object a set of arguments, so that what it compiled is shared."""
    return made(case, RULES[case.rule].make, streaming, window, reduction)


def groups(tree: Any) -> dict[str, Any]:
    """A tree of parameters as a plain nested dict, Linen's or NNX's."""
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else dict(tree)
