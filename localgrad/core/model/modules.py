"""Flax modules as pure functions whose synapses can be tapped: one adapter each for Linen and NNX.

A *synapse* is a linear Flax layer. Its `pre` is what the layer receives, its *drive* what it emits.
`tapped` runs a module and lets `tap(layer, pre)` supply the drive of every synapse it calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.extend import core as jex

from localgrad.core.model.constants import Constants, LinenModel, held_by, require_unchanged
from localgrad.core.model.decorrelation import Decorrelation
from localgrad.core.model.statistics import LINEN_NORMS, NNX_NORMS, hold, holding
from localgrad.core.params import Leaves, Path, flatten

LINEN_SYNAPSES = (
    nn.Dense,
    nn.DenseGeneral,
    nn.Einsum,
    nn.Conv,
    nn.ConvTranspose,
    nn.Embed,
    Decorrelation,
)
NNX_SYNAPSES = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.Embed)


class Layer(NamedTuple):
    """A synapse met while a module runs.

    Attributes:
        path: where its parameters lie in the module's.
        kind: the name of its class, such as `'Dense'`.
        apply: the layer's own call as a pure function `(leaves of the layer, pre) -> drive`.
    """

    path: Path
    kind: str
    apply: Callable[[Leaves, Any], Any]


Tap = Callable[[Layer, Any], Any]


def _followed(name: str, tap: Tap) -> Tap:
    """A tap that refuses layers called inside a transformation that the step makes.

    What they receive there must not leave it, and `jax.vmap` may show one example or one of many
    kernels, as if that were all.

    Args:
        name: the module's class.
        tap: to be called where nothing has been transformed since now.

    Returns:
        The tap.
    """
    outside = jex.get_opaque_trace_state()

    def followed(layer: Layer, pre: Any) -> Any:
        if jex.get_opaque_trace_state() != outside:
            raise ValueError(
                f"{name} calls layer {'/'.join(layer.path)} inside a transformation or a loop, "
                "such as jax.vmap, jax.checkpoint, nnx.remat or lax.while_loop, where it cannot be "
                "followed. Call it outside of that."
            )
        return tap(layer, pre)

    return followed


def traced_once(call: Callable[..., Any], module: Any, *args: Any) -> Any:
    """`call(module, *args)`, from its jaxpr where it was traced with such arguments before.

    A rule calls a module many times over, and each time Flax would run all its Python.
    """
    try:
        hash(module)
    except TypeError:
        return call(module, *args)
    return _inlined(call, module, *args)


# In the jaxpr of whoever calls, where wirings are read; newer JAX asks when to inline.
_EARLY = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


@functools.partial(jax.jit, static_argnums=(0, 1), inline=_EARLY)
def _inlined(call: Callable[..., Any], module: Any, *args: Any) -> Any:
    return call(module, *args)


@dataclasses.dataclass(frozen=True)
class LinenModule:
    """A Linen module as a pure function of flat parameters.

    Attributes:
        module: the module.
        constants: its collections beside `params`, or None for none.
        held_statistics: whether the statistics of its normalisations carry no credit.
    """

    module: nn.Module
    constants: Constants | None = None
    held_statistics: bool = False

    @property
    def kind(self) -> type:
        """The class of the wrapped module."""
        return type(self.module)

    @property
    def name(self) -> str:
        """The class of the wrapped module, in words."""
        return self.kind.__name__

    def apply(self, params: Leaves, *args: Any) -> Any:
        """Calls the module."""
        return traced_once(LinenModule._call, self, params, *args)

    def _call(self, params: Leaves, *args: Any) -> Any:
        with holding() if self.held_statistics else contextlib.nullcontext():
            return self.module.apply(self._variables(params), *args)

    def _variables(self, params: Leaves) -> dict[str, Any]:
        fixed = {} if self.constants is None else self.constants.state()
        return {"params": unflatten_dict(params), **fixed}

    def normalises(self, params: Leaves, *args: Any) -> bool:
        """Whether it calls a normalisation; shapes suffice."""
        met = set()

        def intercept(next_fun, call_args, call_kwargs, context):
            met.add(type(context.module))
            return next_fun(*call_args, **call_kwargs)

        with nn.intercept_methods(intercept):
            jax.eval_shape(self._call, params, *args)
        return not met.isdisjoint(LINEN_NORMS)

    def tapped(self, params: Leaves, tap: Tap, *args: Any) -> Any:
        """Calls the module with `tap` supplying the drive of every synapse.

        A layer inside a lifted transform (`nn.jit`, `nn.remat`, `nn.WeightNorm`) is not tapped: it
        is called with parameters, and on values, that are not ours to see (`virtual.py` sees them).
        """
        inside, root, tap = False, None, _followed(self.name, tap)

        def intercept(next_fun, call_args, call_kwargs, context):
            nonlocal inside, root
            layer = context.module
            root = root or layer.scope.root
            plain = layer.scope.root is root and context.method_name == "__call__"
            if inside or type(layer) not in LINEN_SYNAPSES or not plain:
                return next_fun(*call_args, **call_kwargs)
            inside = True
            try:
                return tap(_linen_layer(layer), _only(layer, call_args, call_kwargs))
            finally:
                inside = False

        with nn.intercept_methods(intercept):
            return self._call(params, *args)

    def initialize_carry(self, shape: tuple[int, ...], key: jax.Array | None = None) -> Any:
        """The initial carry for inputs of this shape, batch axis first."""
        return self.module.initialize_carry(jax.random.key(0) if key is None else key, shape)

    @property
    def observes(self) -> bool:
        """Whether it corrects its carry by what it is shown after a step."""
        return hasattr(self.module, "observe")

    def observe(self, params: Leaves, carry: Any, target: Any) -> Any:
        """The carry, corrected by the target of the step that it leaves."""
        return self.module.apply(self._variables(params), carry, target, method="observe")


def _only(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The one argument of a layer's call, given by position or by name."""
    given = [*args, *kwargs.values()]
    if len(given) != 1:
        raise ValueError(
            f"layer {type(layer).__name__} is called with {len(given)} arguments; a synapse takes "
            "what it receives and nothing else. Give the rest when you make the layer."
        )
    return given[0]


