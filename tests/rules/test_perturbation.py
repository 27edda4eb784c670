"""Perturbation rules beside BPTT, by every coordinate at once; their variance; what they refuse.

The mean over noise of an estimate that is quadratic in it is the sum over unit vectors in its
place, so that no draw is needed for a mean. Letters: B batch, T steps, N units, P parameters.
"""

import contextlib
import functools
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.core.model.nodes import nodes_of
from localgrad.core.model.stack import assemble
from localgrad.core.params import leaves_of
from localgrad.core.passes import disturb
from localgrad.rules.perturbation import particles
from tests.golden.test_perturbation import arrays, by_weight, problem

pytestmark = pytest.mark.usefixtures("x64")
close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-9)
B, T, N, IN, OUT = 2, 5, 3, 2, 2


def network(cell=None, steps=T, batch=B):
    """A network, random parameters and a batch with weights and a reset."""
    rng = np.random.default_rng(0)
    cell = cell or nn.GRUCell(N, param_dtype=jnp.float64)
    model = localgrad.Network((cell,), readout=nn.Dense(OUT, param_dtype=jnp.float64))
    x = jnp.asarray(rng.normal(size=(batch, steps, IN)))
    carry = model.initialize_carry(jax.random.key(0), (batch, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape)), params)
    reset = jnp.zeros((batch, steps), bool).at[0, steps // 2].set(True)
    mask = jnp.asarray(rng.choice([0.0, 0.5, 1.0], (batch, steps)))
    targets = jnp.asarray(rng.normal(size=(batch, steps, OUT)))
    return model, params, localgrad.Batch(x, targets, mask, reset)


def updates_of(make, given, feed=None, loss=optax.squared_error, **options):
    """The updates of a call."""
    model, params, batch = given
    options = {"key": jax.random.key(1), "reduction": "sum"} | options
    if make in (localgrad.bptt, localgrad.tbptt):
        del options["key"]
    rule = make(model, loss, **options)
    with feed or contextlib.nullcontext():
        return rule(params, rule.init(params), batch)[0]


def unit_vectors(batch):
    """Feeds each unit vector of the noise of all nodes and steps as a sample of its own."""

    def noise_for(kind, keys, parts):
        del kind
        steps, samples = keys.shape
        shapes = [[part.drives[n[0]].shape[1:] for n in part.nodes] for part in parts]
        sizes = [steps * int(np.prod(s[1:])) for row in shapes for s in row]
        assert sum(sizes) == samples, f"make it with samples={sum(sizes)}"
        eye, found = iter(np.split(np.eye(samples), np.cumsum(sizes)[:-1], axis=1)), []
        for row in shapes:
            each = [jnp.asarray(next(eye)).reshape(samples, steps, 1, -1) for _ in row]
            each = [jnp.repeat(jnp.moveaxis(z, 1, 0), batch, axis=2) for z in each]
            found.append([z * np.sqrt(samples) for z in each])
        return found

    return mock.patch.object(disturb, "noise_for", noise_for)


NODES = {"gru": 4 * N, "simple": N}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("credit", ["causal", "total", "step"])
@pytest.mark.few(1)
def test_nodes_give_the_gradient_on_average(name, credit):
    cells = {"gru": nn.GRUCell, "simple": nn.SimpleCell}
    given = network(cells[name](N, param_dtype=jnp.float64))
    options = {"over": "nodes", "credit": credit, "samples": T * (NODES[name] + OUT), "window": T}
    found = updates_of(localgrad.forward_gradient, given, unit_vectors(B), **options)
    exact = {"causal": localgrad.bptt, "total": localgrad.bptt, "step": localgrad.tbptt}[credit]
    close(found, updates_of(exact, given, **({"horizon": 1} if credit == "step" else {})))


@pytest.mark.slow
def test_noise_of_some_size_gives_the_gradient_but_for_its_square():
    given = network(nn.SimpleCell(N, param_dtype=jnp.float64))
    exact = updates_of(localgrad.bptt, given)
    sizes = {}
    for scale in (0.02, 0.01):
        found = updates_of(
            localgrad.node_perturbation,
            given,
            unit_vectors(B),
            samples=T * (N + OUT),
            window=T,
            scale=scale / np.sqrt(T * (N + OUT)),
            antithetic=True,
        )
        sizes[scale] = optax.tree.norm(jax.tree.map(jnp.subtract, found, exact))
    assert 3.9 < sizes[0.02] / sizes[0.01] < 4.1


def test_weights_give_the_gradient_on_average():
    given = network()
    leaves = [np.size(a) for a in jax.tree.leaves(given[1])]
    total = sum(leaves)

    def renewed(options, draw, numbers, before):
        eye = iter(np.split(np.eye(total) * np.sqrt(total), np.cumsum(leaves)[:-1], axis=1))
        noise = {
            path: jnp.asarray(next(eye)).reshape(total, 1, *z.shape[2:])
            for path, z in before.noise.items()
        }
        return {path: jnp.repeat(z, B, axis=1) for path, z in noise.items()}, {}

    feed = mock.patch.object(particles, "_renewed", renewed)
    found = updates_of(localgrad.forward_gradient, given, feed, samples=total)
    close(found, updates_of(localgrad.bptt, given))


def test_activity_gives_the_gradient_after_a_change_of_basis():
    # M_t = sum_{k <= t} J_tk J_tk', from the golden file's network, whose units are tanh.
    model, params, batch = problem("b1")
    steps, _, units = arrays()["b1_z_h"].shape
    given = (model, params, batch)
    count = steps * (units + 2)
    found = updates_of(
        localgrad.activity_perturbation,
        given,
        unit_vectors(1),
        samples=count,
        window=steps,
        scale=1e-4 / np.sqrt(count),
        antithetic=True,
        norm="variance",
    )
    change, adjoint = arrays()["b1_anp_cov_M"], arrays()["b1_node_grad_total_h"][:, 0]
    wanted = np.einsum("tij,tj,tk->ik", change, adjoint, arrays()["b1_clean_uh"][:, 0])
    np.testing.assert_allclose(by_weight(found)["A"], wanted, rtol=0, atol=1e-6)


def relative_variance(make, given, draws=4000, exact=(localgrad.bptt, {}), **options):
    """E|estimate - G|^2 over |G|^2 for whole sequences, and its standard error."""
    model, params, batch = given
    batch = batch._replace(reset=None)
    given = (model, params, batch)
    options = {"reduction": "sum"} | options

    def one(key):
        rule = make(model, optax.squared_error, key=key, **options)
        return rule(params, rule.init(params), batch)[0]

    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=200))(
        jax.random.split(jax.random.key(0), draws)
    )
    exact = updates_of(exact[0], given, **exact[1])
    off = jax.tree.map(lambda a, b: ((a - b[None]) ** 2).reshape(draws, -1).sum(1), found, exact)
    each = np.asarray(sum(jax.tree.leaves(off))) / float(optax.tree.norm(exact)) ** 2
    return each.mean(), each.std() / np.sqrt(draws)


