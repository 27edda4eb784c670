"""Data-aligned linear networks: white inputs, lagged targets, aligned weights, back to modes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.theory.modes import Modes, modes_of
from localgrad.theory.values import float64


class Bases(NamedTuple):
    """The orthogonal matrices that a problem's data and an aligned network share.

    Attributes:
        U: of the outputs, [O, O].
        P: of the units, [N, N].
        V: of the inputs, [I, I].

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> theory.Bases(U=jnp.eye(2), P=jnp.eye(5), V=jnp.eye(3)).P.shape
        (5, 5)
    """

    U: jax.Array
    P: jax.Array
    V: jax.Array


class Weights(NamedTuple):
    """A linear network `h_t = W h_{t-1} + B x_t`, `y_t = A h_t`.

    Attributes:
        A: readout, [O, N].
        W: recurrent, [N, N].
        B: input, [N, I].

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> weights = theory.Weights(A=jnp.ones((2, 5)), W=jnp.zeros((5, 5)), B=jnp.ones((5, 3)))
        >>> weights.W.shape
        (5, 5)
    """

    A: jax.Array
    W: jax.Array
    B: jax.Array


def random_bases(key: jax.Array, outputs: int, units: int, inputs: int) -> Bases:
    """Bases drawn uniformly from the orthogonal matrices.

    Args:
        key: a typed PRNG key.
        outputs: O.
        units: N.
        inputs: I.

    Returns:
        The bases.

    Example:
        >>> import jax
        >>> from localgrad import theory
        >>> theory.random_bases(jax.random.key(0), outputs=3, units=6, inputs=4).P.shape
        (6, 6)
    """
    keys = jax.random.split(key, 3)
    sizes = (outputs, units, inputs)
    float64(0.0)
    draw = [
        jax.random.orthogonal(k, n, dtype=jnp.float64) for k, n in zip(keys, sizes, strict=True)
    ]
    return Bases(*draw)


def white_inputs(key: jax.Array, examples: int, steps: int, inputs: int) -> jax.Array:
    """A finite set of sequences that is exactly white over steps and channels together.

    The mean over examples of `x_t x_s^T` is the identity if t = s, and zero otherwise. With more
    than `T I` examples the mean of every entry is zero too, so that biases have nothing to learn.

    Args:
        key: a typed PRNG key.
        examples: E, at least `T I`.
        steps: T.
        inputs: I.

    Returns:
        [E, T, I].

    Raises:
        ValueError: with fewer examples than `T I`, of which no set is white.

    Example:
        >>> import jax
        >>> from localgrad import theory
        >>> x = theory.white_inputs(jax.random.key(0), examples=13, steps=4, inputs=3)
        >>> flat = x.reshape(13, 12)
        >>> float(abs(flat.T @ flat / 13 - jax.numpy.eye(12)).max()) < 1e-12
        True
    """
    entries = steps * inputs
    if examples < entries:
        raise ValueError(
            f"examples must be at least steps * inputs = {entries} to be exactly white; got "
            f"{examples}."
        )
    float64(0.0)
    drawn = jax.random.normal(key, (examples, entries), jnp.float64)
    if examples > entries:
        drawn = jnp.concatenate([jnp.ones((examples, 1)), drawn], axis=1)
    flat = jnp.linalg.qr(drawn)[0][:, -entries:]
    return (jnp.sqrt(examples) * flat).reshape(examples, steps, inputs)


def lagged_targets(inputs: Any, target: Any, bases: Bases) -> jax.Array:
    """Outputs that the inputs have caused: `y_t = sum_l U diag(target_l) V^T x_{t-l}`.

    Args:
        inputs: [E, T, I].
        target: [M, L], what an input of each mode does l steps later; as `realisable` makes it.
        bases: of the problem; M is at most the smallest of O, N and I.

    Returns:
        [E, T, O].

    Raises:
        ValueError: if there are more modes than the bases can hold.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from localgrad import theory
        >>> bases = theory.random_bases(jax.random.key(0), outputs=2, units=5, inputs=2)
        >>> x = jnp.ones((3, 4, 2))
        >>> theory.lagged_targets(x, jnp.ones((2, 4)), bases).shape
        (3, 4, 2)
    """
    inputs, target = float64(inputs, target)
    modes, steps = len(target), inputs.shape[1]
    _require_room(modes, bases)
    seen = inputs @ bases.V[:, :modes]  # [E, T, M]
    found = jnp.zeros((*inputs.shape[:2], len(bases.U)))
    for lag in range(min(steps, target.shape[1])):
        late = jnp.pad(seen, ((0, 0), (lag, 0), (0, 0)))[:, :steps]
        found += late @ (bases.U[:, :modes] * target[None, :, lag]).T
    return found


def aligned(modes: Modes, bases: Bases, others: Any = 0.0) -> Weights:
    """The network that has given modes: `U diag(a) P^T`, `P diag(w) P^T` and `P diag(b) V^T`.

    RFLO's feedback matrix is aligned likewise: `aligned(Modes(r, 0, 0), bases).A`.

    Args:
        modes: the strengths, [M] each.
        bases: of the problem.
        others: [N - M] or a number, recurrent strengths of the directions without a mode.

    Returns:
        The weights.

    Raises:
        ValueError: if there are more modes than the bases can hold.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from localgrad import theory
        >>> bases = theory.random_bases(jax.random.key(0), outputs=2, units=5, inputs=2)
        >>> modes = theory.Modes(jnp.ones(2), jnp.zeros(2), jnp.ones(2))
        >>> [m.shape for m in theory.aligned(modes, bases)]
        [(2, 5), (5, 5), (5, 2)]
    """
    a, w, b = modes_of(modes)
    count, units = len(a), len(bases.P)
    _require_room(count, bases)
    u, p, v = bases.U[:, :count], bases.P[:, :count], bases.V[:, :count]
    rest = jnp.broadcast_to(float64(others), (units - count,))
    recurrent = bases.P * jnp.concatenate([w, rest])[None] @ bases.P.T
    return Weights(u * a[None] @ p.T, recurrent, p * b[None] @ v.T)


def project(weights: Weights, bases: Bases) -> tuple[Modes, jax.Array]:
    """What a trained network is in the problem's bases.

    Args:
        weights: A, W, B.
        bases: of the problem.

    Returns:
        The modes, [M] each with M the smallest of O, N and I, and how far from aligned the network
        is: the largest entry that an aligned one would not have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from localgrad import theory
        >>> bases = theory.random_bases(jax.random.key(0), outputs=2, units=5, inputs=2)
        >>> weights = theory.aligned(theory.Modes(jnp.ones(2), jnp.zeros(2), jnp.ones(2)), bases)
        >>> modes, leak = theory.project(weights, bases)
        >>> modes.a, float(leak) < 1e-12
        (Array([1., 1.], dtype=float64), True)
    """
    u, p, v = bases
    inside = [u.T @ weights.A @ p, p.T @ weights.W @ p, p.T @ weights.B @ v]
    count = min(len(u), len(p), len(v))
    on = [jnp.diagonal(m) for m in inside]
    off = [
        m - jnp.zeros_like(m).at[jnp.arange(len(d)), jnp.arange(len(d))].set(d)
        for m, d in zip(inside, on, strict=True)
    ]
    leak = jnp.max(jnp.stack([jnp.abs(m).max() for m in off]))
    return Modes(*(d[:count] for d in on)), leak


def to_params(weights: Weights) -> Any:
    """The weights as parameters of a `Network` of one linear `RateCell` and a readout without bias.

    The network is `localgrad.Network((localgrad.RateCell(N, activation=identity),),
    readout=nn.Dense(O, use_bias=False))` with `identity = lambda u: u`; its input bias starts at
    zero, and stays there on inputs of mean zero.

    Args:
        weights: A, W, B.

    Returns:
        The parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> weights = theory.Weights(A=jnp.ones((2, 5)), W=jnp.ones((5, 5)), B=jnp.ones((5, 3)))
        >>> theory.to_params(weights)["cells_0"]["i"]["kernel"].shape
        (3, 5)
    """
    a, w, b = weights
    drives = {"i": {"kernel": b.T, "bias": jnp.zeros(len(w), w.dtype)}, "h": {"kernel": w.T}}
    return {"cells_0": drives, "readout": {"kernel": a.T}}


def from_params(params: Any) -> Weights:
    """The inverse of `to_params`, without the bias.

    Args:
        params: of a `Network` of one `RateCell` and a `Dense` readout.

    Returns:
        The weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> weights = theory.Weights(A=jnp.ones((2, 5)), W=jnp.ones((5, 5)), B=jnp.ones((5, 3)))
        >>> theory.from_params(theory.to_params(weights)).B.shape
        (5, 3)
    """
    cell = params["cells_0"]
    return Weights(
        A=params["readout"]["kernel"].T, W=cell["h"]["kernel"].T, B=cell["i"]["kernel"].T
    )


def _require_room(modes: int, bases: Bases) -> None:
    room = min(len(basis) for basis in bases)
    if modes > room:
        raise ValueError(
            f"{modes} modes do not fit: U, P and V of sizes {[len(basis) for basis in bases]} hold "
            f"{room}. Draw larger bases or give fewer modes."
        )
