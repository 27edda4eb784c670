"""The readout as a linear regression: M regressors, the highest cell's outputs and 1 for a bias."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from localgrad.core.contract.checks import number
from localgrad.core.model.modules import Module
from localgrad.core.params import Leaves, Path

KERNEL: Path = ("readout", "kernel")
BIAS: Path = ("readout", "bias")


def require_linear(asker: str, readout: Module | None, params: Leaves) -> None:
    """Raises unless the readout is a linear layer whose parameters are there."""
    if readout is None or readout.kind not in (nn.Dense, nnx.Linear):
        found = "no readout" if readout is None else f"{readout.name} for a readout"
        raise ValueError(
            f"{asker} solves for a linear readout, and this model has {found}. Make the model a "
            "localgrad.Network((cell,), readout=nn.Dense(O)), or a localgrad.NNXNetwork with an "
            "nnx.Linear, or train it by localgrad.readout_only, which takes any readout."
        )
    if KERNEL not in params:
        raise ValueError(
            f"{asker} got params without {'/'.join(KERNEL)}: pass all of this model's params."
        )


def require_ridge(ridge: Any) -> float:
    """The penalty, in plain numbers; raises unless it is positive."""
    hint = (
        "It is what a squared weight counts, where the squared error of one step and example "
        "counts 1; a small one, such as 1e-6, hardly does."
    )
    return number("ridge", ridge, "be positive and finite", hint)


def shape_of(params: Leaves) -> tuple[int, int]:
    """M and O."""
    inputs, outputs = params[KERNEL].shape
    return inputs + (BIAS in params), outputs


def regressors(asker: str, params: Leaves, ys: jax.Array, dtype: Any) -> jax.Array:
    """The highest cell's outputs [W, B, N], with a 1 behind if there is a bias: [W, B, M]."""
    if ys.ndim != 3:
        raise ValueError(
            f"{asker} takes cells that give [B, N] at each step; this one gives {ys.shape[1:]}. "
            "Flatten it in a cell of your own, or use localgrad.readout_only."
        )
    ys = ys.astype(dtype)
    if BIAS not in params:
        return ys
    return jnp.concatenate([ys, jnp.ones((*ys.shape[:2], 1), dtype)], axis=-1)


def as_readout(params: Leaves, matrix: jax.Array) -> Leaves:
    """A matrix [M, O] as the leaves of the readout."""
    if BIAS not in params:
        return {KERNEL: matrix}
    return {KERNEL: matrix[:-1], BIAS: matrix[-1]}
