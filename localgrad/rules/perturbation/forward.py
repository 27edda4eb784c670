"""Forward gradients: a directional derivative along noise, in one pass forward."""

from __future__ import annotations

from typing import Any

import jax

from localgrad.core.contract.checks import require_choice
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import windowed_rule
from localgrad.core.passes.reward import CREDITS
from localgrad.rules.perturbation import copies, particles
from localgrad.rules.perturbation.options import infinitesimal, require_samples

OVER = ("weights", "nodes")


def forward_gradient(
    model: Any,
    loss: Loss,
    *,
    key: jax.Array,
    over: str = "weights",
    samples: int = 1,
    noise: str = "rademacher",
    credit: str = "causal",
    samples_at_once: int | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Forward gradients: perturbation without a size, by a derivative forward in time.

    Each example has a random direction, over all weights or over what all nodes receive at each
    step, and a tangent that travels forward beside its carry. With `d_t` the derivative of the loss
    of step t along it::

        over="weights"      dW = z sum_t d_t                      z drawn at a sequence's start
        over="nodes"        dW = sum_t c_t z_t (outer) x_t        c_t as in `node_perturbation`

    averaged over K samples. It is what `weight_perturbation` and `node_perturbation` tend to as
    their scale goes to 0, without rounding.

    *Estimates*, on average, exactly the gradient of BPTT (over nodes under step credit, that with a
    horizon of one step). The variance is that of the rule it is the limit of.

    *Costs* K passes forward with their tangents, each about two forward passes, and one without;
    memory does not grow with T: K B P numbers are carried. Cells and losses need forward-mode
    derivatives: `jax.custom_vjp` has none, `jax.custom_jvp` does.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`. Over nodes its parameters all lie in layers.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged. It
            has a derivative.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        over: `"weights"`, for any cell, or `"nodes"`, for parameters in layers.
        samples: K, directions for each example.
        noise: `"gaussian"` or `"rademacher"`, what directions are drawn from.
        credit: over nodes, `"causal"`, `"step"` or `"total"`; over weights all are one.
        samples_at_once: how many directions to follow side by side, or None for all.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carries and tangents persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `ParticleState` or a `NodeState`.

    Raises:
        ValueError: as the two rules.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.forward_gradient(model, optax.l2_loss, key=jax.random.key(2))
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> bool(jnp.any(updates["cells_0"]["hr"]["kernel"]))
        True

    Reference:
        Baydin, Pearlmutter, Syme, Wood and Torr, "Gradients without backpropagation", 2022,
        https://arxiv.org/abs/2202.08587. Over nodes: Ren, Kornblith, Liao and Hinton, "Scaling
        forward gradient with local losses", ICLR, 2023, https://arxiv.org/abs/2210.03310
    """
    require_choice("over", over, OVER)
    require_choice("credit", credit, CREDITS)
    require_samples(samples, samples_at_once)
    told = {"over": over, "samples": samples, "noise": noise, "credit": credit}
    told |= {"samples_at_once": samples_at_once}
    name, drawn = "forward_gradient", infinitesimal(noise)
    if over == "weights":
        each = particles.Options(name, drawn, samples, samples_at_once, None, "causal", key)
        recipe = particles.recipe_of(each, told)
    else:
        every = copies.Options(name, drawn, samples, samples_at_once, credit, None, False, key)
        recipe = copies.recipe_of(every, told)
    common = {"batch_size": batch_size, "window": window, "reduction": reduction}
    return windowed_rule(model, loss, recipe, **common, example=example)
