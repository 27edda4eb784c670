"""Node perturbation and its activity-based form: noise on what units receive, and losses."""

from __future__ import annotations

from typing import Any

import jax

from localgrad.core.contract.checks import require_choice
from localgrad.core.contract.rule import LearningRule, Loss
from localgrad.core.frame import windowed_rule
from localgrad.core.passes.reward import CREDITS
from localgrad.rules.perturbation import copies, lone
from localgrad.rules.perturbation.copies import Options
from localgrad.rules.perturbation.norms import NORMS
from localgrad.rules.perturbation.options import noise_of, require_samples

READOUTS = ("perturb", "exact")
BASELINES = ("clean", "running_mean")


def node_perturbation(
    model: Any,
    loss: Loss,
    *,
    key: jax.Array,
    scale: float = 0.01,
    samples: int = 1,
    antithetic: bool = False,
    noise: str = "rademacher",
    credit: str = "causal",
    resync: bool = False,
    readout: str = "perturb",
    baseline: str = "clean",
    samples_at_once: int | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Node perturbation in time: noise on every unit's input, paid by the losses that follow.

    A second copy of the model runs beside the clean one, with independent noise `scale * z` added
    to each *node*, the sum of drives that a unit receives, at each step, for each example. With
    `d_t` the difference of the copies' losses at step t over `scale`, and `x_t` what a synapse
    received in the clean copy::

        dW = sum_t c_t z_t (outer) x_t           c_t = sum_{s >= t} d_s      credit="causal"
                                                 c_t = d_t                   credit="step"
                                                 c_t = sum_s d_s             credit="total"

    averaged over K samples. What reaches the loss of its own step alone, such as a readout, is
    always paid by that one. A reset ends the sums.

    With `resync=True`, for step credit, copies begin each step from the clean carry. What earlier
    noise did to a loss, which step credit cannot tell from what its own did, is then not there: the
    mean stays and the variance no longer grows with the memory of the network. Nothing has to be
    run one step after another but the clean copy.

    With `baseline="running_mean"` there is no clean copy, as in an animal or on a chip: the network
    itself is noisy, and d_t is its loss at step t less the mean loss of the calls before, over
    `scale`. The last ten calls count most, those without a step that weighs anything not at all. It
    costs one forward pass, and varies far more: what the loss owes to the inputs is noise to it.

    *Estimates*, on average over the noise, the gradient of BPTT under causal and total credit, but
    for an error that falls with `scale` squared, and the gradient with a horizon of one step under
    step credit. Causal credit leaves out losses that came before the noise, so that it varies less
    than total credit. The variance grows with the number of nodes and steps.

    *Costs* K + 1 forward passes (2 K + 1 if antithetic), the drawing of noise and the sum of
    products: with 128 rate units or a GRU, 1, 8 and 64 samples took 2.7 to 3.0, 1.1 to 1.2 and .87
    to .96 times as long as so many forward passes on one CPU core. Normal numbers take longer to
    draw than a forward pass.
    Memory does not grow with T: for each sample, stream and parameter below the readout, one number
    is carried, but with step credit.
    No derivative of an activation, a cell or a loss is taken (of the loss, for an exact readout).

    A copy of an example whose loss or carry is not finite, where the clean one's is, is left out at
    those steps and goes on from the clean carry at the window's end; where that happens, numbers
    depend on where windows end.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`. Its parameters all lie in layers.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged. It
            need not be differentiable, and may be computed outside JAX by `jax.pure_callback`.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        scale: the noise's standard deviation, in the units of the drives. Smaller is less biased,
            until rounding drowns the differences of losses.
        samples: K, noisy copies of each example.
        antithetic: let each sample be two copies with opposite noise, and compare these: what is of
            even order in the noise drops out of every sample.
        noise: `"gaussian"` or `"rademacher"` (-1 or 1 times the scale).
        credit: `"causal"`, `"step"` or `"total"`.
        resync: let noisy copies begin each step from the clean carry; with step credit alone.
        readout: `"perturb"`, or `"exact"` for the gradient of the readout of a `Network`.
        baseline: what losses are compared with, `"clean"` or `"running_mean"`. The latter has one
            noisy copy of each example, causal or step credit, and a perturbed readout.
        samples_at_once: how many samples to run side by side, a divisor of K: bounds memory. None
            for all.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carries and eligibility persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `NodeState`, or a `LoneState` without a clean copy.

    Raises:
        ValueError: by name, for a parameter that lies in no layer, and for what no noise can be.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.GRUCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.node_perturbation(
        ...     model, optax.l2_loss, key=jax.random.key(2), samples=8
        ... )
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> int(state.clock)
        10

    Reference:
        Fernandez, Keemink and van Gerven, "Gradient-free training of recurrent neural networks
        using random perturbations", Frontiers in Neuroscience, 2024,
        https://doi.org/10.3389/fnins.2024.1439155, whose step credit it has with
        `credit="step"` and `optax.scale(scale)` behind it. Fiete and Seung, "Gradient learning in
        spiking neural networks by dynamic perturbation of conductances", Physical Review Letters,
        2006, https://doi.org/10.1103/PhysRevLett.97.048104, and Miconi, "Biologically plausible
        learning in recurrent neural networks reproduces neural dynamics observed during cognitive
        tasks", eLife, 2017, https://doi.org/10.7554/eLife.20899, for running means. Werfel, Xie and
        Seung, "Learning curves for stochastic gradient descent in linear feedforward networks",
        Neural Computation, 2005, https://doi.org/10.1162/089976605774320539
    """
    require_choice("credit", credit, CREDITS)
    require_choice("readout", readout, READOUTS)
    require_choice("baseline", baseline, BASELINES)
    told = {"scale": scale, "samples": samples, "antithetic": antithetic, "noise": noise}
    told |= {"credit": credit, "resync": resync, "readout": readout, "baseline": baseline}
    told |= {"samples_at_once": samples_at_once}
    _require_step_credit(resync, credit)
    require_samples(samples, samples_at_once)
    if baseline == "running_mean":
        _require_lone(samples, antithetic, credit, resync, readout)
    options = Options(
        rule="node_perturbation",
        noise=noise_of(scale, noise, antithetic, resync),
        samples=samples,
        at_once=samples_at_once,
        credit=credit,
        norm=None,
        exact_readout=readout == "exact",
        key=key,
    )
    recipe = (copies if baseline == "clean" else lone).recipe_of(options, told)
    common = {"batch_size": batch_size, "window": window, "reduction": reduction}
    return windowed_rule(model, loss, recipe, **common, example=example)


def _require_step_credit(resync: bool, credit: str) -> None:
    """Raises where noise that ends with its step is held to account for later losses."""
    if not isinstance(resync, bool):
        raise ValueError(f"resync must be True or False; got {resync!r}.")
    if resync and credit != "step":
        raise ValueError(
            f'resync=True needs credit="step"; got credit={credit!r}. Noise that ends with its '
            'step brings about no later loss. Use credit="step", or resync=False.'
        )


def _require_lone(samples: int, antithetic: bool, credit: str, resync: bool, readout: str) -> None:
    """Raises for what one noisy network without a clean copy cannot do."""
    told = {"samples": samples, "antithetic": antithetic, "credit": credit}
    told |= {"resync": resync, "readout": readout}
    fitting = {
        "samples": (1,),
        "antithetic": (False,),
        "credit": CREDITS[:2],
        "resync": (False,),
        "readout": READOUTS[:1],
    }
    for name, value in told.items():
        if value not in fitting[name]:
            raise ValueError(
                f'{name} must be one of {fitting[name]} with baseline="running_mean"; got '
                f"{value!r}. There is one noisy network, and no other to compare it with: more "
                "examples in a batch take the place of samples."
            )


def activity_perturbation(
    model: Any,
    loss: Loss,
    *,
    key: jax.Array,
    scale: float = 0.01,
    samples: int = 1,
    antithetic: bool = False,
    noise: str = "rademacher",
    credit: str = "causal",
    norm: str = "layer",
    readout: str = "perturb",
    samples_at_once: int | None = None,
    batch_size: int | None = None,
    window: int | None = None,
    reduction: str = "mean",
    example: Any = None,
) -> LearningRule:
    r"""Activity-based node perturbation: pays all that changed in a unit's input.

    As `node_perturbation`, with the difference of the two copies' drives in place of the noise: the
    noise of a unit and all that earlier noise, and that of other units, brought about::

        dW = sum_t c_t k_t (da_t / scale) (outer) x_t       da_t = noisy drive - clean drive
        k_t = N_l / |da_t / scale|^2                        norm="layer", N_l units and their norm
        k_t = N / |da_t / scale|^2                          norm="joint", of all layers together
        k_t = 1                                             norm="variance"
        k_t = sqrt(N + I) / |da_t / scale|^2                norm="fernandez2024", norm of the layer

    *Estimates* a preconditioned gradient. With `norm="variance"` and small noise, its mean for step
    t is M_t G_t, with G_t what BPTT finds (under step credit, what it finds with a horizon of one
    step), and M_t = sum_{k <= t} J_tk J_tk' >= I how earlier noise spreads. So each step descends
    on average, but the sum over steps need not, and is biased; the norms by layer bias it further.
    One sample of it lies closer to the gradient than one of `node_perturbation`, for what earlier
    noise does to a loss is a signal here and noise there; of many samples the mean does not, for
    its bias.

    *Costs* and arguments as of `node_perturbation`. There is no total credit here: it would pay
    activity for losses that its causes already brought about.

    Args:
        model: a Flax cell: a Linen module as it is, an NNX cell through `localgrad.from_nnx`, or a
            `localgrad.Network`. Its parameters all lie in layers.
        loss: `(outputs [B, ...], targets [B, ...]) -> [B]` or `[B, ...]`, the loss of one time
            step for each example, such as `optax.l2_loss`; trailing axes are averaged. It
            need not be differentiable, and may be computed outside JAX by `jax.pure_callback`.
        key: a typed PRNG key. Noise is drawn from it, for each step anew, however often `update` is
            called.
        scale: the noise's standard deviation.
        samples: K, noisy copies of each example.
        antithetic: let each sample be two copies with opposite noise.
        noise: `"gaussian"` or `"rademacher"`.
        credit: `"causal"` or `"step"`.
        norm: `"layer"`, `"joint"`, `"variance"` or `"fernandez2024"`.
        readout: `"perturb"`, or `"exact"` for its gradient.
        samples_at_once: how many samples to run side by side, or None for all.
        batch_size: None for *episodic* learning: each batch holds whole sequences, from the initial
            carry. B for *streaming*: B parallel streams whose carries and eligibility persist
            from call to call.
        window: steps processed together inside a call; memory grows with it, never with T, and the
            numbers do not depend on it. None picks a size.
        reduction: `"mean"` divides by the total weight of this call's steps, `"sum"` does not.
        example: one time step's inputs without the batch axis (array or `ShapeDtypeStruct`). Needed
            by `init` only if no Dense or Embed layer takes the input as it is.

    Returns:
        A `LearningRule`; its state is a `NodeState`.

    Raises:
        ValueError: as `node_perturbation`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> model = localgrad.Network((nn.SimpleCell(8),), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.activity_perturbation(
        ...     model, optax.l2_loss, key=jax.random.key(2), samples=8
        ... )
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> bool(jnp.isfinite(updates["cells_0"]["h"]["kernel"]).all())
        True

    Reference:
        Fernandez, Keemink and van Gerven, "Gradient-free training of recurrent neural networks
        using random perturbations", Frontiers in Neuroscience, 2024,
        https://doi.org/10.3389/fnins.2024.1439155; its code's rule is `credit="step"`,
        `norm="fernandez2024"`, at B = 1 (with more examples it has one loss difference for all).
        Dalm, van Gerven and Ahmad, "Effective learning with node perturbation in deep neural
        networks", 2023, https://arxiv.org/abs/2310.00965
    """
    require_choice("credit", credit, CREDITS[:2])
    require_choice("norm", norm, NORMS)
    require_choice("readout", readout, READOUTS)
    told = {"scale": scale, "samples": samples, "antithetic": antithetic, "noise": noise}
    told |= {"credit": credit, "norm": norm, "readout": readout, "samples_at_once": samples_at_once}
    require_samples(samples, samples_at_once)
    options = Options(
        rule="activity_perturbation",
        noise=noise_of(scale, noise, antithetic),
        samples=samples,
        at_once=samples_at_once,
        credit=credit,
        norm=norm,
        exact_readout=readout == "exact",
        key=key,
    )
    common = {"batch_size": batch_size, "window": window, "reduction": reduction}
    recipe = copies.recipe_of(options, told)
    return windowed_rule(model, loss, recipe, **common, example=example)