def _linen_layer(layer: nn.Module) -> Layer:
    free = layer.clone(parent=None, name=None)
    return Layer(
        layer.path,
        type(layer).__name__,
        lambda leaves, pre: traced_once(_call_layer, free, leaves, pre),
    )


def _call_layer(layer: nn.Module, leaves: Leaves, pre: Any) -> Any:
    return layer.apply({"params": unflatten_dict(leaves)}, pre)


@dataclasses.dataclass(frozen=True)
class NNXModule:
    """An NNX module as a pure function of flat parameters; made by `localgrad.from_nnx`."""

    graphdef: Any
    treedef: Any
    paths: tuple[Path, ...]
    constants: Constants
    name: str
    held_statistics: bool = False

    @property
    def kind(self) -> type:
        """The class of the wrapped module."""
        return type(self._blank())

    def merge(self, params: Leaves) -> Any:
        """A fresh copy of the module that holds these parameters."""
        state = jax.tree.unflatten(self.treedef, [params[path] for path in self.paths])
        module = nnx.merge(self.graphdef, state, self.constants.state())
        if self.held_statistics:
            hold(module)
        return module

    def normalises(self, params: Leaves, *args: Any) -> bool:
        """Whether it holds a normalisation."""
        del params, args
        return any(isinstance(layer, NNX_NORMS) for _, layer in nnx.iter_modules(self._blank()))

    def apply(self, params: Leaves, *args: Any) -> Any:
        """Calls the module; raises if that changes what the module holds."""
        module = self.merge(params)
        found = module(*args)
        require_unchanged(self.name, self.merge(params), held_by(module), lambda m: m(*args))
        return found

    def tapped(self, params: Leaves, tap: Tap, *args: Any) -> Any:
        """Calls the module with `tap` supplying the drive of every synapse."""
        module, tap = self.merge(params), _followed(self.name, tap)
        for path, layer in list(nnx.iter_modules(module)):
            if type(layer) in NNX_SYNAPSES and _learns_all(layer):
                handle = _nnx_layer(tuple(str(key) for key in path), layer)

                def respond(self, *args, handle=handle, **kwargs):
                    return tap(handle, _only(self, args, kwargs))

                kind = type(layer)
                object.__setattr__(
                    layer, "__class__", type(kind.__name__, (kind,), {"__call__": respond})
                )
        return module(*args)

    def initialize_carry(self, shape: tuple[int, ...], key: jax.Array | None = None) -> Any:
        """The initial carry for inputs of this shape, batch axis first."""
        rngs = nnx.Rngs(jax.random.key(0) if key is None else key)
        return self._blank().initialize_carry(shape, rngs)

    @property
    def observes(self) -> bool:
        """Whether it corrects its carry by what it is shown after a step."""
        return hasattr(self._blank(), "observe")

    def observe(self, params: Leaves, carry: Any, target: Any) -> Any:
        """The carry, corrected by the target of the step that it leaves."""
        return self.merge(params).observe(carry, target)

    def _blank(self) -> Any:
        """The module without parameters, on which neither its carry nor its methods depend."""
        blank: Any = dict.fromkeys(self.paths)
        return self.merge(blank)


