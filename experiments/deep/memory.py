"""How the traces grow: what a stream carries and BPTT keeps, by width and depth, in bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import localgrad
from experiments.deep.stacks import LOSS, STACKS, StackName

WIDTHS = (32, 128, 512)
DEPTHS = (1, 2, 4, 8)
STEPS = 1000  # of BPTT's tape
ANYTHING = 2**60


class Size(NamedTuple):
    """Bytes for one stream of one network of float32.

    Attributes:
        width: N, units a layer and inputs.
        depth: L.
        eprop: eligibilities of `eprop`.
        deep_eprop: those of `deep_eprop`.
        rtrl: the influence of `rtrl`.
        tape: what BPTT keeps of 1000 steps, at least: each layer's carry and output.
    """

    width: int
    depth: int
    eprop: int
    deep_eprop: int
    rtrl: int
    tape: int


def sizes(name: StackName, widths: tuple[int, ...] = WIDTHS) -> list[Size]:
    """What a kind of stack takes, by width and depth; nothing is allocated."""
    return [size(name, width, depth) for width in widths for depth in DEPTHS]


def size(name: StackName, width: int, depth: int) -> Size:
    """What one network takes."""
    model = STACKS[name].make(depth, width)
    x = jnp.zeros((1, width))
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    params = jax.eval_shape(model.init, jax.random.key(0), carry, x)["params"]
    rules = {
        "eprop": localgrad.eprop(model, LOSS, batch_size=1),
        "deep_eprop": localgrad.deep_eprop(model, LOSS, batch_size=1, max_influence_bytes=ANYTHING),
        "rtrl": localgrad.rtrl(model, LOSS, batch_size=1, max_influence_bytes=ANYTHING),
    }
    held = {name: bytes_of(beside_carry(rule, params)) for name, rule in rules.items()}
    return Size(width, depth, **held, tape=STEPS * (bytes_of(carry) + 4 * width * depth))


def beside_carry(rule: Any, params: Any) -> Any:
    """The shapes of a stream's state, without the model's carry."""
    state = jax.eval_shape(rule.init, params)
    return state._replace(carry=None, initial_carry=None, loss=None)


def bytes_of(tree: Any) -> int:
    """Bytes of arrays or their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
