"""Which data a part takes: what the user names, or the best that is there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets import Glyphs, Video, bouncing, glyphs, of_classes
from experiments.ptncn.problems import Problem, of_video
from experiments.ptncn.sizes import Size


def pooled(given: Glyphs, by: int) -> Glyphs:
    """Glyphs whose pixels are means of squares of pixels; small ones stay as they are."""
    if given.train.shape[1] < 16 or by == 1:
        return given

    def mean(images: np.ndarray) -> np.ndarray:
        m, h, w = images.shape
        return images.reshape(m, h // by, by, w // by, by).mean(axis=(2, 4))

    return given._replace(train=mean(given.train), test=mean(given.test))


def video_of(given: Glyphs, size: Size, canvas: tuple[int, int]) -> Video:
    """Two of these glyphs, for 20 frames."""
    return bouncing(given, canvas=canvas, test_size=size.tested)


def canvas_for(given: Glyphs) -> tuple[int, int]:
    """A canvas that leaves glyphs as much room as 64 pixels leave 28."""
    h, w = given.train.shape[1:]
    return round(h * 64 / 28), round(w * 64 / 28)


def problem_of(video: Video, size: Size) -> Problem:
    """What is learned of a video."""
    return of_video(video, size.batch_size, size.sequences, size.scored, size.scored)


def load(name: Any, data_dir: Path | None, download: bool, size: Size) -> Glyphs:
    """Glyphs by name, as large as the size says."""
    return pooled(glyphs(name, data_dir, download=download), size.pool)


def halves(given: Glyphs) -> list[Glyphs]:
    """The first five classes and the others."""
    return [of_classes(given, part, _name(given, part)) for part in (range(5), range(5, 10))]


def _name(given: Glyphs, classes: Collection[int]) -> str:
    letters = "ABCDEFGHIJ" if "not" in given.name.lower() else "0123456789"
    first, last = letters[min(classes)], letters[max(classes)]
    return f"{given.name} {first}-{last}"
