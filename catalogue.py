"""The catalogue: every rule with its traits, as the tests, benchmarks and experiments read them.

A new rule enters by its module, a line of `localgrad/__init__.py`, and a row of `RULES`; one that
cannot have a row, by a line of `APART`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import localgrad

TRAITS = {
    "gated": "Use localgrad.eprop",
    "bare": "readout.*Wrap it: localgrad.Network",
    "complex": "carry is complex128.* two real arrays",
    "paired": "Use feedback='symmetric'",
    "tuned": "lies in none .* Use localgrad.weight_perturbation",
}
"""What some rules refuse in a model, and a part of the message: a leak that depends on the data, no
readout, a complex carry, two outputs a unit, parameters of the cell outside its layers."""

TELLING = ("embed", "nnx_gru")
"""The models of the conformance table that a rule is tried on unless its row says otherwise: an
encoder, a stack and unit parameters; a bare NNX cell with its gates in one kernel. All other pairs
are slow tests, but those of rules that are tried on all models."""


class Rule(NamedTuple):
    """A row of the catalogue.

    Attributes:
        factory: the public function; messages call the rule by its name.
        label: its name in tables and figures, in which settings may stand: `"TBPTT({horizon})"`.
        expectation: what its updates are, or what their mean over draws is if it is `random`: the
            name of an oracle of the conformance tests.
        settings: what the factory is told beside what all factories take.
        refuses: the traits of models it refuses; the first that a model has is what it says.
        keyed: whether it is given a key, to draw from in `init` or in each update.
        random: whether the updates themselves are drawn, and not just, say, feedback weights.
        windowed: whether it takes `window`; otherwise each call is its horizon, and a split
            truncates.
        gridded: whether what it draws depends on where windows end, so that a stream gives the same
            numbers only if it is split between them.
        power: of N, with which the time of a step grows where N is large and all else fixed.
        dense: whether its influence has N S P numbers, which is slow at the sizes of others.
        deep: whether it differs only in a stack from another rule.
        fast: whether it claims to take no longer than BPTT at N = 128, B = 16, T = 1000.
        credits: the top-level groups of parameters it credits, or None for all of them; the
            others get exact zeros.
        plain: those that get the plain gradient where there is one step only, or None for all.
        models: the models it is always tried on, or None for all.
    """

    factory: Callable[..., localgrad.LearningRule]
    label: str
    expectation: str
    settings: dict[str, Any] = {}
    refuses: tuple[str, ...] = ()
    keyed: bool = False
    random: bool = False
    windowed: bool = True
    gridded: bool = False
    power: int = 2
    dense: bool = False
    deep: bool = False
    fast: bool = False
    credits: tuple[str, ...] | None = None
    plain: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = TELLING

    @property
    def public_name(self) -> str:
        """What its messages call it."""
        return self.factory.__name__

    def make(
        self, model: Any, loss: Any, *, key: jax.Array | None = None, **options: Any
    ) -> localgrad.LearningRule:
        """The rule of a model; an option that it has no use for is left out.

        Args:
            model: as the rules take it.
            loss: likewise.
            key: what a keyed rule draws from; None for `jax.random.key(1)`.
            **options: arguments of all factories, and settings other than the row's own.

        Returns:
            The rule.
        """
        own = {name: options.pop(name, value) for name, value in self.settings.items()}
        if self.keyed:
            own["key"] = jax.random.key(1) if key is None else key
        if not self.windowed:
            options.pop("window", None)
        return self.factory(model, loss, **own, **options)

    def refusal(self, traits: tuple[str, ...]) -> str | None:
        """What it says to a model of these traits, or None if it takes it."""
        return next((TRAITS[trait] for trait in self.refuses if trait in traits), None)


_LOCAL = ("complex",)

RULES: dict[str, Rule] = {
    "bptt": Rule(localgrad.bptt, "BPTT", "bptt", windowed=False, fast=True, models=None),
    "rtrl": Rule(
        localgrad.rtrl, "RTRL", "bptt", {}, ("complex",), power=4, dense=True, models=None
    ),
    "snap": Rule(localgrad.snap, "SnAp-1", "diagonal", {}, _LOCAL, fast=True),
    "mdgl": Rule(localgrad.mdgl, "MDGL", "once", {}, _LOCAL),
    "modprop": Rule(
        localgrad.modprop,
        "ModProp",
        "types",
        {"slope": 0.3},
        (*_LOCAL, "gated"),
        models=("embed",),
    ),
    "eprop": Rule(localgrad.eprop, "e-prop, symmetric", "cut", {}, _LOCAL, fast=True, models=None),
    "eprop_random": Rule(
        localgrad.eprop,
        "e-prop, random",
        "cut",
        {"feedback": "random"},
        (*_LOCAL, "bare", "paired"),
        keyed=True,
        plain=("readout",),
        models=("embed",),
    ),
    "deep_eprop": Rule(
        localgrad.deep_eprop,
        "deep e-prop",
        "deep",
        {},
        _LOCAL,
        deep=True,
        models=("embed", "two_gated"),
    ),
    "rflo": Rule(
        localgrad.rflo,
        "RFLO, random",
        "cut",
        {"feedback": "random"},
        (*_LOCAL, "gated", "bare"),
        keyed=True,
        fast=True,
        plain=("readout",),
        models=("embed", "simple"),
    ),
    "tbptt": Rule(localgrad.tbptt, "TBPTT({horizon})", "tbptt", {"horizon": 3}),
    "tbptt_stride": Rule(
        localgrad.tbptt,
        "TBPTT({horizon}), every {stride}",
        "strided",
        {"horizon": 2, "stride": 4},
        models=("embed",),
    ),
    "node_perturbation": Rule(
        localgrad.node_perturbation,
        "node perturbation",
        "bptt",
        {"scale": 1e-4},
        ("tuned",),
        keyed=True,
        random=True,
        models=("gru",),
    ),
    "node_perturbation_exact": Rule(
        localgrad.node_perturbation,
        "node perturbation, exact readout",
        "bptt",
        {"scale": 1e-4, "samples": 2, "antithetic": True, "readout": "exact"},
        ("tuned", "bare"),
        keyed=True,
        random=True,
        models=(),
    ),
    "weight_perturbation": Rule(
        localgrad.weight_perturbation,
        "weight perturbation",
        "bptt",
        {"scale": 1e-4},
        keyed=True,
        random=True,
        models=("rate_alpha",),
    ),
    "forward_gradient": Rule(
        localgrad.forward_gradient,
        "forward gradient",
        "bptt",
        keyed=True,
        random=True,
        models=(),
    ),
    "forward_gradient_nodes": Rule(
        localgrad.forward_gradient,
        "forward gradient, nodes",
        "bptt",
        {"over": "nodes"},
        ("tuned",),
        keyed=True,
        random=True,
        models=(),
    ),
    "pes": Rule(
        localgrad.pes,
        "PES({unroll})",
        "bptt",
        {"scale": 1e-4, "unroll": 3},
        keyed=True,
        random=True,
        models=(),
    ),
    "uoro": Rule(
        localgrad.uoro,
        "UORO",
        "bptt",
        {"window": 16},
        ("complex",),
        keyed=True,
        random=True,
        gridded=True,
        models=("embed",),
    ),
    "kf_rtrl": Rule(
        localgrad.kf_rtrl,
        "KF-RTRL",
        "bptt",
        {},
        _LOCAL,
        keyed=True,
        random=True,
        gridded=True,
        models=("gru",),
        power=3,
    ),
    "ok": Rule(
        localgrad.ok,
        "OK({rank})",
        "bptt",
        {"rank": 2},
        _LOCAL,
        keyed=True,
        random=True,
        gridded=True,
        models=("rate_alpha",),
        power=3,
    ),
    "readout_only": Rule(
        localgrad.readout_only,
        "readout only",
        "readout",
        {},
        ("bare",),
        credits=("readout",),
        plain=("readout",),
        models=("embed", "optimized_lstm"),
    ),
}

APART: dict[str, tuple[Callable[..., localgrad.LearningRule], str]] = {
    "lra": (
        localgrad.lra,
        "it trains a PTNCN alone, and no model of the table corrects its states",
    ),
    "activity_perturbation": (
        localgrad.activity_perturbation,
        "the mean of its updates is a gradient only after a change of basis at each step",
    ),
    "decorrelation": (
        localgrad.decorrelation,
        "it learns the matrices of Decorrelation layers alone, and follows no gradient",
    ),
    "force": (localgrad.force, "its updates depend on all that it saw, and so do not add up"),
    "dni": (
        localgrad.dni,
        "its predictor learns from all that it saw, and its numbers depend on its horizon",
    ),
}
"""Rules that have no row, and why: a row is tried on every model, and its updates with the same
parameters are added up over the pieces of a stream. Their tests lie in `tests/rules`."""
