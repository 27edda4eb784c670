"""Is a cell what a rule takes it for? Read off its program and tried on numbers, never assumed.

*Fidelity*: running the cell with its synapses tapped gives what the cell itself gives.
*Unit-locality*: each drive column, carry entry and unit parameter touches the state of one unit,
the column's number modulo N. Both are tried at several random points with one-hot cotangents, and
units that meet where no such point lies are found in the program; inside any transformation, since
nothing here depends on a traced value.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.model.coded import CodedModule
from localgrad.core.model.modules import Module
from localgrad.core.model.statistics import NAMES
from localgrad.core.model.synapses import (
    CHAINED,
    OUTPUT,
    RECURRENT,
    Anatomy,
    dissect,
    is_unit,
    record,
    respond_to,
)
from localgrad.core.model.trial import POINTS, Draws, Outline, apart, tried_once
from localgrad.core.model.virtual import VirtualModule
from localgrad.core.model.wrapped import TiedModule
from localgrad.core.ownership.owners import Owners, reduced, strays
from localgrad.core.ownership.walk import owners_of
from localgrad.core.params import Leaves, Path, under
from localgrad.core.steps import response


class Meetings(NamedTuple):
    """Where a cell's program lets its units meet; all false in a unit-local cell.

    Attributes:
        drives: for each synapse, whether a column reaches another unit's state.
        carry: whether a unit's state reaches another's, all drives given.
        unowned: the parameters outside synapses of which one number a unit reaches another unit.
        pres: for each synapse, the units whose carry reaches each entry of pre [R].
    """

    drives: list[bool]
    carry: bool
    unowned: frozenset[Path]
    pres: list[Owners | None]


class Findings(NamedTuple):
    """What the trial of a cell shows; every number would be 0 in a unit-local cell.

    Attributes:
        fidelity: largest difference between the tapped and the plain cell.
        drives: for each synapse, the largest effect of a column on another unit's state.
        carry: the largest effect of a unit's state on another unit's, all drives given.
        leak: how much the effect of a unit's state on its own next one varies between points.
        unowned: for each parameter outside synapses, the same as for drives.
        pres: for each synapse, the effect of each unit's carry on each entry of pre, [N, R].
        meetings: what the program itself shows.
        outside: whether the cell gives NaN at all points tried.
    """

    fidelity: Any
    drives: list[Any]
    carry: Any
    leak: Any
    unowned: dict[Path, Any]
    pres: list[Any]
    meetings: Meetings
    outside: bool


def tried(cell: Anatomy, params: Leaves, carry: Any, x: Any) -> Findings:
    """Tries a cell on random numbers of the given shapes (those of B examples), and reads it."""
    return tried_once(_findings, cell.module, params, (carry, x))


def _findings(module: Module, leaves: Outline, given: Outline) -> Findings:
    draw = Draws()
    params = leaves.filled(draw.weights)
    carry, x = given.filled(lambda shape, dtype: draw.values((POINTS, *shape), dtype))
    cell = dissect(module, params, carry, x)
    trial = functools.partial(_trial, cell)
    found = jax.tree.map(np.asarray, apart(trial, params, carry, x, _drawn_drives(cell)))
    if outside := _has_nan(found):
        carry, x = _admissible(module, carry, x)
        drives = apart(functools.partial(_own_drives, cell), params, carry, x)
        found = jax.tree.map(np.asarray, apart(trial, params, carry, x, drives))
        outside = _has_nan(found)
    return Findings(**found, meetings=_meetings(cell, params, carry, x), outside=outside)


def _has_nan(found: Any) -> bool:
    return any(np.isnan(a).any() for a in jax.tree.leaves(found))


def _drawn_drives(cell: Anatomy) -> list:
    draw = Draws()
    return [draw.values(site.drive.shape, site.drive.dtype) for site in cell.sites]


def _own_drives(cell: Anatomy, params: Leaves, carry: Any, x: Any) -> list:
    """What each synapse gives at these points."""
    drives = []

    def respond(i: int, layer: Any, pre: Any) -> jax.Array:
        drives.append(layer.apply(under(params, layer.path), pre))
        return drives[i]

    respond_to(cell.module, params, carry, x, respond)
    return drives


def _admissible(module: Module, carry: Any, x: Any) -> tuple[Any, Any]:
    """Points in a cell's domain, if any are: states above its initial ones, inputs in 0 .. 1.

    So a square root or a logarithm of a state has a value, if it has one where sequences begin.
    """
    draw = np.random.default_rng(1)
    with jax.ensure_compile_time_eval():
        start = jax.tree.map(
            lambda a, like: np.asarray(a, like.dtype),
            module.initialize_carry(jax.tree.leaves(x)[0].shape),
            carry,
        )

    def beside(a: np.ndarray, size: float) -> np.ndarray:
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return a
        return (a + size * draw.uniform(0.1, 0.9, a.shape)).astype(a.dtype)

    return (
        jax.tree.map(lambda a: beside(a, 0.2), start),
        jax.tree.map(lambda a: beside(np.zeros_like(a), 1.0), x),
    )


def _meetings(cell: Anatomy, params: Leaves, carry: Any, x: Any) -> Meetings:
    unowned = {path: params[path] for path in cell.unowned}
    inputs = (carry, [site.drive for site in cell.sites], unowned)

    def step(inputs: tuple, params: Leaves, x: Any) -> list:
        carry, drives, unowned = inputs
        new, _, pres = record(cell.module, params | unowned, carry, x, drives)
        return [*jax.tree.leaves(new), *pres]

    program = jax.make_jaxpr(step)(inputs, params, x)
    units, states = jax.tree.leaves(carry)[0].shape[-1], len(jax.tree.leaves(carry))
    flat, treedef = jax.tree.flatten(inputs)
    labels = [_unit_labels(leaf.shape, units) for leaf in flat]
    of_carry, of_drives, of_unowned = jax.tree.unflatten(treedef, range(len(flat)))

    def reach(*seen: int) -> list[Owners | None]:
        seeds = [a if i in seen else None for i, a in enumerate(labels)]
        return owners_of(program, seeds + [None] * len(jax.tree.leaves((params, x))), credit=True)

    def meet(*seen: int) -> bool:
        return any(strays(found, np.arange(units)) for found in reach(*seen)[:states])

    every = range(len(flat))
    meeting = {i for i in every if meet(i)} if meet(*every) else set()
    own = jax.tree.leaves(of_carry)
    return Meetings(
        drives=[i in meeting for i in of_drives],
        carry=any(i in meeting for i in own),
        unowned=frozenset(path for path, i in of_unowned.items() if i in meeting),
        pres=[found and reduced(found, range(found.lo.ndim - 1)) for found in reach(*own)[states:]],
    )


def _unit_labels(shape: tuple[int, ...], units: int) -> np.ndarray | None:
    is_labelled = len(shape) > 0 and shape[-1] > 1
    return np.broadcast_to(np.arange(shape[-1]) % units, shape) if is_labelled else None


def _trial(cell: Anatomy, params: Leaves, carry: Any, x: Any, drives: list) -> dict[str, Any]:
    module = cell.module
    unowned = {path: params[path] for path in cell.unowned}

    def plain_step(i: int, layer: Any, pre: Any) -> jax.Array:
        del i
        return layer.apply(under(params, layer.path), pre)

    plain = module.apply(params, carry, x)
    tapped = respond_to(module, params, carry, x, plain_step)
    gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), plain, tapped)

    def states(carry: Any, drives: list, unowned: Leaves) -> list:
        return jax.tree.leaves(record(module, params | unowned, carry, x, drives)[0])

    def received(carry: Any) -> list:
        return record(module, params, carry, x, drives)[2]

    out, pull = jax.vjp(states, carry, drives, unowned)
    units = jax.tree.leaves(carry)[0].shape[-1]
    spread = jnp.zeros(())
    leak_carry, leak_drives, leak_unowned = jnp.zeros(()), [jnp.zeros(())] * len(drives), {}
    for k, leaf in enumerate(out):
        eye = jnp.broadcast_to(jnp.eye(units, dtype=leaf.dtype)[:, None], (units, *leaf.shape))
        one_hot = [jnp.zeros((units, *o.shape), o.dtype) for o in out]
        one_hot[k] = eye
        to_carry, to_drives, to_unowned = jax.vmap(pull)(one_hot)
        for effect in jax.tree.leaves(to_carry):
            spread = jnp.maximum(spread, jnp.max(jnp.ptp(effect.sum(-1), axis=1)))
        leak_carry = jnp.maximum(leak_carry, _leak(to_carry, units))
        leak_drives = [
            jnp.maximum(a, _leak(b, units)) for a, b in zip(leak_drives, to_drives, strict=True)
        ]
        for path, effect in to_unowned.items():
            leak = _leak(effect, units) if effect.size > units else jnp.zeros(())
            leak_unowned[path] = jnp.maximum(leak_unowned.get(path, 0.0), leak)
    return dict(
        fidelity=functools.reduce(jnp.maximum, jax.tree.leaves(gaps)),
        drives=leak_drives,
        carry=leak_carry,
        leak=spread,
        unowned=leak_unowned,
        pres=[_felt(received, carry, i, units) for i in range(len(cell.sites))],
    )


def _leak(effects: Any, units: int) -> jax.Array:
    """Largest entry of [N, ..., D] that lies in a column of another unit than the row's."""
    leaks = [jnp.zeros(())]
    for effect in jax.tree.leaves(effects):
        if effect.shape[-1] % units:
            leaks.append(jnp.full((), jnp.inf))
            continue
        foreign = jnp.arange(effect.shape[-1])[None] % units != jnp.arange(units)[:, None]
        foreign = foreign.reshape((units,) + (1,) * (effect.ndim - 2) + (-1,))
        leaks.append(jnp.max(jnp.where(foreign, jnp.abs(effect), 0)).astype(jnp.float32))
    return functools.reduce(jnp.maximum, leaks)


