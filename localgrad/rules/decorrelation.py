"""`decorrelation`: matrices that take the correlations out of what layers receive.

Letters: B batch, W steps of a window, N units.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from localgrad.core.contract.checks import number, require_choice
from localgrad.core.contract.objective import Shown
from localgrad.core.contract.rule import NOTHING, LearningRule, Loss
from localgrad.core.contract.state import CarryState
from localgrad.core.frame import Recipe, windowed_rule
from localgrad.core.model.decorrelation import NAME, Decorrelation
from localgrad.core.model.stack import Stack
from localgrad.core.params import Leaves, Path, accumulator, flatten
from localgrad.core.passes.heard import hear
from localgrad.core.windows import Frame, Window, even_windows

FORMS = ("multiplicative", "additive")


class Options(NamedTuple):
    """What `decorrelation` was told; see there."""

    form: str
    kappa: float


def decorrelation(
    model: Any,
    loss: Loss,
    *,
    form: str = "multiplicative",
    kappa: float = 0.0,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Learns the matrices of `localgrad.Decorrelation` layers, and leaves everything else alone.

    With `y = D x` what such a layer gives, and `<.>` the mean over examples and steps (and over
    further axes of y; what several calls of a layer in a step give is added)::

        dD = ((1 - kappa) offdiag<y y'> + kappa diag(<y^2> - 1)) D      form="multiplicative"
        dD = (1 - kappa) offdiag<y y'> + kappa diag(<y^2> - 1)          form="additive"

    where offdiag has the diagonal set to 0. It needs neither errors nor labels: `loss` is only
    measured. All steps count alike, also those whose loss is masked. Use it with another rule for
    the weights, and a learning rate of its own::

        rule = localgrad.mix(
            {
                "weights": localgrad.activity_perturbation(model, loss, key=key),
                "decorrelation": localgrad.decorrelation(model, loss),
            },
            localgrad.label_decorrelation,
        )
        rates = {"weights": optax.sgd(1e-3), "decorrelation": optax.sgd(1e-4)}
        tx = optax.chain(rule, optax.partition(rates, localgrad.label_decorrelation))

    which is decorrelated ANP; with `node_perturbation` it is DNP, with `weight_perturbation` DWP.

    *Estimates*, at kappa = 0, the gradient of the summed squares of correlations,
    `1/4 |offdiag(D S D')|^2` with S = <x x'>, times the inverse of S: a descent direction under
    which D A^-1 learns from inputs A x as D does from x. The additive form, the authors' until
    October 2024, agrees with it at D = 1 alone. *Costs* a forward pass and N^2 a step, layer and
    example; memory does not grow with T.

    Args:
        model: a Flax cell or `localgrad.Network` with `localgrad.Decorrelation` layers in it.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged.
        form: `"multiplicative"` or `"additive"`.
        kappa: in [0, 1], how much of the update draws the variances to 1.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carry persists from call
            to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not. Here
            every step weighs 1.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `CarryState`.

    Raises:
        ValueError: if the model has no such layer, or one that cannot be seen, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> cell = localgrad.DecorrelatedCell(nn.SimpleCell(8))
        >>> model = localgrad.Network((cell,), readout=nn.Dense(2))
        >>> x = jax.random.normal(jax.random.key(0), (4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.decorrelation(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> bool(jnp.any(updates["cells_0"]["state"]["decorrelation"]))
        True
        >>> bool(jnp.any(updates["readout"]["kernel"]))
        False

    Reference:
        Ahmad, Schrader and van Gerven, "Constrained parameter inference as a principle for
        learning", Transactions on Machine Learning Research, 2023,
        https://arxiv.org/abs/2203.13203. Fernandez, Keemink and van Gerven, "Gradient-free training
        of recurrent neural networks using random perturbations", Frontiers in Neuroscience, 2024,
        https://doi.org/10.3389/fnins.2024.1439155
    """
    require_choice("form", form, FORMS)
    kappa = number("kappa", kappa, "lie in [0, 1]", "0 leaves the variances alone.")
    options = Options(form, kappa)
    return windowed_rule(
        model,
        loss,
        Recipe(
            name="decorrelation",
            state=CarryState,
            process=functools.partial(_process, options),
            credits=_credits,
            settings=options._asdict(),
            default_window=even_windows,
            screen=_screen,
        ),
        batch_size=batch_size,
        window=window,
        reduction=reduction,
        example=example,
    )


def label_decorrelation(params: Any) -> Any:
    """A tree of labels, for `localgrad.mix` and `optax.partition`.

    Args:
        params: a model's parameters.

    Returns:
        The same tree with `"decorrelation"` for the matrices of `localgrad.Decorrelation` layers,
        and `"weights"` for all else.

    Example:
        >>> import localgrad
        >>> localgrad.label_decorrelation({"state": {"decorrelation": 1.0}, "h": {"kernel": 1.0}})
        {'h': {'kernel': 'weights'}, 'state': {'decorrelation': 'decorrelation'}}
    """
    leaves, restore = flatten(params)
    return restore({path: "decorrelation" if path[-1] == NAME else "weights" for path in leaves})


def _process(options: Options, frame: Frame, state: CarryState, window: Window) -> tuple:
    """One window: what the layers gave, and how it is correlated."""
    stack = frame.stack
    heard = hear(stack, frame.params, stack.unpack(state.carry), window.inputs, window.reset)
    values = frame.objective.values(heard.outputs, window.targets, window.weight)
    grads: Leaves = {}
    for part in heard.parts:
        for site, given in zip(part.sites, part.drives, strict=True):
            if site.layer.kind != Decorrelation.__name__:
                continue
            path = (*part.prefix, *site.layer.path, NAME)
            found = frame.share * _correlations(options, frame.params[path], given)
            grads[path] = grads[path] + found if path in grads else found
    _require_seen(stack, frame.params, grads)
    return state._replace(carry=stack.pack(heard.carries)), grads, Shown(values, heard.outputs)


def _require_seen(stack: Stack, params: Leaves, grads: Leaves) -> None:
    """Raises for a parameter of that name that belongs to no layer that was seen."""
    for path in params:
        if path[-1] == NAME and path not in grads and stack.asks(path):
            raise ValueError(
                f"decorrelation cannot learn {'/'.join(path)}: it belongs to no "
                "localgrad.Decorrelation layer that is called plainly. Use the layer itself, not a "
                "subclass, outside of nn.remat, nn.vmap and nn.jit, and call other parameters "
                "something else."
            )


def _correlations(options: Options, kernel: jax.Array, given: jax.Array) -> jax.Array:
    """The update of a matrix by what it gave, [W, B, ..., N], summed over W and B."""
    y = given.astype(accumulator(kernel)).reshape(*given.shape[:2], -1, given.shape[-1])
    second = jnp.einsum("wbxn,wbxm->nm", y, y) / y.shape[2]
    diagonal = jnp.diag(jnp.diag(second))
    found = (1 - options.kappa) * (second - diagonal)
    found += options.kappa * (diagonal - y.shape[0] * y.shape[1] * jnp.eye(y.shape[-1]))
    return kernel.astype(found.dtype) @ found if options.form == "multiplicative" else found


def _screen(stack: Stack, params: Leaves) -> None:
    del stack
    if not any(path[-1] == NAME for path in params):
        raise ValueError(
            "decorrelation learns the matrices of localgrad.Decorrelation layers, and this model "
            "has none. Put a localgrad.DecorrelatedCell around its cell."
        )


def _credits(stack: Stack, params: Leaves) -> dict[Path, str]:
    del stack
    return {path: "decorrelation" if path[-1] == NAME else NOTHING for path in params}
