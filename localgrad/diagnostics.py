"""Diagnostics: what a rule credits and keeps, and how far its update is from another one's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.params import leaves_of


class Alignment(NamedTuple):
    """How an update lies to a reference; read the two numbers together.

    Attributes:
        cosine: scalar in [-1, 1], of the angle between the two; 0 when either is zero.
        norm_ratio: scalar, the update's Euclidean norm divided by the reference's; 0 when both are
            zero, infinity when only the reference is.
    """

    cosine: jax.Array
    norm_ratio: jax.Array


def compare(updates: Any, reference: Any) -> dict[str, Alignment]:
    """Compares a rule's updates with a reference, group of parameters by group.

    With `reference` from `localgrad.bptt` at the same parameters and on the same batch, this says
    how much of the true gradient a local rule recovers. A cosine alone hides an update that is a
    thousand times too small, and the readout's gradient, exact under most rules, flatters the
    cosine of the whole: look at `norm_ratio` and at the recurrent groups too.

    Args:
        updates: the updates, a pytree of real arrays.
        reference: the updates to compare with, of the same structure and shapes.

    Returns:
        An `Alignment` for each top-level group of parameters, such as `'cells_0'` and `'readout'`
        of a `Network`, and for `'all'` of them as one vector. Sums are taken in float32 or wider,
        on values scaled by their largest magnitude, so that small gradients do not underflow.
        Non-finite updates give non-finite numbers. The function is pure: use it under `jit`,
        `vmap` or `scan`.

    Raises:
        ValueError: if the two trees differ in structure or in a shape, or a group is named 'all'.

    Example:
        >>> import jax.numpy as jnp, localgrad
        >>> exact = {"cells_0": jnp.array([3.0, 4.0]), "readout": jnp.array([1.0])}
        >>> local = {"cells_0": jnp.array([4.0, 3.0]), "readout": jnp.array([0.0])}
        >>> result = localgrad.compare(local, exact)
        >>> for group, (cosine, norm_ratio) in result.items():
        ...     print(f"{group}: cosine {cosine:.2f}, norm ratio {norm_ratio:.2f}")
        cells_0: cosine 0.96, norm ratio 1.00
        readout: cosine 0.00, norm ratio 0.00
        all: cosine 0.94, norm ratio 0.98
    """
    _require_alike(updates, reference)
    groups = dict(updates) if isinstance(updates, Mapping) else {}
    if "all" in groups:
        raise ValueError("a top-level group of parameters is named 'all'; rename it.")
    result = {str(name): _align(groups[name], reference[name]) for name in groups}
    return {**result, "all": _align(updates, reference)}


def summary(rule: Any, params: Any) -> str:
    """Who credits what, and what the rule's state takes, before anything is allocated.

    Args:
        rule: a localgrad rule.
        params: the model's parameters; shapes suffice.

    Returns:
        The size of the rule's state, and what would take less, then a table with a line for each
        parameter. In streaming mode the state holds the carry and the influence of every stream; an
        episodic call of several windows holds as much, but only while it runs.

    Raises:
        ValueError: if the rule cannot credit the model, or is no localgrad rule.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.SimpleCell(8),), readout=nn.Dense(2))
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, jnp.ones((4, 3)))["params"]
        >>> print(localgrad.summary(localgrad.snap(model, optax.l2_loss, batch_size=4), params))
        state: 1,796 bytes
        parameter         shape   credited
        cells_0/h/kernel  (8, 8)  own unit's past (eligibility)
        cells_0/i/bias    (8,)    own unit's past (eligibility)
        cells_0/i/kernel  (3, 8)  own unit's past (eligibility)
        readout/bias      (2,)    exact
        readout/kernel    (8, 2)  exact
    """
    credits = getattr(rule, "credits", None)
    if credits is None:
        raise ValueError(f"rule must be a rule of localgrad; got {rule!r}. Pass it, not its chain.")
    leaves = leaves_of(params)
    rows = [("parameter", "shape", "credited")]
    rows += [
        ("/".join(path), str(leaves[path].shape), how) for path, how in credits(params).items()
    ]
    widths = [max(len(line[column]) for line in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {shape:{widths[1]}}  {how}" for name, shape, how in rows]
    blank = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    # Numbers, where there are any: a rule may read from them how much it keeps.
    state = (
        jax.eval_shape(rule.init, params) if blank else jax.eval_shape(lambda: rule.init(params))
    )
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
    streams = getattr(state, "carry", None) is not None
    advice = f" ({rule.advice})" if rule.advice and streams else ""
    return "\n".join([f"state: {size:,} bytes{advice}", *lines])


def _require_alike(updates: Any, reference: Any) -> None:
    """Raises unless the two trees have one structure and equal shapes."""
    structures = jax.tree.structure(updates), jax.tree.structure(reference)
    if structures[0] != structures[1]:
        raise ValueError(
            f"updates and reference must be trees of one structure; got {structures[0]} and "
            f"{structures[1]}. Take both from rules of the same model."
        )
    leaves = jax.tree.leaves_with_path(updates)
    for (path, left), right in zip(leaves, jax.tree.leaves(reference), strict=True):
        if jnp.shape(left) != jnp.shape(right):
            raise ValueError(
                f"updates and reference must agree in shape; at {jax.tree_util.keystr(path)} got "
                f"{jnp.shape(left)} and {jnp.shape(right)}."
            )


def _align(updates: Any, reference: Any) -> Alignment:
    """The alignment of two trees as two vectors."""
    left, left_scale = _scaled(jax.tree.leaves(updates))
    right, right_scale = _scaled(jax.tree.leaves(reference))
    left_norm, right_norm = jnp.sqrt(_dot(left, left)), jnp.sqrt(_dot(right, right))
    product = left_norm * right_norm
    cosine = _dot(left, right) / jnp.where(product == 0, 1, product)
    empty = (left_norm == 0) & (right_norm == 0)
    ratio = (left_norm / jnp.where(empty, 1, right_norm)) * (left_scale / right_scale)
    return Alignment(cosine=jnp.clip(cosine, -1, 1), norm_ratio=ratio)


def _scaled(leaves: list[Any]) -> tuple[list[jax.Array], jax.Array]:
    """Leaves in float32 or wider, divided by the largest magnitude among them; and that scale."""
    dtype = jnp.result_type(jnp.float32, *leaves)
    wide = [jnp.asarray(leaf, dtype) for leaf in leaves]
    largest = [jnp.max(jnp.abs(leaf), initial=0) for leaf in wide]
    scale = jnp.max(jnp.stack(largest)) if largest else jnp.zeros((), dtype)
    scale = jnp.where(scale == 0, 1, scale)
    return [leaf / scale for leaf in wide], scale


def _dot(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    """The inner product of two lists of arrays."""
    products = [jnp.sum(a * b) for a, b in zip(left, right, strict=True)]
    return jnp.sum(jnp.stack(products)) if products else jnp.zeros(())
