"""Perturbation rules beside the authors' code (B = 1, float64) and an independent NumPy program.

Draws are fed. The network of `b1_*` has fixed matrices D0 and D1 before its input and behind its
units. What the authors scale by the learning rate and 1 / scale is scaled so here. Not used are the
keys of total credit with activity and with weights, and of decorrelation with full covariances,
which nothing here offers; that of the norm over a trajectory is `norm="variance"` times one number,
as tested.
"""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad
from localgrad.core.passes import disturb
from localgrad.rules.perturbation import copies, particles
from tests.golden.common import load

pytestmark = pytest.mark.usefixtures("x64")

WEIGHTS = {
    "A": ("cells_0", "A", "kernel"),
    "R": ("cells_0", "R", "kernel"),
    "C": ("readout", "kernel"),
}


class Units(nn.RNNCellBase):
    """tanh units, no biases; their state is what D1 makes of them, their input what D0 does."""

    features: int
    case: str

    @nn.compact
    def __call__(self, carry, x):
        dense = functools.partial(nn.Dense, self.features, use_bias=False, param_dtype=jnp.float64)
        before, behind = (arrays().get(f"{self.case}_par_{name}") for name in ("D0", "D1"))
        x = x if before is None else x @ before.T
        units = jnp.tanh(dense(name="A")(x) + dense(name="R")(carry))
        carry = units if behind is None else units @ behind.T
        return carry, carry

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self):
        return 1


@functools.cache
def arrays():
    return load("perturbation")


@functools.cache
def problem(case):
    """The network, its parameters, and the one sequence."""
    found = {name: jnp.asarray(arrays()[f"{case}_par_{name}"].T) for name in WEIGHTS}
    params = {"cells_0": {n: {"kernel": found[n]} for n in "AR"}, "readout": {"kernel": found["C"]}}
    units, outputs = found["C"].shape
    readout = nn.Dense(outputs, use_bias=False, param_dtype=jnp.float64)
    model = localgrad.Network((Units(units, case),), readout=readout)
    u, y = (jnp.swapaxes(jnp.asarray(arrays()[f"{case}_{name}"]), 0, 1) for name in "UY")
    return model, params, localgrad.Batch(u, y)


@functools.cache
def decorrelated(case):
    """The same with matrices that learn, from the file's or the identity."""
    _, params, batch = problem(case)
    units, outputs = params["readout"]["kernel"].shape
    inputs = f"{case}_par_D0" in arrays()
    cell = localgrad.DecorrelatedCell(Units(units, "without"), inputs=inputs)
    readout = nn.Dense(outputs, use_bias=False, param_dtype=jnp.float64)
    model = localgrad.Network((cell,), readout=readout)
    behind = arrays().get(f"{case}_par_D1", np.eye(units))
    cells = {"cell": params["cells_0"], "state": {"decorrelation": jnp.asarray(behind.T)}}
    if inputs:
        cells["input"] = {"decorrelation": jnp.asarray(arrays()[f"{case}_par_D0"].T)}
    return model, {"cells_0": cells, "readout": params["readout"]}, batch


def rule_of(make, case="b1", **options):
    options = {"scale": float(arrays()["meta_sigma"]), "reduction": "sum"} | options
    if make is localgrad.forward_gradient:
        del options["scale"]
    return make(problem(case)[0], optax.squared_error, key=jax.random.key(0), **options)


def learned(rule, feed):
    """What a rule makes of the whole sequence, by weight, [to, from], with noise fed."""
    _, params, batch = problem("b1")
    with feed:
        updates, _ = rule(params, rule.init(params), batch)
    return by_weight(updates)


def by_weight(tree):
    return {"A": tree["cells_0"]["A"]["kernel"].T, "R": tree["cells_0"]["R"]["kernel"].T} | {
        "C": tree["readout"]["kernel"].T
    }


def holds(found, key, weights="ARC", factor=1.0):
    for name in weights:
        wanted = arrays()[key.format(name)]
        np.testing.assert_allclose(
            factor * found[name], wanted, rtol=0, atol=1e-9 * np.abs(wanted).max(), err_msg=name
        )


