"""Glyphs: small grey pictures of digits and letters, for training and for testing.

| name | glyphs | needs |
|---|---|---|
| `digits` | 1797 digits, 8 x 8, that come with scikit-learn | nothing |
| `digits_0_4`, `digits_5_9` | of five classes each, to train on some and try the others | nothing |
| `mnist` | 70000 digits, 28 x 28 | `mnist/` or `--download` |
| `notmnist` | 9803 letters A to J, 28 x 28 | `notmnist/` |

Sources: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
https://doi.org/10.24432/C50P49. LeCun, Cortes and Burges, "The MNIST database of handwritten
digits", 1998. Bulatov, "notMNIST dataset", 2011.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from experiments.datasets.files import Source, ask, locate, read_idx

GlyphName = Literal["digits", "digits_0_4", "digits_5_9", "mnist", "notmnist"]
TEST_SHARE = 0.2

MNIST = Source(
    folder="mnist",
    files=(
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ),
    what="the four idx files of MNIST",
    builder="mnist",
)
NOTMNIST = Source(
    folder="notmnist",
    files=("notmnist_10k.npz",),
    what="an npz of notMNIST's small set, images [M, 28, 28] uint8 and labels [M] 0 to 9,",
)


class Glyphs(NamedTuple):
    """Pictures of one size.

    Attributes:
        name: what they are, in tables.
        train: [M, h, w] float32 in [0, 1].
        test: others, [M', h, w].
        train_labels: their classes, [M] int32.
        test_labels: likewise, [M'].
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray


def glyphs(
    name: GlyphName, data_dir: Path | None = None, *, seed: int = 0, download: bool = False
) -> Glyphs:
    """Reads glyphs.

    Args:
        name: which, see the head of this module.
        data_dir: the folder of the user's data; None for that of LOCALGRAD_DATA, if there is one.
        seed: fixes which are held out, where the source does not say.
        download: whether files that are missing may be asked of tensorflow-datasets.

    Returns:
        The glyphs.

    Raises:
        ValueError: if there are none of this name.
        FileNotFoundError: if a file is missing; the message says what to put where.

    Example:
        >>> glyphs("digits").train.shape
        (1438, 8, 8)
    """
    if name not in GLYPHS:
        raise ValueError(f"glyphs must be one of {', '.join(GLYPHS)}; got {name!r}.")
    return GLYPHS[name](data_dir, seed, download)


def of_classes(given: Glyphs, classes: Collection[int], name: str) -> Glyphs:
    """The glyphs of some classes.

    Args:
        given: glyphs.
        classes: which classes to keep.
        name: what to call them.

    Returns:
        Those, with the labels they had.

    Raises:
        ValueError: if none are left to train or to test on.

    Example:
        >>> sorted({*of_classes(glyphs("digits"), (2, 3), "2 and 3").test_labels.tolist()})
        [2, 3]
    """
    train, test = (
        np.isin(labels, list(classes)) for labels in (given.train_labels, given.test_labels)
    )
    if not train.any() or not test.any():
        raise ValueError(f"classes must name some of {given.name}'s; got {list(classes)}.")
    return Glyphs(
        name,
        given.train[train],
        given.test[test],
        given.train_labels[train],
        given.test_labels[test],
    )


def _digits(data_dir: Path | None, seed: int, download: bool) -> Glyphs:
    """scikit-learn's, 0..16."""
    data = load_digits()
    return _split("digits", data.images / 16, data.target, seed)


def _some_digits(classes: range, data_dir: Path | None, seed: int, download: bool) -> Glyphs:
    """Those of some classes."""
    whole = _digits(data_dir, seed, download)
    return of_classes(whole, classes, f"digits {classes[0]} to {classes[-1]}")


def _mnist(data_dir: Path | None, seed: int, download: bool) -> Glyphs:
    """MNIST, which comes split."""
    paths = locate(MNIST, data_dir, download)
    if paths is not None:
        train, train_labels, test, test_labels = map(read_idx, paths)
    else:
        (train, train_labels), (test, test_labels) = (
            (
                np.stack([item["image"][..., 0] for item in items]),
                np.array([item["label"] for item in items]),
            )
            for items in (ask(MNIST, "train"), ask(MNIST, "test"))
        )
    return Glyphs(
        "MNIST",
        _unit(train / np.float32(255)),
        _unit(test / np.float32(255)),
        train_labels.astype(np.int32),
        test_labels.astype(np.int32),
    )


def _notmnist(data_dir: Path | None, seed: int, download: bool) -> Glyphs:
    """notMNIST without its blank pictures, and with one of each that it holds several times."""
    paths = locate(NOTMNIST, data_dir, download)
    assert paths is not None  # it has no builder
    with np.load(paths[0]) as content:
        images, labels = content["images"], content["labels"]
    flat = images.reshape(len(images), -1)
    varied = np.flatnonzero(flat.min(axis=1) != flat.max(axis=1))
    _, first = np.unique(flat[varied], axis=0, return_index=True)
    kept = varied[np.sort(first)]
    return _split("notMNIST", images[kept] / np.float32(255), labels[kept], seed)


def _split(name: str, images: np.ndarray, labels: np.ndarray, seed: int) -> Glyphs:
    """Holds some out."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = round(TEST_SHARE * len(order))
    train, test = order[held_out:], order[:held_out]
    images, labels = _unit(images), labels.astype(np.int32)
    return Glyphs(name, images[train], images[test], labels[train], labels[test])


def _unit(images: np.ndarray) -> np.ndarray:
    """As float32, once it is certain that they lie in [0, 1]."""
    if images.ndim != 3 or not (0 <= images.min() and images.max() <= 1):
        raise ValueError(
            f"glyphs must be [M, h, w] in [0, 1]; got shape {images.shape}, values from "
            f"{images.min()} to {images.max()}."
        )
    return images.astype(np.float32)


GLYPHS: dict[GlyphName, Callable[[Path | None, int, bool], Glyphs]] = {
    "digits": _digits,
    "digits_0_4": partial(_some_digits, range(5)),
    "digits_5_9": partial(_some_digits, range(5, 10)),
    "mnist": _mnist,
    "notmnist": _notmnist,
}
