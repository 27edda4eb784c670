"""Streams of any shape: however they are cut, masked and reset, in either precision.

Each example compiles programs of its own, so the quick test has a few, with everything on, of the
rules that show a machinery each; the slow one many, of all.
"""

import dataclasses

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import localgrad
from catalogue import RULES
from tests.conformance.table import MACHINERY

CUTTABLE = [name for name, row in RULES.items() if row.windowed and not row.gridded]
CELLS = {
    "rate": lambda n: localgrad.RateCell(n, alpha=0.3),
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
    "leaky": lambda n: localgrad.LeakyCell(n, decay=0.8),
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """A network with data.

    Attributes:
        rule: a row of the catalogue.
        cell: of `CELLS`.
        sizes: B, T, N, I, O.
        cut: after how many steps the stream is cut.
        window: of the rule.
        mask: whether steps weigh differently, some nothing.
        reset: whether sequences begin within the stream.
        double: float64, or float32.
        seed: of the numbers.
    """

    rule: str
    cell: str
    sizes: tuple[int, int, int, int, int]
    cut: int
    window: int | None
    mask: bool
    reset: bool
    double: bool
    seed: int


@st.composite
def streams(draw, rules):
    rule = draw(st.sampled_from(rules))
    cells = ["rate"] if "gated" in RULES[rule].refuses else list(CELLS)
    b, n, i, o = (draw(st.integers(1, most)) for most in (3, 4, 3, 3))
    t = draw(st.integers(2, 7))
    return Stream(
        rule=rule,
        cell=draw(st.sampled_from(cells)),
        sizes=(b, t, n, i, o),
        cut=draw(st.integers(1, t - 1)),
        window=draw(st.none() | st.integers(1, t)),
        mask=draw(st.booleans()),
        reset=draw(st.booleans()),
        double=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def of(stream: Stream) -> tuple:
    """The model, random parameters, and the data."""
    b, t, n, i, o = stream.sizes
    dtype = jnp.float64 if stream.double else jnp.float32
    rng = np.random.default_rng(stream.seed)
    model = localgrad.Network((CELLS[stream.cell](n),), readout=nn.Dense(o))
    x = jnp.zeros((b, i), dtype)
    params = model.init(jax.random.key(0), model.initialize_carry(jax.random.key(0), x.shape), x)
    params = jax.tree.map(
        lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape), dtype), params["params"]
    )
    return (
        model,
        params,
        localgrad.Batch(
            *(jnp.asarray(rng.normal(size=(b, t, width)), dtype) for width in (i, o)),
            mask=jnp.asarray(rng.choice([0.0, 0.5, 2.0], (b, t)), dtype) if stream.mask else None,
            reset=jnp.asarray(rng.random((b, t)) < 0.3) if stream.reset else None,
        ),
    )


def by_gradient(model, params, batch):
    """BPTT by `jax.grad` of a loop in Python."""

    def loss(params):
        start = model.initialize_carry(jax.random.key(0), batch.inputs[:, 0].shape)
        start = jax.tree.map(lambda a: a.astype(batch.inputs.dtype), start)
        carry, total = start, 0.0
        for t in range(batch.inputs.shape[1]):
            if batch.reset is not None:
                again = batch.reset[:, t, None]
                carry = jax.tree.map(lambda a, s, r=again: jnp.where(r, s, a), carry, start)
            carry, y = model.apply({"params": params}, carry, batch.inputs[:, t])
            each = optax.l2_loss(y, batch.targets[:, t]).mean(-1)
            total += (each if batch.mask is None else each * batch.mask[:, t]).sum()
        return total

    return jax.jit(jax.grad(loss))(params)


def check(stream: Stream) -> None:
    """A stream in two calls is a stream in one; and where the rule is exact, the gradient."""
    with jax.enable_x64(stream.double):
        model, params, batch = of(stream)
        b, t, *_ = stream.sizes
        window = {} if stream.window is None else {"window": stream.window}
        if RULES[stream.rule].factory is localgrad.tbptt:
            window = {}
        rule = RULES[stream.rule].make(
            model,
            optax.l2_loss,
            batch_size=b,
            reduction="sum",
            example=batch.inputs[0, 0],
            **window,
        )
        begun = rule.init(params)
        whole, last = rule(params, begun, batch)
        first, rest = (
            jax.tree.map(lambda a, s=s: a[:, s], batch)
            for s in (slice(stream.cut), slice(stream.cut, None))
        )
        one, state = rule(params, begun, first)
        two, state = rule(params, state, rest)
        pieces = jax.tree.map(jnp.add, one, two)
        rounding = 1e-10 if stream.double else 2e-4
        scale = 1 + max(float(jnp.abs(a).max()) for a in jax.tree.leaves(whole))
        near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rounding * scale)  # noqa: E731
        jax.tree.map(near, pieces, whole)
        jax.tree.map(near, state.carry, last.carry)
        if stream.rule == "rtrl":
            jax.tree.map(near, whole, by_gradient(model, params, batch))


GIVEN = {"mask": True, "reset": True}


@hypothesis.settings(max_examples=1)  # the smallest there is, beside those given
@hypothesis.given(streams([name for name in MACHINERY if name in CUTTABLE]))
@hypothesis.example(
    Stream("rtrl", "rate", (2, 6, 3, 2, 2), cut=3, window=2, double=True, seed=1, **GIVEN)
)
@hypothesis.example(
    Stream("tbptt", "leaky", (3, 4, 2, 3, 1), cut=2, window=None, double=False, seed=2, **GIVEN)
)
@hypothesis.example(
    Stream("eprop_random", "leaky", (2, 6, 3, 1, 3), cut=3, window=2, double=True, seed=3, **GIVEN)
)
def test_a_stream_may_be_cut_anywhere(stream):
    check(stream)


@pytest.mark.slow
@hypothesis.settings(max_examples=60)
@hypothesis.given(streams(CUTTABLE))
def test_a_stream_may_be_cut_anywhere_under_every_rule(stream):
    check(stream)