def to_nodes():
    """Feeds the noise of hidden and output units."""
    hidden, output = (jnp.asarray(arrays()[f"b1_z_{name}"])[:, None] for name in "ho")
    return mock.patch.object(disturb, "noise_for", lambda *_: [[hidden], [output]])


def to_weights(noise, lifetime):
    """Feeds noise, by weight [T, to, from], anew every so many steps; None for the first alone."""
    each = {WEIGHTS[n]: jnp.asarray(z).swapaxes(-1, -2)[:, None, None] for n, z in noise.items()}

    def renewed(options, draw, numbers, before):
        if lifetime is None:
            return {path: z[0] for path, z in each.items()}, {}
        begins = draw.clock % lifetime == 0
        now = {p: jnp.where(begins, each[p][draw.clock], z) for p, z in before.noise.items()}
        met = {p: jnp.where(begins, z + now[p], z) for p, z in before.met.items()}
        return now, met

    return mock.patch.object(particles, "_renewed", renewed)


def drawn():
    return {name: arrays()[f"b1_z{name}"] for name in WEIGHTS}


LR, SIGMA, ETA = (
    float(load("perturbation")[f"meta_{name}"]) for name in ("lr", "sigma", "eta_decor")
)


@pytest.mark.parametrize("credit", ["step", "causal", "total"])
def test_node_perturbation(credit):
    found = learned(rule_of(localgrad.node_perturbation, credit=credit), to_nodes())
    holds(found, f"b1_np_{credit}_g{{}}", "AR")
    holds(found, "b1_np_step_g{}", "C")  # a readout is paid by its own step, whatever the credit


def test_node_perturbation_whose_noise_ends_with_its_step():
    rule = rule_of(localgrad.node_perturbation, credit="step", resync=True)
    holds(learned(rule, to_nodes()), "b1_np_resync_g{}")


@pytest.mark.parametrize("credit", ["step", "causal"])
@pytest.mark.parametrize(
    ("norm", "theirs"),
    [("layer", "layer_N"), ("joint", "joint_N"), ("fernandez2024", "layer_sqrtN")],
)
def test_activity_perturbation(credit, norm, theirs):
    found = learned(rule_of(localgrad.activity_perturbation, credit=credit, norm=norm), to_nodes())
    holds(found, f"b1_anp_{credit}_{theirs}_g{{}}", "AR")
    holds(found, f"b1_anp_step_{theirs}_g{{}}", "C")


@pytest.mark.parametrize("credit", ["step", "causal"])
def test_a_norm_over_the_trajectory_is_one_number(credit):
    found = learned(
        rule_of(localgrad.activity_perturbation, credit=credit, norm="variance"), to_nodes()
    )
    ratio = arrays()[f"b1_anp_{credit}_traj_N_gA"] / found["A"]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-8)
    holds(found, f"b1_anp_{credit}_traj_N_g{{}}", "AR", float(ratio[0, 0]))


@pytest.mark.parametrize(
    ("make", "options", "key", "factor"),
    [
        (localgrad.node_perturbation, {}, "b1_np_code_d{}", SIGMA),
        (localgrad.activity_perturbation, {"norm": "fernandez2024"}, "b1_anp_code_d{}", 1.0),
    ],
)
def test_the_published_rules_on_nodes(make, options, key, factor):
    holds(learned(rule_of(make, credit="step", **options), to_nodes()), key, factor=-LR * factor)


def test_the_published_rule_gives_one_output_its_gradient_times_a_number():
    """With one example and one output: the square root of inputs and nodes, whatever the noise."""
    model, params, batch = problem("on1")
    rule = rule_of(
        localgrad.activity_perturbation, "on1", credit="step", norm="fernandez2024", scale=1e-7
    )
    updates, _ = rule(params, rule.init(params), batch)
    exact = localgrad.bptt(model, optax.squared_error, reduction="sum")
    wanted, _ = exact(params, exact.init(params), batch)
    units = len(arrays()["on1_par_R"])
    found = by_weight(updates)["C"] / np.sqrt(1 + units + 1)
    np.testing.assert_allclose(found, by_weight(wanted)["C"], rtol=1e-5)


