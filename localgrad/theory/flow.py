"""Gradient flow of the modes, integrated by diffrax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.theory.modes import (
    ALIKE,
    Endless,
    ModeRule,
    Modes,
    Task,
    descent,
    loss,
    modes_of,
    require_rule,
    require_task,
)
from localgrad.theory.values import float64, known, require_inside, require_modes


class Trajectory(NamedTuple):
    """What a flow passed through.

    Attributes:
        times: [K].
        modes: leaves [K, ...]; NaN after the flow has stopped.
        stopped: when some `|w|` came within 1e-6 of 1, past which endless sequences have no loss,
            or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> modes = theory.Modes(jnp.ones(3), jnp.zeros(3), jnp.ones(3))
        >>> theory.Trajectory(jnp.arange(3.0), modes, jnp.asarray(jnp.inf)).modes.w.shape
        (3,)
    """

    times: jax.Array
    modes: Modes
    stopped: jax.Array


def integrate(
    rule: ModeRule,
    start: Modes,
    task: Task | Endless,
    times: Any,
    *,
    rates: Modes = ALIKE,
    rtol: float = 1e-11,
    atol: float = 1e-13,
) -> Trajectory:
    """Gradient flow: `d modes / dt = -rates descent(rule, modes, task)`.

    Dormand and Prince's method of order 8 by diffrax, which takes a step to each of `times`: values
    between steps would be interpolated, and less accurate by orders of magnitude.

    Args:
        rule: `bptt()`, `tbptt(K)` or `rflo(r, rho)`.
        start: the strengths at `times[0]`, [...].
        task: what the modes are to learn. With `Endless`, the flow stops as a `|w|` reaches 1.
        times: [K], increasing, in units of one over the learning rate.
        rates: learning rates of a, w and b; see `unleaky`.
        rtol: the step's relative tolerance.
        atol: its absolute tolerance.

    Returns:
        The trajectory.

    Raises:
        ImportError: without diffrax: `pip install 'localgrad[theory]'`.
        ValueError: if `times` do not increase, an endless flow starts at `|w| >= 1`, the start or
            the task is not finite, shapes do not fit, or without 64-bit numbers.

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> endless = theory.Endless(theory.Modes(1.2, 0.7, 1.0))
        >>> start = theory.Modes(0.02, 0.0, 0.03)
        >>> path = theory.integrate(theory.bptt(), start, endless, np.linspace(0, 40, 5))
        >>> float(path.modes.w[-1])
        0.7000
    """
    require_rule(rule)
    require_modes("start", start)
    require_task(task)
    _require_increasing(times)
    if isinstance(task, Endless):
        require_inside("start.w", start.w, "or take a Task of finitely many steps")
    start = modes_of(start)
    named = rule.name, rule.horizon
    saved, stopped = _flow(named, rule.gain, rule.decay, start, task, times, rates, rtol, atol)
    return Trajectory(float64(times), saved, stopped)


@functools.partial(jax.jit, static_argnames=("named", "rtol", "atol"))
def _flow(
    named: tuple[str, int | None],
    gain: Any,
    decay: Any,
    start: Modes,
    task: Task | Endless,
    times: Any,
    rates: Modes,
    rtol: float,
    atol: float,
) -> tuple[Modes, jax.Array]:
    """`integrate`, compiled once for each rule and shape."""
    name, horizon = named
    rule = ModeRule(name, gain, decay, horizon)

    def velocity(modes: Modes) -> Modes:
        return jax.tree.map(lambda d, rate: -rate * d, descent(rule, modes, task), rates)

    edge = _room if isinstance(task, Endless) else None
    return solve(velocity, start, times, rtol, atol, edge)


def solve(
    velocity: Callable[[Any], Any],
    start: Any,
    times: Any,
    rtol: float = 1e-11,
    atol: float = 1e-13,
    edge: Callable[[Any], jax.Array] | None = None,
) -> tuple[Any, jax.Array]:
    """Integrates any autonomous flow, such as that of a whole network under a learning rule.

    Args:
        velocity: `y -> dy/dt`, a pytree of the same kind.
        start: y at `times[0]`.
        times: [K], increasing.
        rtol: the step's relative tolerance.
        atol: its absolute tolerance.
        edge: `y -> number`; the flow stops after the first step at which it is negative.

    Returns:
        y at each time, leaves [K, ...], NaN after a stop; and when it stopped, or infinity.

    Raises:
        ImportError: without diffrax: `pip install 'localgrad[theory]'`.

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> path, stopped = theory.solve(lambda y: -y, jnp.asarray(1.0), [0.0, 1.0])
        >>> round(float(path[-1]), 6), float(stopped)
        (0.367879, inf)
    """
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "integrating a flow needs diffrax: pip install 'localgrad[theory]'."
        ) from error
    times = float64(times)
    event = None
    if edge is not None:
        event = diffrax.Event(lambda t, y, args, **_: edge(y) < 0)
    steps = diffrax.PIDController(rtol=rtol, atol=atol)
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: velocity(y)),
        diffrax.Dopri8(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=start,
        saveat=diffrax.SaveAt(ts=times, t1=edge is not None),
        stepsize_controller=diffrax.ClipStepSizeController(steps, step_ts=times),
        event=event,
        max_steps=1_000_000,
        adjoint=diffrax.ForwardMode(),
    )
    if edge is None:
        return found.ys, jnp.asarray(jnp.inf)
    # After a stop the last state follows those saved before it; slots that stay empty hold inf.
    reached = jnp.where(jnp.isfinite(found.ts), found.ts, times[0]).max()
    stopped = jnp.where(found.event_mask, reached, jnp.inf)
    gone = times > stopped

    def told(y: jax.Array) -> jax.Array:
        return jnp.where(gone.reshape(-1, *(1,) * (y.ndim - 1)), jnp.nan, y[:-1])

    return jax.tree.map(told, found.ys), stopped


def half_time(path: Trajectory, task: Task | Endless) -> jax.Array:
    """When the loss first fell to half of what it was, between saved times by a straight line.

    Args:
        path: a trajectory.
        task: what was learned.

    Returns:
        The time, or infinity if that never happened; for many modes, of their summed loss.

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> endless = theory.Endless(theory.Modes(1.0, 0.7, 1.0))
        >>> small = theory.Modes(1e-3, 0.0, 1e-3)
        >>> path = theory.integrate(theory.bptt(), small, endless, np.linspace(0, 20, 201))
        >>> bool(theory.half_time(path, endless) > 6.0)  # a plateau: about ln(1000)
        True
    """
    value = loss(path.modes, task)
    value = value.reshape(len(path.times), -1).sum(-1)
    half = value[0] / 2
    below = value <= half
    first = jnp.maximum(jnp.argmax(below), 1)
    before, after = value[first - 1], value[first]
    part = (before - half) / (before - after)
    at = path.times[first - 1] + part * (path.times[first] - path.times[first - 1])
    at = jnp.where(value[0] > 0, at, path.times[0])
    return jnp.where(below.any(), at, jnp.inf)


def _room(modes: Modes) -> jax.Array:
    """How far the modes are from where to stop; at `|w| = 1` itself their speed is infinite."""
    return 1 - 1e-6 - jnp.abs(modes.w).max()


def _require_increasing(times: Any) -> None:
    found = known(times)
    if found is None:
        return
    if found.ndim != 1 or len(found) < 2 or not np.all(np.diff(found) > 0):
        raise ValueError(
            f"times must be at least two increasing numbers, [K]; got shape {found.shape}"
            f"{f', {found.tolist()}' if found.size < 8 else ''}."
        )
