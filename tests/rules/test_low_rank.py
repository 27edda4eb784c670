"""UORO, KF-RTRL and OK: the limits in which they are exact, and the variance elsewhere."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.core.passes import kronecker
from tests.conformance import draws, zoo
from tests.conformance.table import build, groups
from tests.golden.problems import LOSSES, batch_of, network_of, params_of

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(3)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)


def problem_of(cell):
    """A bare cell with random parameters, and two sequences with weights and resets."""
    inputs = jax.random.normal(KEY, (2, 9, 4))
    carry = cell.initialize_carry(KEY, inputs[:, 0].shape)
    params = cell.init(KEY, carry, inputs[:, 0])["params"]
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(KEY, a.shape), params)
    _, y = cell.apply({"params": params}, carry, inputs[:, 0])
    return cell, params, ragged(localgrad.Batch(inputs, jnp.ones((2, 9, y.shape[-1]))))


def ragged(batch):
    rng = np.random.default_rng(0)
    shape = jax.tree.leaves(batch.inputs)[0].shape[:2]
    mask, reset = rng.choice([0.0, 1.0, 2.0], shape), rng.random(shape) < 0.1
    return batch._replace(mask=mask, reset=reset)


def table_problem(name):
    built = build(name)
    return built.model, built.params, jax.tree.map(lambda a: a[:2, :9], ragged(built.batch))


def streamed(make, model, params, batch, **options):
    """Three calls of three steps: the summed updates, and the last state."""
    rule = make(model, optax.l2_loss, batch_size=2, reduction="sum", **options)
    state, total = rule.init(params), None
    for at in range(0, 9, 3):
        piece = jax.tree.map(lambda a, at=at: a[:, at : at + 3], batch)
        updates, state = rule(params, state, piece)
        total = updates if total is None else jax.tree.map(jnp.add, total, updates)
    return rule, groups(total), state


EXACT = {
    # Gates, two layers of a stack; time constants and an encoder, which no product holds.
    "two_gated": functools.partial(table_problem, "two_gated"),
    "embed": functools.partial(table_problem, "embed"),
    # One layer behind another, a layer called twice, units that meet: products all the same.
    "resets_before": lambda: problem_of(zoo.ResetsBefore()),
    "twice": lambda: problem_of(zoo.Twice()),
    "stacked": lambda: problem_of(zoo.Stacked()),
}
SLOW = ("twice", "stacked", "two_gated")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXACT]
)
@pytest.mark.slow
def test_with_a_rank_of_all_that_a_layer_receives_ok_is_rtrl(name):
    """At a window of one step too, in which all credit passes the products."""
    model, params, batch = EXACT[name]()
    _, wanted, held = streamed(localgrad.rtrl, model, params, batch)
    for window in (3,) if name == "two_gated" else (1, 3):
        rule, found, state = streamed(
            localgrad.ok, model, params, batch, rank=12, key=KEY, window=window
        )
        close(found, wanted)
    said = rule.credits(params)
    inside = [path for path in said if path[-1] == "kernel" and path[0] != "readout"]
    assert inside and all("12 Kronecker products" in said[path] for path in inside)
    exact = {cell: dict(leaves) for cell, leaves in state.influence.items()}
    close(exact, {c: {p: held.influence[c][p] for p in leaves} for c, leaves in exact.items()})


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.slow
def test_few_products_mean_the_sum_and_vary_as_little_as_they_can(rank):
    """Over all places of the marks; the least variance is Benzing's, of the singular values."""
    rng = np.random.default_rng(rank)
    left, right = rng.normal(size=(6, 5, 4)), rng.normal(size=(6, 7))
    whole = np.einsum("tnd,tu->ndu", left, right)
    starts = (np.arange(20_000) + 0.5) / 20_000
    reduce = functools.partial(kronecker.by_sampling, rank)
    a, u = jax.vmap(reduce, (0, None, None))(starts, left, right)
    made = np.einsum("krnd,kru->kndu", a, u)
    np.testing.assert_allclose(made.mean(0), whole, rtol=0, atol=1e-3 * np.abs(whole).max())
    sizes = np.linalg.svd(whole.reshape(20, 7), compute_uv=False)[:6]
    kept = next(m for m in range(rank) if (rank - m) * sizes[m] <= sizes[m:].sum())
    least = sizes[kept:].sum() ** 2 / (rank - kept) - (sizes[kept:] ** 2).sum()
    found = ((made - whole) ** 2).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(found, least, rtol=1e-3)


