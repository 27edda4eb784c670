"""`LIFCell` and `ALIFCell`: spiking units, without and with an adaptive threshold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers

from localgrad.cells.arguments import each, numbers
from localgrad.cells.surrogates import SURROGATES, Surrogate, spike
from localgrad.core.contract.checks import positive_integer

DECAY_HINT = "With a time constant tau > 0 and a step dt, it is exp(-dt / tau)."


class LIFCell(nn.RNNCellBase):
    r"""A layer of leaky integrate-and-fire units.

    The equations of one step, with `alpha` the decay of the membrane, are::

        v_t = alpha v_{t-1} + scale (W_i x_t + W_h z_{t-1}) - thr z_{t-1}
        u_t = (v_t - thr) / thr
        z_t = 1 if u_t > 0 and the unit is not refractory, else 0

    The carry is `(v, z, r)`, each [B, N]: the voltage, the spikes, and the steps for which the unit
    is still refractory (a float, as everything in a carry). The output is `z_t`. In place of the
    derivative that a spike has not, `dz_t/du_t = dampening * surrogate(u_t)` is used, and 0 in
    units that are refractory. No credit passes the reset `- thr z_{t-1}`, unless `reset_credit`.

    Past the cut of `W_h` only the voltage remembers: one eligibility a synapse, a low-pass filter
    of what arrives at it, as in e-prop's paper (Bellec et al., "A solution to the learning dilemma
    for recurrent networks of spiking neurons", 2020, https://doi.org/10.1038/s41467-020-17236-y).

    Args:
        features: N, the number of units.
        decay: alpha, exp(-dt / tau) with tau the membrane's time constant, in [0, 1]: a number, or
            an array (N,) of one a unit.
        threshold: thr > 0, in the units of v: a number or (N,).
        refractory: for how many steps after a spike a unit stays silent. (Where a counter is set to
            n at the spike and counts down in the same step, this is n - 1.)
        scale: what the synapses' drive is multiplied by, >= 0: a number or (N,). 1 - decay keeps
            the voltage of a constant drive at that drive.
        autapses: whether units send spikes to themselves. If not, the diagonal of the kernel of
            `W_h` is not used: it begins at 0 and its gradient is 0.
        reset_credit: whether credit passes the reset, as in some codes' BPTT.
        surrogate: "triangular", max(0, 1 - |u|); "sigmoid", 4 s(u) s(-u) with s the logistic
            function; "fast_sigmoid", 1 / (1 + |u|)^2; "arctan", 1 / (1 + u^2); or a function of u.
        dampening: what the surrogate is multiplied by, >= 0.
        use_bias: whether `W_i` has a bias.
        kernel_init: initializer of `W_i`.
        recurrent_kernel_init: initializer of `W_h`.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: if a number is out of its range or an array of another shape than (N,), or the
            surrogate is unknown.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.LIFCell(8, refractory=2)
        >>> x = jnp.ones((4, 3))
        >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
        >>> params = cell.init(jax.random.key(1), carry, x)["params"]
        >>> (v, z, r), y = cell.apply({"params": params}, carry, x)
        >>> y.shape, sorted(params)
        ((4, 8), ['h', 'i'])
    """

    features: int
    decay: Any = 0.95
    threshold: Any = 1.0
    refractory: int = 0
    scale: Any = 1.0
    autapses: bool = False
    reset_credit: bool = False
    surrogate: str | Surrogate = "triangular"
    dampening: float = 0.3
    use_bias: bool = False
    kernel_init: Callable[..., Any] = initializers.lecun_normal()
    recurrent_kernel_init: Callable[..., Any] = initializers.lecun_normal()
    bias_init: Callable[..., Any] = initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        self._numbers("decay", "lie in [0, 1]", DECAY_HINT)
        self._numbers(
            "threshold", "be positive and finite", "Units spike where the voltage exceeds it."
        )
        self._numbers("scale", "be 0 or more, and finite", "Let the kernels bear the sign.")
        if not (np.ndim(self.dampening) == 0 and 0 <= self.dampening < np.inf):
            raise ValueError(f"dampening must be a number, 0 or more; got {self.dampening!r}.")
        if not (np.ndim(self.refractory) == 0 and 0 <= self.refractory == int(self.refractory)):
            raise ValueError(
                "refractory must be a number of steps, an integer that is 0 or more; got "
                f"{self.refractory!r}. With 0 a unit may spike at every step."
            )
        if not (callable(self.surrogate) or self.surrogate in SURROGATES):
            raise ValueError(
                f"surrogate must be one of {', '.join(SURROGATES)}, or a function of "
                f"u = (v - threshold) / threshold; got {self.surrogate!r}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
        """One step: `((v, z, r), x [B, I]) -> ((v, z, r), z)`."""
        v, z, r = carry
        v = self._integrate(v, z, x)
        z, r = self._fire(v, each(self.threshold, v), r)
        return (v, z, r), z

    @nn.nowrap
    def _integrate(self, v: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
        """The new voltage; the spikes of the last step act through `W_h`, and reset."""
        layer = functools.partial(
            nn.Dense, self.features, dtype=self.dtype, param_dtype=self.param_dtype
        )
        drive = layer(
            name="i",
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
        )(x) + layer(
            name="h",
            use_bias=False,
            kernel_init=self.recurrent_kernel_init if self.autapses else self._apart,
            dot_general=None if self.autapses else _dot_apart,
        )(z)
        fading = each(self.decay, v) * v + each(self.scale, drive) * drive
        spikes = z if self.reset_credit else jax.lax.stop_gradient(z)
        return fading - each(self.threshold, v) * spikes

    @nn.nowrap
    def _fire(self, v: jax.Array, threshold: jax.Array, r: jax.Array) -> tuple:
        """The spikes, and for how long units are refractory."""
        shape = self.surrogate if callable(self.surrogate) else SURROGATES[self.surrogate]
        u = (v - threshold) / each(self.threshold, v)
        r = jax.lax.stop_gradient(r)
        z = spike(u, lambda u: self.dampening * shape(u))
        z = jnp.where(r > 0, jnp.zeros_like(z), z)
        return z, jnp.where(z > 0, float(self.refractory), jnp.maximum(r - 1, 0)).astype(r.dtype)

    @nn.nowrap
    def _apart(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        kernel = self.recurrent_kernel_init(key, shape, dtype)
        return jnp.where(jnp.eye(self.features, dtype=bool), jnp.zeros_like(kernel), kernel)

    @nn.nowrap
    def _numbers(self, name: str, must: str, hint: str) -> None:
        setattr(self, name, numbers(name, getattr(self, name), self.features, must, hint))

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> tuple:
        """Units at rest: zeros, each of shape `input_shape[:-1] + (N,)`."""
        del rng
        rest = jnp.zeros((*input_shape[:-1], self.features), self.param_dtype)
        return (rest,) * self._states

    @property
    def num_feature_axes(self) -> int:
        """The input has one feature axis."""
        return 1

    _states = 3


class ALIFCell(LIFCell):
    r"""A layer of leaky integrate-and-fire units whose threshold adapts (LSNN).

    `LIFCell` with a threshold that every spike raises by `beta`, and that falls back at the rate
    `rho`, the decay of the adaptation::

        v_t = alpha v_{t-1} + scale (W_i x_t + W_h z_{t-1}) - thr z_{t-1}
        u_t = (v_t - thr - beta a_{t-1}) / thr
        z_t = 1 if u_t > 0 and the unit is not refractory, else 0
        a_t = rho a_{t-1} + z_t

    The carry is `(v, a, z, r)`, each [B, N], and the output `z_t`. `a_t` is the adaptation that the
    next step meets: the `a_{t+1}` of texts that count the spike in with one step's delay. Credit
    passes from a unit's spikes to its adaptation, but not to its reset. So past the cut of `W_h`
    the voltage and the adaptation remember, with the eligibilities of e-prop's paper::

        eps_v,t = alpha eps_v,{t-1} + pre_t
        eps_a,t = rho eps_a,{t-1} + psi_t (eps_v,t - beta eps_a,{t-1}),     psi_t = dz_t/dv_t

    With `beta = 0` the units are those of `LIFCell`.

    Args:
        features: N, the number of units.
        decay: alpha, exp(-dt / tau) with tau the membrane's time constant, in [0, 1]: a number, or
            an array (N,) of one a unit.
        threshold: thr > 0, in the units of v, of a unit at rest: a number or (N,).
        refractory: for how many steps after a spike a unit stays silent.
        scale: what the synapses' drive is multiplied by, >= 0: a number or (N,).
        autapses: whether units send spikes to themselves. If not, the diagonal of the kernel of
            `W_h` is not used: it begins at 0 and its gradient is 0.
        reset_credit: whether credit passes the reset, as in some codes' BPTT.
        surrogate: the derivative used for a spike's: a name, as for `LIFCell`, or a function of u.
        dampening: what the surrogate is multiplied by, >= 0.
        use_bias: whether `W_i` has a bias.
        kernel_init: initializer of `W_i`.
        recurrent_kernel_init: initializer of `W_h`.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.
        adaptation_decay: rho, exp(-dt / tau_a), in [0, 1]: a number or (N,).
        beta: by how much a spike raises the threshold, >= 0, in the units of v: a number or (N,).

    Raises:
        ValueError: as `LIFCell`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> beta = jnp.where(jnp.arange(8) < 4, 0.0, 0.2)  # half the units adapt
        >>> cells = localgrad.ALIFCell(8, beta=beta), localgrad.LeakyCell(2, decay=0.9)
        >>> model = localgrad.Network(cells)  # an LSNN with its leaky readout
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.deep_eprop(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> updates["cells_0"]["h"]["kernel"].shape
        (8, 8)

    Reference:
        Bellec, Scherr, Subramoney, Hajek, Salaj, Legenstein and Maass, "A solution to the learning
        dilemma for recurrent networks of spiking neurons", Nature Communications, 2020,
        https://doi.org/10.1038/s41467-020-17236-y
    """

    adaptation_decay: Any = 0.995
    beta: Any = 0.1

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        self._numbers("adaptation_decay", "lie in [0, 1]", DECAY_HINT)
        self._numbers("beta", "be 0 or more, and finite", "With 0 the threshold is constant.")
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: tuple, x: jax.Array) -> tuple[tuple, jax.Array]:
        """One step: `((v, a, z, r), x [B, I]) -> ((v, a, z, r), z)`."""
        v, a, z, r = carry
        v = self._integrate(v, z, x)
        z, r = self._fire(v, each(self.threshold, v) + each(self.beta, a) * a, r)
        a = each(self.adaptation_decay, a) * a + z
        return (v, a, z, r), z

    _states = 4


def _dot_apart(
    pre: jax.Array, kernel: jax.Array, dimension_numbers: Any, **kwargs: Any
) -> jax.Array:
    """A product with all of a kernel [N, N] but its diagonal, as an `nn.Dense` computes it."""
    others = jnp.where(jnp.eye(len(kernel), dtype=bool), jnp.zeros_like(kernel), kernel)
    return jax.lax.dot_general(pre, others, dimension_numbers, **kwargs)
