"""How low the rank of a weight change is, and why RFLO's is.

Every RFLO update of a layer is `R^T` times something: `dW = R^T sum_t error_t P_t^T` with traces P
that all units share. Whatever the data, the loss, the length of training or the split into batches,
the total change `[W - W_0, B - B_0]` has at most the rank of R, hence at most O.

*Exact for* SGD with any schedule, momentum, clipping by global norm. *Not for* anything that treats
entries one by one: Adam and RMSprop, elementwise clipping, masks on weights; nor for feedback that
learns. Weight decay shrinks W_0 too, and the bound holds for the change from the shrunken W_0.
Units with M different time constants have at most M O. A nonlinearity gates each unit by its own
slope and breaks the bound; at small amplitude the rest is of the order of amplitude squared.
One-step truncated BPTT has the same bound with a frozen readout in place of R; else its readout
turns, and only from small weights does the change stay near rank O. BPTT has no bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class WeightChange(NamedTuple):
    """How many directions a matrix has changed in.

    Attributes:
        rank: the number of singular values above `rtol` times the largest.
        singular_values: of the change, in falling order.
    """

    rank: int
    singular_values: np.ndarray


def weight_change_rank(
    params0: Any, params: Any, *, rtol: float = 1e-9, joint: bool = False
) -> dict[str, WeightChange]:
    """The rank and the singular values of how far each matrix has come.

    Args:
        params0: parameters before training, a pytree.
        params: the same after training.
        rtol: singular values below this part of the largest count as zero. The default suits
            float64; float32 leaves about 1e-6 of noise.
        joint: also stack the matrices that end in the same units (kernels are [inputs, units]) into
            one, `"joint"`: RFLO's bound holds for recurrent and input weights together. Give the
            parameters of one cell.

    Returns:
        A `WeightChange` for each leaf with two axes, by its path.

    Raises:
        ValueError: if the two pytrees differ in structure or shapes, or if the matrices to join do
            not all end in the same number of units.

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
    change = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(new) - np.asarray(old)
        for (path, old), new in pairs
        if np.ndim(old) == 2
    }
    found = {name: _of(matrix, rtol) for name, matrix in change.items()}
    if joint:
        widths = {name: matrix.shape[1] for name, matrix in change.items()}
        if len(set(widths.values())) != 1:
            raise ValueError(
                "joint=True stacks matrices [inputs, units] that end in the same units; got units "
                f"{widths}. Give the parameters of one cell, such as params['cells_0']."
            )
        found["joint"] = _of(np.concatenate(list(change.values())), rtol)
    return found


def _of(matrix: np.ndarray, rtol: float) -> WeightChange:
    values = np.linalg.svd(matrix, compute_uv=False)
    return WeightChange(int((values > rtol * values[0]).sum()) if values[0] > 0 else 0, values)


def rank_bound(rule: str, outputs: int, units: int, time_constants: int = 1) -> int:
    """The largest rank that linear units' weights can change by, under plain SGD or momentum.

    Args:
        rule: `"rflo"`, or `"bptt"` or `"tbptt"`, which have no bound but the matrix' size.
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
    if rule not in ("rflo", "bptt", "tbptt"):
        raise ValueError(f"rule must be 'rflo', 'bptt' or 'tbptt'; got {rule!r}.")
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
