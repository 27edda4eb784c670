"""How far a network's weights and its data are from sharing singular vectors.

The theory of modes holds for *aligned* problems: one U and V make every lagged correlation of
outputs and inputs diagonal, and with one P the weights are `U diag(a) P^T`, `P diag(w) P^T` and
`P diag(b) V^T`. Two matrices X and Y share their singular vectors if and only if `X Y^T` and
`X^T Y` are both symmetric (Eckart and Young), so no basis need be found to measure it: what is
taken is the cosine between these products and their transposes.

Reference:
    Eckart and Young, "A principal axis transformation for non-Hermitian matrices", Bulletin of the
    American Mathematical Society, 1939, https://doi.org/10.1090/S0002-9904-1939-06910-3
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.core.contract.checks import positive_integer
from localgrad.theory.networks import Weights
from localgrad.theory.values import float64, require_numbers


class Alignment(NamedTuple):
    """Cosines between products of matrices and their transposes: 1 where bases are shared.

    Square matrices of N rows that have nothing to do with each other give about 1/N, others more
    the fewer rows or columns they have: a number alone is symmetric. The least is -1.

    Attributes:
        data: of the lags' correlations among each other; 1 if there is one lag.
        weights: of readout and input weights with the data: A with every `Sigma_l B^T`.
        recurrence: the mean of three, all without W's mean diagonal, whose basis is any: W with
            its own transpose, with A, and with B.

    Example:
        >>> from localgrad import theory
        >>> theory.Alignment(data=1.0, weights=0.3, recurrence=0.1).weights
        0.3
    """

    data: Any
    weights: Any
    recurrence: Any


def alignment(weights: Weights, correlations: Any) -> Alignment:
    """How nearly a linear network and its data share their singular vectors.

    Args:
        weights: A [O, N], W [N, N], B [N, I]; of leaky units too, whose leak changes nothing.
        correlations: [L, O, I], of outputs with inputs l steps before; see `lagged_correlations`.

    Returns:
        Three cosines, all 1 if and only if the problem is aligned, but for coincidences.

    Raises:
        ValueError: if shapes do not fit, or without 64-bit numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from localgrad import theory
        >>> bases = theory.random_bases(jax.random.key(0), outputs=2, units=5, inputs=2)
        >>> modes = theory.Modes(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.1]), jnp.ones(2))
        >>> data = jnp.stack([bases.U * s[None] @ bases.V.T for s in jnp.eye(2) + 1])
        >>> [round(float(v), 4) for v in theory.alignment(theory.aligned(modes, bases), data)]
        [1.0, 1.0, 1.0]
    """
    if not isinstance(weights, Weights):
        raise ValueError(
            f"weights must be Weights(A, W, B), as from_params makes them; got "
            f"{type(weights).__name__}."
        )
    named = {f"weights.{name}": value for name, value in weights._asdict().items()}
    require_numbers(correlations=correlations, **named)
    a, w, b = float64(*weights)
    data = float64(correlations)
    outputs, units, inputs = a.shape[:1], a.shape[1:], b.shape[1:]
    fit = a.ndim == b.ndim == 2 and (w.shape, b.shape[:1]) == (units * 2, units)
    if not fit or data.shape[1:] != outputs + inputs or not len(data):
        raise ValueError(
            f"correlations must be [L, O, I], L at least 1, and weights A [O, N], W [N, N], "
            f"B [N, I]; got {data.shape} and {a.shape}, {w.shape}, {b.shape}."
        )
    return _alignment(Weights(a, w, b), data)


@jax.jit
def _alignment(weights: Weights, data: jax.Array) -> Alignment:
    """`alignment`, compiled once for each shape."""
    a, w, b = weights
    one, other = np.triu_indices(len(data), 1)
    reached = data @ b.T  # [L, O, N]: B as the data see it
    w = w - jnp.trace(w) / len(w) * jnp.eye(len(w))
    among = [_cosine(x[None], y[None]) for x, y in ((w, jnp.eye(len(w))), (a @ w, a), (w @ b, b))]
    return Alignment(
        data=_cosine(data[one], data[other]),
        weights=_cosine(jnp.broadcast_to(a, reached.shape), reached),
        recurrence=jnp.mean(jnp.stack(among)),
    )


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """The cosine of `x y^T` and `x^T y`, [K, ...] each, with their transposes; 1 if all are 0."""
    products = (jnp.einsum("kij,klj->kil", x, y), jnp.einsum("kij,kil->kjl", x, y))
    both = sum((m * jnp.swapaxes(m, 1, 2)).sum() for m in products)
    size = sum((m * m).sum() for m in products)
    return jnp.where(size > 0, both / jnp.where(size > 0, size, 1.0), 1.0)


def lagged_correlations(inputs: Any, targets: Any, lags: int) -> jax.Array:
    """What the data say an input should do l steps later: the mean of `y_t x_{t-l}^T`.

    Args:
        inputs: [E, T, I], white over time and channels, or nearly so.
        targets: [E, T, O].
        lags: L, at most T.

    Returns:
        [L, O, I], means over examples and all steps t that have an input l steps before.

    Raises:
        ValueError: for more lags than steps, for shapes that do not fit, or without 64-bit numbers.

    Example:
        >>> import jax
        >>> from localgrad import theory
        >>> x = theory.white_inputs(jax.random.key(0), examples=13, steps=4, inputs=3)
        >>> found = theory.lagged_correlations(x, x, lags=2)
        >>> found.shape, round(float(found[0, 0, 0]), 6), abs(round(float(found[1, 0, 0]), 6))
        ((2, 3, 3), 1.0, 0.0)
    """
    require_numbers(inputs=inputs, targets=targets)
    lags = positive_integer("lags", lags)
    inputs, targets = float64(inputs, targets)
    fit = inputs.ndim == targets.ndim == 3 and inputs.shape[:2] == targets.shape[:2]
    if not fit or lags > inputs.shape[1]:
        raise ValueError(
            f"inputs [E, T, I] and targets [E, T, O] must agree, with lags from 1 to T; got "
            f"{inputs.shape}, {targets.shape} and lags {lags}."
        )
    steps = inputs.shape[1]
    pairs = ((targets[:, lag:], inputs[:, : steps - lag]) for lag in range(lags))
    size = len(inputs)
    return jnp.stack([jnp.einsum("eto,eti->oi", y, x) / (size * y.shape[1]) for y, x in pairs])