def _felt(received: Any, carry: Any, i: int, units: int) -> jax.Array:
    """How much each unit's carry moves each entry of the i-th synapse's pre, [N, R]."""
    pre = received(carry)[i]
    if not jnp.issubdtype(pre.dtype, jnp.inexact):
        return jnp.zeros((units, 1))

    def moved(direction: jax.Array) -> jax.Array:
        tangent = jax.tree.map(
            lambda c: jnp.broadcast_to(direction.astype(c.dtype), c.shape), carry
        )
        return jnp.abs(response(lambda c: received(c)[i], carry, tangent)).max(0)

    return jax.vmap(moved)(jnp.eye(units))


def require_fidelity(cell: Anatomy, found: Findings, name: str) -> None:
    """Raises if the tapped cell computes something else than the cell itself, or nothing."""
    if found.outside:
        raise ValueError(
            f"{name} ({cell.module.name}) gives NaN at the points where it is tried, which lie "
            "outside of its domain, as for a square root or a logarithm of a negative state: at "
            "random ones, and at states above its initial carry with inputs between 0 and 1. Let "
            "initialize_carry give states at which the step has a value and a derivative, or keep "
            "what is under the root from leaving its domain (jnp.maximum(h, 1e-6))."
        )
    if not found.fidelity <= 1e-3:
        raise ValueError(
            f"{name} ({cell.module.name}) computes something else when its layers are called by "
            f"themselves (difference {found.fidelity:.2g}): something like WeightNorm or "
            "SpectralNorm changes a layer's parameters on the way. Use plain layers."
        )


