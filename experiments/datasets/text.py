"""Text: symbols in sentences, each of which is one sequence that starts afresh.

| name | symbols | needs |
|---|---|---|
| `manual` | characters of the sentences of Python's own reference manual | nothing |
| `ptb` | characters of Penn Treebank, as P-TNCN's authors code them | `ptb/` |
| `ptb_words` | its 10,000 words | `ptb/` |
| `shakespeare` | characters of tiny Shakespeare | `tiny_shakespeare/` or `--download` |

`manual` is what `help()` shows, which comes with every Python: about 1,400 different sentences,
140,000 characters. It differs a little from one Python to the next, and so do numbers that are
measured on it; it is there to try things out. Sources: Marcus, Santorini and Marcinkiewicz,
"Building a large annotated corpus of English: the Penn Treebank", 1993; Mikolov et al., "Recurrent
neural network based language model", 2010, for its words and its split; Karpathy, "char-rnn", 2015,
https://github.com/karpathy/char-rnn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.datasets.files import Source, ask, locate, read

TextName = Literal["manual", "ptb", "ptb_words", "shakespeare"]
Sentences = tuple[np.ndarray, ...]

PTB = Source(
    folder="ptb",
    files=("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    what="Mikolov's Penn Treebank (its licence is the LDC's)",
)
SHAKESPEARE = Source(
    folder="tiny_shakespeare",
    files=("input.txt",),
    what="char-rnn's tiny Shakespeare",
    builder="tiny_shakespeare",
)
PTB_SYMBOLS = "#$'&*-/.1032547698<>N\\_acbedgfihkjmlonqpsrutwvyxz"
MANUAL_SYMBOLS = " abcdefghijklmnopqrstuvwxyz0123456789.,;:'\"()-"
PIECE = 100
"""Characters in a piece of Shakespeare, which has no sentences."""


class Text(NamedTuple):
    """Sentences of symbols.

    Attributes:
        name: what they are, in tables.
        symbols: what the codes stand for.
        train: the sentences to learn from, each its codes [T] int32, with two symbols at least.
        valid: others, to choose by.
        test: others, to report.
    """

    name: str
    symbols: tuple[str, ...]
    train: Sentences
    valid: Sentences
    test: Sentences


def text(
    name: TextName, data_dir: Path | None = None, *, seed: int = 0, download: bool = False
) -> Text:
    """Reads a text.

    Args:
        name: which, see the head of this module.
        data_dir: the folder of the user's data; None for that of LOCALGRAD_DATA, if there is one.
        seed: fixes the split of `manual`; the others come split.
        download: whether files that are missing may be asked of tensorflow-datasets.

    Returns:
        The text.

    Raises:
        ValueError: if there is none of this name, or a file holds a symbol that it should not.
        FileNotFoundError: if a file is missing; the message says what to put where.

    Example:
        >>> manual = text("manual")
        >>> len(manual.symbols), "".join(manual.symbols[:5])
        (46, ' abcd')
    """
    if name not in TEXTS:
        raise ValueError(f"text must be one of {', '.join(TEXTS)}; got {name!r}.")
    return TEXTS[name](data_dir, seed, download)


def _manual(data_dir: Path | None, seed: int, download: bool) -> Text:
    """Its sentences in lower case, one of each, without those that hold code; 80/10/10."""
    from pydoc_data.topics import topics  # half a megabyte

    sentence = re.compile(f"[a-z][{re.escape(MANUAL_SYMBOLS)}]{{18,398}}[.:]")
    found: dict[str, None] = {}
    for topic in sorted(topics):
        plain = topics[topic].translate(str.maketrans("‘’“”", "''\"\""))
        for paragraph in re.split(r"\n\s*\n", plain):
            whole = re.split(r"(?<=[.:?!])\s+(?=[A-Z\"])", " ".join(paragraph.split()))
            found |= dict.fromkeys(filter(sentence.fullmatch, map(str.lower, whole)))
    coded = _coded([*found], MANUAL_SYMBOLS, "Python's manual")
    order = np.random.default_rng(seed).permutation(len(coded))
    parts = np.split(order, [len(order) * 8 // 10, len(order) * 9 // 10])
    train, valid, test = (tuple(coded[i] for i in part) for part in parts)
    return Text("Python's manual", tuple(MANUAL_SYMBOLS), train, valid, test)


def _ptb(data_dir: Path | None, seed: int, download: bool) -> Text:
    """One line is one sentence, `_` is a space, and nothing marks the end."""
    train, valid, test = (
        _coded([line.replace(" ", "_") for line in lines], PTB_SYMBOLS, "Penn Treebank")
        for lines in _ptb_lines(data_dir, download)
    )
    return Text("Penn Treebank", tuple(PTB_SYMBOLS), train, valid, test)


def _ptb_words(data_dir: Path | None, seed: int, download: bool) -> Text:
    """`<eos>`, the words of a line, `<eos>`: what is predicted are the words and the end.

    As many words as is usual are then scored, one `<eos>` a line among them. But it is usual to go
    on from the last sentence, whose words here are not known.
    """
    splits = [
        [["<eos>", *line.split(), "<eos>"] for line in lines]
        for lines in _ptb_lines(data_dir, download)
    ]
    counts = Counter(word for line in splits[0] for word in line[1:])
    symbols = sorted(counts, key=lambda word: (-counts[word], word))
    train, valid, test = (_coded(lines, symbols, "Penn Treebank") for lines in splits)
    return Text("Penn Treebank, words", tuple(symbols), train, valid, test)


def _ptb_lines(data_dir: Path | None, download: bool) -> list[list[str]]:
    """The lines of each file, without spaces around them."""
    paths = locate(PTB, data_dir, download)
    assert paths is not None  # it has no builder
    files = [read(path).decode().split("\n") for path in paths]
    return [[bare for line in lines if (bare := line.strip(" "))] for lines in files]


def _shakespeare(data_dir: Path | None, seed: int, download: bool) -> Text:
    """Pieces of 100 characters, after tensorflow-datasets' split: 90/5/5 of all characters."""
    paths = locate(SHAKESPEARE, data_dir, download)
    if paths is not None:
        whole = read(paths[0]).decode()
        first = int(0.9 * len(whole))
        second = first + int(0.5 * (len(whole) - first))
        splits = [whole[:first], whole[first:second], whole[second:]]
    else:
        names = ("train", "validation", "test")
        parts = [ask(SHAKESPEARE, name)[0]["text"] for name in names]  # bytes; str where mocked
        splits = [part.decode() if isinstance(part, bytes) else str(part) for part in parts]
    symbols = sorted({*"".join(splits)})
    train, valid, test = (
        _coded(
            [split[at : at + PIECE] for at in range(0, len(split), PIECE)], symbols, "Shakespeare"
        )
        for split in splits
    )
    return Text("tiny Shakespeare", tuple(symbols), train, valid, test)


def _coded(sentences: Sequence[Sequence[str]], symbols: Sequence[str], name: str) -> Sentences:
    """Their codes, without sentences in which there is nothing to predict."""
    code: Mapping[str, int] = {symbol: k for k, symbol in enumerate(symbols)}
    try:
        return tuple(
            np.array([code[symbol] for symbol in sentence], np.int32)
            for sentence in sentences
            if len(sentence) > 1
        )
    except KeyError as error:
        raise ValueError(
            f"{name} holds {error.args[0]!r}, which is none of its {len(code)} symbols. Is it "
            "another version of the file?"
        ) from error


TEXTS: dict[TextName, Callable[[Path | None, int, bool], Text]] = {
    "manual": _manual,
    "ptb": _ptb,
    "ptb_words": _ptb_words,
    "shakespeare": _shakespeare,
}
