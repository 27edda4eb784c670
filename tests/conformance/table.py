"""The table: every rule of the catalogue, every model, and what each pair is held to.

A rule enters by a row of the catalogue, a model by a line here, with its traits: every test of this
folder that takes a `case` or every rule then runs on it, and what a rule refuses follows from the
traits of the models.

`lra` has no row: it trains a `localgrad.PTNCN` alone, and that has no line, since a rule would here
credit parameters (E, W_2..W_L) that reach no loss. What of these tests applies to the pair is asked
in `tests/rules/test_lra.py`: an oracle, splits and windows, masks and resets, dtypes, optax and
vmap, memory, refusals; and in `tests/multidevice/test_layers.py`. Two do not apply. Its clipping is
of a batch's sum, so a mean of the devices' means is no mean of the whole (with
`update_radius=None` it is); and a step of weight 0 is not only not learnt from but not observed, so
it does change the states that follow.

`force` has none either: what it learns from a step depends on all it saw before, so that its
updates with the same parameters do not add up over the pieces of a stream. What it keeps instead,
and the rest of what a row is held to, lies in `tests/rules/test_force.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad
from catalogue import RULES, TELLING

# All sizes differ, so that no axis can stand in for another; only the batch has 7 entries.
B, T, N, IN, OUT = 7, 20, 4, 2, 5
SYMBOLS = 6


class Model(NamedTuple):
    """A model of the table.

    Attributes:
        make: makes the Flax module.
        cells: the kinds of its cells, the lowest first, as `oracles.CELLS` names them.
        traits: those of the catalogue's `TRAITS` it has.
        symbols: whether its inputs are integers, through an `Embed` encoder.
    """

    make: Callable[[], Any]
    cells: tuple[str, ...]
    traits: tuple[str, ...] = ()
    symbols: bool = False


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


def _spiking(make: Any, features: int, **kwargs: Any) -> Any:
    options = {"decay": 0.8, "threshold": 0.5, "refractory": 1, "scale": 0.7, "dampening": 0.6}
    return make(features, surrogate="sigmoid", param_dtype=jnp.float64, **options, **kwargs)


def _alif(features: int) -> localgrad.ALIFCell:
    return _spiking(localgrad.ALIFCell, features, adaptation_decay=0.9, beta=0.3)


def _nnx() -> dict[str, Any]:
    return {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}


MODELS: dict[str, Model] = {
    "rate": Model(_read(lambda: _rate(N)), ("rate",)),
    "rate_alpha": Model(
        _read(lambda: _rate(N, alpha=_leaks, learn_alpha=True)), ("rate_alpha",), ("tuned",)
    ),
    "simple": Model(_read(lambda: nn.SimpleCell(N, **_stock)), ("simple",)),
    "gru": Model(_read(lambda: nn.GRUCell(N, **_stock)), ("gru",), ("gated",)),
    "lstm": Model(_read(lambda: nn.LSTMCell(N, **_stock)), ("lstm",), ("gated",)),
    "optimized_lstm": Model(
        _read(lambda: nn.OptimizedLSTMCell(N, **_stock)), ("lstm",), ("gated",)
    ),
    "mgu": Model(_read(lambda: nn.MGUCell(N, **_stock)), ("mgu",), ("gated",)),
    "nnx_simple": Model(lambda: nnx.SimpleCell(IN, N, **_nnx()), ("nnx_simple",), ("bare",)),
    "nnx_gru": Model(lambda: nnx.GRUCell(IN, N, **_nnx()), ("nnx_gru",), ("gated", "bare")),
    "nnx_lstm": Model(lambda: nnx.LSTMCell(IN, N, **_nnx()), ("nnx_lstm",), ("gated", "bare")),
    "lif": Model(_read(lambda: _spiking(localgrad.LIFCell, N)), ("lif",), ("gated",)),
    "alif": Model(_read(lambda: _alif(N)), ("alif",), ("gated",)),
    "lru": Model(
        _read(lambda: localgrad.LRUCell(N, param_dtype=jnp.float64)),
        ("lru",),
        ("gated", "tuned"),
    ),
    "rtu": Model(
        _read(lambda: localgrad.RTUCell(N, jnp.tanh, param_dtype=jnp.float64)),
        ("rtu",),
        ("gated", "tuned", "paired"),
    ),
    "elstm": Model(
        _read(lambda: localgrad.ElementwiseLSTMCell(N, param_dtype=jnp.float64)),
        ("elstm",),
        ("gated", "tuned"),
    ),
    "two_alif": Model(
        _read(
            lambda: _alif(N),
            lambda: _alif(N - 1),
            lambda: localgrad.LeakyCell(N - 2, decay=0.7, scale=0.3, param_dtype=jnp.float64),
        ),
        ("alif", "alif", "leaky"),
        ("gated",),
    ),
    "two_gated": Model(
        _read(lambda: nn.LSTMCell(N, **_stock), lambda: nn.GRUCell(N - 1, **_stock)),
        ("lstm", "gru"),
        ("gated",),
    ),
    "two_rates": Model(
        _read(lambda: nn.SimpleCell(N, **_stock), lambda: _rate(N - 1)), ("simple", "rate")
    ),
    "nnx_two": Model(
        lambda: localgrad.NNXNetwork(
            [nnx.LSTMCell(IN, N, **_nnx()), nnx.GRUCell(N, N - 1, **_nnx())],
            readout=nnx.Linear(N - 1, OUT, **_nnx()),
        ),
        ("nnx_lstm", "nnx_gru"),
        ("gated",),
    ),
    "embed": Model(
        _read(
            lambda: _rate(N, alpha=_leaks, learn_alpha=True),
            lambda: nn.SimpleCell(N - 1, **_stock),
            encoder=lambda: nn.Embed(SYMBOLS, IN),
        ),
        ("rate_alpha", "simple"),
        ("tuned",),
        symbols=True,
    ),
}


class Case(NamedTuple):
    """One pair of the table."""

    rule: str
    model: str


def _refusal(case: Case) -> str | None:
    return RULES[case.rule].refusal(MODELS[case.model].traits)


ALIKE = (
    "rate",
    "simple",
    "lstm",
    "lif",
    "alif",
    "elstm",
    "two_gated",
    "two_alif",
    "optimized_lstm",
    "mgu",
    "nnx_simple",
    "nnx_lstm",
    "nnx_two",
    "two_rates",
    "rtu",
)
"""Models that are much like others; rules that are tried on all are so on these in slow tests."""


def _always(case: Case) -> bool:
    """Whether a pair is no slow test: a telling model, or the first that is refused for a trait."""
    models, refusal = RULES[case.rule].models, _refusal(case)
    if refusal is None:
        return case.model not in ALIKE if models is None else case.model in models
    return case == next(c for c in PAIRS if c.rule == case.rule and _refusal(c) == refusal)


def telling(case: Case) -> bool:
    """Whether all is asked of a pair that is always tried; the others are asked what counts most:
    a test that is marked `every_pair`."""
    return RULES[case.rule].models is not None or case.model in TELLING


PAIRS = [Case(rule, model) for model in MODELS for rule in RULES]
CASES = [case for case in PAIRS if _refusal(case) is None]
REFUSALS = [case for case in PAIRS if _refusal(case) is not None]
EVERYWHERE = [name for name, row in RULES.items() if row.models is None]
"""The rules that every model is tried under: exact backwards, exact forwards, and local."""


MACHINERY = (
    "tbptt",
    "rtrl",
    "eprop_random",
    "node_perturbation",
    "weight_perturbation",
    "ok",
)
"""A rule of each machinery: what all rules do alike is asked of these, and of others when slow."""


def by_machinery(names: Iterable[str]) -> list[Any]:
    """Names of rules as pytest takes them; those whose machinery another shows are slow."""
    return [n if n in MACHINERY else pytest.param(n, marks=pytest.mark.slow) for n in names]


def cases_of(cases: list[Case]) -> list[Any]:
    """The cases as pytest takes them; those that are not always tried are slow."""
    return [
        pytest.param(case, id="-".join(case), marks=() if _always(case) else pytest.mark.slow)
        for case in cases
    ]


def message_of(case: Case) -> str:
    """The message, as a pattern, by which the case's rule refuses its model."""
    return f"(?s){RULES[case.rule].public_name}.*{_refusal(case)}"


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
    else:
        carry = model.initialize_carry(jax.random.key(0), inputs[:, 0].shape)
        params = jax.jit(model.init)(jax.random.key(0), carry, inputs[:, 0])["params"]
    width = N if "bare" in row.traits else OUT
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


def plain(tree: Any) -> Any:
    """A tree whose keys are numbers, which can be compared."""

    def number(a: Any) -> Any:
        keyed = hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(a) if keyed else a

    return jax.tree.map(number, tree)


def groups(tree: Any) -> dict[str, Any]:
    """A tree of parameters as a plain nested dict, Linen's or NNX's."""
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else dict(tree)
