"""Which parameters noise on nodes reaches, and how they are credited for it."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from localgrad.core.model.locality import require_layers
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import OUTPUT
from localgrad.core.params import Leaves, Path, accumulator
from localgrad.core.passes.heard import Part, unheard


def lasting(stack: Stack, params: Leaves) -> Iterator[Path]:
    """The parameters whose noise reaches later losses, by whole path."""
    params = {path: leaf for path, leaf in params.items() if stack.asks(path)}
    for path in params:
        if path[:1] == ("encoder",) and stack.encoder is not None:
            yield path
    for level in stack.levels:
        cell, prefix = stack.cells[level], stack.prefixes[level]
        highest = level == stack.levels[-1]
        heads = [
            prefix + site.layer.path for site in cell.sites if not (highest and site.role == OUTPUT)
        ]
        yield from (path for path in params if any(path[: len(h)] == h for h in heads))


def blank_eligibility(stack: Stack, params: Leaves, samples: int, batch: int) -> Leaves:
    """That of B sequences that begin, by whole path [K, B, ...]."""
    return {
        path: jnp.zeros((samples, batch, *params[path].shape), accumulator(params[path]))
        for path in dict.fromkeys(lasting(stack, params))
    }


def require_reached(rule: str, exact_readout: bool, stack: Stack) -> None:
    """Raises for parameters of cells that no noise enters by, and for no readout to be exact."""
    for level in stack.levels:
        cell, name = stack.cells[level], stack.name(level)
        require_layers(cell, name, rule)
        unowned = [path for path in cell.unowned if stack.asks(stack.prefixes[level] + path)]
        if unowned:
            _refuse(rule, f"{name} ({cell.module.name})", unowned[0])
    if exact_readout and stack.readout is None:
        raise ValueError(
            f'{rule} with readout="exact" needs the readout of a localgrad.Network, and '
            "this model has none. Wrap it: localgrad.Network((cell,), readout=nn.Dense(O)) (NNX: "
            "localgrad.NNXNetwork)."
        )


def require_heard(rule: str, stack: Stack, part: Part, params: Leaves) -> None:
    """Raises for parameters of an encoder or readout that no noise enters by."""
    for path in unheard(part, params):
        if stack.asks(path):
            _refuse(rule, part.label, path[len(part.prefix) :])


def _refuse(rule: str, where: str, path: Path) -> None:
    raise ValueError(
        f"{rule} cannot credit parameter {'/'.join(path)} of {where}: noise enters a model by its "
        "linear layers, and this one lies in none that it can see. Use "
        "localgrad.weight_perturbation, which takes every parameter."
    )


def credits_of(
    signal: str, credit: str, exact_readout: bool, stack: Stack, params: Leaves
) -> dict[Path, str]:
    """How each parameter is credited, as `localgrad.summary` prints it."""
    late, found = set(lasting(stack, params)), {}
    for path in params:
        if exact_readout and path[:1] == ("readout",):
            found[path] = "exact"
        else:
            found[path] = f"{signal} ({credit if path in late else 'step'} credit)"
    return found
