"""A window run forward with all its synapses heard, and nudged: what perturbation rules look at.

Nothing is differentiated. Letters: B batch, W steps of the window, D width of a drive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from localgrad.core.model.modules import Layer, Module
from localgrad.core.model.nodes import Node, nodes_of
from localgrad.core.model.stack import Stack
from localgrad.core.model.synapses import OUTPUT, Site
from localgrad.core.params import Leaves, Path, under
from localgrad.core.passes.contraction import pres
from localgrad.core.passes.forward import Tape
from localgrad.core.passes.run import through_cells

Nudges = Sequence[Mapping[int, jax.Array]]
"""For each part of a model, what to add to its drives, by number of the synapse call, [W, B, D]."""


class Part(NamedTuple):
    """A part of a model, and what its synapses received and gave in a window.

    Attributes:
        label: encoder, cell or readout, as messages call it.
        prefix: where its parameters lie in the model's.
        sites: its synapse calls.
        nodes: the calls of each node that a rule is for.
        instant: for each node, whether it reaches the loss of its own step alone.
        received: what each call received, [W, B, ...].
        drives: what each call gave, nudges included, [W, B, D].
    """

    label: str
    prefix: Path
    sites: tuple[Site, ...]
    nodes: tuple[Node, ...]
    instant: tuple[bool, ...]
    received: list[jax.Array]
    drives: list[jax.Array]


class Heard(NamedTuple):
    """A window, heard.

    Attributes:
        carries: each cell's carry after it.
        entered: for each cell, the carry that entered each step, after any reset, leaves [W, B, N].
        parts: encoder, cells, readout, as far as there are any.
        ys: the highest cell's outputs, leaves [W, B, ...].
        outputs: the model's, leaves [W, B, ...].
    """

    carries: tuple[Any, ...]
    entered: tuple[Any, ...]
    parts: list[Part]
    ys: Any
    outputs: Any


def hear(
    stack: Stack,
    params: Leaves,
    carries: Any,
    xs: Any,
    reset: jax.Array | None,
    nudges: Nudges | None = None,
) -> Heard:
    """Runs a model over a window.

    Args:
        stack: the model, taken apart.
        params: its parameters.
        carries: each cell's carry before the window, leaves [B, N].
        xs: inputs, leaves [W, B, ...].
        reset: [W, B] bool, or None.
        nudges: for each part, or None for none.

    Returns:
        What was heard.
    """
    given: list[Mapping[int, jax.Array]] = list(nudges or ())
    given += [{}] * (len(stack.cells) + 2 - len(given))  # a readout may be left alone
    parts, zs = [], xs
    if stack.encoder is not None:
        part, zs = _memoryless(stack, "encoder", stack.encoder, params, zs, given.pop(0))
        parts.append(part._replace(instant=(False,) * len(part.nodes)))
    last, tapes = through_cells(stack, params, carries, zs, reset, nudges=given)
    parts += [_cell(stack, params, level, tapes[level]) for level in stack.levels]
    ys = outputs = tapes[-1].ys
    if stack.readout is not None:
        nudge = given[len(stack.cells)]
        part, outputs = _memoryless(stack, "readout", stack.readout, params, ys, nudge)
        parts.append(part)
    return Heard(last, tuple(tape.carries for tape in tapes), parts, ys, outputs)


def _cell(stack: Stack, params: Leaves, level: int, tape: Tape) -> Part:
    """A cell as a part; the highest one's outputs reach no later loss by themselves."""
    cell, prefix = stack.cells[level], stack.prefixes[level]
    own, highest = under(params, prefix), level == stack.levels[-1]
    nodes = nodes_of(cell, own, stack.initial[level], stack.fed[level])
    nodes = _asked(stack, prefix, cell.sites, nodes)
    instant = tuple(highest and all(cell.sites[i].role == OUTPUT for i in n) for n in nodes)
    received = pres(cell, own, tape)
    return Part(stack.name(level), prefix, cell.sites, nodes, instant, received, tape.drives)


def _asked(
    stack: Stack, prefix: Path, sites: Sequence[Site], nodes: Sequence[Node]
) -> tuple[Node, ...]:
    """The nodes with a synapse that the rule is for."""
    heads = [prefix + site.layer.path for site in sites]
    return tuple(node for node in nodes if any(stack.asks(heads[i]) for i in node))


def _memoryless(
    stack: Stack,
    label: str,
    module: Module,
    params: Leaves,
    xs: Any,
    nudges: Mapping[int, jax.Array],
) -> tuple[Part, Any]:
    """A module without memory on all steps at once; each call is a node of its own."""
    own = under(params, (label,))
    sites: list[Site] = []

    def step(x: Any, nudges: dict[int, jax.Array]) -> tuple[Any, list, list]:
        received: list[jax.Array] = []
        drives: list[jax.Array] = []

        def tap(layer: Layer, pre: Any) -> jax.Array:
            drive = layer.apply(under(own, layer.path), pre)
            nudge = nudges.get(len(sites))
            if nudge is not None:
                drive = drive + nudge.astype(drive.dtype)
            spec = jax.ShapeDtypeStruct(drive.shape, drive.dtype)
            sites.append(Site(layer, OUTPUT, spec, True, frozenset()))
            received.append(pre)
            drives.append(drive)
            return drive

        return module.tapped(own, tap, x), received, drives

    outputs, *heard = jax.vmap(step)(xs, dict(nudges))
    nodes = _asked(stack, (label,), sites, [(i,) for i in range(len(sites))])
    return Part(label, (label,), tuple(sites), nodes, (True,) * len(nodes), *heard), outputs


def unheard(part: Part, params: Leaves) -> list[Path]:
    """The parameters of a part that no synapse owns, by their whole path."""
    own = under(params, part.prefix)
    heard = {p for site in part.sites for p in own if p[: len(site.layer.path)] == site.layer.path}
    return [part.prefix + path for path in own if path not in heard]
