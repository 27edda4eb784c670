"""`from_linen`: the way in for Linen modules that hold more than parameters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from localgrad.core.model.constants import Constants, LinenModel
from localgrad.core.model.modules import require_cell


def from_linen(module: nn.Module, variables: Any) -> tuple[LinenModel, Any]:
    """Splits what a Linen cell's `init` gave into a model for localgrad's rules and its parameters.

    For cells that hold more than parameters: all collections but `params` are constants of the
    model, as they are now, such as a mask of the wiring, time constants, or the running averages of
    a BatchNorm that uses them. A step that writes one of them is refused. A module with nothing but
    parameters goes into a rule as it is.

    Args:
        module: a Linen cell, or a `localgrad.Network` of cells.
        variables: what `module.init(key, carry, x)` gave, or the same after training.

    Returns:
        The model, static and hashable (its constants by their values), and its parameters.

    Raises:
        ValueError: if the module is no cell, `variables` has no `params`, or a constant has no
            value, as inside `jax.jit`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> class Masked(nn.RNNCellBase):
        ...     @nn.compact
        ...     def __call__(self, h, x):
        ...         seen = self.variable("wiring", "mask", lambda: jnp.array([[1.0, 0.0, 1.0]]))
        ...         h = jnp.tanh(nn.Dense(4, name="i")(x * seen.value) + nn.Dense(4, name="h")(h))
        ...         return h, h
        ...
        ...     def initialize_carry(self, key, input_shape):
        ...         return jnp.zeros((*input_shape[:-1], 4))
        ...
        ...     num_feature_axes = 1
        >>> variables = Masked().init(jax.random.key(0), jnp.zeros((2, 4)), jnp.ones((2, 3)))
        >>> model, params = localgrad.from_linen(Masked(), variables)
        >>> rule = localgrad.eprop(model, optax.l2_loss)
        >>> batch = localgrad.Batch(jnp.ones((2, 5, 3)), jnp.ones((2, 5, 4)))
        >>> updates, state = rule(params, rule.init(params), batch)
        >>> sorted(updates), float(abs(updates["i"]["kernel"][1]).max())
        (['h', 'i'], 0.0)
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"module must be a Linen module; got {type(module).__name__}. An NNX module goes "
            "through localgrad.from_nnx."
        )
    require_cell(module)
    if "params" not in variables:
        raise ValueError(
            f"variables must be what {type(module).__name__}().init gave, with its 'params' and "
            f"other collections; got the collections {sorted(variables)}."
        )
    fixed = {name: tree for name, tree in variables.items() if name != "params"}
    fixed = jax.tree.map(lambda a: a if hasattr(a, "dtype") else jnp.asarray(a), fixed)
    return LinenModel(module, Constants(fixed, type(module).__name__)), variables["params"]
