"""Whether a loss and targets fit a P-TNCN's outputs: what can be told before anything is learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.cells.ptncn import PTNCN
from localgrad.core.contract.rule import Loss

TRIALS, WIDTH, SPREAD, SLACK = 8, 3.0, 0.3, 1e-5


def require_matching_loss(model: PTNCN, loss: Loss) -> None:
    """Raises unless a loss is least where outputs equal targets.

    It is tried on random frames, among outputs that the model's `output_activation` can give. A
    loss that fails on them, or that cannot be computed here, is left to the first call.

    Args:
        model: whose outputs the loss is given.
        loss: `(outputs [B, D], targets [B, D]) -> [B]` or `[B, ...]`.
    """
    rng = np.random.default_rng(0)
    logits = WIDTH * rng.normal(size=(TRIALS, model.outputs))
    noise = SPREAD * rng.normal(size=logits.shape)
    try:
        with jax.ensure_compile_time_eval():
            target, *others = (
                model.output_activation(jnp.asarray(a, jnp.float32))
                for a in (logits, logits + noise, logits - noise)
            )
            best, *rest = (np.asarray(loss(frame, target)) for frame in (target, *others))
    except Exception:
        return
    if best.ndim < 1 or len(best) != TRIALS:
        return
    best, *rest = (a.reshape(TRIALS, -1).mean(1) for a in (best, *rest))
    if not all(np.all(a >= best - SLACK * (1 + np.abs(best))) for a in rest):
        raise ValueError(
            f"loss ({_name(loss)}) is not least where outputs equal targets, with outputs after "
            f"output_activation ({_name(model.output_activation)}): the error mu - x does not "
            "reduce it. It may take logits: localgrad.categorical_cross_entropy fits a softmax, "
            "localgrad.binary_cross_entropy a sigmoid, optax.l2_loss the identity."
        )


def unit_range_inspector(model: PTNCN) -> Callable[[Any], None]:
    """A check of a batch's targets, by their numbers, for models whose outputs lie in [0, 1].

    Args:
        model: the model.

    Returns:
        `batch -> None`, which raises if an observed target lies beyond. Traced numbers, as under
        `jax.jit`, and those on other hosts, are not looked at.
    """
    probe = np.linspace(-30, 30, 8 * model.outputs, dtype=np.float32).reshape(8, -1)
    try:
        with jax.ensure_compile_time_eval():
            outputs = np.asarray(model.output_activation(jnp.asarray(probe)))
        unit = bool(np.all((outputs >= 0) & (outputs <= 1)))
    except Exception:
        unit = False
    return (lambda batch: _require_unit(model, batch)) if unit else (lambda batch: None)


def _require_unit(model: PTNCN, batch: Any) -> None:
    targets: Any = getattr(batch, "targets", None)
    mask: Any = getattr(batch, "mask", None)
    if not all(_at_hand(a) for a in (targets, mask) if a is not None) or np.ndim(targets) != 3:
        return
    targets = np.asarray(targets)
    beyond = (targets < -SLACK) | (targets > 1 + SLACK)
    if mask is not None and np.shape(mask) == targets.shape[:2]:
        beyond &= np.asarray(mask)[..., None] != 0
    if beyond.any():
        raise ValueError(
            f"batch.targets hold values from {targets[beyond].min()} to {targets[beyond].max()}, "
            f"but the model's outputs ({_name(model.output_activation)}) lie in [0, 1]. Scale the "
            "frames, as in pixels / 255, or give PTNCN an output_activation of their range."
        )


def _at_hand(a: Any) -> bool:
    """Whether an array's numbers are known here and now."""
    if isinstance(a, jax.core.Tracer):
        return False
    return isinstance(a, np.ndarray) or (isinstance(a, jax.Array) and a.is_fully_addressable)


def _name(function: Any) -> str:
    return getattr(getattr(function, "func", function), "__name__", repr(function))
