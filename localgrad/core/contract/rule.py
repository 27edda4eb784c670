"""`Batch` and `LearningRule`: what a rule is given, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import jax
import numpy as np
import optax

from localgrad.core.params import Path

Loss = Callable[[Any, Any], jax.Array]
Credits = Callable[[Any], dict[Path, str]]
Select = Callable[[Any], frozenset[Path]]
"""Parameters -> the paths of some of them."""

NOTHING = "nothing: stays as it is"
"""How a rule credits what it leaves alone."""


class Batch(NamedTuple):
    """Sequences to learn from: B examples, T time steps.

    Attributes:
        inputs: leaves [B, T, ...].
        targets: leaves [B, T, ...].
        mask: [B, T] weight of each step's loss, or None for ones. It weights losses only: the carry
            and the influence advance on every step, also at weight 0.
        reset: [B, T] bool, forget carry and influence *before* this step, or None for never.

    Example:
        >>> import jax.numpy as jnp, localgrad
        >>> batch = localgrad.Batch(inputs=jnp.ones((4, 10, 3)), targets=jnp.ones((4, 10, 2)))
        >>> batch.mask is None
        True
    """

    inputs: Any
    targets: Any
    mask: jax.Array | None = None
    reset: jax.Array | None = None


if TYPE_CHECKING:
    _Transformation = optax.GradientTransformationExtraArgs
else:
    _Transformation = object


class LearningRule(_Transformation):
    """A learning rule: a pure function of `(params, state, batch)` and an optax transformation.

    `rule.init(params)` makes the state. `rule(params, state, batch)` returns `(updates, state)`;
    the updates are gradient-signed, so that optax's `-learning_rate` descends them. The same rule
    comes first in an `optax.chain`, which hands it `batch` as an extra argument.

    A call compiles itself, so it needs no `jax.jit` around it; `jax.jit(rule)`, `jax.vmap(rule)`
    and a `jax.lax.scan` over it work. A rule is a closure that cannot be pickled: save its states,
    and make the rule anew by the same call of its factory.

    Attributes:
        init: `params -> state`.
        update: optax's `(updates, state, params, *, batch) -> (updates, state)`; takes None as
            updates.
        name: the name of its factory.
        settings: what the factory was told.
        credits: `params -> {path: how the rule credits that parameter}`; shown by
            `localgrad.summary`.
        advice: which rule takes less memory, if this one takes much; shown there too.
        narrow: `(params -> paths) -> LearningRule`, the same rule for these parameters alone; all
            others get exact zeros. What `localgrad.mix` is made of.
        draws: whether its updates are drawn from a key in its state.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> batch = localgrad.Batch(jnp.ones((4, 10, 3)), jnp.ones((4, 10, 2)))
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
        >>> rule = localgrad.eprop(model, optax.l2_loss)
        >>> print(rule)  # doctest: +ELLIPSIS
        eprop(Network, l2_loss, feedback='symmetric', batch_size=None, window=None, ...)
        >>> updates, state = rule(params, rule.init(params), batch)  # pure function
        >>> tx = optax.chain(rule, optax.adam(1e-3))  # native optax
        >>> updates, opt_state = tx.update(None, tx.init(params), params, batch=batch)
        >>> bool(optax.tree.get(opt_state, "loss") == state.loss)
        True
    """

    def __init__(
        self,
        init: Callable[[Any], Any],
        update: Callable[..., tuple[Any, Any]],
        *,
        name: str,
        settings: Mapping[str, Any],
        credits: Credits,
        narrow: Callable[[Select], LearningRule],
        advice: str = "",
        draws: bool = False,
    ) -> None:
        self.init, self.update = init, update
        self.name, self.settings, self.credits = name, dict(settings), credits
        self.advice, self.narrow, self.draws = advice, narrow, draws

    # optax asks isinstance(rule, GradientTransformationExtraArgs) before it hands on `batch`. That
    # is a tuple, and JAX refers to what it compiles by weak references, which no tuple allows: so
    # a rule is no tuple, but answers for one, and unpacks like one.
    @property
    def __class__(self) -> type:
        return optax.GradientTransformationExtraArgs

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))

    def __call__(self, params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        """One update: `(params, state, batch) -> (updates, state)`."""
        return self.update(None, state, params, batch=batch)

    def __repr__(self) -> str:
        model, loss = (_shown(self.settings[name]) for name in ("model", "loss"))
        rest = [f"{k}={_shown(v)}" for k, v in self.settings.items() if k not in ("model", "loss")]
        return f"{self.name}({', '.join([model, loss, *rest])})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a localgrad rule is a closure and cannot be pickled; got {self!r}. Save its states, "
            "and make the rule anew by the same call of its factory."
        )

    def __copy__(self) -> LearningRule:
        return self  # it never changes

    def __deepcopy__(self, memo: Any) -> LearningRule:
        return self


def _shown(value: Any) -> str:
    """A setting in one line: modules and functions by name, arrays by dtype and shape."""
    if hasattr(value, "_fields"):
        return repr(value)  # a named tuple of numbers
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, str | int | float | None):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    named = getattr(value, "func", value)  # what a functools.partial holds
    return getattr(named, "__name__", None) or type(named).__name__
