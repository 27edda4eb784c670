"""The documentation is true: the skeleton is a rule, and shared arguments are described alike."""

import functools
import importlib.util
import inspect
import re
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from catalogue import APART, RULES

DOCS = Path(__file__).parents[2] / "docs"


def skeleton():
    """The module that a new rule is copied from."""
    spec = importlib.util.spec_from_file_location("skeleton_rule", DOCS / "skeleton_rule.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_skeleton_is_one_step_of_bptt(x64):
    rng = np.random.default_rng(0)
    cells = (
        localgrad.RateCell(4, alpha=0.3, learn_alpha=True, param_dtype=float),
        nn.LSTMCell(3, param_dtype=float),
    )
    dense = functools.partial(nn.Dense, param_dtype=float)
    model = localgrad.Network(cells, readout=dense(2), encoder=dense(5))
    inputs = jnp.asarray(rng.normal(size=(2, 7, 3)))
    carry = model.initialize_carry(jax.random.key(0), (2, 3))
    params = model.init(jax.random.key(1), carry, inputs[:, 0])["params"]
    batch = localgrad.Batch(inputs, jnp.asarray(rng.normal(size=(2, 7, 2))))
    expected = localgrad.tbptt(model, optax.l2_loss, horizon=1, reduction="sum")
    found = skeleton().immediate(model, optax.l2_loss, batch_size=2, window=3, reduction="sum")
    chex.assert_trees_all_close(
        found(params, found.init(params), batch)[0],
        expected(params, expected.init(params), batch)[0],
        rtol=1e-10,
        atol=1e-10,
    )
    assert set(found.credits(params).values()) == {"this step only"}


def arguments(factory) -> dict[str, str]:
    """What the docstring says of each argument."""
    text = inspect.getdoc(factory).split("\nArgs:\n")[1].split("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}


FACTORIES = {row.factory.__name__: row.factory for row in RULES.values()}
FACTORIES |= {name: factory for name, (factory, _) in APART.items()}
SHARED = (
    "model",
    "loss",
    "batch_size",
    "window",
    "reduction",
    "feedback",
    "firing_rate",
    "key",
    "example",
)


def first_sentence(said: str) -> str:
    """Up to its full stop; what follows may be the rule's own.

    On windows, what a rule draws may depend.
    """
    return said.split(". ")[0].rstrip(".").removesuffix(", and the numbers do not depend on it")


@pytest.mark.parametrize("argument", SHARED)
def test_shared_arguments_are_described_alike(argument):
    said = {
        name: first_sentence(arguments(factory)[argument])
        for name, factory in FACTORIES.items()
        if argument in inspect.signature(factory).parameters
        and not (argument == "model" and name in APART)
    }
    assert len(said) > 1 and len(set(said.values())) == 1, said


@pytest.mark.parametrize("name", FACTORIES)
def test_every_argument_is_described(name):
    taken = list(inspect.signature(FACTORIES[name]).parameters)
    assert list(arguments(FACTORIES[name])) == taken
    assert taken[:2] == ["model", "loss"]


def test_every_public_name_is_documented_and_has_an_example():
    for name in localgrad.__all__:
        text = inspect.getdoc(getattr(localgrad, name))
        assert text and (name == "Alignment" or ">>>" in text), name


def test_the_catalogue_holds_every_rule():
    """A factory that makes a rule of a model is a row, or it is told why not."""
    functions = {n: getattr(localgrad, n) for n in localgrad.__all__}
    signatures = {n: inspect.signature(f) for n, f in functions.items() if inspect.isfunction(f)}
    made = {
        name
        for name, signature in signatures.items()
        if signature.return_annotation == "LearningRule" and "model" in signature.parameters
    }
    assert made == set(FACTORIES)
