"""Rules whose updates are random: right on average, and drawn anew for each key and example.

A row of the table that says `random=True` has all this, beside the contract. The test itself is
tried on bptt with noise, which passes without a bias and fails with one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from catalogue import RULES, Rule
from tests.conformance import draws, oracles
from tests.conformance.table import MODELS, build, by_machinery, groups

MODEL = "rate_alpha"


class NoisyState(NamedTuple):
    """The state of bptt, and what to draw from."""

    inner: Any
    key: jax.Array


class Noisy:
    """bptt, with noise for each example on every update, and a bias."""

    def __init__(self, model: Any, loss: Any, *, key: Any, bias: float, scale: float, **options):
        options = {name: options[name] for name in ("batch_size", "reduction") if name in options}
        self.rule = localgrad.bptt(model, loss, **options)
        self.key, self.bias, self.scale = key, bias, scale

    def init(self, params: Any) -> NoisyState:
        return NoisyState(self.rule.init(params), self.key)

    def __call__(self, params: Any, state: NoisyState, batch: localgrad.Batch) -> tuple:
        updates, inner = self.rule(params, state.inner, batch)
        key, now = jax.random.split(state.key)
        leaves, treedef = jax.tree.flatten(updates)
        noisy = [
            self.scale * a
            + self.bias
            + 0.5 * jax.random.normal(k, (len(batch.mask), *a.shape)).sum(0)
            for a, k in zip(leaves, jax.random.split(now, len(leaves)), strict=True)
        ]
        return jax.tree.unflatten(treedef, noisy), NoisyState(inner, key)


def noisy(bias: float = 0.0, scale: float = 1.0) -> Rule:
    """A row of the table for it."""

    factory: Any = functools.partial(Noisy, bias=bias, scale=scale)
    return Rule(factory, "noisy", "bptt", keyed=True, random=True, models=None)


RANDOM = {"noisy": noisy()} | {name: row for name, row in RULES.items() if row.random}
every_random_rule = pytest.mark.parametrize(
    "name",
    ["noisy", *by_machinery(name for name in RANDOM if name != "noisy")],
)


def drawn(row: Rule, examples: slice = slice(None), count: int = draws.DRAWS) -> Any:
    """The updates of many keys on the same few examples: leaves [count, ...]."""
    taken = [m for m in (MODEL, "rate") if row.refusal(MODELS[m].traits) is None]
    built = build(row.models[0] if row.models else taken[0])
    batch = jax.tree.map(lambda a: a[examples, :6], built.batch)
    batch = batch._replace(mask=jnp.ones(batch.inputs.shape[:2]))

    options = {"window": 2} if row.gridded else {}  # in a single window it would draw nothing
    options |= {"reduction": "sum", "example": built.example}

    def draw(key: jax.Array) -> Any:
        rule = row.make(built.model, optax.l2_loss, key=key, **options)
        return groups(rule(built.params, rule.init(built.params), batch)[0])

    return draws.sample(draw, count)


@functools.cache
def exact() -> Any:
    """The gradient of the same batch."""
    built = build(MODEL)
    steps = oracles.steps_of(jax.tree.map(lambda a: a[:, :6], built.batch))
    return groups(oracles.bptt(built.model, built.params, steps))


@pytest.mark.slow
def test_noise_without_a_bias_passes():
    draws.assert_mean(drawn(noisy()), exact())


@pytest.mark.parametrize(("bias", "scale"), [(0.1, 1.0), (-0.1, 1.0), (0.0, 1.1)])
@pytest.mark.few(2)
def test_a_bias_fails(bias, scale):
    with pytest.raises(AssertionError, match="z-scores"):
        draws.assert_mean(drawn(noisy(bias, scale)), exact())


def test_what_does_not_vary_must_be_equal():
    same = {"a": np.ones((5, 3))}
    draws.assert_mean(same, {"a": np.ones(3)})
    with pytest.raises(AssertionError, match="z-scores .*'a'.*inf"):
        draws.assert_mean(same, {"a": np.ones(3) + 1e-6})


def test_scores_are_as_large_as_announced():
    """Those of entries and, over many leaves that vary together, those of leaves."""
    rng = np.random.default_rng(0)
    leaves = rng.normal(size=(200, 500, 8)) @ rng.normal(size=(8, 6))
    scores = np.stack([draws.scores_of(3 + leaf, np.full(6, 3.0)) for leaf in leaves])
    assert scores.shape == (200, 7)
    np.testing.assert_allclose(scores.std(0), 1, atol=0.2)
    np.testing.assert_allclose(scores.mean(0), 0, atol=0.3)
    assert np.abs(scores).max() < 4.5


@every_random_rule
@pytest.mark.few(1)
def test_a_key_gives_the_same_again_and_another_gives_other_numbers(name):
    first, again = (drawn(RANDOM[name], count=3) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert any(np.any(a[0] != a[1]) for a in jax.tree.leaves(first))


@every_random_rule
@pytest.mark.slow
def test_each_example_draws_its_own_noise(name):
    """Noise of its own adds up in variance, noise in common would in standard deviation."""

    def variance(examples: slice) -> float:
        return sum(a.var(0).sum() for a in jax.tree.leaves(drawn(RANDOM[name], examples)))

    alone = sum(variance(slice(k, k + 1)) for k in range(3))
    np.testing.assert_allclose(variance(slice(3)), alone, rtol=0.2)
