"""Data: what is read from files, what is made of it, and how it reaches a network.

`files` finds them, `glyphs`, `text` and `weather` read them, `bouncing` makes videos of glyphs and
`mackey_glass` a chaotic series, `batches` has a network predict the next frame or symbol, and
`floors` says how well one predicts without a network. The first name of each table needs no file:
scikit-learn's digits, Python's manual.
"""

from experiments.datasets.batches import (
    Codes,
    minibatches,
    next_frames,
    next_symbols,
    scored,
    streams,
    subset,
)
from experiments.datasets.bouncing import Video, bouncing
from experiments.datasets.files import root_of
from experiments.datasets.floors import (
    Score,
    SymbolFloors,
    VideoFloors,
    symbol_floors,
    video_floors,
)
from experiments.datasets.glyphs import GLYPHS, GlyphName, Glyphs, glyphs, of_classes
from experiments.datasets.mackey_glass import mackey_glass
from experiments.datasets.text import TEXTS, Text, TextName, text
from experiments.datasets.weather import Weather, scaled, weather

__all__ = [
    "Codes",
    "GLYPHS",
    "GlyphName",
    "Glyphs",
    "Score",
    "SymbolFloors",
    "TEXTS",
    "Text",
    "TextName",
    "Video",
    "VideoFloors",
    "Weather",
    "bouncing",
    "glyphs",
    "mackey_glass",
    "minibatches",
    "next_frames",
    "next_symbols",
    "of_classes",
    "root_of",
    "scaled",
    "scored",
    "streams",
    "subset",
    "symbol_floors",
    "text",
    "video_floors",
    "weather",
]