@pytest.mark.parametrize(("noise", "more"), [("gaussian", 1), ("rademacher", -1)])
@pytest.mark.slow
def test_the_variance_of_weight_perturbation_counts_parameters(noise, more):
    given = network(nn.SimpleCell(N, param_dtype=jnp.float64), batch=1)
    total = sum(np.size(a) for a in jax.tree.leaves(given[1]))
    found, error = relative_variance(localgrad.weight_perturbation, given, noise=noise, scale=1e-4)
    assert abs(found - (total + more)) < 3 * error


def of_noise(given):
    """What each step's loss owes to noise on each node, [T, T, units], and what nodes receive."""
    model, params, batch = given
    own, out = params["cells_0"], params["readout"]
    x, targets, mask = batch.inputs[0], batch.targets[0], batch.mask[0]
    kernels = [own[name]["kernel"] for name in "ih"]
    bias = sum(own[name].get("bias", jnp.zeros(N)) for name in "ih")

    def losses(z):
        h, each, states = jnp.zeros(N), [], []
        for t in range(T):
            states.append(h)
            h = jnp.tanh(x[t] @ kernels[0] + h @ kernels[1] + bias + z[t, :N])
            y = h @ out["kernel"] + out["bias"] + z[t, N:]
            each.append(mask[t] * jnp.mean((y - targets[t]) ** 2))
        return jnp.stack(each), jnp.stack([*states[1:], h])

    blank = jnp.zeros((T, N + OUT))
    after = losses(blank)[1]
    before = jnp.concatenate([jnp.zeros((1, N)), after[:-1]])
    ones = [jnp.ones((T, 1)) for name in "ih" if "bias" in own[name]]
    received = [jnp.concatenate(a, 1) for a in ([x, before, *ones], [after, jnp.ones((T, 1))])]
    return np.asarray(jax.jacobian(lambda z: losses(z)[0])(blank)), list(map(np.asarray, received))