def test_the_published_rule_on_weights():
    rule = rule_of(
        localgrad.weight_perturbation, credit="step", lifetime=1, antithetic=False, reduction="sum"
    )
    noise = drawn()
    noise["R"] = noise["R"] * (np.arange(len(noise["R"])) > 0)[:, None, None]  # as theirs
    holds(learned(rule, to_weights(noise, 1)), "b1_wp_code_d{}", factor=-LR * SIGMA)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"lifetime": 1, "antithetic": False}, "b1_wp_causal_g{}"),
        ({"antithetic": False}, "b1_wp_static_g{}"),
        ({}, "b1_mezo_g{}"),
        *(({"lifetime": k, "credit": "step"}, f"b1_truncES_K{k}_g{{}}") for k in (1, 2, 3, 6)),
    ],
)
def test_weight_perturbation(options, key):
    feed = to_weights(drawn(), options.get("lifetime"))
    holds(learned(rule_of(localgrad.weight_perturbation, **options), feed), key)


def test_weight_perturbation_by_signs():
    signs = {name: np.sign(z) for name, z in drawn().items()}
    rule = rule_of(localgrad.weight_perturbation, noise="rademacher")
    holds(learned(rule, to_weights(signs, None)), "b1_spsa_rademacher_g{}")


@pytest.mark.parametrize("unroll", [1, 2, 3, 6])
def test_persistent_evolution_strategies(unroll):
    rule = rule_of(localgrad.pes, unroll=unroll)
    holds(learned(rule, to_weights(drawn(), unroll)), f"b1_pes_K{unroll}_g{{}}")


def test_forward_gradients():
    make = localgrad.forward_gradient
    holds(learned(rule_of(make), to_weights(drawn(), None)), "b1_fwdgrad_weight_g{}")
    for credit in ("step", "causal", "total"):
        found = learned(rule_of(make, over="nodes", credit=credit), to_nodes())
        holds(found, f"b1_fwdgrad_node_{credit}_g{{}}", "AR")
        holds(found, "b1_fwdgrad_node_step_g{}", "C")


@pytest.mark.parametrize(
    ("name", "make", "options", "factor"),
    [
        ("NP", localgrad.node_perturbation, {}, SIGMA),
        ("ANP", localgrad.activity_perturbation, {"norm": "fernandez2024"}, 1.0),
        ("WP", localgrad.weight_perturbation, {"lifetime": 1, "antithetic": False}, SIGMA),
    ],
)
def test_twenty_steps_online(name, make, options, factor):
    model, params, batch = problem("on1")
    rule = rule_of(make, "on1", credit="step", batch_size=1, **options)
    tx = optax.chain(rule, optax.sgd(factor * float(arrays()[f"on1_{name}_lr"])))
    with online(arrays()[f"on1_{name}_draws"].reshape(batch.inputs.shape[1], -1), name):
        learn = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=1))
        found, _, losses = learn(params, tx.init(params))
    for weight, value in by_weight(found).items():
        wanted = arrays()[f"on1_{name}_final_{weight}"]
        moved = np.abs(wanted - arrays()[f"on1_par_{weight}"]).max()
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-9 * moved, err_msg=weight)
    np.testing.assert_allclose(losses.mean(), arrays()[f"on1_{name}_loss"], rtol=1e-12)


def test_twenty_steps_online_with_decorrelation():
    model, params, batch = decorrelated("on1")
    common = {"batch_size": 1, "reduction": "sum"}
    noisy = localgrad.activity_perturbation(
        model,
        optax.squared_error,
        key=jax.random.key(0),
        scale=SIGMA,
        credit="step",
        norm="fernandez2024",
        **common,
    )
    plain = localgrad.decorrelation(model, optax.squared_error, **common)
    labels = localgrad.label_decorrelation
    rates = {"weights": "lr", "decorrelation": "eta"}
    tx = optax.chain(
        localgrad.mix({"weights": noisy, "decorrelation": plain}, labels),
        optax.partition(
            {k: optax.sgd(float(arrays()[f"on1_DANP_{v}"])) for k, v in rates.items()}, labels
        ),
    )
    with online(arrays()["on1_DANP_draws"].reshape(batch.inputs.shape[1], -1), "DANP"):
        learn = jax.jit(lambda p, s: localgrad.learn(tx, p, s, batch, chunk=1))
        found, _, losses = learn(params, tx.init(params))
    cells = found["cells_0"]
    each = by_weight({"cells_0": cells["cell"], "readout": found["readout"]})
    each["D1"] = cells["state"]["decorrelation"].T
    for weight, value in each.items():
        wanted = arrays()[f"on1_DANP_final_{weight}"]
        before = np.eye(len(wanted)) if weight == "D1" else arrays()[f"on1_par_{weight}"]
        moved = np.abs(wanted - before).max()
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-9 * moved, err_msg=weight)
    np.testing.assert_allclose(losses.mean(), arrays()["on1_DANP_loss"], rtol=1e-12)


