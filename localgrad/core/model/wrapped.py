"""Modules around modules: each answers for the one within what it does not change itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from localgrad.core.model.modules import Layer, Tap
from localgrad.core.params import Leaves, Path, under


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A module around another.

    Attributes:
        inner: the module within.
    """

    inner: Any

    @property
    def kind(self) -> type:
        """The class of the module within."""
        return self.inner.kind

    @property
    def name(self) -> str:
        """The class of the module within, in words."""
        return self.inner.name

    @property
    def held_statistics(self) -> bool:
        """Whether the statistics of its normalisations carry no credit."""
        return self.inner.held_statistics

    @property
    def observes(self) -> bool:
        """Whether it corrects its carry by what it is shown after a step."""
        return self.inner.observes

    def own_carry(self, carry: Any) -> Any:
        """The carry as the module within has it."""
        return carry

    def normalises(self, params: Leaves, carry: Any, x: Any) -> bool:
        """Whether it calls a normalisation; `params` are those within, and shapes suffice."""
        return self.inner.normalises(params, jax.eval_shape(self.own_carry, carry), x)

    def initialize_carry(self, shape: tuple[int, ...], key: jax.Array | None = None) -> Any:
        """The initial carry for inputs of this shape, batch axis first."""
        return self.inner.initialize_carry(shape, key)

    def apply(self, params: Leaves, *args: Any) -> Any:
        """Calls the module."""
        return self.inner.apply(params, *args)

    def tapped(self, params: Leaves, tap: Tap, *args: Any) -> Any:
        """Calls the module with `tap` supplying the drive of every synapse."""
        return self.inner.tapped(params, tap, *args)


@dataclasses.dataclass(frozen=True)
class HeldModule(Wrapped):
    """A module without memory that no derivative is taken of: credit ends there."""

    def apply(self, params: Leaves, *args: Any) -> Any:
        """Calls the module."""
        return self.inner.apply(*jax.lax.stop_gradient((params, *args)))


@dataclasses.dataclass(frozen=True)
class TiedModule(Wrapped):
    """A cell with layers whose parameters also work outside their own call, as in `Embed.attend`.

    Such a layer is no synapse: the derivatives of its parameters are those of the whole step.

    Attributes:
        tied: the paths of these layers.
    """

    tied: frozenset[Path]

    def tapped(self, params: Leaves, tap: Tap, *args: Any) -> Any:
        """Calls the module with `tap` supplying the drive of every synapse."""

        def some(layer: Layer, pre: Any) -> Any:
            own = under(params, layer.path)
            return layer.apply(own, pre) if layer.path in self.tied else tap(layer, pre)

        return self.inner.tapped(params, some, *args)
