"""The anatomy of a cell: its synapses, what feeds each, and what lives between them.

Read off the cell's jaxpr with every drive made an input of its own, so that what depends on what is
a fact of the trace and no guess about the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.model.modules import Layer, Module, impure, traced_once
from localgrad.core.model.trial import Outline, memoised, outline
from localgrad.core.model.wrapped import TiedModule
from localgrad.core.ownership.reach import dependencies
from localgrad.core.params import Leaves, Path, under

INPUT, RECURRENT, OUTPUT, CHAINED = "input", "recurrent", "output", "chained"


class Site(NamedTuple):
    """One synapse call of a cell.

    Attributes:
        layer: the linear layer called.
        role: `INPUT` (pre depends on x alone), `RECURRENT` (pre depends on the carry, or on
            parameters of no synapse), `OUTPUT` (reaches y but not the new carry) or `CHAINED` (pre
            depends on another synapse's drive and the drive reaches the new carry).
        drive: shape and dtype of the drive for one step.
        reads_x: whether x reaches pre.
        tuned_by: paths of the parameters of no synapse that reach pre.
    """

    layer: Layer
    role: str
    drive: jax.ShapeDtypeStruct
    reads_x: bool
    tuned_by: frozenset[Path]


class Anatomy(NamedTuple):
    """What a rule needs to know of one cell.

    Attributes:
        module: the cell.
        sites: its synapse calls, in the order in which the cell makes them.
        unowned: paths of the parameters that no synapse owns.
        reads_x: whether x reaches the new carry or y by a way that passes no synapse.
        drives_reach: for each site, whether its drive reaches the new carry.
        unowned_reach: the unowned parameters that reach the new carry, also by way of a synapse.
        live: for each carry leaf, whether credit still reaches it once the drives are given that
            reach the new carry.
    """

    module: Module
    sites: tuple[Site, ...]
    unowned: tuple[Path, ...]
    reads_x: bool
    drives_reach: tuple[bool, ...]
    unowned_reach: frozenset[Path]
    live: tuple[bool, ...]


Respond = Callable[[int, Layer, Any], Any]


def respond_to(module: Module, params: Leaves, carry: Any, x: Any, respond: Respond) -> Any:
    """Runs one step of a cell with `respond(i, layer, pre)` supplying the i-th call's drive."""
    count = 0

    def tap(layer: Layer, pre: Any) -> Any:
        nonlocal count
        count += 1
        return respond(count - 1, layer, pre)

    return module.tapped(params, tap, carry, x)


def record(module: Module, params: Leaves, carry: Any, x: Any, drives: list[Any]) -> tuple:
    """Runs one step with the given drives and returns `(carry, y, what each synapse received)`."""
    return traced_once(_record, module, params, carry, x, drives)


def _record(module: Module, params: Leaves, carry: Any, x: Any, drives: list[Any]) -> tuple:
    pres = []

    def respond(i: int, layer: Layer, pre: Any) -> Any:
        del layer
        pres.append(pre)
        return drives[i]

    carry, y = respond_to(module, params, carry, x, respond)
    return carry, y, pres


def in_use(layer: Layer, leaves: Leaves, pre: jax.Array) -> jax.Array:
    """A layer's kernel, 0 where the layer masks it; `pre` is something that it may receive."""
    kernel = leaves[("kernel",)]
    ones = jnp.ones((1, *pre.shape[1:]), pre.dtype)
    uses = jax.grad(lambda k: layer.apply(leaves | {("kernel",): k}, ones).sum())(kernel)
    return kernel * uses


def is_unit(leaf: Any, units: int) -> bool:
    """Whether a parameter is one number for all units, or some for each, as a layer's columns."""
    return leaf.size == 1 or (leaf.size == leaf.shape[-1] and leaf.size % units == 0)


def dissect(module: Module, params: Leaves, carry: Any, x: Any) -> Anatomy:
    """Finds the synapses of a cell and classifies them.

    Args:
        module: the cell.
        params: its parameters; shapes suffice.
        carry: the carry of B examples; shapes suffice.
        x: one step's input of B examples; shapes suffice.

    Returns:
        The cell's anatomy.
    """
    return memoised(_dissected)(module, outline((params, carry, x)))


def _dissected(module: Module, given: Outline) -> Anatomy:
    params, carry, x = given.filled(jax.ShapeDtypeStruct)
    layers, drives = _meet(module, params, carry, x)
    jaxpr, (n_carry, n_y) = _trace(module, params, carry, x, drives)
    depends, credits = dependencies(jaxpr.jaxpr), dependencies(jaxpr.jaxpr, credit=True)
    carry_in, x_in, drives_in, params_in = _numbered(carry, x, drives, params)
    drive_numbers = set(drives_in)
    to_carry = [depends[k] for k in range(n_carry)]
    to_y = [depends[k] for k in range(n_carry, n_carry + n_y)]
    to_pre = depends[n_carry + n_y :]

    # A drive reaches the new carry directly, or through the pre of a synapse that does.
    reach = set().union(*to_carry)
    for _ in layers:
        reach |= set().union(
            *(pre for pre, number in zip(to_pre, drives_in, strict=True) if number in reach), set()
        )
    owned = {path for layer in layers for path in _owned(params, layer)}
    unowned = tuple(path for path in params if path not in owned)
    tuned = {params_in[path] for path in unowned}
    seen = set().union(*to_carry, *to_y, *to_pre)
    tied = frozenset(
        layer.path for layer in layers for path in _owned(params, layer) if params_in[path] in seen
    )
    if tied:
        without: Any = TiedModule(module, tied)
        return dissect(without, params, carry, x)

    sites, credited = [], set().union(*credits[: n_carry + n_y])
    for k, (layer, drive, number) in enumerate(zip(layers, drives, drives_in, strict=True)):
        pre = to_pre[k]
        if not pre & {*carry_in, *x_in, *drives_in}:
            raise ValueError(
                f"layer {'/'.join(layer.path)} of {module.name} is fed by a constant, which has no "
                "batch axis. Make what it gives a parameter of the cell."
            )
        if number not in reach:
            role = OUTPUT
            credited |= credits[n_carry + n_y + k]
        elif pre & drive_numbers:
            role = CHAINED
        else:
            role = RECURRENT if pre & {*carry_in, *tuned} else INPUT
        found = {path for path in unowned if params_in[path] in pre}
        sites.append(Site(layer, role, drive, bool(pre & set(x_in)), frozenset(found)))
    direct = set().union(*to_carry, *to_y)
    return Anatomy(
        module=module,
        sites=tuple(sites),
        unowned=unowned,
        reads_x=bool(direct & set(x_in)),
        drives_reach=tuple(number in reach for number in drives_in),
        unowned_reach=frozenset(path for path in unowned if params_in[path] in reach),
        live=tuple(number in credited for number in carry_in),
    )


def _owned(params: Leaves, layer: Layer) -> list[Path]:
    n = len(layer.path)
    return [path for path in params if path[:n] == layer.path]


def _meet(
    module: Module, params: Leaves, carry: Any, x: Any
) -> tuple[list[Layer], list[jax.ShapeDtypeStruct]]:
    """The layers a step calls and the shapes they emit."""
    layers: list[Layer] = []
    drives: list[jax.ShapeDtypeStruct] = []

    def step(params: Leaves, carry: Any, x: Any) -> Any:
        def respond(i: int, layer: Layer, pre: Any) -> jax.Array:
            del i
            drive = _emitted(layer, under(params, layer.path), pre)
            layers.append(layer)
            drives.append(jax.ShapeDtypeStruct(drive.shape, drive.dtype))
            return jnp.zeros(drive.shape, drive.dtype)

        return respond_to(module, params, carry, x, respond)

    try:
        jax.eval_shape(step, params, carry, x)
    except Exception as error:
        raise impure(error, module.name) or error from error
    return layers, drives


def _emitted(layer: Layer, leaves: Leaves, pre: Any) -> jax.ShapeDtypeStruct:
    if not leaves:
        raise ValueError(
            f"layer {'/'.join(layer.path) or layer.kind} has no parameters in params: it runs "
            "inside a lifted transform (nn.jit, nn.remat, nn.scan) or is shared. Use it plainly."
        )
    try:
        return jax.eval_shape(layer.apply, leaves, pre)
    except KeyError as error:
        raise ValueError(
            f"layer {'/'.join(layer.path)} lacks parameter {error} in params: it is shared with "
            "another layer. Give each layer its own."
        ) from error


def _trace(module: Module, params: Leaves, carry: Any, x: Any, drives: list[Any]) -> Any:
    """The jaxpr of `(carry, x, drives, params) -> (carry, y, pres)`, and how many of the first."""
    sizes = None

    def step(carry: Any, x: Any, drives: list[Any], params: Leaves) -> list[Any]:
        nonlocal sizes
        new_carry, y, pres = record(module, params, carry, x, drives)
        sizes = len(jax.tree.leaves(new_carry)), len(jax.tree.leaves(y))
        return [*jax.tree.leaves(new_carry), *jax.tree.leaves(y), *pres]

    jaxpr = jax.make_jaxpr(step)(carry, x, drives, params)
    return jaxpr, sizes


def _numbered(carry: Any, x: Any, drives: list[Any], params: Leaves) -> tuple:
    """The numbers of the jaxpr's inputs, in the structure of the arguments."""
    args = (carry, x, drives, params)
    flat, treedef = jax.tree.flatten(args)
    carry, x, drives, params = jax.tree.unflatten(treedef, range(len(flat)))
    return jax.tree.leaves(carry), jax.tree.leaves(x), drives, params
