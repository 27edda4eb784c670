"""What gradient flow leaves unchanged, of one mode and of any linear network."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import number
from localgrad.theory.modes import ALIKE, ModeRule, Modes, require_rule
from localgrad.theory.values import alike, float64, require_modes


def conserved(rule: ModeRule, modes: Modes, rates: Modes = ALIKE) -> jax.Array:
    """The quantity that a rule's flow conserves in each mode, for any task.

    The quantities, with learning rates `eta`::

        bptt        a^2/eta_a - b^2/eta_b
        tbptt(1)    a^2/eta_a - b^2/eta_b - w^2/eta_w
        rflo        (w - rho)^2/eta_w + b^2/eta_b - 2 r a/eta_a

    so that RFLO's flow stays in a plane curved through (a, w, b), and the readout follows the rest.
    They need the same error in all three updates: a frozen readout voids them. Steps of finite size
    eta drift by O(eta).

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)`.
        modes: the strengths, [...].
        rates: learning rates of a, w and b.

    Returns:
        [...].

    Raises:
        ValueError: for `tbptt(K > 1)`, of which no conserved quantity is known, and for strengths
            that are no finite numbers or whose shapes do not broadcast.

    Example:
        >>> from localgrad import theory
        >>> float(theory.conserved(theory.bptt(), theory.Modes(a=2.0, w=0.3, b=1.0)))
        3.0
    """
    require_rule(rule)
    require_modes("modes", modes)
    a, w, b = float64(*modes)
    a, w, b = alike(a=a, w=w, b=b)
    if rule.name == "rflo":
        gain, decay = float64(*rule.seen(modes))
        return (w - decay) ** 2 / rates.w + b**2 / rates.b - 2 * gain * a / rates.a
    _require_known(rule)
    outer = a**2 / rates.a - b**2 / rates.b
    return outer if rule.name == "bptt" else outer - w**2 / rates.w


def conserved_matrix(
    rule: ModeRule, weights: Any, feedback: jax.Array | None = None, alpha: float = 1.0
) -> jax.Array:
    """The matrix that a rule's flow conserves in any linear network, on any data, aligned or not.

    The matrices, for updates with one learning rate::

        bptt        A^T A + W^T W - W W^T - B B^T
        tbptt(1)    A^T A - W W^T - B B^T
        rflo        (W - rho I)(W - rho I)^T + B B^T - R^T A - A^T R

    In leaky units `(rho - 1 + alpha)/alpha` stands for rho: zero where RFLO's traces decay by the
    units' own `1 - alpha`.

    Args:
        rule: `bptt()`, `tbptt(1)` or `rflo(r, rho)` with one rho; r is not used.
        weights: `Weights` A [O, N], W [N, N], B [N, I].
        feedback: R [O, N], for RFLO.
        alpha: the leak of the units, for RFLO.

    Returns:
        [N, N], symmetric.

    Raises:
        ValueError: for `tbptt(K > 1)`, for RFLO without feedback, and for other rules with a leak.

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> weights = theory.Weights(A=jnp.eye(2), W=jnp.zeros((2, 2)), B=2 * jnp.eye(2))
        >>> theory.conserved_matrix(theory.bptt(), weights).tolist()
        [[-3.0, 0.0], [0.0, -3.0]]
    """
    require_rule(rule)
    alpha = number("alpha", alpha, "lie in (0, 1]")
    a, w, b = float64(*weights)
    if rule.name == "rflo":
        if feedback is None:
            raise ValueError("feedback must be the matrix R [O, N] for rflo; got None.")
        r = float64(feedback)
        # With m = 1 - alpha + alpha w, the shifted m - rho is alpha (w - centre).
        centre = (float64(rule.decay) - 1 + alpha) / alpha
        shifted = w - centre * jnp.eye(len(w))
        return shifted @ shifted.T + b @ b.T - r.T @ a - a.T @ r
    _require_known(rule)
    if alpha != 1.0:
        raise ValueError(f"alpha must be 1 for {rule.name}; got {alpha}.")
    outer = a.T @ a - w @ w.T - b @ b.T
    return outer + w.T @ w if rule.name == "bptt" else outer


def _require_known(rule: ModeRule) -> None:
    if rule.name == "tbptt" and rule.horizon != 1:
        raise ValueError(
            f"no conserved quantity of tbptt with a horizon of {rule.horizon} steps is known, only "
            "of tbptt(1), bptt() and rflo(r, rho)."
        )