@pytest.mark.parametrize(
    "credit",
    ["causal", "resync", *(pytest.param(c, marks=pytest.mark.slow) for c in ("step", "total"))],
)
@pytest.mark.slow
def test_the_variance_of_node_perturbation_counts_nodes_and_steps(credit):
    """By Isserlis' theorem: noise z enters node n at step t, which is paid by the sum of losses
    a_t . z and pays x_t."""
    given = network(nn.SimpleCell(N, param_dtype=jnp.float64), batch=1)
    given = (*given[:2], given[2]._replace(reset=None))
    owed, received = of_noise(given)
    paid = {"causal": np.triu(np.ones((T, T))), "step": np.eye(T), "total": np.ones((T, T))}
    resync = credit == "resync"
    if resync:  # a step's loss owes nothing to the noise of others
        credit, owed = "step", np.einsum("ts,tsk->tsk", np.eye(T), owed)
    exact = (localgrad.tbptt, {"horizon": 1}) if credit == "step" else (localgrad.bptt, {})
    wanted = 0.0
    for x, units, pays in zip(
        received, (slice(N), slice(N, None)), (paid[credit], np.eye(T)), strict=True
    ):
        a = np.einsum("ts,skj->tkj", pays, owed)
        mine, gram = a[..., units], x @ x.T
        wanted += mine.shape[-1] * np.einsum("tt,tkj,tkj->", gram, a, a)
        wanted += np.einsum("ts,tsi,sti->", gram, mine, mine)
    found, error = relative_variance(
        localgrad.node_perturbation,
        given,
        noise="gaussian",
        scale=1e-4,
        credit=credit,
        resync=resync,
        exact=exact,
    )
    wanted /= float(optax.tree.norm(updates_of(exact[0], given, **exact[1]), squared=True))
    assert abs(found - wanted) < min(4 * error, 0.05 * wanted)


@pytest.mark.slow
def test_noise_that_ends_with_its_step_varies_less_and_means_the_same():
    given = network(nn.SimpleCell(N, param_dtype=jnp.float64), batch=1)
    exact = (localgrad.tbptt, {"horizon": 1})
    wanted = updates_of(exact[0], given, **exact[1])
    vary = functools.partial(
        relative_variance, localgrad.node_perturbation, given, scale=1e-4, credit="step"
    )
    (lasting, error), (ending, _) = vary(exact=exact), vary(exact=exact, resync=True)
    assert ending < lasting - 4 * error
    count = T * (N + OUT)
    told = {"samples": count, "window": T, "credit": "step", "scale": 1e-4 / np.sqrt(count)}
    found = updates_of(
        localgrad.node_perturbation,
        given,
        unit_vectors(1),
        antithetic=True,
        resync=True,
        **told,
    )
    chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.slow
