"""Reservoirs to train, and their best readout in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import localgrad

B, T, IN, N, OUT = 2, 11, 3, 5, 2
ALPHA = 0.4


def problem(bias=True, seed=0):
    """A network, its parameters, and a batch with weights, resets and unseen targets."""
    rng = np.random.default_rng(seed)
    cell = localgrad.ReservoirCell(N, alpha=ALPHA, density=0.5, bias_scale=0.3, param_dtype=float)
    model = localgrad.Network((cell,), readout=nn.Dense(OUT, use_bias=bias, param_dtype=float))
    inputs = rng.normal(size=(B, T, IN))
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    params = model.init(jax.random.key(seed + 1), carry, jnp.asarray(inputs[:, 0]))["params"]
    mask = rng.choice([0.0, 0.5, 2.0], (B, T))
    mask[:, [4, 10]] = 0
    mask[:, 3] = (0, 1)
    targets = np.where(mask[..., None] == 0, np.nan, rng.normal(size=(B, T, OUT)))
    arrays = (inputs, targets, mask, rng.random((B, T)) < 0.2)
    return model, params, localgrad.Batch(*map(jnp.asarray, arrays))


def features(params, batch):
    """The reservoir's states and a 1, [B, T, M]."""
    p = jax.tree.map(np.asarray, params)
    cell, inputs = p["cells_0"], np.asarray(batch.inputs)
    reset = np.zeros(inputs.shape[:2], bool) if batch.reset is None else np.asarray(batch.reset)
    a, found = np.zeros((len(inputs), len(cell["i"]["bias"]))), []
    for t in range(inputs.shape[1]):
        a = np.where(reset[:, t, None], 0, a)
        drive = inputs[:, t] @ cell["i"]["kernel"] + cell["i"]["bias"]
        a = (1 - ALPHA) * a + ALPHA * np.tanh(drive + a @ cell["h"]["kernel"])
        found.append(a)
    found = np.stack(found, 1)
    if "bias" not in p["readout"]:
        return found
    return np.concatenate([found, np.ones((*found.shape[:2], 1))], -1)


def matrix(params):
    """Kernel and bias as one matrix [M, OUT]."""
    readout = params["readout"]
    rows = [readout["kernel"], *([readout["bias"][None]] if "bias" in readout else [])]
    return np.concatenate(rows)


def regression(x, y, weight, forgetting, ridge, before):
    """The minimizer of the forgetful squared error and of the distance from `before`."""
    seen = np.any(weight != 0, axis=0)
    later = np.array([seen[t + 1 :].sum() for t in range(len(seen))])
    counts = np.sqrt(forgetting**later * weight)[..., None]
    rows, wanted = counts * x, np.where(counts == 0, 0, counts * y)
    size = x.shape[-1]
    prior = np.sqrt(forgetting ** seen.sum() * ridge) * np.eye(size)
    rows = np.concatenate([rows.reshape(-1, size), prior])
    wanted = np.concatenate([wanted.reshape(-1, y.shape[-1]), prior @ before])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0]


def series(steps):
    """A sum of sinusoids [1, steps, 1] to be continued."""
    t = np.arange(steps + 1)
    u = np.sin(t / 5) + 0.6 * np.sin(t / 3.1) + 0.3 * np.sin(t / 11.7)
    return localgrad.Batch(jnp.asarray(u[None, :-1, None]), jnp.asarray(u[None, 1:, None]))


def reservoir(dtype=jnp.float32, units=60):
    cell = localgrad.ReservoirCell(
        units, alpha=ALPHA, input_scale=0.5, param_dtype=dtype, bias_scale=0.2
    )
    model = localgrad.Network((cell,), readout=nn.Dense(1, param_dtype=dtype))
    x = jnp.zeros((1, 1), dtype)
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    return model, model.init(jax.random.key(1), carry, x)["params"]


def residual(params):
    """The root mean square error that a readout makes on 400 steps of the series, in float64."""
    params, batch = jax.tree.map(lambda a: a.astype(float), params), series(400)
    return np.sqrt(np.mean((features(params, batch) @ matrix(params) - batch.targets) ** 2))
