"""How much of everything: minutes on two cores, hours on an accelerator, or a glance."""

from __future__ import annotations

from typing import Literal, NamedTuple

SizeName = Literal["small", "full", "short"]


class Size(NamedTuple):
    """A size of the experiment.

    Attributes:
        text_units: H, of each of two layers of the P-TNCN that reads text.
        video_units: likewise, that sees videos.
        sentences: of the training text, at most; None for all.
        sequences: videos in an epoch.
        epochs: of every row.
        batch_size: B, streams.
        steps: T, of a call on text.
        pool: by which glyphs of 28 x 28 pixels are made smaller.
        tested: videos to report.
        scored: videos, or streams of text, scored at a time.
        tested_sentences: of the test text; None for all.
    """

    text_units: int
    video_units: int
    sentences: int | None
    sequences: int
    epochs: int
    batch_size: int
    steps: int
    pool: int
    tested: int
    scored: int
    tested_sentences: int | None = None


SIZES: dict[SizeName, Size] = {
    "small": Size(64, 128, 2000, 2000, 4, 50, 100, 2, 1000, 200),
    "full": Size(1000, 1000, None, 10_000, 50, 50, 100, 1, 10_000, 200),
    "short": Size(6, 6, 30, 8, 1, 4, 20, 2, 8, 4, 20),
}