WAY_OUT = "Use an exact rule (bptt, tbptt, rtrl) or another cell."
HOLD = (
    f"If {NAMES} joins its units, held_statistics=True leaves the credit of its statistics out, "
    "with a bias. Else use an exact rule (bptt, tbptt, rtrl) or another cell."
)


def require_real(cell: Anatomy, carry: Any, name: str, rule: str) -> None:
    """Raises for complex states, of whose influence only the real half would be kept."""
    for leaf in jax.tree.leaves(carry):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"{rule} cannot credit {name} ({cell.module.name}): its carry is {leaf.dtype}. "
                "Keep real and imaginary parts as two real arrays, or use bptt or tbptt."
            )


def require_units(cell: Anatomy, carry: Any, name: str, rule: str) -> None:
    """Raises unless every leaf of the carry holds one number for each of the same N units."""
    require_real(cell, carry, name, rule)
    module = cell.module.inner if isinstance(cell.module, VirtualModule) else cell.module
    if isinstance(module, CodedModule):
        raise ValueError(
            f"{rule} cannot credit {name} ({cell.module.name}): its carry holds integers, flags or "
            f"keys beside its units. {WAY_OUT}"
        )
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(carry)]
    if len(set(shapes)) > 1 or any(len(shape) != 1 for shape in shapes):
        kind = " as a convolutional cell has it" if any(len(s) > 1 for s in shapes) else ""
        raise ValueError(
            f"{rule} cannot credit {name} ({cell.module.name}): for each example its carry has "
            f"shapes {shapes}{kind}, where a local rule needs (N,) numbers, one a unit. {WAY_OUT}"
        )