def test_noise_that_ends_with_its_step_needs_no_memory_of_it(antithetic):
    model, params, batch = network()
    told = {"key": jax.random.key(3), "credit": "step", "resync": True, "samples": 2}
    told |= {"antithetic": antithetic, "reduction": "sum"}
    whole = localgrad.node_perturbation(model, optax.squared_error, **told)
    wanted, _ = whole(params, whole.init(params), batch)
    rule = localgrad.node_perturbation(model, optax.squared_error, batch_size=B, window=3, **told)
    state, total = rule.init(params), jax.tree.map(jnp.zeros_like, params)
    assert state.deviation is None and not state.eligibility
    for piece in (slice(0, 2), slice(2, None)):
        part = jax.tree.map(lambda a, piece=piece: a[:, piece], batch)
        found, state = rule(params, state, part)
        total = jax.tree.map(jnp.add, total, found)
    chex.assert_trees_all_close(total, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("credit", ["step", "causal"])
@pytest.mark.slow
def test_one_sample_of_activity_lies_closer_to_the_gradient(credit):
    model, params, batch = network(nn.SimpleCell(8, param_dtype=jnp.float64), steps=12, batch=1)
    given = (model, params, batch._replace(reset=None))
    exact = (localgrad.tbptt, {"horizon": 1}) if credit == "step" else (localgrad.bptt, {})
    wanted = updates_of(exact[0], given, **exact[1])

    def cosines(make):
        def one(key):
            found = updates_of(make, given, key=key, credit=credit, scale=1e-4)
            return localgrad.compare(found, wanted)["all"].cosine

        return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 500))

    nodes, active = (
        np.asarray(cosines(make))
        for make in (localgrad.node_perturbation, localgrad.activity_perturbation)
    )
    error = np.hypot(nodes.std(), active.std()) / np.sqrt(500)
    assert active.mean() > nodes.mean() + 4 * error


@pytest.mark.slow
def test_the_variance_falls_as_one_over_samples():
    given = network(nn.SimpleCell(N, param_dtype=jnp.float64), batch=1)
    one, error = relative_variance(localgrad.node_perturbation, given, scale=1e-4)
    four, _ = relative_variance(localgrad.node_perturbation, given, scale=1e-4, samples=4)
    assert abs(one / four - 4) < 12 * error / one + 0.3
    total, _ = relative_variance(localgrad.node_perturbation, given, scale=1e-4, credit="total")
    assert one < 0.9 * total, "losses before the noise only add variance"


@pytest.mark.parametrize("make", [localgrad.node_perturbation, localgrad.weight_perturbation])
@pytest.mark.slow
def test_a_tiny_scale_is_a_forward_gradient(make):
    given = network()
    over = "nodes" if make is localgrad.node_perturbation else "weights"
    found = updates_of(make, given, scale=1e-6, antithetic=True, samples=2)
    limit = updates_of(localgrad.forward_gradient, given, over=over, samples=2)
    chex.assert_trees_all_close(found, limit, rtol=1e-6, atol=1e-6)


RULES = {
    "node": localgrad.node_perturbation,
    "activity": localgrad.activity_perturbation,
    "weight": localgrad.weight_perturbation,
    "pes": functools.partial(localgrad.pes, unroll=2),
}
every_rule = pytest.mark.parametrize(
    "name", [*list(RULES)[:3], pytest.param("pes", marks=pytest.mark.slow)]
)


@jax.custom_jvp
def stern(x):
    """A sign, of which none may ask for a derivative."""
    return jnp.sign(x)


@stern.defjvp
def _refused(primals, tangents):
    raise AssertionError("this was differentiated")


@every_rule
@pytest.mark.few(1)
def test_nothing_is_differentiated(name):
    given = network(nn.SimpleCell(N, activation_fn=stern, param_dtype=jnp.float64))
    loss = lambda y, target: stern(y - target).mean(-1) + jnp.abs(y).sum(-1)  # noqa: E731
    for options in ({}, {"batch_size": B}):
        found = updates_of(RULES[name], given, loss=loss, scale=1.0, **options)
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(found))
        assert jnp.any(found["cells_0"]["h"]["kernel"])


@every_rule
@pytest.mark.few(1)
def test_rewards_may_come_from_outside_of_jax(name):
    def outside(y, target):
        return np.square(y - target).mean(-1)

    def loss(y, target):
        shape = jax.ShapeDtypeStruct(y.shape[:1], y.dtype)
        return jax.pure_callback(outside, shape, y, target)

    given = network()
    close(
        updates_of(RULES[name], given, loss=loss),
        updates_of(RULES[name], given, loss=optax.squared_error),
    )


