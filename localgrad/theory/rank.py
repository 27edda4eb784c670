"""How low the rank of a weight change is, why RFLO's is, and how many dimensions states fill.

Every RFLO update of a layer is `R^T` times something: `dW = R^T sum_t error_t P_t^T` with traces P
that all units share. Whatever the data, the loss, the length of training or the split into batches,
the total change `[W - W_0, B - B_0]` has at most the rank of R, hence at most O.

*Exact for* SGD with any schedule, momentum, clipping by global norm. *Not for* anything that treats
entries one by one: Adam and RMSprop, elementwise clipping, masks on weights; nor for feedback that
learns. Weight decay shrinks W_0 too, and the bound holds for the change from the shrunken W_0.
Units with M different time constants have at most M O. A nonlinearity gates each unit by its own
slope and breaks the bound; at small amplitude the rest is of the order of amplitude squared.

*With one output* Adam keeps nearly rank 1: each gradient is `r_i q_j`, whose running means are
`r_i` and `r_i^2` times those of q, and Adam's ratio is `sign(r_i)` times a function of j, but for
its epsilon. So the change's columns are along `sign(R)`, not R.

*e-prop* in linear units sends errors by the readout A that RFLO sends by R, along the same traces:
with fixed feedback it is RFLO. One-step truncated BPTT does so without traces. Both have RFLO's
bound with a frozen readout; else the readout turns, and only from small weights (of `W - rho I`
under e-prop) does the change stay near rank O: what is beyond falls in proportion to their scale.
SnAp-1, which adds W's diagonal to each unit's own decay and is called e-prop by some, and BPTT
have no bound.

Weights of low rank hold states of few dimensions, as far as the weights came from nothing: see
`state_dimension`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from localgrad.theory.values import require_numbers


class WeightChange(NamedTuple):
    """How many directions a matrix has changed in.

    Attributes:
        rank: the number of singular values above `rtol` times the largest.
        singular_values: of the change, in falling order.

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> before, after = {"w": np.zeros((2, 2))}, {"w": np.diag([3.0, 0.0])}
        >>> theory.weight_change_rank(before, after)["w"].singular_values.tolist()
        [3.0, 0.0]
    """

    rank: int
    singular_values: np.ndarray


def weight_change_rank(
    params0: Any, params: Any, *, rtol: float | None = None, joint: bool = False
) -> dict[str, WeightChange]:
    """The rank and the singular values of how far each matrix has come.

    Args:
        params0: parameters before training, a pytree.
        params: the same after training.
        rtol: singular values below this part of the largest count as zero; None takes the root of
            the rounding of the parameters' dtype: 1.5e-8 of float64, 3.5e-4 of float32, .088 of
            bfloat16. Updates that are tiny beside their weights leave more noise.
        joint: also stack the matrices that end in the same units (kernels are [inputs, units]) into
            one, `"joint"`: RFLO's bound holds for recurrent and input weights together. Give the
            parameters of one cell.

    Returns:
        A `WeightChange` for each leaf with two axes, by its path.

    Raises:
        ValueError: if the two pytrees differ in structure or shapes, a matrix is empty or not
            finite, or if the matrices to join do not all end in the same number of units.

    Example:
        >>> import jax.numpy as jnp
        >>> from localgrad import theory
        >>> before = {"kernel": jnp.zeros((3, 3))}
        >>> after = {"kernel": jnp.outer(jnp.arange(3.0), jnp.ones(3))}
        >>> theory.weight_change_rank(before, after)["kernel"].rank
        1
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params0, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"params0 and params must be alike; got shapes {shapes[0]} and {shapes[1]}."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(params0), jax.tree.leaves(params), strict=True)
    change, noise = {}, {}
    for (path, old), new in pairs:
        if np.ndim(old) == 2:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            change[name] = _matrix(f"params {name}", new) - _matrix(f"params0 {name}", old)
            noise[name] = max(_rounding(old), _rounding(new)) ** 0.5 if rtol is None else rtol
    found = {name: _of(matrix, noise[name]) for name, matrix in change.items()}
    if joint:
        widths = {name: matrix.shape[1] for name, matrix in change.items()}
        if len(set(widths.values())) != 1:
            raise ValueError(
                "joint=True stacks matrices [inputs, units] that end in the same units; got units "
                f"{widths}. Give the parameters of one cell, such as params['cells_0']."
            )
        found["joint"] = _of(np.concatenate(list(change.values())), max(noise.values()))
    return found


