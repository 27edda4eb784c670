"""Cells whose carry holds integers, flags or typed keys, with these written as floats.

No credit reaches them, but all else of a carry's leaves is differentiated, so that a counter or a
key becomes numbers that float32 holds exactly: 16 bits each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from localgrad.core.model.modules import Module, Tap
from localgrad.core.model.wrapped import Wrapped
from localgrad.core.params import Leaves

BITS = 16


@dataclasses.dataclass(frozen=True)
class Code:
    """How one leaf of a carry is written.

    Attributes:
        dtype: the leaf's, or that of the numbers in a key; empty for a floating leaf, which stays.
        key: which keys the leaf holds; empty if it holds none.
    """

    dtype: str = ""
    key: str = ""

    def write(self, leaf: jax.Array) -> jax.Array:
        """Floats [..., halves], or as many as there are flags."""
        if not self.dtype:
            return leaf
        data = jax.random.key_data(leaf) if self.key else leaf
        if self.dtype == "bool":
            return data.astype(jnp.float32)
        bits = jnp.iinfo(data.dtype).bits
        whole = jax.lax.bitcast_convert_type(data, f"uint{bits}")
        parts = [(whole >> k) & (2**BITS - 1) for k in range(0, bits, BITS)]
        return jnp.stack(parts, -1).astype(jnp.float32)

    def read(self, leaf: jax.Array) -> jax.Array:
        """The inverse of `write`, of any numbers."""
        if not self.dtype:
            return leaf
        leaf = jax.lax.stop_gradient(leaf)
        if self.dtype == "bool":
            return leaf > 0.5
        bits = jnp.iinfo(self.dtype).bits
        halves = jnp.clip(jnp.round(leaf), 0, 2**BITS - 1).astype(f"uint{bits}")
        shifts = range(0, bits, BITS)
        whole = sum((halves[..., i] << k for i, k in enumerate(shifts)), halves[..., 0] * 0)
        data = jax.lax.bitcast_convert_type(whole, self.dtype)
        return jax.random.wrap_key_data(data, impl=self.key) if self.key else data


@dataclasses.dataclass(frozen=True)
class CodedModule(Wrapped):
    """A cell as a pure function of a floating carry.

    Attributes:
        treedef: the structure of its carry.
        codes: how each leaf of it is written.
    """

    treedef: Any
    codes: tuple[Code, ...]

    def enter_carry(self, own: Any) -> Any:
        """The cell's own carry in floats."""
        leaves = self.treedef.flatten_up_to(own)
        pairs = zip(self.codes, leaves, strict=True)
        return self.treedef.unflatten([code.write(leaf) for code, leaf in pairs])

    def own_carry(self, carry: Any) -> Any:
        """The inverse of `enter_carry`."""
        leaves = self.treedef.flatten_up_to(carry)
        pairs = zip(self.codes, leaves, strict=True)
        return self.treedef.unflatten([code.read(leaf) for code, leaf in pairs])

    def apply(self, params: Leaves, *args: Any) -> Any:
        """Calls the cell."""
        carry, x = args
        new, y = self.inner.apply(params, self.own_carry(carry), x)
        return self.enter_carry(new), y

    def tapped(self, params: Leaves, tap: Tap, *args: Any) -> Any:
        """Calls the cell with `tap` supplying the drive of every synapse."""
        carry, x = args
        new, y = self.inner.tapped(params, tap, self.own_carry(carry), x)
        return self.enter_carry(new), y

    def initialize_carry(self, shape: tuple[int, ...], key: jax.Array | None = None) -> Any:
        """The initial carry for inputs of this shape, batch axis first."""
        return self.enter_carry(self.inner.initialize_carry(shape, key))


def coded(cell: Module, carry: Any) -> tuple[Any, Any]:
    """A cell and its carry, in floats."""
    leaves, treedef = jax.tree.flatten(carry)
    codes = tuple(map(_code, leaves))
    if not any(code.dtype for code in codes):
        return cell, carry
    module = CodedModule(cell, treedef, codes)
    return module, module.enter_carry(carry)


def _code(leaf: Any) -> Code:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return Code("uint32", str(jax.random.key_impl(leaf)))
    return Code("" if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.dtype(leaf.dtype).name)
