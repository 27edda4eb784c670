"""`PTNCN`: the parallel temporal neural coding network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.linen.dtypes import promote_dtype

from localgrad.cells.layers import Layers, Several
from localgrad.cells.phases import Activation, Errors, Weights, compare, correct, drive, predict
from localgrad.core.contract.checks import number, positive_integer


class PTNCNCarry(NamedTuple):
    """What a `PTNCN` hands from step to step.

    Attributes:
        state: y, what each layer goes on from: the activity, once a frame is observed corrected.
        activity: z = f(drive), before any correction.
        drive: a, what each layer was driven by.
        prediction: p, what layers 2..L predict of layers 1..L-1, [B, H_l] each.
        output: mu [B, D], the predicted frame.
    """

    state: Layers
    activity: Layers
    drive: Layers
    prediction: Several
    output: jax.Array


class PTNCN(nn.RNNCellBase):
    r"""The parallel temporal neural coding network: layers that predict, compare and correct.

    Called on the last frame `x'`, with `y'` the last states, it predicts the next frame `mu`; once
    that frame `x` is seen, `observe` corrects the states. For layers l = 1..L, all at once::

        a_l = y'_{l-1} M_l + y'_l V_l + y'_{l+1} U_l       z_l = f(a_l)             y'_0 = x'
        mu  = g(z_1 W_1)                                   p_l = z_{l+1} W_{l+1}    l < L
        e_0 = mu - x                                       e_l = p_l - z_l          l < L
        y_l = f(a_l - beta (e_{l-1} E_l - alpha e_l + sparsity sign(a_l)))

    The top layer has no U and no alpha term. There is no bias, no derivative of f or g is ever
    taken, and no layer waits for another: the phases have an order, the layers have none. States
    that no frame corrects go on as they are, `y = z`; so under `nn.RNN` it predicts uncorrected.
    `localgrad.evaluate` predicts, observes and corrects with fixed parameters, which adapts the
    states to data the network was never trained on; `localgrad.lra` trains it. It is a model of its
    own: inside a `localgrad.Network`, whose targets are not its frames, nothing corrects it.

    Widths may differ. With `stacked=True` those of equal widths are stacked: parameters `W`, `E`,
    `M`, `V` and `U` are then [L - 1, H, H], a phase is one batched product for layers 2..L, and the
    leading axis can be laid over devices; only layer 1, which meets the frame, is apart (`W1`,
    `E1`, `M1`, `V1`).

    Args:
        features: (H_1, ..., H_L), the widths of the layers, the lowest first.
        outputs: D, the numbers of a frame.
        activation: f, any elementwise function, also sign or a step.
        output_activation: g, such as `jax.nn.softmax` for symbols, `jax.nn.sigmoid` for pictures,
            or the identity; its error is always `mu - x`.
        beta: how far the states are corrected; 0 turns the correction off.
        alpha: how much a layer's own error counts beside that of the layer below.
        sparsity: how much the correction pulls drives towards 0.
        top_down: False leaves out both U and M_2..M_L, so that the last states of a layer's
            neighbours do not drive it.
        stacked: whether the parameters and states of layers 2..L are one array.
        kernel_init: initializer of every matrix.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: if a width is no positive integer, a coefficient is negative, `stacked` meets
            unequal widths or a single layer, or a frame has not D numbers.

    Example:
        >>> import jax, jax.numpy as jnp, localgrad
        >>> model = localgrad.PTNCN((8, 6), outputs=3)
        >>> x = jnp.ones((4, 3)) / 3  # [B, D]
        >>> carry = model.initialize_carry(jax.random.key(0), x.shape)
        >>> params = model.init(jax.random.key(1), carry, x)["params"]
        >>> carry, frame = model.apply({"params": params}, carry, x)
        >>> corrected = model.apply({"params": params}, carry, x, method="observe")
        >>> frame.shape, bool((corrected.state.first == carry.state.first).all())
        ((4, 3), False)

    Reference:
        Ororbia, Mali, Giles and Kifer, "Continual learning of recurrent neural networks by locally
        aligning distributed representations", IEEE Transactions on Neural Networks and Learning
        Systems, 2020, https://doi.org/10.1109/TNNLS.2019.2953622, arXiv:1810.07411. More than two
        layers are our generalisation.
    """

    features: Sequence[int]
    outputs: int
    activation: Activation = jnp.tanh
    output_activation: Activation = jax.nn.softmax
    beta: float = 0.1
    alpha: float = 0.001
    sparsity: float = 0.0
    top_down: bool = True
    stacked: bool = False
    kernel_init: Callable[..., Any] = initializers.normal(0.05)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not isinstance(self.features, Iterable) or not tuple(self.features):
            raise ValueError(
                f"features must be a sequence of widths, one a layer; got {self.features!r}. Write "
                "features=(64,) for a single layer of 64."
            )
        self.features = tuple(positive_integer("each of features", n) for n in self.features)
        self.outputs = positive_integer("outputs", self.outputs)
        for name in ("beta", "alpha", "sparsity"):
            hint = "It is part of the model: one module for each value."
            value = number(name, getattr(self, name), "be 0 or more, and finite", hint)
            setattr(self, name, value)
        for name in ("activation", "output_activation"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"{name} must be a function of an array, such as jnp.tanh; got "
                    f"{getattr(self, name)!r}."
                )
        if self.stacked and (len(self.features) < 2 or len(set(self.features)) > 1):
            raise ValueError(
                "stacked needs two or more layers of one width; got "
                f"features={self.features}. Leave it out, or make the widths equal."
            )
        super().__post_init__()

    def setup(self) -> None:
        """Declares the parameters, those of `observe` too."""
        self.weights = self.gather(
            {
                name: self.param(name, self._initial, shape, self.param_dtype)
                for name, shape in self._shapes().items()
            }
        )

    def __call__(self, carry: PTNCNCarry, x: jax.Array) -> tuple[PTNCNCarry, jax.Array]:
        """Predicts: `(carry, the last frame [B, D]) -> (carry, the next frame [B, D])`."""
        return self.advance(self.weights, carry, x)

    def observe(self, carry: PTNCNCarry, target: jax.Array) -> PTNCNCarry:
        """Corrects: `(carry of the prediction, the frame that came [B, D]) -> carry`."""
        return self.corrected(self.weights, carry, target)[0]

    @nn.nowrap
    def advance(
        self, weights: Weights, carry: PTNCNCarry, x: jax.Array
    ) -> tuple[PTNCNCarry, jax.Array]:
        """`__call__` with given weights, for rules."""
        self._require_frame("x", x, carry)
        before = carry
        x, state, weights = self._promoted(x, carry.state, weights)
        drives = drive(weights, x, state)
        activity = jax.tree.map(self.activation, drives)
        output, prediction = predict(weights, activity, self.output_activation)
        after = PTNCNCarry(activity, activity, drives, prediction, output)
        return _as_before(after, before), output

    @nn.nowrap
    def corrected(
        self, weights: Weights, carry: PTNCNCarry, target: jax.Array
    ) -> tuple[PTNCNCarry, Errors]:
        """`observe` with given weights, for rules; also the errors."""
        self._require_frame("target", target, carry)
        target, now, weights = self._promoted(target, carry, weights)
        errors = compare(now.output, now.prediction, now.activity, target)
        if not self.beta:
            return carry._replace(state=carry.activity), errors
        f, beta, alpha = self.activation, self.beta, self.alpha
        state = correct(weights, now.drive, errors, f, beta, alpha, self.sparsity)
        return carry._replace(state=_as_before(state, carry.state)), errors

    @nn.nowrap
    def gather(self, leaves: Mapping[str, Any]) -> Weights:
        """The parameters by their role."""
        if self.stacked:
            return Weights(*map(leaves.get, Weights._fields))
        last = len(self.features)
        several = {
            kind: tuple(leaves[f"{kind}{layer}"] for layer in range(2, last + 1)) for kind in "WEV"
        }
        neighbours = {"M": range(2, last + 1), "U": range(1, last)} if self.top_down else {}
        several |= {k: tuple(leaves[f"{k}{n}"] for n in ns) for k, ns in neighbours.items()}
        firsts = {name: leaves[name] for name in ("W1", "E1", "M1", "V1")}
        return Weights(**{"M": None, "U": None} | firsts | several)

    @nn.nowrap
    def scatter(self, weights: Weights) -> dict[str, Any]:
        """By name what `gather` took by role."""
        found: dict[str, Any] = {}
        for kind, several in weights._asdict().items():
            if isinstance(several, tuple):
                start = 1 if kind == "U" else 2
                found |= {f"{kind}{start + k}": one for k, one in enumerate(several)}
            elif several is not None:
                found[kind] = several
        return found

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> PTNCNCarry:
        """Zeros: a sequence begins with no frame, no state and no prediction."""
        del rng
        batch = input_shape[:-1]
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        zeros = functools.partial(jnp.zeros, dtype=wide)
        first, *rest = self.features

        def several(widths: Sequence[int]) -> Several:
            if self.stacked:
                return zeros((*batch, len(widths), first))
            return tuple(zeros((*batch, width)) for width in widths)

        def layers() -> Layers:
            return Layers(zeros((*batch, first)), several(rest))

        output = zeros((*batch, self.outputs))
        return PTNCNCarry(layers(), layers(), layers(), several(self.features[:-1]), output)

    @property
    def num_feature_axes(self) -> int:
        """A frame has one axis."""
        return 1

    @nn.nowrap
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, [from, to]."""
        sizes, last = (self.outputs, *self.features), len(self.features)
        found: dict[str, tuple[int, ...]] = {}
        for n in range(1, last + 1):
            found |= {f"W{n}": (sizes[n], sizes[n - 1]), f"E{n}": (sizes[n - 1], sizes[n])}
            found |= {f"V{n}": (sizes[n], sizes[n])}
            if n == 1 or self.top_down:
                found |= {f"M{n}": (sizes[n - 1], sizes[n])}
            if n < last and self.top_down:
                found |= {f"U{n}": (sizes[n + 1], sizes[n])}
        if not self.stacked:
            return found
        stacks: dict[str, tuple[int, ...]] = {
            kind: (last - 1, sizes[1], sizes[1]) for kind in ("WEVMU" if self.top_down else "WEV")
        }
        return {name: found[name] for name in ("W1", "E1", "M1", "V1")} | stacks

    @nn.nowrap
    def _initial(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """A matrix drawn, or a stack of matrices, each drawn by itself."""
        if len(shape) == 2:
            return self.kernel_init(key, shape, dtype)
        keys = jax.random.split(key, shape[0])
        return jax.vmap(lambda key: self.kernel_init(key, shape[1:], dtype))(keys)

    @nn.nowrap
    def _promoted(self, *trees: Any) -> Any:
        """Trees in the dtype of the computation."""
        leaves, treedef = jax.tree.flatten(trees)
        return jax.tree.unflatten(treedef, promote_dtype(*leaves, dtype=self.dtype))

    @nn.nowrap
    def _require_frame(self, name: str, frame: Any, carry: PTNCNCarry) -> None:
        """Raises unless there is a frame of D numbers for each example of the carry."""
        shape, wanted = jnp.shape(frame), carry.output.shape
        if shape != wanted:
            raise ValueError(
                f"{name} must be a frame [B, D] of shape {wanted}, as its carry has it, with D = "
                f"outputs = {self.outputs}; got shape {shape}. A P-TNCN is fed the last "
                "frame and predicts the next one: inputs and targets have the same D numbers a "
                "step (symbols as jax.nn.one_hot)."
            )


def _as_before(new: Any, old: Any) -> Any:
    """Leaves no narrower than those they replace, so that a loop can carry them."""
    return jax.tree.map(lambda a, b: a.astype(jnp.promote_types(a.dtype, b.dtype)), new, old)
