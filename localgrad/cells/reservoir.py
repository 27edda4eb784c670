"""`ReservoirCell`: the leaky echo state network, a rate cell with weights drawn to stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from localgrad.cells.rate import RateCell
from localgrad.core.contract.checks import number, positive_integer

SQUARINGS = 20


class ReservoirCell(RateCell):
    r"""A reservoir: leaky rate units whose random weights are meant to stay as they are.

    The equation of one step is that of `RateCell`, with phi a tanh unless told otherwise::

        a_t = (1 - alpha) a_{t-1} + alpha phi(W_i x_t + b + W_h a_{t-1})

    What differs is how the weights are drawn: `W_i` and `b` uniform within their scales; `W_h`
    normal where a unit hears another and 0 elsewhere, then scaled to its spectral radius. Each
    unit hears equally many, drawn without replacement and at least one, so that `W_h` has a cycle,
    and its radius is not 0.

    Its parameters are ordinary ones, that any rule would train. `localgrad.readout_only`,
    `localgrad.force` and `localgrad.fit_ridge` leave them as they are.

    Args:
        features: N, the number of units.
        alpha: the leak, in (0, 1]: a number, or an array (N,) of one a unit.
        learn_alpha: make `alpha` a parameter (N,), started from the value given.
        activation: phi, any elementwise function.
        spectral_radius: the largest modulus of the eigenvalues of `W_h`, >= 0. Below 1 most
            reservoirs forget how they began; well above 1 they are chaotic.
        density: the share of units that each unit hears, in (0, 1].
        input_scale: `W_i` is uniform between plus and minus this, >= 0.
        bias_scale: likewise `b`. Without biases a tanh reservoir answers to -x by minus what it
            answers to x, and no readout can tell an even function of its inputs.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: if an argument lies out of range, or `alpha` is of another shape than (N,).

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad
        >>> cell = localgrad.ReservoirCell(50, alpha=0.3, density=0.2)
        >>> model = localgrad.Network((cell,), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 3))
        >>> carry = model.initialize_carry(jax.random.key(0), x.shape)
        >>> params = model.init(jax.random.key(1), carry, x)["params"]
        >>> kernel = params["cells_0"]["h"]["kernel"]
        >>> int((kernel[:, 0] != 0).sum()), abs(jnp.linalg.eigvals(kernel)).max().round(4)
        (10, Array(0.9, dtype=float32))

    Reference:
        Jaeger, "The echo state approach to analysing and training recurrent neural networks", GMD
        Report 148, 2001, https://www.ai.rug.nl/minds/uploads/EchoStatesTechRep.pdf. How to choose
        the arguments: Lukosevicius, "A practical guide to applying echo state networks", in Neural
        Networks: Tricks of the Trade, Springer, 2012,
        https://doi.org/10.1007/978-3-642-35289-8_36
    """

    spectral_radius: float = 0.9
    density: float = 0.1
    input_scale: float = 1.0
    bias_scale: float = 0.0
    # What a rate cell is told, a reservoir draws by itself.
    kernel_init: Any = dataclasses.field(init=False, repr=False, compare=False)
    recurrent_kernel_init: Any = dataclasses.field(init=False, repr=False, compare=False)
    bias_init: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.features = positive_integer("features", self.features)
        for name in ("spectral_radius", "input_scale", "bias_scale"):
            setattr(self, name, number(name, getattr(self, name), "be 0 or more, and finite"))
        heard = "It is the share of units that each unit hears: 10 / features for ten of them."
        self.density = number("density", self.density, "lie in (0, 1]", heard)
        self.kernel_init = _uniform(self.input_scale)
        self.recurrent_kernel_init = _sparse(self.density, self.spectral_radius)
        self.bias_init = _uniform(self.bias_scale)
        super().__post_init__()


def radius_of(matrix: jax.Array) -> jax.Array:
    """The spectral radius of a square matrix, by Gelfand's formula.

    It is the limit of `|A^k|^(1/k)`, here with the Frobenius norm and `k = 2^20`, by repeated
    squaring of a matrix kept at norm 1. With V the eigenvectors, the result is too large by at most
    a factor `(sqrt(N) cond(V))^(1/k)`, 1 + 2e-5 at a condition of 1e7; to that comes rounding.
    Unlike an eigenvalue decomposition it runs on any device.

    Args:
        matrix: [N, N], at least float32.

    Returns:
        The radius; NaN if some power of the matrix is 0.
    """

    def square(j: jax.Array, so_far: tuple) -> tuple:
        a, log = so_far
        size = jnp.sqrt(jnp.sum(a * a))
        a = a / size
        return jnp.matmul(a, a, precision="highest"), log + jnp.log(size) * 0.5**j

    start = (matrix, jnp.zeros((), matrix.dtype))
    return jnp.exp(jax.lax.fori_loop(0, SQUARINGS + 1, square, start)[1])


def _sparse(density: float, radius: float) -> Any:
    """An initializer [N, N] of which each column holds equally many weights, with that radius."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        wide = jnp.promote_types(dtype, jnp.float32)
        pick, draw = jax.random.split(key)
        heard = max(1, round(density * shape[0]))
        order = jnp.argsort(jax.random.uniform(pick, shape), axis=0)
        kernel = jnp.where(order < heard, jax.random.normal(draw, shape, wide), 0)
        return (kernel * (radius / radius_of(kernel))).astype(dtype)

    return init


def _uniform(scale: float) -> Any:
    """An initializer that is uniform between plus and minus `scale`."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -scale, scale)
