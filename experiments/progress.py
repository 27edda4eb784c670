"""Progress: a bar in a terminal; in a log, where it would fill a file, a line a minute."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

EVERY = 60.0
"""Seconds between two lines of a log."""


class Lines(tqdm):
    """A bar that writes whole lines, one below the other."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], object]:
        """Prints a line in place of the one before."""

        def show(line: str) -> None:
            if line:
                print(line, file=file, flush=True)

        return show

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """Waits for the next line."""
        del refresh
        super().set_description(desc, refresh=False)


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    unit: str,
    total: int | None = None,
    desc: str | None = None,
    file: TextIO | None = None,
) -> tqdm:
    """A bar over something, or one that is moved by hand.

    Args:
        iterable: what to go through; None for `bar.update()`.
        unit: what is counted.
        total: how many there are, if the iterable does not say.
        desc: what stands before the bar.
        file: where it is shown; None: standard error.

    Returns:
        The bar, also a context manager.

    Example:
        >>> import io
        >>> log = io.StringIO()
        >>> [each for each in progress(range(1000), unit="row", file=log)][-1]
        999
        >>> len(log.getvalue().splitlines())
        2
    """
    file = sys.stderr if file is None else file
    options: dict[str, Any] = {"total": total, "unit": unit, "desc": desc, "file": file}
    if file.isatty():
        return tqdm(iterable, smoothing=0.05, **options)
    return Lines(iterable, mininterval=EVERY, miniters=1, ncols=80, ascii=True, **options)
