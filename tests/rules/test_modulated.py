"""`mdgl` by types beside its recursion in NumPy, its limits, and what it refuses.

What it is with the weights themselves, the conformance tests ask of every model.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

B, T, N, IN, OUT = 2, 9, 6, 3, 2
TYPES = np.array([0, 1, 1, 2, 0, 1])
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)
WIDE = {"param_dtype": jnp.float64}


def problem(*cells, seed=0):
    """A network of cells, its parameters, all random, and a batch."""
    rng = np.random.default_rng(seed)
    model = localgrad.Network(cells, readout=nn.Dense(OUT, **WIDE))
    x = jnp.asarray(rng.normal(size=(B, T, IN)))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(0), carry, x[:, 0])["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)) / 2, params)
    return model, params, localgrad.Batch(x, jnp.asarray(rng.normal(size=(B, T, OUT))))


def averaged(weights):
    """Each weight as the mean of those, not zero, from its type to its type; entry by entry."""
    found = np.zeros_like(weights)
    for p in range(N):
        for q in range(N):
            alike = [
                weights[a, b]
                for a in range(N)
                for b in range(N)
                if TYPES[a] == TYPES[p] and TYPES[b] == TYPES[q] and weights[a, b] != 0
            ]
            found[p, q] = np.mean(alike) if weights[p, q] != 0 else 0.0
    return found


def recursion(params, batch, alpha):
    """The published sums, forward in time: eligibilities [post, pre], and what units tell."""
    cell, readout = jax.tree.map(np.asarray, (params["cells_0"], params["readout"]))
    kernels = {"i": cell["i"]["kernel"], "h": cell["h"]["kernel"]}
    told_by = averaged(kernels["h"])
    found = {name: np.zeros_like(kernel) for name, kernel in kernels.items()}
    for x, target in zip(np.asarray(batch.inputs), np.asarray(batch.targets), strict=True):
        a, trace = np.zeros(N), {k: np.zeros((N, v.shape[0])) for k, v in kernels.items()}
        for t in range(T):
            pre = {"i": x[t], "h": a}
            drive = x[t] @ kernels["i"] + cell["i"]["bias"] + a @ kernels["h"]
            a = (1 - alpha) * a + alpha * np.tanh(drive)
            slope = alpha * (1 - np.tanh(drive) ** 2)
            error = (a @ readout["kernel"] + readout["bias"] - target[t]) / OUT
            signal = readout["kernel"] @ error
            told = told_by @ (slope * signal)  # by j to p, for the eligibility of the step before
            for name in kernels:
                before = trace[name]
                trace[name] = (1 - alpha) * before + slope[:, None] * pre[name]
                found[name] += (signal[:, None] * trace[name] + told[:, None] * before).T
    return found


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.few(1)
def test_it_is_its_recursion(window, x64):
    model, params, batch = problem(localgrad.RateCell(N, alpha=0.4, **WIDE))
    sparse = np.random.default_rng(1).random((N, N)) < 0.7
    params["cells_0"]["h"]["kernel"] *= sparse
    expected = recursion(params, batch, 0.4)
    rule = localgrad.mdgl(
        model, optax.l2_loss, types=TYPES, batch_size=B, window=window, reduction="sum"
    )
    state, found = rule.init(params), {"i": 0.0, "h": 0.0}
    for steps in (slice(0, 4), slice(4, T)):
        piece = localgrad.Batch(batch.inputs[:, steps], batch.targets[:, steps])
        updates, state = rule(params, state, piece)
        found = {k: found[k] + updates["cells_0"][k]["kernel"] for k in found}
    close(found, expected)


def spiking(params, x, told_by):
    """A LIF network's outputs [T, O]; recurrent credit passes once, by weights `told_by`."""
    cell, readout, stop = params["cells_0"], params["readout"], jax.lax.stop_gradient
    kernel = cell["h"]["kernel"] * (1 - jnp.eye(N))

    def spikes(v):
        smooth = 0.6 * 4 * jax.nn.sigmoid((v - 0.5) / 0.5)
        return stop((v > 0.5).astype(v.dtype) - smooth) + smooth

    v = z = jnp.zeros(N)
    outputs = []
    for t in range(T):
        drive = x[t] @ cell["i"]["kernel"] + stop(z) @ kernel
        once = drive + (z - stop(z)) @ told_by
        settled = 0.8 * v - 0.5 * stop(z)
        outputs.append(spikes(settled + once) @ readout["kernel"] + readout["bias"])
        v = settled + drive
        z = spikes(v)
    return jnp.stack(outputs)


@pytest.mark.slow
def test_spiking_units_that_do_not_hear_themselves(x64):
    """A diagonal that the cell masks is no weight of a type, and no credit passes there."""
    options = {"decay": 0.8, "threshold": 0.5, "surrogate": "sigmoid", "dampening": 0.6}
    model, params, batch = problem(localgrad.LIFCell(N, scale=1.0, **options, **WIDE))
    params["cells_0"] = jax.tree.map(lambda a: 2 * a, params["cells_0"])

    told_by = averaged(np.asarray(params["cells_0"]["h"]["kernel"]) * (1 - np.eye(N)))

    def loss(params):
        outputs = jax.vmap(lambda x: spiking(params, x, told_by))(batch.inputs)
        return optax.l2_loss(outputs, batch.targets).mean(-1).sum(), outputs

    rule = localgrad.mdgl(model, optax.l2_loss, types=TYPES, window=4, reduction="sum")
    found, _ = rule(params, rule.init(params), batch)
    expected, outputs = jax.grad(loss, has_aux=True)(params)
    close(localgrad.evaluate(model, optax.l2_loss, params, batch)[1], outputs)
    close(found, expected)


def update(factory, model, params, batch, **options):
    rule = factory(model, optax.l2_loss, **options)
    return rule(params, rule.init(params), batch)[0]


@pytest.mark.slow
def test_units_that_keep_nothing_are_credited_over_two_steps(x64):
    model, params, batch = problem(nn.SimpleCell(N, **WIDE))
    found = update(localgrad.mdgl, model, params, batch, window=4)
    close(found, update(localgrad.tbptt, model, params, batch, horizon=2))


def test_a_type_for_each_unit_is_none(x64):
    """Gate by gate, and whatever the labels are."""
    model, params, batch = problem(nn.GRUCell(N, **WIDE))
    own = update(localgrad.mdgl, model, params, batch, types=[2 * np.arange(N)])
    close(own, update(localgrad.mdgl, model, params, batch))


def test_without_recurrent_weights_it_is_exact(x64):
    model, params, batch = problem(localgrad.RateCell(N, alpha=0.4, **WIDE))
    params["cells_0"]["h"]["kernel"] *= 0
    cells = [
        update(rule, model, params, batch)["cells_0"]["i"]
        for rule in (localgrad.mdgl, localgrad.bptt)
    ]
    close(*cells)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (np.zeros(N), r"integers of 0 or more.*float64 and shape \(6,\)"),
        ([-1] * N, "integers of 0 or more"),
        (np.zeros((N, 2), int), r"shape \(6, 2\)"),
        (np.zeros(N - 1, int), r"every unit of every cell.*'cells_0': 6.*\(5,\)"),
        ([TYPES, TYPES], "every unit of every cell"),
        ({"cell": TYPES}, r"'cells_0': 6.*'cell': \(6,\)"),
    ],
)
@pytest.mark.few(3)
def test_refused_types(types, message, x64):
    model, params, _ = problem(nn.GRUCell(N))
    with pytest.raises(ValueError, match=message):
        localgrad.mdgl(model, optax.l2_loss, types=types).init(params)