@every_rule
@pytest.mark.slow
def test_some_samples_at_a_time_give_what_all_at_once_do(name):
    given = network()
    whole = updates_of(RULES[name], given, samples=6)
    close(updates_of(RULES[name], given, samples=6, samples_at_once=2), whole)


@every_rule
@pytest.mark.slow
def test_a_lost_copy_is_left_out_and_the_others_are_not(name):
    model, params, batch = network()
    batch = batch._replace(mask=None, reset=None)

    def loss(y, target):
        return jnp.where(jnp.abs(y[..., 0]) > 1.5, jnp.nan, (y - target).mean(-1))

    given = (model, params, batch)
    found = updates_of(RULES[name], given, loss=loss, scale=0.5, samples=50)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(found))
    assert all(jnp.any(a) for a in jax.tree.leaves(found))
    blind = lambda y, target: jnp.full(y.shape[:1], jnp.nan)  # noqa: E731
    lost = updates_of(RULES[name], given, loss=blind)
    assert jnp.isnan(lost["readout"]["bias"]).all(), "a clean loss that is lost is not hidden"


@every_rule
@pytest.mark.few(1)
def test_a_copy_whose_carry_is_lost_goes_on_from_the_clean_one(name):
    cell = nn.SimpleCell(N, activation_fn=jnp.sqrt, param_dtype=jnp.float64)
    model, params, batch = network(cell)
    params = jax.tree.map(jnp.abs, params)
    batch = localgrad.Batch(jnp.abs(batch.inputs), batch.targets)
    rule = RULES[name](
        model, optax.squared_error, key=jax.random.key(0), scale=0.6, samples=20, batch_size=B
    )
    updates, state = rule(params, rule.init(params), batch)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves((updates, state.deviation)))
    still = [(a == 0).all(-1) for a in jax.tree.leaves(state.deviation)]
    assert any(a.any() for a in still) and not all(a.all() for a in still)


@pytest.mark.parametrize("normal", [False, True], ids=["dense", "normalised"])
@pytest.mark.few(1)
def test_an_exact_readout_gets_its_gradient_and_no_noise(normal):
    model, params, batch = network()
    if normal:  # a readout with parameters that no noise could enter by
        layers = [nn.LayerNorm(param_dtype=jnp.float64), nn.Dense(OUT, param_dtype=jnp.float64)]
        model = localgrad.Network(model.cells, readout=nn.Sequential(layers))
        carry = model.initialize_carry(jax.random.key(0), (B, IN))
        params = model.init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    given = (model, params, batch)
    found = updates_of(localgrad.node_perturbation, given, readout="exact")
    close(found["readout"], updates_of(localgrad.bptt, given)["readout"])


def lone(given, **options):
    """A rule without a clean copy that is used to a loss, and a state in which it is."""
    model, params, batch = given
    rule = localgrad.node_perturbation(
        model, optax.squared_error, baseline="running_mean", **{"reduction": "sum"} | options
    )
    usual, _, _ = localgrad.evaluate(model, optax.squared_error, params, batch)
    state = rule.init(params)
    return rule, state._replace(loss=usual, usual=usual, calls=jnp.ones_like(state.calls))


def test_without_a_clean_copy_it_is_right_on_average_too():
    given = network(nn.SimpleCell(N, param_dtype=jnp.float64))
    model, params, batch = given
    draws = 4000

    def one(key):
        rule, state = lone(given, key=key, scale=0.05)
        return rule(params, state, batch)[0]

    keys = jax.random.split(jax.random.key(0), draws)
    found = jax.jit(lambda k: jax.lax.map(one, k, batch_size=200))(keys)
    exact = updates_of(localgrad.bptt, given)
    off = jax.tree.map(lambda a, b: np.asarray(a - b[None]), found, exact)
    for a in jax.tree.leaves(off):
        assert np.abs(a.mean(0) / a.std(0)).max() < 4.5 / np.sqrt(draws)


