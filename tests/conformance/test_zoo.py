"""Cells of all kinds: what is taken is credited in full, what cannot be credited is refused."""

import dataclasses
import functools
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from catalogue import RULES, TRAITS
from tests.conformance import oracles, zoo
from tests.conformance.table import EVERYWHERE, by_machinery

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
B, T, IN = 2, 8, 3

# A random rule's updates are compared in the contract only.
SETTLED = {name: row for name, row in RULES.items() if not row.random}
LOCAL = [n for n, r in SETTLED.items() if r.expectation in ("cut", "diagonal") and not r.keyed]
EXACT = [name for name in EVERYWHERE if RULES[name].expectation == "bptt"]


@functools.cache
def problem(model, symbols=False, spatial=()):
    """Parameters, none zero, and a batch for a model of the zoo."""
    rng = np.random.default_rng(0)
    if symbols:
        inputs = jnp.asarray(rng.integers(0, 6, (B, T)))
    else:
        inputs = jnp.asarray(rng.normal(size=(B, T, *spatial, IN)))
    carry = model.initialize_carry(jax.random.key(0), inputs[:, 0].shape)
    variables = jax.jit(model.init)(jax.random.key(0), carry, inputs[:, 0])
    params = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.3 * rng.normal(size=a.shape)), variables["params"]
    )
    _, y = jax.eval_shape(model.apply, {"params": params}, carry, inputs[:, 0])
    return params, localgrad.Batch(inputs, jnp.asarray(rng.normal(size=(B, T, *y.shape[1:]))))


def make(name, model, batch, **options):
    """A rule of a model of the zoo."""
    options |= {"reduction": "sum", "example": batch.inputs[0, 0]}
    return RULES[name].make(model, optax.l2_loss, **options)


def learned(rule, params, batch):
    """The updates of one call."""
    return rule(params, rule.init(params), batch)[0]


def streamed(rule, params, batch):
    """The updates of one-step calls, summed, and the state after them."""
    state, found = rule.init(params), []
    for t in range(T):
        updates, state = rule(params, state, jax.tree.map(lambda a, t=t: a[:, t : t + 1], batch))
        found.append(updates)
    return jax.tree.map(lambda *each: sum(each), *found), state


@functools.cache
def exactly(model, **kind):
    """The gradient."""
    params, batch = problem(model, **kind)
    return jax.jit(functools.partial(oracles.bptt, model))(params, oracles.steps_of(batch))


@functools.cache
def local_problem(name):
    """A cell of the zoo, alone or in a stack, and its oracle for local rules."""
    cell, step = zoo.LOCAL[name]
    model, cells = cell(), (step,)
    if name == "skip":  # its direct way from x must carry credit to the cell below
        model = localgrad.Network((zoo.Concat(3), zoo.Skip(3)), readout=nn.Dense(2))
        cells = (zoo.concat, step)
    params, batch = problem(model, name == "symbols")
    steps = oracles.steps_of(batch)
    net = oracles.net_of(cells, model, steps)

    @functools.partial(jax.jit, static_argnames="how")
    def oracle(how):
        return oracles.local(net, params, steps, how)

    return model, params, batch, oracle


@pytest.mark.parametrize("name", zoo.LOCAL)
@pytest.mark.parametrize(
    "rule", ["eprop", *(pytest.param(n, marks=pytest.mark.slow) for n in LOCAL if n != "eprop")]
)
@pytest.mark.few(1)
def test_local_rules_credit_all_that_stays_in_a_unit(rule, name):
    model, params, batch, oracle = local_problem(name)
    how = RULES[rule].expectation
    if how == "diagonal" and name in zoo.NO_DIAGONAL:
        with pytest.raises(ValueError, match=zoo.NO_DIAGONAL[name]):
            learned(make(rule, model, batch), params, batch)
        return
    expected = oracle(how=how)
    updates, state = streamed(one := make(rule, model, batch, batch_size=B), params, batch)
    close(updates, expected)
    assert all(np.all(np.abs(leaf) > 0) for leaf in jax.tree.leaves(updates) if leaf.ndim < 2)
    if rule in EVERYWHERE:
        close(learned(make(rule, model, batch, window=3), params, batch), expected)
    if name in SPLIT:
        at_once(one, params, batch, updates, state)


SPLIT = ("skip", "reads", "adaptive")
"""Unit parameters, a layer for input and carry, and two carries: streamed at once and by steps."""


def at_once(rule, params, batch, updates, state):
    """One call gives these updates and this state."""
    found, after = rule(params, rule.init(params), batch)
    close(found, updates)
    close(after._replace(loss=state.loss), state)