def require_local(
    cell: Anatomy, params: Leaves, carry: Any, found: Findings, name: str, rule: str
) -> None:
    """Raises, by name, for what a rule that treats each unit by itself cannot credit."""
    where = f"{rule} cannot credit {name} ({cell.module.name})"
    way_out, units = WAY_OUT, jax.tree.leaves(carry)[0].shape[-1]
    hold = WAY_OUT if cell.module.held_statistics else HOLD
    if isinstance(cell.module, TiedModule):
        tied = "/".join(min(cell.module.tied))
        raise ValueError(
            f"{where}: the parameters of layer {tied} also work outside its own call, as with "
            f"Embed.attend, tied weights, or a kernel that is read directly. {way_out}"
        )
    paths = [site.layer.path for site in cell.sites]
    for site, leak, meets in zip(cell.sites, found.drives, found.meetings.drives, strict=True):
        label = f"layer {_called(cell, site.layer.path)}"
        if site.role == CHAINED:
            raise ValueError(
                f"{where}: {label} is fed by another layer of the same cell, so its units depend "
                f"on each other within a step. {way_out} (A stack of cells goes into "
                "localgrad.Network; a GRU must apply its reset gate after the recurrent layer.)"
            )
        if paths.count(site.layer.path) > 1:
            raise ValueError(f"{where}: {label} is called more than once a step. {way_out}")
        if site.layer.kind.startswith("Conv"):
            raise ValueError(f"{where}: {label} is a {site.layer.kind}. {way_out}")
        if site.role != OUTPUT and site.tuned_by:
            path = min(site.tuned_by)
            raise ValueError(
                f"{where}: parameter {_called(cell, path)} works on what {label} receives, "
                f"and so on many units at once. {way_out}"
            )
        if site.role != OUTPUT and (not leak <= 0 or meets):
            raise ValueError(
                f"{where}: {label} reaches other units than its own {_seen(leak)}, as under a "
                f"normalisation over units. {hold}"
            )
    for path in [path for path in cell.unowned if path in cell.unowned_reach]:
        reaches = found.unowned.get(path, 0.0) > 0 or path in found.meetings.unowned
        if reaches or not is_unit(params[path], units):
            raise ValueError(
                f"{where}: parameter {_called(cell, path)} of shape {params[path].shape} is no "
                "weight of a linear map (a product with it in the step itself, in no while loop, "
                f"branch, convolution or custom derivative) and is not one number a unit. {hold}"
            )
    if not found.carry <= 0 or found.meetings.carry:
        raise ValueError(
            f"{where}: the state of one unit reaches another's outside any layer "
            f"{_seen(found.carry)}. {hold}"
        )
    _require_claimed(cell, params, where, way_out)


def _called(cell: Anatomy, path: Path) -> str:
    """How messages call a layer or a parameter of a cell."""
    module = cell.module
    return module.label(path) if isinstance(module, VirtualModule) else "/".join(path)


def _seen(leak: Any) -> str:
    return "(in its program, if not at the points tried)" if leak <= 0 else f"(effect {leak:.2g})"


def _require_claimed(cell: Anatomy, params: Leaves, where: str, way_out: str) -> None:
    for site in cell.sites:
        for path, leaf in under(params, site.layer.path).items():
            if leaf.shape[-1] != site.drive.shape[-1]:
                raise ValueError(
                    f"{where}: the last axis of {_called(cell, site.layer.path + path)} "
                    f"{leaf.shape} is not the layer's output {site.drive.shape[1:]}. {way_out}"
                )


def require_constant_leak(cell: Anatomy, found: Findings, name: str, rule: str) -> None:
    """Raises unless a unit's own state fades by a constant factor."""
    if len(cell.live) > 1 or found.leak > 1e-4:
        raise ValueError(
            f"{rule} cannot credit {name} ({cell.module.name}): past its recurrent layers its "
            "Jacobian is no constant leak (it is gated, or nonlinear). Use localgrad.eprop, which "
            "keeps the unit's own dynamics, or localgrad.RateCell."
        )


def own_entries(
    cell: Anatomy, found: Findings, name: str, rule: str = "snap"
) -> dict[int, tuple[int, int]]:
    """Where the units lie in the pre of each recurrent synapse: the entry of unit 0, and N.

    Raises:
        ValueError: if they are not N entries in a row, or the synapse has no kernel to read.
    """
    entries = {}
    for i, site in enumerate(cell.sites):
        if site.role != RECURRENT:
            continue
        felt = found.pres[i] > 0
        units = len(felt)
        start = int(felt[0].argmax())
        in_a_row = felt.sum() == units and np.diagonal(felt, start).sum() == units
        places = np.arange(felt.shape[1]) - start
        in_a_row &= not strays(found.meetings.pres[i], np.where(places < units, places, -1))
        if site.layer.kind not in ("Dense", "Linear") or not in_a_row:
            raise ValueError(
                f"{rule} cannot credit {name} ({cell.module.name}): layer "
                f"{_called(cell, site.layer.path)} ({site.layer.kind}) does not receive the units "
                "as entries in a row, so it has no weight from unit to unit. Use localgrad.eprop."
            )
        entries[i] = (start, units)
    return entries
