"""Data: what is read from files, what is made of it, and how it reaches a network.

`files` finds them, `glyphs` and `text` read them, `bouncing` makes videos of glyphs, `batches` has
a network predict the next frame or symbol, and `floors` says how well one predicts without a
network. The first name of each table needs no file: scikit-learn's digits, Python's manual.
"""

from experiments.datasets.batches import (
    batches,
    next_frames,
    next_symbols,
    scored,
    subset,
    widths,
)
from experiments.datasets.bouncing import Video, bouncing
from experiments.datasets.floors import (
    Score,
    SymbolFloors,
    VideoFloors,
    symbol_floors,
    video_floors,
)
from experiments.datasets.glyphs import GLYPHS, GlyphName, Glyphs, glyphs, of_classes
from experiments.datasets.text import TEXTS, Text, TextName, text

__all__ = [
    "GLYPHS",
    "TEXTS",
    "GlyphName",
    "Glyphs",
    "Score",
    "SymbolFloors",
    "Text",
    "TextName",
    "Video",
    "VideoFloors",
    "batches",
    "bouncing",
    "glyphs",
    "next_frames",
    "next_symbols",
    "of_classes",
    "scored",
    "subset",
    "symbol_floors",
    "text",
    "video_floors",
    "widths",
]
