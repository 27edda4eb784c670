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
from tests.conformance import oracles, zoo

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
B, T, IN = 2, 8, 3


def problem(model, symbols=False, spatial=()):
    """Parameters, none zero, and a batch for a model of the zoo."""
    rng = np.random.default_rng(0)
    if symbols:
        inputs = jnp.asarray(rng.integers(0, 6, (B, T)))
    else:
        inputs = jnp.asarray(rng.normal(size=(B, T, *spatial, IN)))
    carry = model.initialize_carry(jax.random.key(0), inputs[:, 0].shape)
    variables = model.init(jax.random.key(0), carry, inputs[:, 0])
    params = jax.tree.map(
        lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), variables["params"]
    )
    _, y = jax.eval_shape(model.apply, {"params": params}, carry, inputs[:, 0])
    return params, localgrad.Batch(inputs, jnp.asarray(rng.normal(size=(B, T, *y.shape[1:]))))


def make(factory, model, batch, **options):
    """A rule of a model of the zoo."""
    options |= {"reduction": "sum", "example": batch.inputs[0, 0]}
    return factory(model, optax.l2_loss, **options)


def learned(rule, params, batch):
    """The updates of one call."""
    return rule(params, rule.init(params), batch)[0]


def streamed(rule, params, batch):
    """The updates of one-step calls, summed."""
    state, found = rule.init(params), []
    for t in range(T):
        updates, state = rule(params, state, jax.tree.map(lambda a, t=t: a[:, t : t + 1], batch))
        found.append(updates)
    return jax.tree.map(lambda *each: sum(each), *found)


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
def test_eprop_credits_all_that_stays_in_a_unit(name):
    model, params, batch, oracle = local_problem(name)
    expected = oracle(how="cut")
    close(learned(make(localgrad.eprop, model, batch, window=3), params, batch), expected)
    updates = streamed(make(localgrad.eprop, model, batch, batch_size=B), params, batch)
    close(updates, expected)
    assert all(np.all(np.abs(leaf) > 0) for leaf in jax.tree.leaves(updates) if leaf.ndim < 2)


@pytest.mark.parametrize("name", [name for name in zoo.LOCAL if name != "general"])
def test_snap_keeps_what_a_unit_sends_to_itself(name):
    model, params, batch, oracle = local_problem(name)
    updates = streamed(make(localgrad.snap, model, batch, batch_size=B), params, batch)
    close(updates, oracle(how="diagonal"))


def test_snap_refuses_a_layer_without_a_diagonal():
    model, params, batch, _ = local_problem("general")
    with pytest.raises(ValueError, match=r"layer h \(Einsum\) .* Use localgrad\.eprop"):
        learned(make(localgrad.snap, model, batch), params, batch)


@pytest.mark.parametrize(
    "model",
    [cell(3) if name == "skip" else cell() for name, (cell, _) in zoo.LOCAL.items()]
    + [cell() for cell in zoo.REFUSED],
    ids=lambda model: type(model).__name__,
)
def test_exact_rules_are_exact_on_all(model):
    params, batch = problem(model, isinstance(model, zoo.Symbols))
    expected = jax.jit(functools.partial(oracles.bptt, model))(params, oracles.steps_of(batch))
    close(learned(make(localgrad.bptt, model, batch), params, batch), expected)
    close(streamed(make(localgrad.rtrl, model, batch, batch_size=B), params, batch), expected)


@pytest.mark.parametrize("cell", zoo.REFUSED, ids=lambda cell: cell.__name__)
def test_what_a_local_rule_cannot_credit_it_refuses(cell):
    params, batch = problem(cell())
    for batch_size in (None, B):
        rule = make(localgrad.eprop, cell(), batch, batch_size=batch_size)
        with pytest.raises(ValueError, match=f"(?s){zoo.REFUSED[cell]}"):
            rule(params, rule.init(params), batch)


def test_a_convolutional_cell_is_for_exact_rules():
    model = nn.ConvLSTMCell(2, kernel_size=(2,))
    params, batch = problem(model, spatial=(3,))
    expected = jax.jit(functools.partial(oracles.bptt, model))(params, oracles.steps_of(batch))
    close(learned(make(localgrad.bptt, model, batch), params, batch), expected)
    close(streamed(make(localgrad.rtrl, model, batch, batch_size=B), params, batch), expected)
    rule = make(localgrad.eprop, model, batch)
    with pytest.raises(
        ValueError, match=r"eprop cannot credit cell \(ConvLSTMCell\).*convolutional"
    ):
        learned(rule, params, batch)


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop])
@pytest.mark.parametrize(
    "cell, path", [(zoo.Tied, "e/embedding"), (zoo.WithoutAutapses, "h/kernel")]
)
def test_a_layer_whose_parameters_work_elsewhere_is_refused(factory, cell, path):
    params, batch = problem(cell(), cell is zoo.Tied)
    rule = make(factory, cell(), batch)
    with pytest.raises(ValueError, match=f"parameter {path} outside its layer's own call"):
        learned(rule, params, batch)


def test_a_carry_belongs_to_its_examples():
    params, batch = problem(zoo.Counts())
    with pytest.raises(ValueError, match=r"carry of shape \(\).* batch axis, B = [12]"):
        learned(make(localgrad.bptt, zoo.Counts(), batch), params, batch)


def test_complex_states_are_for_backpropagation():
    params, batch = problem(zoo.Complex())
    expected = jax.jit(functools.partial(oracles.bptt, zoo.Complex()))(
        params, oracles.steps_of(batch)
    )
    close(learned(make(localgrad.bptt, zoo.Complex(), batch), params, batch), expected)
    for factory in (localgrad.rtrl, localgrad.eprop, localgrad.snap):
        rule = make(factory, zoo.Complex(), batch)
        with pytest.raises(ValueError, match="carry is complex128.* two real arrays"):
            learned(rule, params, batch)


@pytest.mark.parametrize("window", [1, 3, 5, 7])
@pytest.mark.parametrize(
    "factory",
    [
        functools.partial(localgrad.tbptt, horizon=3),
        localgrad.rtrl,
        localgrad.snap,
        localgrad.eprop,
        localgrad.readout_only,
    ],
    ids=["tbptt", "rtrl", "snap", "eprop", "readout_only"],
)
def test_windows_of_any_size_give_the_same(factory, window):
    """Also where one full window is followed by a shorter one."""
    dense = nn.Dense(2, param_dtype=float)
    model = localgrad.Network((nn.LSTMCell(4, param_dtype=float),), dense)
    params, batch = problem(model)
    whole = make(factory, model, batch, window=T)
    rule = make(factory, model, batch, window=window)
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
    params, batch = problem(ByName())
    expected = jax.jit(functools.partial(oracles.bptt, ByName()))(params, oracles.steps_of(batch))
    close(learned(make(localgrad.bptt, ByName(), batch), params, batch), expected)
    whole = learned(make(localgrad.eprop, ByName(), batch), params, batch)
    close(streamed(make(localgrad.eprop, ByName(), batch, batch_size=B), params, batch), whole)


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.rtrl, localgrad.eprop])
def test_a_fresh_state_can_be_donated(factory):
    params, batch = problem(zoo.Concat())
    rule = make(factory, zoo.Concat(), batch, batch_size=B)
    expected, _ = rule(params, rule.init(params), batch)
    donating = jax.jit(lambda state: rule(params, state, batch), donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what could not be reused
        found, _ = donating(rule.init(params))
    close(found, expected)