@pytest.mark.parametrize("rule", by_machinery(EXACT))
@pytest.mark.parametrize(
    "model",
    [cell(3) if name == "skip" else cell() for name, (cell, _) in zoo.LOCAL.items()]
    + [cell() for cell in (*zoo.REFUSED, *zoo.UNSEEN)],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.few(2)
def test_exact_rules_are_exact_on_all(model, rule):
    kind = {"symbols": isinstance(model, zoo.Symbols | zoo.Tied)}
    params, batch = problem(model, **kind)
    expected = exactly(model, **kind)
    if not RULES[rule].windowed:
        close(learned(make(rule, model, batch), params, batch), expected)
        return
    updates, state = streamed(one := make(rule, model, batch, batch_size=B), params, batch)
    close(updates, expected)
    if isinstance(model, tuple(zoo.LOCAL[name][0] for name in SPLIT)):
        at_once(one, params, batch, updates, state)
        close(learned(make(rule, model, batch, window=3), params, batch), expected)


@pytest.mark.parametrize("cell", zoo.REFUSED, ids=lambda cell: cell.__name__)
@pytest.mark.few(2)
def test_what_a_local_rule_cannot_credit_it_refuses(cell):
    params, batch = problem(cell())
    for batch_size in (None, B):
        rule = make("eprop", cell(), batch, batch_size=batch_size)
        with pytest.raises(ValueError, match=f"(?s){zoo.REFUSED[cell]}"):
            rule(params, rule.init(params), batch)


@pytest.mark.slow
def test_a_convolutional_cell_is_for_exact_rules():
    model = nn.ConvLSTMCell(2, kernel_size=(2,))
    params, batch = problem(model, spatial=(3,))
    expected = exactly(model, spatial=(3,))
    close(learned(make("bptt", model, batch), params, batch), expected)
    close(streamed(make("rtrl", model, batch, batch_size=B), params, batch)[0], expected)
    for name in LOCAL:
        message = rf"{name} cannot credit cell \(ConvLSTMCell\).*convolutional"
        with pytest.raises(ValueError, match=message):
            learned(make(name, model, batch), params, batch)


@pytest.mark.parametrize("name", ["eprop", "snap"])
@pytest.mark.few(1)
def test_tied_weights_learn_what_two_learn(name):
    params, batch = problem(zoo.Tied(), symbols=True)
    table = params["e"]["embedding"]
    tied = learned(make(name, zoo.Tied(), batch), params, batch)
    apart = params | {"o": {"kernel": table.T}}
    each = learned(make(name, zoo.Untied(), batch), apart, batch)
    both = each["e"]["embedding"] + each["o"]["kernel"].T
    close(tied, {"e": {"embedding": both}, "h": each["h"]})


def test_a_carry_belongs_to_its_examples():
    params, batch = problem(zoo.Counts())
    with pytest.raises(ValueError, match=r"carry of shape \(\).* batch axis, B = [12]"):
        learned(make("bptt", zoo.Counts(), batch), params, batch)


def test_complex_states_are_for_backpropagation():
    params, batch = problem(zoo.Complex())
    expected = exactly(zoo.Complex())
    close(learned(make("bptt", zoo.Complex(), batch), params, batch), expected)


@pytest.mark.parametrize("name", [n for n, row in RULES.items() if "complex" in row.refuses])
def test_complex_states_are_refused(name):
    params, batch = problem(zoo.Complex())
    with pytest.raises(ValueError, match=TRAITS["complex"]):
        learned(make(name, zoo.Complex(), batch), params, batch)


# The contract has windows that divide the steps; after several of 3 comes one of 2, and 3 after 5.
@pytest.mark.parametrize(
    "window", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 5, 7))]
)
@pytest.mark.parametrize(
    "name", by_machinery(name for name, row in SETTLED.items() if row.windowed)
)
@pytest.mark.slow
def test_windows_of_any_size_give_the_same(name, window):
    """Also where one full window is followed by a shorter one."""
    gated = not RULES[name].refusal(("gated",))
    cell = (nn.LSTMCell if gated else nn.SimpleCell)(4, param_dtype=float)
    model = localgrad.Network((cell,), nn.Dense(2, param_dtype=float))
    params, batch = problem(model)
    whole, rule = (make(name, model, batch, window=size) for size in (T, window))
    one, other = (r(params, r.init(params), batch) for r in (whole, rule))
    close(one[0], other[0])
    close(one[1].loss, other[1].loss)


class ByName(zoo.Cell):
    """It calls a layer by keyword, and holds an array."""

    tau: np.ndarray = dataclasses.field(default_factory=lambda: np.array([2.0]), hash=False)

    @nn.compact
    def __call__(self, h, x):
        h = zoo.leaky(h, self.layer("i")(inputs=x) + self.layer("h")(h)) / float(self.tau[0])
        return h, h


def test_layers_called_by_name_and_cells_that_hold_arrays():
    params, batch = problem(model := ByName())
    close(learned(make("bptt", model, batch), params, batch), exactly(model))
    whole = learned(make("eprop", model, batch), params, batch)
    close(streamed(make("eprop", model, batch, batch_size=B), params, batch)[0], whole)


@pytest.mark.parametrize("name", by_machinery(RULES))
@pytest.mark.few(2)
def test_a_fresh_state_can_be_donated(name):
    params, batch = problem(model := localgrad.Network((zoo.Concat(),), nn.Dense(2)))
    rule = make(name, model, batch, batch_size=B)
    expected, _ = rule(params, rule.init(params), batch)
    donating = jax.jit(lambda state: rule(params, state, batch), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what could not be reused
        found, _ = donating(rule.init(params))
    close(found, expected)