def test_the_products_are_the_influence():
    model, params, batch = network_of("c1"), params_of("c1"), batch_of("c1")
    options = {"batch_size": 1, "window": 5}
    exact = localgrad.rtrl(model, LOSSES["c1"], **options)
    few = localgrad.ok(model, LOSSES["c1"], rank=9, key=KEY, **options)
    held = exact(params, exact.init(params), batch)[1].influence["cells_0"]
    state = few(params, few.init(params), batch)[1]
    whole = jnp.einsum("brnd,bru->bnud", state.left["cells_0"], state.right["cells_0"])
    close(whole[:, :, :3], held["cells_0", "i", "kernel"])
    close(whole[:, :, 3:-1], held["cells_0", "h", "kernel"])
    close(whole[:, :, -1], held["cells_0", "i", "bias"])


MAKES = {
    "uoro": localgrad.uoro,
    "kf_rtrl": localgrad.kf_rtrl,
    "ok(1)": functools.partial(localgrad.ok, rank=1),
    "ok(2)": functools.partial(localgrad.ok, rank=2),
    "ok(4)": functools.partial(localgrad.ok, rank=4),
}
PUBLISHED = {
    "c0": {"uoro": 228, "kf_rtrl": 30.7, "ok(1)": 27.8, "ok(2)": 4.1, "ok(4)": 0.048},
    "c1": {"uoro": 397, "kf_rtrl": 61.5, "ok(1)": 35.1, "ok(2)": 2.5, "ok(4)": 0.036},
}
"""Total variance of the gradient of ten steps: an independent NumPy program, from zero factors."""


def variance(name, case, window, count=draws.DRAWS):
    """Of the cell's gradient of a sequence, summed over its entries."""
    model, params, batch = network_of(case), params_of(case), batch_of(case)

    def draw(key):
        rule = MAKES[name](model, LOSSES[case], key=key, window=window, reduction="sum")
        return rule(params, rule.init(params), batch)[0]["cells_0"]

    return sum(np.asarray(a).var(0).sum() for a in jax.tree.leaves(draws.sample(draw, count)))


@pytest.mark.parametrize("case", [pytest.param("c0", marks=pytest.mark.slow), "c1"])
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.few(1)
def test_the_variance_is_that_of_the_published_rules(name, case):
    """Theirs is given to two or three digits, of some thousand draws; so are ours."""
    np.testing.assert_allclose(variance(name, case, 1), PUBLISHED[case][name], rtol=0.1)


@pytest.mark.parametrize("name", ["uoro", "kf_rtrl", pytest.param("ok(2)", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_exact_credit_within_windows_takes_most_of_the_variance(name):
    """Of c0, ten steps in windows of two and of five."""
    assert variance(name, "c0", 2, 500) < PUBLISHED["c0"][name] / 8
    assert variance(name, "c0", 5, 500) < PUBLISHED["c0"][name] / 200


@pytest.mark.parametrize("name", ["uoro", "kf_rtrl", "ok(2)"])
@pytest.mark.few(1)
def test_without_a_window_of_one_a_step_credits_itself_exactly(name):
    """The published influence, and the published gradient without the noise of its last step."""
    model, params, batch = network_of("c1"), params_of("c1"), batch_of("c1")
    options = {"key": KEY, "batch_size": 1, "reduction": "sum"}
    rules = [MAKES[name](model, LOSSES["c1"], window=window, **options) for window in (1, None)]
    states = [rule.init(params) for rule in rules]
    once = localgrad.bptt(model, LOSSES["c1"], batch_size=1, reduction="sum")
    for now in range(2):
        piece = jax.tree.map(lambda a, now=now: a[:, [now]], batch)
        found = [rule(params, s, piece) for rule, s in zip(rules, states, strict=True)]
        if now == 0:
            close(found[1][0], once(params, once.init(params), piece)[0])
        states = [state for _, state in found]
        close((states[0].left, states[0].right), (states[1].left, states[1].right))


def test_a_single_window_of_an_episode_is_exact():
    model, params, batch = network_of("c1"), params_of("c1"), batch_of("c1")
    exact = localgrad.bptt(model, LOSSES["c1"])
    for name in ("uoro", "kf_rtrl"):
        rule = MAKES[name](model, LOSSES["c1"], key=KEY)
        found = rule(params, rule.init(params), batch)[0]
        close(found, exact(params, exact.init(params), batch)[0])


def test_what_cannot_be_is_refused():
    model, loss = network_of("c1"), LOSSES["c1"]
    for rank in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"rank must be a positive integer; got {rank}.*try 4"):
            localgrad.ok(model, loss, rank=rank, key=KEY)
    for make in MAKES.values():
        with pytest.raises(
            ValueError, match=r"key must be a typed PRNG key: pass jax\.random\.key"
        ):
            make(model, loss, key=None)
    with pytest.raises(ValueError, match=r"noise must be one of \('gaussian', 'rademacher'\)"):
        localgrad.uoro(model, loss, key=KEY, noise="signs")
    rule = localgrad.ok(model, loss, rank=4, key=KEY, batch_size=1, max_influence_bytes=1000)
    with pytest.raises(ValueError, match=r"ok's influence.*max_influence_bytes.*localgrad\.uoro"):
        rule.init(params_of("c1"))
