"""Hourly weather of one station from 2010 to 2013, the file of Informer's experiments.

NOAA's local climatological data in the form of Zhou et al., "Informer: beyond efficient transformer
for long sequence time-series forecasting", 2021, https://github.com/zhouhaoyi/Informer2020, where
it is WTH.csv. It is not shipped, and there is no other source: put it into a folder.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.datasets.files import Source, locate, read

WTH = Source(
    folder="weather_wth",
    files=("WTH.csv",),
    what="the WTH.csv of Informer's data (hourly weather 2010-2013)",
)
TARGET = "DryBulbFarenheit"  # so it is spelt there


class Weather(NamedTuple):
    """A table of numbers in time.

    Attributes:
        columns: D names.
        values: [rows, D], an hour a row.
    """

    columns: tuple[str, ...]
    values: np.ndarray

    @property
    def target(self) -> int:
        """The column of the temperature."""
        return self.columns.index(TARGET)


def weather(data_dir: Path | None = None) -> Weather:
    """Reads the file; the columns in degrees Celsius, which say the same again, are left out.

    Args:
        data_dir: the folder of the user's data; None for that of LOCALGRAD_DATA, if there is one.

    Raises:
        FileNotFoundError: if it is missing; the message says what to put where.
        ValueError: if it has no such columns, or holds what is no number.
    """
    paths = locate(WTH, data_dir, False)
    assert paths is not None  # it has no builder
    header, *rows = csv.reader(read(paths[0]).decode().splitlines())
    kept = [k for k, name in enumerate(header) if name != "date" and "Celsius" not in name]
    columns = tuple(header[k] for k in kept)
    if TARGET not in columns:
        raise ValueError(f"{paths[0]} must have a column {TARGET}; got {', '.join(header)}.")
    return Weather(columns, np.array([[float(row[k]) for k in kept] for row in rows]))


def scaled(values: np.ndarray, training: int) -> np.ndarray:
    """Each column from 0 to 1 over its first rows, those of training; later ones may lie outside.

    Args:
        values: [rows, D].
        training: how many rows say what 0 and 1 are.
    """
    low, high = values[:training].min(axis=0), values[:training].max(axis=0)
    return (values - low) / np.where(high > low, high - low, 1)
