"""Where data lie: in a folder of the user's, or with tensorflow-datasets if the user says so."""

from __future__ import annotations

import gzip
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VARIABLE = "LOCALGRAD_DATA"


class Source(NamedTuple):
    """The files of a data set.

    Attributes:
        folder: the folder of `--data-dir` that holds them.
        files: their names; each may also be there compressed, with `.gz` at the end.
        what: what they are, for who has to find them.
        builder: the name of the same data in tensorflow-datasets, or None.
    """

    folder: str
    files: tuple[str, ...]
    what: str
    builder: str | None = None


def root_of(data_dir: Path | None) -> Path | None:
    """The folder of the user's data: that one, or what LOCALGRAD_DATA names, or none."""
    return data_dir or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)


def locate(source: Source, data_dir: Path | None, download: bool) -> list[Path] | None:
    """Finds the files of a data set.

    Args:
        source: the data set.
        data_dir: the folder that holds its folder; None for what the environment variable
            LOCALGRAD_DATA names.
        download: whether tensorflow-datasets may be asked, which may reach the network.

    Returns:
        The paths, or None for "ask tensorflow-datasets".

    Raises:
        FileNotFoundError: if a file is missing and there is nobody to ask.
    """
    root = root_of(data_dir)
    missing = [*source.files]
    if root is not None:
        folder = root / source.folder
        pairs = [(folder / f"{name}.gz", folder / name) for name in source.files]
        found = [next((path for path in pair if path.is_file()), None) for pair in pairs]
        paths = [path for path in found if path is not None]
        if len(paths) == len(found):
            return paths
        missing = [name for name, path in zip(source.files, found, strict=True) if path is None]
    if download and source.builder:
        return None
    other = f"say --download to take tensorflow-datasets' {source.builder}"
    if not source.builder:
        other = "there is no other source: tensorflow-datasets, and so --download, has none"
    where = root or "DIR"
    say = "" if root else f" and say --data-dir DIR, or set {VARIABLE}=DIR"
    raise FileNotFoundError(
        f"no {', '.join(missing)} in {where}/{source.folder}. Put {source.what} there{say} (.gz or "
        f"not); or {other}."
    )


def ask(source: Source, split: str) -> Sequence[Any]:
    """A split of tensorflow-datasets, prepared first if it has to be.

    Raises:
        ValueError: if what it takes to read or prepare it is not installed.
    """
    try:
        return importlib.import_module("tensorflow_datasets").data_source(
            source.builder, split=split
        )
    except ImportError as error:
        raise ValueError(
            f"--download takes tensorflow-datasets, which lacks {error.name}: pip install "
            "'localgrad[data]', and tensorflow, without which nothing is prepared for the first "
            f"time. Or put {source.what} into a folder {source.folder} of --data-dir."
        ) from error


def read(path: Path) -> bytes:
    """What is in a file, decompressed if its name ends in .gz."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return file.read()


def read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes, MNIST's format: 0, 0, 8, rank, then the sizes, then the numbers.

    Raises:
        ValueError: if it is none.
    """
    content = read(path)
    rank = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", count=rank, offset=4) if rank else np.zeros(0, int)
    numbers = np.frombuffer(content, np.uint8, offset=min(4 + 4 * rank, len(content)))
    if not rank or numbers.size != np.prod(shape, dtype=np.int64):
        raise ValueError(
            f"{path} must be an idx file of bytes; got {len(content)} bytes that begin "
            f"{content[:4]!r} and sizes {shape.tolist()}. Fetch it again."
        )
    return numbers.reshape(shape)
