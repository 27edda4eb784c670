"""Weight perturbation, and persistent evolution strategies: noise on parameters."""

from __future__ import annotations

from typing import Any

import jax

from localgrad.core.contract.checks import positive_integer, require_choice
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import windowed_rule
from localgrad.rules.perturbation.options import noise_of, require_samples
from localgrad.rules.perturbation.particles import Options, recipe_of

CREDITS = ("causal", "step")


def weight_perturbation(
    model: Any,
    loss: Loss,
    *,
    key: jax.Array,
    scale: float = 0.01,
    samples: int = 1,
    antithetic: bool = True,
    noise: str = "rademacher",
    lifetime: int | None = None,
    credit: str = "causal",
    samples_at_once: int | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Weight perturbation in time: noise on every parameter, paid by the losses that follow.

    Each example has copies of its own, with noise `scale * z` on all parameters. It is drawn at a
    sequence's start, and anew every `lifetime` steps. With `d_t` half the difference between the
    losses of a copy and of that with opposite noise, over `scale`, or that to the clean copy's::

        dW = sum_t d_t z_t                          credit="step"     z_t the noise of step t
        dW = sum_t d_t sum_{draws until t} z        credit="causal"

    averaged over K samples. With one draw a sequence the two are the same.

    *Estimates*, on average over the noise, the gradient of BPTT, but for an error that falls with
    `scale` squared; with a lifetime and step credit, the gradient within each life alone. With one
    draw a sequence its relative variance is P - 1 (signs) or P + 1 (Gaussian noise) for one
    example, one sample and P parameters, whatever the length; each new draw adds to it.

    *Costs* 2 K + 1 forward passes, or K + 1 if not antithetic, in which every example has weights
    of its own: with 128 units, 16 examples and 8 samples each sample took 5 to 19 times as long as
    a pass with weights in common, on one CPU core. Memory holds K B P numbers, twice as many
    with a lifetime and causal credit, and does not grow with T. No derivative is
    taken, and any cell will do.

    A copy of an example whose loss or carry is not finite, where the clean one's is, is left out at
    those steps and goes on from the clean carry at the end of a window, or of a life; where that
    happens, numbers depend on where windows end.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged. It
            need not be differentiable, and may be computed outside JAX by `jax.pure_callback`.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        scale: the noise's standard deviation, in the parameters' unit.
        samples: K, noisy copies of each example (pairs, if antithetic).
        antithetic: compare copies with opposite noise.
        noise: `"gaussian"` or `"rademacher"` (-1 or 1 times the scale).
        lifetime: steps from one draw to the next; None for one draw a sequence. Steps are then
            taken one by one, as they are where `Batch.reset` is given.
        credit: `"causal"` or `"step"`.
        samples_at_once: how many samples to run side by side, a divisor of K: bounds memory. None
            for all.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carries and noise persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `ParticleState`.

    Raises:
        ValueError: for what no noise can be, and as in `bptt`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.OptimizedLSTMCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.weight_perturbation(model, optax.l2_loss, key=jax.random.key(2))
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> bool(jnp.any(updates["readout"]["kernel"]))
        True

    Reference:
        Fernandez, Keemink and van Gerven, "Gradient-free training of recurrent neural networks
        using random perturbations", Frontiers in Neuroscience, 2024,
        https://doi.org/10.3389/fnins.2024.1439155, whose code's rule is `antithetic=False`,
        `lifetime=1`, `credit="step"`, with `optax.scale(scale)` behind it. Züge, Klos and
        Memmesheimer, "Weight versus node perturbation learning in temporally extended tasks",
        Physical Review X, 2023, https://doi.org/10.1103/PhysRevX.13.021006
    """
    require_choice("credit", credit, CREDITS)
    if lifetime is not None:
        positive_integer("lifetime", lifetime, "It counts steps; None is for a sequence.")
    told = {"scale": scale, "samples": samples, "antithetic": antithetic, "noise": noise}
    told |= {"lifetime": lifetime, "credit": credit, "samples_at_once": samples_at_once}
    disturbed = noise_of(scale, noise, antithetic)
    require_samples(samples, samples_at_once)
    options = Options(
        "weight_perturbation", disturbed, samples, samples_at_once, lifetime, credit, key
    )
    common = {"batch_size": batch_size, "window": window, "reduction": reduction}
    return windowed_rule(model, loss, recipe_of(options, told), **common, example=example)


def pes(
    model: Any,
    loss: Loss,
    *,
    key: jax.Array,
    unroll: int,
    scale: float = 0.01,
    samples: int = 1,
    samples_at_once: int | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Persistent evolution strategies: noise drawn anew for each unroll, none of it forgotten.

    Pairs of particles with opposite noise keep their states from one unroll of a sequence to the
    next; `xi` sums the noise that a particle has met. With `l+` and `l-` the losses of a pair::

        xi_j = xi_{j-1} + scale * z_j               at the start of unroll j
        dW   = sum_t (l+_t - l-_t) xi_{j(t)} / (2 scale^2)

    It is `weight_perturbation` with `lifetime=unroll` and Gaussian noise, by its own name.

    *Estimates*, on average, the gradient of BPTT over the whole sequence, but for an error that
    falls with `scale` squared: unrolls do not truncate it. Its variance grows with their number.
    *Costs* as `weight_perturbation`.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged. It
            need not be differentiable, and may be computed outside JAX by `jax.pure_callback`.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        unroll: steps from one draw to the next.
        scale: the noise's standard deviation.
        samples: K pairs of particles for each example.
        samples_at_once: how many pairs to run side by side, or None for all.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carries and noise persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `ParticleState`.

    Raises:
        ValueError: as `weight_perturbation`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.pes(
        ...     model, optax.l2_loss, key=jax.random.key(2), unroll=5, batch_size=4
        ... )
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> state.since.tolist()  # steps since each stream's sequence began
        [10, 10, 10, 10]

    Reference:
        Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs
        with persistent evolution strategies", ICML, 2021, https://arxiv.org/abs/2112.13835
    """
    positive_integer("unroll", unroll, "It counts steps.")
    told = {"unroll": unroll, "scale": scale, "samples": samples}
    told |= {"samples_at_once": samples_at_once}
    disturbed = noise_of(scale, "gaussian", antithetic=True)
    require_samples(samples, samples_at_once)
    options = Options("pes", disturbed, samples, samples_at_once, unroll, "causal", key)
    common = {"batch_size": batch_size, "window": window, "reduction": reduction}
    return windowed_rule(model, loss, recipe_of(options, told), **common, example=example)