@pytest.mark.parametrize(("form", "era"), [("multiplicative", "new"), ("additive", "old")])
def test_decorrelation_of_a_sequence(form, era):
    model, params, batch = decorrelated("b1")
    rule = localgrad.decorrelation(model, optax.squared_error, form=form)
    updates, _ = rule(params, rule.init(params), batch)
    step = localgrad.decorrelation(model, optax.squared_error, form=form, batch_size=1)
    _, state = step(params, step.init(params), jax.tree.map(lambda a: a[:, :-1], batch))
    last, _ = step(params, state, jax.tree.map(lambda a: a[:, -1:], batch))
    for name, layer in {"D0": "input", "D1": "state"}.items():
        matrix = arrays()[f"b1_par_{name}"]
        for found, key in ((updates, "seqavg"), (last, "online")):
            moved = matrix - ETA * found["cells_0"][layer]["decorrelation"].T
            wanted = arrays()[f"b1_decor_{key}_{era}_{name}"]
            np.testing.assert_allclose(moved, wanted, rtol=1e-9, err_msg=f"{key} {name}")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "dec_copi"),
        ({"form": "additive"}, "dec_old_additive"),
        ({"kappa": float(load("perturbation")["dec_kappa"])}, "dec_kappa_rowscale"),
    ],
)
def test_decorrelation_of_vectors(options, key):
    x, matrix = (jnp.asarray(arrays()[f"dec_{name}"]) for name in "XD")
    cell = nn.SimpleCell(1, param_dtype=jnp.float64)
    model = localgrad.Network((cell,), encoder=localgrad.Decorrelation())
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    params = model.init(jax.random.key(0), carry, x)["params"]
    params["encoder"]["decorrelation"] = matrix.T
    rule = localgrad.decorrelation(model, optax.squared_error, **options)
    begins = jnp.ones((len(x), 1), bool)
    batch = localgrad.Batch(x[:, None], jnp.zeros((len(x), 1, 1)), reset=begins)
    updates, _ = rule(params, rule.init(params), batch)
    found = matrix - float(arrays()["dec_eta"]) * updates["encoder"]["decorrelation"].T
    np.testing.assert_allclose(found, arrays()[key], rtol=1e-9)


def online(draws, name):
    """Feeds draws [T, numbers], those of a step side by side in the order of their code."""
    if name == "WP":
        units = len(arrays()["on1_par_R"])
        a, r, c = np.split(draws, [units, units + units**2], axis=1)
        r = r * (np.arange(len(r)) > 0)[:, None]
        shaped = {"A": (units, 1), "R": (units, units), "C": (1, units)}
        each = zip(shaped.items(), (a, r, c), strict=True)
        return to_weights({n: z.reshape(-1, *shape) for (n, shape), z in each}, 1)

    def noise_for(kind, clocks, parts):
        del kind, parts
        rows = jnp.asarray(draws)[clocks[:, 0]][:, None, None]  # [W, K, B, numbers]
        return [[rows[..., :-1]], [rows[..., -1:]]]

    return Patches(
        mock.patch.object(disturb, "noise_for", noise_for),
        mock.patch.object(copies, "step_keys", lambda key, clock, steps: clock + jnp.arange(steps)),
        mock.patch.object(jax.random, "fold_in", lambda key, number: key),
    )


class Patches:
    """Several patches as one."""

    def __init__(self, *patches):
        self.patches = patches

    def __enter__(self):
        for patch in self.patches:
            patch.__enter__()

    def __exit__(self, *error):
        for patch in reversed(self.patches):
            patch.__exit__(*error)
