"""Numbers of the theory: float64, finite, of shapes that fit, or an error that names them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def float64(*values: Any) -> Any:
    """The values as float64 arrays; one value alone comes back alone.

    Raises:
        ValueError: if 64-bit numbers are off.
    """
    if jnp.result_type(float) != jnp.float64:
        raise ValueError(
            "localgrad.theory needs 64-bit numbers, but jax_enable_x64 is False: in float32 its "
            "rates and conserved quantities would be wrong. Call "
            'jax.config.update("jax_enable_x64", True) first.'
        )
    found = tuple(jnp.asarray(value, jnp.float64) for value in values)
    return found[0] if len(found) == 1 else found


def known(value: Any) -> np.ndarray | None:
    """The value in NumPy, or None while it is traced."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def require_numbers(**values: Any) -> None:
    """Raises unless every value is real and finite, as far as it is known."""
    for name, value in values.items():
        found = known(value)
        if found is None:
            continue
        if not np.issubdtype(found.dtype, np.number) or np.iscomplexobj(found):
            raise ValueError(f"{name} must be real numbers, in an array or alone; got {value!r}.")
        if not np.isfinite(found).all():
            raise ValueError(
                f"{name} must be finite; got {found.size - np.isfinite(found).sum()} of "
                f"{found.size} values that are NaN or infinite."
            )


def require_one(**values: Any) -> None:
    """Raises unless every value is one number, real and finite, as far as it is known."""
    require_numbers(**values)
    for name, value in values.items():
        if np.ndim(value):
            raise ValueError(
                f"{name} must be a number, of one mode; got shape {np.shape(value)}. Ask for each."
            )


def require_modes(name: str, modes: Any) -> None:
    """Raises unless they are modes, all real and finite, by name, such as `start.w`."""
    if getattr(modes, "_fields", None) != ("a", "w", "b"):
        raise ValueError(f"{name} must be Modes(a, w, b); got {modes!r}.")
    require_numbers(**{f"{name}.{part}": v for part, v in zip("awb", modes, strict=True)})


def require_not_zero(name: str, value: Any, why: str) -> None:
    """Raises if some value is zero."""
    require_numbers(**{name: value})
    found = known(value)
    if found is not None and not found.all():
        raise ValueError(f"{name} must not be 0; got {value}. {why}")


def require_inside(name: str, value: Any, why: str) -> None:
    """Raises unless all values lie inside (-1, 1)."""
    require_numbers(**{name: value})
    found = known(value)
    if found is not None and not np.all(np.abs(found) < 1):
        raise ValueError(f"{name} must lie inside (-1, 1), {why}; got {value}.")


def alike(**values: jax.Array) -> list[jax.Array]:
    """The values, broadcast to one shape, whatever their ranks.

    Raises:
        ValueError: if their shapes do not broadcast.
    """
    shape = shape_of(**values)
    return [jnp.broadcast_to(value, shape) for value in values.values()]


def shape_of(**values: Any) -> tuple[int, ...]:
    """The one shape that all values broadcast to.

    Raises:
        ValueError: if their shapes do not broadcast.
    """
    shapes = {name: np.shape(value) for name, value in values.items()}
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"shapes must be alike, or broadcast; got {told}. Give each a number or [M]."
        ) from None


def powers(base: jax.Array, count: int) -> jax.Array:
    """[..., count]: base to the powers 0 .. count - 1, also for base 0, with right derivatives."""
    ones = jnp.ones_like(base)[..., None]
    repeated = jnp.broadcast_to(base[..., None], (*base.shape, count - 1))
    return jnp.cumprod(jnp.concatenate([ones, repeated], axis=-1), axis=-1)