@pytest.mark.parametrize("credit", ["causal", "step"])
@pytest.mark.slow
def test_opposite_noise_is_compared_with_the_same_loss(credit):
    """So that the baseline drops out of the sum of two, and a clean rule's pair is left."""
    model, params, batch = given = network(nn.SimpleCell(N, param_dtype=jnp.float64))
    rng = np.random.default_rng(0)
    noise = [[jnp.asarray(rng.normal(size=(T, 1, B, n)))] for n in (N, OUT)]

    def fed(sign, make):
        signed = [[sign * z for z in row] for row in noise]
        with mock.patch.object(disturb, "noise_for", lambda *_: signed):
            return make()

    options = {"key": jax.random.key(0), "credit": credit, "scale": 1e-5, "window": T}

    def alone():
        rule, state = lone(given, **options)
        return rule(params, state, batch)[0]

    both = jax.tree.map(lambda a, b: (a + b) / 2, fed(1, alone), fed(-1, alone))
    pair = fed(
        1, lambda: updates_of(localgrad.node_perturbation, given, antithetic=True, **options)
    )
    # What synapses receive is noisy here, by the scale, and paid by the loss itself, over it.
    clean = lambda tree: jax.tree.map(np.asarray, tree)  # noqa: E731
    biases = [("cells_0", "i", "bias"), ("readout", "bias")]
    for path in biases:
        a, b = (functools.reduce(lambda t, k: t[k], path, clean(tree)) for tree in (both, pair))
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_without_a_clean_copy_a_split_changes_nothing_but_the_baseline():
    given = network()
    model, params, batch = given
    options = {"key": jax.random.key(3), "batch_size": B}
    rule, state = lone(given, **options)
    whole, after = rule(params, state, batch)
    total, now = jax.tree.map(jnp.zeros_like, params), state
    for t in range(T):
        piece = jax.tree.map(lambda a, t=t: a[:, t : t + 1], batch)
        same = {name: getattr(state, name) for name in ("loss", "usual", "calls")}
        updates, now = rule(params, now._replace(**same), piece)
        total = jax.tree.map(jnp.add, total, updates)
    close(total, whole)
    close(now.eligibility, after.eligibility)
    close(now.carry, after.carry)


def test_the_running_mean_is_of_the_calls_before():
    model, params, batch = given = network()
    rule, _ = lone(given, key=jax.random.key(0), reduction="mean")
    state, seen = rule.init(params), []
    for _ in range(14):
        _, state = rule(params, state, batch)
        mean = 0.0
        for count, loss in enumerate(seen, 1):
            mean += max(1 / count, 0.1) * (loss - mean)
        np.testing.assert_allclose(state.usual, mean, rtol=1e-6)
        seen.append(float(state.loss))
    assert np.std(seen) > 0, "noise is there in every call"


@pytest.mark.slow
def test_calls_that_weigh_nothing_are_not_in_the_running_mean():
    model, params, batch = network()
    rule = localgrad.node_perturbation(
        model,
        optax.squared_error,
        key=jax.random.key(0),
        scale=1e-6,
        baseline="running_mean",
        batch_size=B,
    )
    first = jax.tree.map(lambda a: a[:, :1], batch)._replace(reset=jnp.ones((B, 1), bool))
    state = rule.init(params)
    for i in range(9):
        now = first._replace(mask=jnp.full((B, 1), float(i % 4 == 3)))
        _, state = rule(params, state, now)
    loss, _, _ = localgrad.evaluate(model, optax.squared_error, params, first._replace(mask=None))
    assert state.calls == 2
    np.testing.assert_allclose(state.usual, loss, rtol=1e-3)


