"""Mode dynamics: how each rule moves the readout, recurrent and input strength of one direction.

With inputs that are white in space and time and data whose lagged correlations share singular
vectors, a linear network `h_t = W h_{t-1} + B x_t`, `y_t = A h_t` falls apart into scalar problems,
one a mode: `a` of the readout, `w` of the recurrent matrix, `b` of the input matrix. The rules
differ in one thing, the weight `gamma_k` with which an error is sent k steps back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contract.checks import number, positive_integer
from localgrad.theory.values import (
    alike,
    float64,
    powers,
    require_inside,
    require_modes,
    require_numbers,
)


class Modes(NamedTuple):
    """The strengths of each mode, or anything of which there is one a strength.

    Attributes:
        a: of the readout, [...].
        w: of the recurrent matrix, [...].
        b: of the input matrix, [...].

    Example:
        >>> from localgrad import theory
        >>> theory.Modes(a=0.1, w=0.0, b=0.1).w
        0.0
    """

    a: Any
    w: Any
    b: Any


ALIKE = Modes(1.0, 1.0, 1.0)  # one learning rate for all three


class Task(NamedTuple):
    """What the modes are to learn in T = L steps: `L = sum_l weight_l (a w^l b - target_l)^2 / 2`.

    Attributes:
        target: [..., L], what an input should do to the output l steps later.
        weight: [L], how much each lag counts; see `lag_weights`.

    Example:
        >>> from localgrad import theory
        >>> delay = theory.Task([0.0, 1.0, 0.0, 0.0], theory.lag_weights(4))  # y_t = x_{t-1}
        >>> len(delay.target)
        4
    """

    target: Any
    weight: Any


class Endless(NamedTuple):
    """What the modes are to learn from sequences without end: to be the teacher, `|w*| < 1`.

    Attributes:
        teacher: its strengths; only `a* b*` and `w*` matter.

    Example:
        >>> from localgrad import theory
        >>> theory.Endless(theory.Modes(a=1.2, w=0.7, b=1.0)).teacher.w
        0.7
    """

    teacher: Modes


class ModeRule(NamedTuple):
    """A rule, as one mode sees it: an error reaches k steps back by `gain decay^k`, if k < horizon.

    Attributes:
        name: the rule's name.
        gain: [...], or None for the mode's own readout `a`.
        decay: [...], or None for the mode's own `w`.
        horizon: steps back, its own among them, or None for all.

    Example:
        >>> from localgrad import theory
        >>> theory.tbptt(horizon=3)
        ModeRule(name='tbptt', gain=None, decay=None, horizon=3)
    """

    name: str
    gain: Any = None
    decay: Any = None
    horizon: int | None = None

    def seen(self, modes: Modes) -> tuple[Any, Any]:
        """The gain and the decay at these modes."""
        gain = modes.a if self.gain is None else self.gain
        return gain, modes.w if self.decay is None else self.decay


def bptt() -> ModeRule:
    """Backpropagation through time: `gamma_k = a w^k`.

    Returns:
        The rule.

    Example:
        >>> from localgrad import theory
        >>> theory.bptt().name
        'bptt'
    """
    return ModeRule("bptt")


def tbptt(horizon: int) -> ModeRule:
    """Truncated BPTT with a sliding horizon of K steps: `gamma_k = a w^k` for k < K.

    Args:
        horizon: K, in time steps; 1 uses no past at all.

    Returns:
        The rule.

    Raises:
        ValueError: if `horizon` is no positive integer.

    Example:
        >>> from localgrad import theory
        >>> theory.tbptt(1).horizon
        1
    """
    return ModeRule("tbptt", horizon=positive_integer("horizon", horizon, "It is in time steps."))


def rflo(feedback: Any, decay: Any) -> ModeRule:
    """RFLO: `gamma_k = r rho^k`, with fixed feedback r and traces that decay by rho a step.

    Args:
        feedback: r [...], the feedback mode.
        decay: rho [...], in (-1, 1). For leaky units it is `1 - alpha`.

    Returns:
        The rule.

    Raises:
        ValueError: if a decay is not inside (-1, 1), or the feedback is no number: the rule's
            `"random"` is a draw, of which the theory needs the outcome.

    Example:
        >>> from localgrad import theory
        >>> theory.rflo(feedback=0.9, decay=0.4).decay
        0.4
    """
    require_numbers(feedback=feedback)
    require_inside("decay", decay, "or traces would grow")
    return ModeRule("rflo", gain=feedback, decay=decay)


def lag_weights(steps: int, loss: str = "final") -> jax.Array:
    """How much each lag counts in a sequence of T steps.

    Args:
        steps: T, at least 1.
        loss: `"final"`, half the squared error of the last step (ones), or `"per_step"`, its mean
            over all steps for a stationary teacher (`(T - l) / T`).

    Returns:
        [T].

    Raises:
        ValueError: for another loss or no positive integer, or without 64-bit numbers.

    Example:
        >>> from localgrad import theory
        >>> theory.lag_weights(4, "per_step").tolist()
        [1.0, 0.75, 0.5, 0.25]
    """
    lags = float64(np.arange(positive_integer("steps", steps)))
    if loss == "final":
        return jnp.ones_like(lags)
    if loss == "per_step":
        return (steps - lags) / steps
    raise ValueError(f"loss must be 'final' or 'per_step'; got {loss!r}.")


def realisable(teacher: Modes, steps: int, loss: str = "final") -> Task:
    """The task of being a teacher for T steps: `target_l = a* b* w*^l`.

    Args:
        teacher: its strengths, [...].
        steps: T, at least 1.
        loss: `"final"` or `"per_step"`, as in `lag_weights`.

    Returns:
        The task, target [..., T].

    Raises:
        ValueError: as `lag_weights` does, and for a teacher that is not finite.

    Example:
        >>> from localgrad import theory
        >>> theory.realisable(theory.Modes(2.0, 0.5, 1.0), steps=3).target.tolist()
        [2.0, 1.0, 0.5]
    """
    require_modes("teacher", teacher)
    weight = lag_weights(steps, loss)
    a, w, b = modes_of(teacher)
    return Task((a * b)[..., None] * powers(w, steps), weight)


def descent(rule: ModeRule, modes: Modes, task: Task | Endless) -> Modes:
    """The direction in which a rule moves each mode: gradient flow is `d modes / dt = -descent`.

    With `e_l = a w^l b - s_l` and `gamma_k` the rule's backward weight::

        da = b sum_l omega_l w^l e_l
        db = sum_l omega_l gamma_l e_l
        dw = b sum_l omega_l e_l sum_{k<l} gamma_k w^{l-1-k}

    Args:
        rule: `bptt()`, `tbptt(K)` or `rflo(r, rho)`.
        modes: the strengths, [...].
        task: a `Task`, or `Endless` for T = infinity, where `|w| < 1` is needed.

    Returns:
        The direction, to be subtracted, [...].

    Raises:
        ValueError: without 64-bit numbers, and for shapes that do not broadcast, targets or
            teachers that are not finite, and a teacher of endless sequences with `|w*| >= 1`.

    Example:
        >>> from localgrad import theory
        >>> teacher = theory.Modes(1.0, 0.5, 1.0)
        >>> direction = theory.descent(theory.bptt(), teacher, theory.Endless(teacher))
        >>> [float(d) for d in direction]
        [0.0, 0.0, 0.0]
    """
    require_rule(rule)
    require_task(task)
    modes = Modes(*float64(*modes))
    gain, decay = float64(*rule.seen(modes))
    a, w, b, gain, decay = alike(**modes._asdict(), feedback=gain, decay=decay)
    modes = Modes(a, w, b)
    if isinstance(task, Endless):
        return _endless_descent(modes, gain, decay, rule.horizon, task)
    steps = np.shape(task.target)[-1]
    error = _weighted(task, _errors(modes, task))
    backward = gain[..., None] * powers(decay, steps)
    if rule.horizon is not None:
        within = np.broadcast_to(np.arange(steps) < rule.horizon, backward.shape)
        backward = jnp.where(within, backward, 0)

    def next_lag(c: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
        return modes.w * c + gamma, c  # no division: safe where w equals the decay

    _, within = jax.lax.scan(next_lag, jnp.zeros_like(gain), jnp.moveaxis(backward, -1, 0))
    return Modes(
        a=modes.b * (powers(modes.w, steps) * error).sum(-1),
        w=modes.b * (jnp.moveaxis(within, 0, -1) * error).sum(-1),
        b=(backward * error).sum(-1),
    )


def require_rule(rule: Any) -> None:
    """Raises unless it is a rule of the theory."""
    if not isinstance(rule, ModeRule):
        raise ValueError(
            f"rule must be bptt(), tbptt(K) or rflo(r, rho) of localgrad.theory; got {rule!r}."
        )


def require_fading(teacher: Modes) -> None:
    """Raises unless a teacher is finite, and its responses fade: else endless ones have no loss."""
    require_modes("teacher", teacher)
    require_inside(
        "teacher.w",
        teacher.w,
        "where responses fade, for endless sequences; a Task of finitely many steps, as realisable "
        "makes it, takes any w",
    )


def require_task(task: Task | Endless) -> None:
    """Raises unless the task is one that has a loss."""
    if isinstance(task, Endless):
        require_fading(task.teacher)
        return
    if not isinstance(task, Task):
        raise ValueError(f"task must be a Task or Endless; got {type(task).__name__}.")
    require_numbers(**{"task.target": task.target, "task.weight": task.weight})
    target, weight = np.shape(task.target), np.shape(task.weight)
    if not target or len(weight) > len(target) or weight[-1:] not in ((), target[-1:]):
        raise ValueError(
            f"task.weight must be [L] as task.target is [..., L]; got shapes {weight} and {target}."
        )


def _endless_descent(
    modes: Modes, gain: jax.Array, decay: jax.Array, horizon: int | None, task: Endless
) -> Modes:
    """Closed forms of the same sums over all lags: `e_l = p w^l - p* w*^l`."""
    a, w, b = modes
    p = a * b
    a_star, w_star, b_star = float64(*task.teacher)
    p_star = a_star * b_star

    def kept(y: jax.Array) -> Any:  # what the horizon leaves of sum_k (decay y)^k
        whole = 1 / (1 - decay * y)
        return whole if horizon is None else (1 - (decay * y) ** horizon) * whole

    def recurrent(y: jax.Array) -> jax.Array:
        return y * kept(y) / (1 - w * y)

    return Modes(
        a=b * (p / (1 - w * w) - p_star / (1 - w * w_star)),
        w=b * gain * (p * recurrent(w) - p_star * recurrent(w_star)),
        b=gain * (p * kept(w) - p_star * kept(w_star)),
    )


def loss(modes: Modes, task: Task | Endless) -> jax.Array:
    """The loss of each mode, without the part that no linear network can explain.

    Args:
        modes: the strengths, [...].
        task: what they are to learn.

    Returns:
        [...]; NaN for endless sequences and `|w| >= 1`.

    Raises:
        ValueError: as `descent` does.

    Example:
        >>> from localgrad import theory
        >>> teacher = theory.Modes(1.0, 0.5, 1.0)
        >>> float(theory.loss(theory.Modes(0.0, 0.0, 0.0), theory.realisable(teacher, steps=2)))
        0.625
    """
    require_task(task)
    modes = modes_of(modes)
    if isinstance(task, Task):
        return 0.5 * _weighted(task, _errors(modes, task) ** 2).sum(-1)
    a_star, w_star, b_star = float64(*task.teacher)
    p, p_star, w = modes.a * modes.b, a_star * b_star, modes.w
    cross = 2 * p * p_star / (1 - w * w_star)
    value = 0.5 * (p**2 / (1 - w**2) - cross + p_star**2 / (1 - w_star**2))
    return jnp.where(jnp.abs(w) < 1, value, jnp.nan)


def unleaky(modes: Modes, alpha: float) -> tuple[Modes, Modes]:
    """A leaky network as one without leak: `m = 1 - alpha + alpha w`, `beta = alpha b`.

    For units `h_t = (1 - alpha) h_{t-1} + alpha (W h_{t-1} + B x_t)` this theory holds with m and
    beta in place of w and b, RFLO's decay `1 - alpha`, and learning rates `alpha^2` for both.

    Args:
        modes: strengths (a, w, b) of the leaky network.
        alpha: its leak, in (0, 1].

    Returns:
        The strengths (a, m, beta), and the learning rates for `integrate`.

    Raises:
        ValueError: for a leak outside (0, 1].

    Example:
        >>> from localgrad import theory
        >>> theory.unleaky(theory.Modes(1.0, 0.5, 2.0), alpha=0.5)
        (Modes(a=1.0, w=0.75, b=1.0), Modes(a=1.0, w=0.25, b=0.25))
    """
    alpha = number("alpha", alpha, "lie in (0, 1]")
    a, w, b = modes
    return Modes(a, 1 - alpha + alpha * w, alpha * b), Modes(1.0, alpha**2, alpha**2)


def leaky(modes: Modes, alpha: float) -> Modes:
    """The inverse of `unleaky`: strengths (a, w, b) of the leaky network that has (a, m, beta).

    Args:
        modes: strengths (a, m, beta).
        alpha: the leak, in (0, 1].

    Returns:
        The strengths (a, w, b).

    Raises:
        ValueError: for a leak outside (0, 1].

    Example:
        >>> from localgrad import theory
        >>> theory.leaky(theory.Modes(1.0, 0.75, 1.0), alpha=0.5)
        Modes(a=1.0, w=0.5, b=2.0)
    """
    alpha = number("alpha", alpha, "lie in (0, 1]")
    a, m, beta = modes
    return Modes(a, (m - 1 + alpha) / alpha, beta / alpha)


def modes_of(modes: Modes) -> Modes:
    """The strengths as float64 arrays of one shape."""
    a, w, b = float64(*modes)
    return Modes(*alike(a=a, w=w, b=b))


def _errors(modes: Modes, task: Task) -> jax.Array:
    """[..., L]: what the modes do at each lag, less what they should."""
    target = float64(task.target)
    done = (modes.a * modes.b)[..., None] * powers(modes.w, target.shape[-1])
    try:
        return done - jnp.broadcast_to(target, done.shape)
    except ValueError:
        raise ValueError(
            f"modes must fit task.target [..., L]; got modes {done.shape[:-1]} and target "
            f"{target.shape}. Give one strength a row of the target."
        ) from None


def _weighted(task: Task, values: jax.Array) -> jax.Array:
    return jnp.broadcast_to(float64(task.weight), values.shape) * values
