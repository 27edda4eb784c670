"""Bouncing glyphs: videos of glyphs that fly straight on and bounce off the edges.

Srivastava, Mansimov and Salakhutdinov, "Unsupervised learning of video representations using
LSTMs", 2015, https://arxiv.org/abs/1502.04681: two MNIST digits on 64 x 64 pixels for 20 frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.datasets.glyphs import Glyphs


class Video(NamedTuple):
    """A source of videos. Letters: F frames, H rows, W columns.

    Attributes:
        name: what is seen, in tables.
        shape: (F, H, W).
        sample: `(key, batch_size) -> [B, F, H, W]` in [0, 1], of training glyphs; a pure function.
        test: videos of test glyphs, [M, F, H, W].
    """

    name: str
    shape: tuple[int, int, int]
    sample: Callable[[jax.Array, int], jax.Array]
    test: jax.Array


def bouncing(
    glyphs: Glyphs,
    seed: int = 0,
    *,
    count: int = 2,
    frames: int = 20,
    canvas: tuple[int, int] = (64, 64),
    speed: float = 0.1,
    test_size: int = 200,
) -> Video:
    """Makes videos of glyphs.

    Each glyph starts anywhere within the canvas, in any direction, both uniform. Before each frame,
    also the first, it goes `speed` of the way that it is free to go, height less its own height
    downwards and width less its own width sideways; where that leads out of the canvas it stops
    short at the edge and turns back. It is drawn at whole pixels, towards 0. Where glyphs overlap
    the brighter pixel is seen.

    Args:
        glyphs: what is seen.
        seed: fixes the test videos.
        count: K, how many glyphs there are in a video.
        frames: F.
        canvas: (H, W).
        speed: of the free way in one frame, between 0 and 1.
        test_size: M, the number of test videos, which are held in memory.

    Returns:
        The videos.

    Raises:
        ValueError: if an argument is out of its range, or the canvas smaller than a glyph.

    Example:
        >>> from experiments.datasets import glyphs
        >>> video = bouncing(glyphs("digits"), canvas=(16, 16))
        >>> video.sample(jax.random.key(0), 3).shape
        (3, 20, 16, 16)
    """
    for name, value in (("count", count), ("frames", frames), ("test_size", test_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    if not 0 <= speed <= 1:
        raise ValueError(f"speed must lie between 0 and 1; got {speed}.")
    size = glyphs.train.shape[1:]
    if any(c < g for c, g in zip(canvas, size, strict=True)):
        raise ValueError(f"canvas must hold a glyph of {size} pixels; got {canvas}.")
    make = partial(film, count=count, frames=frames, canvas=canvas, speed=speed)
    train = jnp.asarray(glyphs.train)
    # Training keys come from `jax.random.key` of other seeds; folding keeps the streams apart.
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)
    return Video(
        name=f"{count} bouncing {glyphs.name}",
        shape=(frames, *canvas),
        sample=lambda key, batch_size: make(key, train, batch_size),
        test=make(key, jnp.asarray(glyphs.test), test_size),
    )


@partial(jax.jit, static_argnames=("batch_size", "count", "frames", "canvas", "speed"))
def film(
    key: jax.Array,
    images: jax.Array,
    batch_size: int,
    *,
    count: int,
    frames: int,
    canvas: tuple[int, int],
    speed: float,
) -> jax.Array:
    """Draws glyphs, starts and angles, and films them; see `bouncing`.

    Args:
        key: a random key.
        images: [M, h, w].
        batch_size: B.
        count: K.
        frames: F.
        canvas: (H, W).
        speed: of the free way in one frame.

    Returns:
        [B, F, H, W] in the dtype of the images.
    """
    which_key, start_key, angle_key = jax.random.split(key, 3)
    shape = (batch_size, count)
    which = jax.random.randint(which_key, shape, 0, len(images))
    start = jax.random.uniform(start_key, (*shape, 2))
    angle = jax.random.uniform(angle_key, shape, maxval=2 * math.pi)
    free = jnp.asarray([c - g for c, g in zip(canvas, images.shape[1:], strict=True)])
    way = trajectory(start, angle, frames, speed)
    corners = (way * jnp.broadcast_to(free, way.shape)).astype(jnp.int32)
    one = jax.vmap(partial(overlaid, canvas=canvas), (None, 0))  # over frames
    return jax.vmap(one)(images[which], jnp.moveaxis(corners, 0, 1))


def trajectory(start: jax.Array, angle: jax.Array, frames: int, speed: float) -> jax.Array:
    """Where glyphs are, in each direction from 0 at one edge to 1 at the other.

    Args:
        start: [..., 2], down and right, before the first frame.
        angle: [...] of the velocity: its sine goes down, its cosine right.
        frames: F.
        speed: what is gone in one frame.

    Returns:
        [F, ..., 2].
    """

    def step(so_far: tuple[jax.Array, jax.Array], _: None) -> tuple:
        place, velocity = so_far
        place = place + velocity
        velocity = jnp.where((place <= 0) | (place >= 1), -velocity, velocity)
        place = jnp.clip(place, 0, 1)
        return (place, velocity), place

    velocity = speed * jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jax.lax.scan(step, (start, velocity), length=frames)[1]


def overlaid(images: jax.Array, corners: jax.Array, canvas: tuple[int, int]) -> jax.Array:
    """One frame.

    Args:
        images: [K, h, w].
        corners: [K, 2], the row and column of each one's first pixel.
        canvas: (H, W).

    Returns:
        [H, W], dark where there is no glyph.
    """
    blank = jnp.zeros(canvas, images.dtype)
    put = jax.vmap(lambda image, corner: jax.lax.dynamic_update_slice(blank, image, corner))
    return put(images, corners).max(axis=0)