def _learns_all(layer: nnx.Module) -> bool:
    """Whether a layer holds parameters only; one with a fixed kernel is no synapse."""
    return not jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))


def _nnx_layer(path: Path, layer: nnx.Module) -> Layer:
    graphdef, state = nnx.split(layer)
    _, restore = flatten(state)

    def apply(leaves: Leaves, pre: Any) -> Any:
        return nnx.merge(graphdef, restore(leaves))(pre)

    return Layer(path, type(layer).__name__, apply)


def split(module: nnx.Module) -> tuple[NNXModule, nnx.State]:
    """An NNX module as a pure function, and its parameters; all else that it holds is constant."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: leaf, params)  # variables that are not the module's own
    leaves, _ = flatten(params)
    name = type(module).__name__
    constants = Constants(rest, name)
    return NNXModule(graphdef, jax.tree.structure(params), tuple(leaves), constants, name), params


Module = LinenModule | NNXModule


def require_cell(module: Any) -> None:
    """Raises for a module without a carry."""
    if not hasattr(module, "initialize_carry"):
        raise ValueError(
            f"{type(module).__name__} is no recurrent cell: it has no initialize_carry. Pass the "
            "cell itself, without nn.RNN or nnx.RNN around it; layers without a carry go into "
            "localgrad.Network (NNX: localgrad.NNXNetwork) as encoder or readout."
        )


def as_module(model: Any) -> Module:
    """The adapter of a model; raises for what is neither a Linen module nor from `from_nnx`."""
    if isinstance(model, NNXModule):
        return model
    if isinstance(model, LinenModel):
        return LinenModule(model.module, model.constants)
    if isinstance(model, nn.Module):
        require_cell(model)
        return LinenModule(model)
    if isinstance(model, nnx.Module):
        raise ValueError(
            f"model is the NNX module {type(model).__name__}; pass it through "
            "`model, params = localgrad.from_nnx(module)` first."
        )
    raise ValueError(
        f"model must be a Flax cell (linen, or NNX through localgrad.from_nnx); got {model!r}."
    )


def impure(error: Exception, name: str) -> ValueError | None:
    """A clear error for a module that needs mutable state or randomness in its step, or None."""
    if isinstance(error, flax.errors.ScopeParamNotFoundError):
        return ValueError(
            f"params do not fit {name}: {error} Pass the variables' 'params' entry, as in "
            "`params = model.init(key, carry, x)['params']`."
        )
    if isinstance(error, flax.errors.ScopeParamShapeError):
        return ValueError(
            f"params do not fit {name} and what it is fed: {error} Check the last axis of "
            "batch.inputs (or of example), and that the params are this model's."
        )
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return ValueError(
            f"{name} keeps a value of a transformation inside its step, such as jax.jit or "
            "jax.vmap, beyond it. Return what is needed outside."
        )
    if isinstance(error, flax.errors.FlaxError):
        return ValueError(
            f"{name} cannot be run as a pure function of its parameters: {error} Collections that "
            "no step changes come along by localgrad.from_linen(module, variables); let BatchNorm "
            "use_running_average, make Dropout deterministic."
        )
    return None
