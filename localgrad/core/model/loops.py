"""Loops whose length is known only when they run: no derivative goes back through them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core as jex

from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, under

REFUSED = "Reverse-mode differentiation does not work for lax.while_loop"
"""How JAX says so, which names neither the model nor the way out."""


@contextlib.contextmanager
def naming_loops(rule: str, stack: Stack, params: Leaves) -> Iterator[None]:
    """Says within which part of a model such a loop was met, and what to do.

    Args:
        rule: the public name of the rule that is run.
        stack: the model, taken apart.
        params: its parameters.
    """
    try:
        yield
    except ValueError as error:
        if REFUSED not in str(error):
            raise
        where = " and ".join(_looping(stack, params)) or "the encoder, the readout or the loss"
        raise ValueError(
            f"{rule} takes derivatives backward through {where}, with a loop whose length is known "
            "only when it runs: lax.while_loop, or lax.fori_loop with bounds that are traced. Use "
            "lax.scan or fixed bounds; or a rule that goes forward only, such as "
            "localgrad.node_perturbation or localgrad.weight_perturbation."
        ) from error


def _looping(stack: Stack, params: Leaves) -> list[str]:
    """The cells that hold such a loop."""
    found = []
    for level, cell in enumerate(stack.cells):
        given = under(params, stack.prefixes[level]), stack.initial[level], stack.fed[level]
        if _loops(jax.make_jaxpr(cell.module.apply)(*given).jaxpr):
            found.append(f"{stack.name(level)} ({cell.module.name})")
    return found


def _loops(jaxpr: Any) -> bool:
    """Whether a jaxpr, or one within, holds such a loop."""
    return any(
        eqn.primitive.name == "while" or any(map(_loops, jex.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
