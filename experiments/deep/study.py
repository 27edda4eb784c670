"""The public study's own task and network, trained by this library, beside the study's numbers.

Peter, Säckl and Patel, "Deep e-prop: online credit assignment across time and depth in deep
recurrent networks", technical note, 2026,
https://github.com/simonpeter02/e-prop-in-deep-networks: two layers of 32 leaky tanh units, a fast
one below a slow one, Adam at 0.001, batches of 48.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import localgrad
from experiments.deep.stacks import LOSS, ROWS
from experiments.deep.trials import alignment, crossing
from experiments.folder import Pieces
from experiments.progress import progress
from experiments.tasks.motif_count import motif_count
from experiments.train import Budget, History, Problem, make_shared, make_trainer, train

UNITS, LEAKS, RADIUS, DELAY = 32, (0.5, 0.05), 0.9, 12
BATCH, RATE = 48, 0.001
CRITERION = 0.9
RULES = ("bptt", "deep_eprop", "no_temporal", "no_spatial", "readout_only")


class Published(NamedTuple):
    """What the study reports of a rule.

    Attributes:
        accuracy: mean accuracy after training to convergence, 8 seeds, delay 12.
        updates: mean updates until the accuracy reaches 0.9, or None.
    """

    accuracy: float
    updates: float | None


PUBLISHED: dict[str, Published] = {
    "bptt": Published(1.000, 95),
    "deep_eprop": Published(0.999, 256),
    "no_temporal": Published(0.996, 473),
    "no_spatial": Published(0.989, 458),
    "readout_only": Published(0.753, None),
}
PUBLISHED_COSINES = {6: (0.793, 0.959), 12: (0.760, 0.943), 20: (0.726, 0.923)}
"""Cosine of deep e-prop's credit to BPTT's before training, (lower, upper), by delay, 16 seeds."""


class Study(NamedTuple):
    """What the library did there.

    Attributes:
        histories: the trainings, by rule.
        cosines: of deep e-prop to BPTT before training, by delay, [S, 2].
    """

    histories: dict[str, History]
    cosines: dict[int, np.ndarray]

    def accuracy(self, rule: str) -> np.ndarray:
        """The mean of the last five tests, [S]."""
        return np.asarray(self.histories[rule].test_accuracy)[:, -5:].mean(axis=1)

    def updates(self, rule: str) -> np.ndarray:
        """Updates to the criterion, [S]."""
        history = self.histories[rule]
        curves = np.asarray(history.test_accuracy)
        return np.array([crossing(history.steps, curve, CRITERION) for curve in curves])


def network() -> localgrad.Network:
    """The study's network, drawn as it is there: all kernels normal, the recurrent ones scaled."""
    normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    cells = [
        localgrad.RateCell(UNITS, alpha=leak, kernel_init=normal, recurrent_kernel_init=scaled)
        for leak in LEAKS
    ]
    return localgrad.Network(cells, readout=nn.Dense(2, kernel_init=normal))


def scaled(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """A normal matrix of spectral radius 0.9, by Gelfand's formula: |W^k|^(1/k) at k = 256."""
    kernel = jax.random.normal(key, shape, dtype) / np.sqrt(shape[0])
    power, log_norm = kernel, jnp.zeros((), dtype)
    for _ in range(8):
        norm = jnp.linalg.norm(power)
        power, log_norm = (power / norm) @ (power / norm), 2 * (log_norm + jnp.log(norm))
    radius = jnp.exp((log_norm + jnp.log(jnp.linalg.norm(power))) / 256)
    return RADIUS * kernel / radius


def run_study(config: Any, pieces: Pieces) -> Study:
    """Trains every rule of the study, and compares credit before training."""
    model = network()
    budget = Budget(
        steps=config.study_steps,
        batch_size=BATCH,
        learning_rate=RATE,
        clip=1.0,
        seeds=config.study_seeds,
        checkpoints=config.study_checkpoints,
        seed=config.seed,
    )
    shared = make_shared(Problem(model, LOSS, motif_count(config.seed, delay=DELAY)), budget)
    histories = {}
    for name in progress(RULES, unit="rule"):

        def learned(name: str = name) -> History:
            trainer = make_trainer(shared, lambda key: ROWS[name].rule(model), optax.adam, budget)
            return train(trainer, shared, budget, lambda: None)

        histories[name] = pieces.made(f"study_{name}", learned)
    return Study(histories, cosines(model, 2 * config.study_seeds, config.seed))


def cosines(model: Any, seeds: int, seed: int) -> dict[int, np.ndarray]:
    """Cosine of deep e-prop's update to BPTT's at fresh parameters, by delay, [S, 2]."""
    rules = {name: ROWS[name].rule(model) for name in ("bptt", "deep_eprop")}
    found = {}
    for delay in PUBLISHED_COSINES:
        task = motif_count(seed, delay=delay)

        @jax.jit
        def updates(key: jax.Array, task: Any = task) -> list[Any]:
            keys = jax.random.split(key)
            batch = task.sample(keys[0], BATCH)
            x = batch.inputs[:, 0]
            params = model.init(keys[1], model.initialize_carry(key, x.shape), x)["params"]
            return [rule(params, rule.init(params), batch)[0] for rule in rules.values()]

        made = [updates(key) for key in jax.random.split(jax.random.key(seed + 1), seeds)]
        exact, deep = zip(*made, strict=True)
        found[delay] = alignment(list(deep), list(exact), 2)[0]
    return found