def _matrix(name: str, leaf: Any) -> np.ndarray:
    """A leaf in float64; raises unless it has entries, all finite."""
    found = np.asarray(leaf, np.float64)
    if not found.size:
        raise ValueError(f"{name} must have entries; got shape {found.shape}.")
    require_numbers(**{name: found})
    return found


def _rounding(leaf: Any) -> float:
    """The spacing of numbers near 1 in a leaf's dtype; of float64 for whole numbers."""
    dtype = jnp.result_type(leaf)
    return float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else np.float64).eps)


def _of(matrix: np.ndarray, rtol: float) -> WeightChange:
    values = np.linalg.svd(matrix, compute_uv=False)
    return WeightChange(int((values > rtol * values[0]).sum()) if values[0] > 0 else 0, values)


def rank_bound(rule: str, outputs: int, units: int, time_constants: int = 1) -> int:
    """The largest rank that linear units' weights can change by, under plain SGD or momentum.

    Args:
        rule: `"rflo"`, or `"bptt"`, `"tbptt"`, `"eprop"` or `"snap"`, which have no bound but the
            matrix' size while the readout learns.
        outputs: O.
        units: N.
        time_constants: M, how many different leaks the units have.

    Returns:
        `min(M O, N)` for RFLO, else N.

    Raises:
        ValueError: for another rule.

    Example:
        >>> from localgrad import theory
        >>> theory.rank_bound("rflo", outputs=2, units=30), theory.rank_bound("bptt", 2, 30)
        (2, 30)
    """
    known = ("rflo", "bptt", "tbptt", "eprop", "snap")
    if rule not in known:
        raise ValueError(f"rule must be one of {', '.join(map(repr, known))}; got {rule!r}.")
    return min(outputs * time_constants, units) if rule == "rflo" else units


def participation_ratio(singular_values: Any) -> float:
    """How many singular values matter: `(sum s^2)^2 / sum s^4`, a rank for noisy spectra.

    Args:
        singular_values: [K].

    Returns:
        Between 1 and K; 0 if all are zero.

    Example:
        >>> from localgrad import theory
        >>> theory.participation_ratio([1.0, 1.0, 0.0])
        2.0
    """
    power = np.square(np.asarray(singular_values, np.float64))
    return float(power.sum() ** 2 / np.square(power).sum()) if power.any() else 0.0


def state_dimension(states: Any) -> float:
    """How many dimensions hidden states fill: the participation ratio of their variances.

    With the covariance C of the states over time and examples it is `(tr C)^2 / tr C^2`: N if all
    directions vary alike, 1 if all states lie on a line.

    Args:
        states: [..., N], of any steps and examples.

    Returns:
        Between 1 and N; 0 if the states do not vary.

    Raises:
        ValueError: for states that are not finite, or fewer than two.

    Reference:
        Gao, Trautmann, Yu, Santhanam, Ryu, Shenoy and Ganguli, "A theory of multineuronal
        dimensionality, dynamics and measurement", 2017, https://doi.org/10.1101/214262

    Example:
        >>> import numpy as np
        >>> from localgrad import theory
        >>> steps = np.arange(4.0)
        >>> theory.state_dimension(np.stack([steps, 2 * steps, 0 * steps], axis=-1))
        1.0
    """
    require_numbers(states=states)
    flat = np.asarray(states, np.float64)
    flat = flat.reshape(-1, flat.shape[-1]) if flat.ndim else flat.reshape(-1, 1)
    if len(flat) < 2:
        raise ValueError(f"states must be [..., N], two or more; got shape {np.shape(states)}.")
    centred = flat - flat.mean(0)
    return participation_ratio(np.linalg.svd(centred, compute_uv=False))
