"""How much one sample varies, measured over draws of the noise, beside what theory says.

Networks see noise, and their targets are their outputs and noise: as of a network that has learned
what there is to learn, the gradients of different steps do not add up. Where they do, their sum
grows as T, and the variance relative to it grows less than it does here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import localgrad
from experiments.folder import Pieces
from experiments.perturbation.moments import (
    Moments,
    linearised,
    node_moments,
    square,
    weight_moments,
)
from experiments.progress import progress

INPUTS, OUTPUTS, RADIUS = 3, 2, 0.9
UNITS, STEPS = (4, 8, 16, 32, 64), (5, 10, 20, 40, 80, 160)
FEW_UNITS, FEW_STEPS = 8, 20  # while the other is varied
SCALE = 3e-4
AT_ONCE = 100


class Kind(NamedTuple):
    """A rule.

    Attributes:
        label: its name.
        make: the rule of a model, from a key.
        moments: what theory says, of a linearised network.
    """

    label: str
    make: Callable[[Any, jax.Array], localgrad.LearningRule]
    moments: Callable[[Any], Moments]


class Point(NamedTuple):
    """One rule at one size.

    Attributes:
        kind: the rule's name.
        units: N.
        steps: T.
        measured: variance over the square of the mean, the mean of all networks.
        error: its standard error.
        predicted: what theory says.
        cosine: of the estimate's mean to BPTT's gradient.
    """

    kind: str
    units: int
    steps: int
    measured: float
    error: float
    predicted: float
    cosine: float


def _weights(model: Any, key: jax.Array) -> localgrad.LearningRule:
    return localgrad.weight_perturbation(model, optax.l2_loss, antithetic=False, **_told(key))


def _nodes(name: str) -> Kind:
    resync = name == "resync"

    def make(model: Any, key: jax.Array) -> localgrad.LearningRule:
        told: dict[str, Any] = {"credit": "step" if resync else name, "resync": resync}
        return localgrad.node_perturbation(model, optax.l2_loss, **told, **_told(key))

    return Kind(f"NP, {name}", make, lambda linear: node_moments(linear, name, activity=False))


def _activity(credit: str) -> Kind:
    def make(model: Any, key: jax.Array) -> localgrad.LearningRule:
        return localgrad.activity_perturbation(
            model, optax.l2_loss, credit=credit, norm="variance", **_told(key)
        )

    return Kind(f"ANP, {credit}", make, lambda linear: node_moments(linear, credit, activity=True))


def _told(key: jax.Array) -> dict[str, Any]:
    return {"key": key, "scale": SCALE, "noise": "gaussian", "reduction": "sum"}


KINDS: dict[str, Kind] = {
    "wp": Kind("WP", _weights, lambda linear: weight_moments(_gradient(linear))),
    "np_total": _nodes("total"),
    "np_causal": _nodes("causal"),
    "np_step": _nodes("step"),
    "np_resync": _nodes("resync"),
    "anp_causal": _activity("causal"),
    "anp_step": _activity("step"),
}


def _gradient(linear: Any) -> Any:
    return node_moments(linear, "causal", activity=False).mean


def scan_sizes(
    nets: int, draws: int, seed: int, workers: int, short: bool, pieces: Pieces
) -> list[Point]:
    """Every rule over N and over T.

    Args:
        nets: networks a size, each with a sequence of its own.
        draws: of the noise, for each; a multiple of 100.
        seed: where all randomness starts.
        workers: sizes at a time.
        short: whether to take the two least sizes of each alone.
        pieces: sizes that were finished before.
    """
    count = 2 if short else None
    sizes = [(units, FEW_STEPS) for units in UNITS[:count]]
    sizes += [(FEW_UNITS, steps) for steps in STEPS[:count]]
    sizes = [*dict.fromkeys(sizes)]
    with (
        ThreadPoolExecutor(workers) as pool,
        progress(total=len(sizes), unit="size", desc="variance") as bar,
    ):

        def one(size: tuple[int, int]) -> list[Point]:
            made = functools.partial(measure, *size, nets, draws, seed)
            found = pieces.made("variance_{}_{}".format(*size), made)
            bar.update()
            return found

        return [point for found in pool.map(one, sizes) for point in found]


def measure(units: int, steps: int, nets: int, draws: int, seed: int) -> list[Point]:
    """Every rule at one size."""
    orthogonal = nn.initializers.orthogonal(RADIUS)
    cell = nn.SimpleCell(units, recurrent_kernel_init=orthogonal)
    model = localgrad.Network((cell,), readout=nn.Dense(OUTPUTS))

    @jax.jit
    def net(key: jax.Array) -> tuple[Any, localgrad.Batch]:
        keys = jax.random.split(key, 3)
        inputs = jax.random.normal(keys[0], (1, steps, INPUTS))
        noise = jax.random.normal(keys[1], (1, steps, OUTPUTS))
        carry = model.initialize_carry(key, inputs[:, 0].shape)
        params = model.init(keys[2], carry, inputs[:, 0])["params"]
        batch = localgrad.Batch(inputs, noise)
        _, outputs, _ = localgrad.evaluate(model, optax.l2_loss, params, batch)
        return params, batch._replace(targets=outputs + noise)

    @jax.jit
    def one(params: Any, batch: localgrad.Batch, keys: jax.Array) -> dict[str, Any]:
        linear = linearised(params, batch.inputs[0], batch.targets[0])
        moments = {name: kind.moments(linear) for name, kind in KINDS.items()}

        def distances(key: jax.Array) -> dict[str, jax.Array]:
            found = {}
            for name, kind in KINDS.items():
                rule = kind.make(model, key)
                made, _ = rule(params, rule.init(params), batch)
                found[name] = square(jax.tree.map(jnp.subtract, made, moments[name].mean))
            return found

        drawn = jax.lax.map(distances, keys, batch_size=AT_ONCE)
        return {
            name: (
                drawn[name] / square(said.mean),
                said.variance / square(said.mean),
                _cosine(said.mean, moments["np_total"].mean),
            )
            for name, said in moments.items()
        }

    roots = jax.random.split(jax.random.key(seed), (nets, 2))
    found = [one(*net(a), jax.random.split(b, draws)) for a, b in roots]
    return [_point(name, units, steps, [each[name] for each in found]) for name in KINDS]


def _cosine(a: Any, b: Any) -> jax.Array:
    inner = sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    return inner / jnp.sqrt(square(a) * square(b))


def _point(kind: str, units: int, steps: int, found: Sequence[Any]) -> Point:
    drawn = np.array([each[0] for each in found], np.float64)  # [nets, draws]
    errors = drawn.std(axis=1, ddof=1) / np.sqrt(drawn.shape[1])
    return Point(
        kind=kind,
        units=units,
        steps=steps,
        measured=float(drawn.mean()),
        error=float(np.sqrt(np.sum(errors**2)) / len(errors)),
        predicted=float(np.mean([each[1] for each in found])),
        cosine=float(np.mean([each[2] for each in found])),
    )


def over(points: Sequence[Point], kind: str, axis: str) -> list[Point]:
    """The points of a rule over "units" (N) or "steps" (T), ascending."""
    fixed, value = ("steps", FEW_STEPS) if axis == "units" else ("units", FEW_UNITS)
    own = [p for p in points if p.kind == kind and getattr(p, fixed) == value]
    return sorted(own, key=lambda p: getattr(p, axis))


def slope(points: Sequence[Point], axis: str) -> float:
    """The exponent: how the logarithm of what was measured rises with that of N or T."""
    sizes = np.log([getattr(p, axis) for p in points])
    return float(np.polyfit(sizes, np.log([p.measured for p in points]), 1)[0])