def test_drives_that_are_summed_are_one_node():
    wanted = {
        nn.SimpleCell: [("h", "i")],
        nn.GRUCell: [("hn",), ("hr", "ir"), ("hz", "iz"), ("in",)],
        nn.LSTMCell: [("hf", "if"), ("hg", "ig"), ("hi", "ii"), ("ho", "io")],
        localgrad.RateCell: [("h", "i")],
    }
    for make, names in wanted.items():
        cell = make(N)
        x = jnp.zeros((2, IN))
        params = cell.init(jax.random.key(0), cell.initialize_carry(jax.random.key(0), x.shape), x)
        leaves = leaves_of(params["params"])
        stack = assemble(cell, leaves, x)
        anatomy = stack.cells[0]
        nodes = nodes_of(anatomy, leaves, stack.initial[0], stack.fed[0])
        found = sorted(tuple(sorted(anatomy.sites[i].layer.path[0] for i in n)) for n in nodes)
        assert found == names, make


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (localgrad.node_perturbation, {"scale": 0.0}, "scale must be .*positive.*got 0.0"),
        (localgrad.node_perturbation, {"scale": -1}, "scale must be .*positive.*got -1"),
        (localgrad.node_perturbation, {"scale": jnp.ones(())}, "scale must be .*Python number"),
        (localgrad.node_perturbation, {"samples": 0}, "samples must be a positive integer; got 0"),
        (localgrad.node_perturbation, {"samples": 4, "samples_at_once": 3}, "divisor of samples=4"),
        (localgrad.node_perturbation, {"noise": "cauchy"}, "noise must be one of .*'cauchy'"),
        (localgrad.node_perturbation, {"credit": "all"}, "credit must be one of .*'all'"),
        (localgrad.node_perturbation, {"readout": "no"}, "readout must be one of .*'no'"),
        (localgrad.node_perturbation, {"baseline": "no"}, "baseline must be one of .*'no'"),
        *(
            (localgrad.node_perturbation, {"baseline": "running_mean"} | option, message)
            for option, message in (
                ({"samples": 4}, r"samples must be one of \(1,\) .*more examples"),
                ({"antithetic": True}, "antithetic must be one of"),
                ({"credit": "total"}, "credit must be one of .*'causal', 'step'"),
                ({"readout": "exact"}, "readout must be one of .*'perturb'"),
            )
        ),
        (localgrad.node_perturbation, {"resync": True}, 'needs credit="step"; got credit=.causal'),
        (localgrad.node_perturbation, {"resync": 1}, "resync must be True or False; got 1"),
        (localgrad.node_perturbation, {"antithetic": 1}, "antithetic must be True or False; got 1"),
        (localgrad.node_perturbation, {"key": 0}, "key must be a typed PRNG key"),
        (
            localgrad.node_perturbation,
            {"key": jax.random.split(jax.random.key(0), 3)},
            r"key must be a single typed PRNG key; got an array of shape \(3,\)",
        ),
        (localgrad.activity_perturbation, {"credit": "total"}, "credit must be one of"),
        (localgrad.activity_perturbation, {"norm": "l2"}, "norm must be one of .*'l2'"),
        (localgrad.weight_perturbation, {"lifetime": 0}, "lifetime must be a positive.*got 0"),
        (localgrad.weight_perturbation, {"credit": "total"}, "credit must be one of"),
        (localgrad.pes, {"unroll": None}, "unroll must be a positive integer; got None"),
        (localgrad.forward_gradient, {"over": "units"}, "over must be one of .*'units'"),
    ],
)
def test_refusals(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(network()[0], optax.squared_error, **{"key": jax.random.key(0)} | options)


def test_parameters_outside_of_layers_are_refused_by_name():
    cell = localgrad.RateCell(N, learn_alpha=True, param_dtype=jnp.float64)
    with pytest.raises(ValueError, match="parameter alpha of cells_0 .RateCell.*weight_perturb"):
        updates_of(localgrad.node_perturbation, network(cell))
    model, params, batch = network()
    model = localgrad.Network(model.cells, readout=nn.Sequential([nn.LayerNorm(), nn.Dense(OUT)]))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, batch.inputs[:, 0])["params"]
    with pytest.raises(ValueError, match="layers_0/.* of readout"):
        updates_of(localgrad.node_perturbation, (model, params, batch))
    with pytest.raises(ValueError, match='readout="exact" needs the readout'):
        localgrad.node_perturbation(
            nn.GRUCell(N), optax.squared_error, key=jax.random.key(0), readout="exact", batch_size=1
        ).init(
            nn.GRUCell(N).init(jax.random.key(0), jnp.zeros((1, N)), jnp.zeros((1, N)))["params"]
        )
