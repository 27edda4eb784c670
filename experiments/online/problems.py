"""What is learned: endless streams, a call of T steps at a time, in B of them side by side.

| name | input | asked for | of the past it takes |
|---|---|---|---|
| `copy` | bits, a pause that grows while they are recalled | the bits | the pause and the bits |
| `xor` | bits, of which two are marked | whether those two differ, at the end | 19 steps |
| `coin` | a coin at each step | another one, whose chances two earlier ones set | eight steps |
| `mackey_glass` | a chaotic series | its next value | a few tens of steps |
| `text` | characters | the next one | some words |

The first three are of one shape: bits are -1 or 1 on the first channel, the second marks those
that count, the third asks; targets are chances of the two answers. Episodes begin by a reset; the
other streams go on. The coins are those of Pitis ("Recurrent neural networks in TensorFlow", 2016),
whose floors are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.datasets import (
    Codes,
    mackey_glass,
    next_symbols,
    root_of,
    scored,
    streams,
    symbol_floors,
)
from experiments.datasets import text as read
from experiments.perturbation.windows import Series, Window, guess_floor, linear_floor, tiled
from localgrad import Batch

STEPS, STREAMS = 40, 4  # T and B
LENGTH, LONGEST = 4, STEPS - 8  # bits to be copied, and the longest pause
TESTED = (2, 4, 8, 16, 32)  # pauses of the test
GROWTH, LEARNED = 1.2, 0.1  # of the pause, once the loss of a segment is below this
PERIOD, GAP = 10, 4  # of an episode of `xor`, and between its bits
FIRST, SECOND = 3, 8  # lags of the coins
WINDOW = Window(steps=60, washout=20)
SENTENCES = 60  # of the test
Score = Callable[[jax.Array, Batch], jax.Array]


class Problem(NamedTuple):
    """A stream, with what learning on it is judged by.

    Attributes:
        name: of the problem.
        title: in tables and figures.
        outputs: O.
        loss: of a step.
        begin: `key -> stream`, the state of B fresh streams.
        draw: `(stream, key, pause) -> (stream, Batch)`, the next call of them.
        valid: what learning rates are chosen by.
        test: what is reported.
        also: what else is reported of the test: its heading, and `(outputs, batch) -> scalar`.
        floors: what predictions without a network score on `test`.
        grows: whether the pause grows.
        scale: from the loss to what is reported.
        digits: of that in tables.
        also_digits: of what else is.
    """

    name: str
    title: str
    outputs: int
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    begin: Callable[[jax.Array], Any]
    draw: Callable[[Any, jax.Array, jax.Array], tuple[Any, Batch]]
    valid: Batch
    test: Batch
    also: tuple[str, Score]
    floors: dict[str, float]
    grows: bool = False
    scale: float = 1.0
    digits: int = 3
    also_digits: int = 1


def copy(seed: int) -> Problem:
    """Bits to be remembered over a pause, which grows while that succeeds."""

    def held_out(number: int) -> Batch:
        drawn = [copied(_key(seed, 10 * number + k), 64, d) for k, d in enumerate(TESTED)]
        return jax.tree.map(lambda *a: jnp.concatenate(a), *drawn)

    def draw(stream: Any, key: jax.Array, longest: jax.Array) -> tuple[Any, Batch]:
        pause_key, key = jax.random.split(key)
        return stream, copied(key, STREAMS, jax.random.randint(pause_key, (), 1, longest + 1))

    return Problem(
        name="copy",
        title=f"copy: {LENGTH} bits, a pause that grows; tested at {', '.join(map(str, TESTED))}",
        outputs=2,
        loss=optax.softmax_cross_entropy,
        begin=_stateless,
        draw=draw,
        valid=held_out(1),
        test=held_out(2),
        also=("wrong %", wrong),
        floors={"chance": math.log(2)},
        grows=True,
        digits=4,
    )


def copied(key: jax.Array, size: int, pause: Any) -> Batch:
    """Episodes end to end: bits, a pause, the bits asked for; the last is cut."""
    period = 2 * LENGTH + pause
    episode, at = jnp.divmod(jnp.arange(STEPS), period)
    drawn = jax.random.bernoulli(key, shape=(size, STEPS, LENGTH))
    shown, asked = at < LENGTH, at >= period - LENGTH
    which = jnp.where(shown, at, at - period + LENGTH) % LENGTH
    seen = drawn[:, episode, which]
    return bits(seen, shown, shown, asked, seen, at == 0)


def xor(seed: int) -> Problem:
    """Two bits, and at the end of an episode whether they differ."""
    at = jnp.arange(STEPS) % PERIOD
    episode = jnp.arange(STEPS) // PERIOD

    def sample(key: jax.Array, size: int) -> Batch:
        seen = jax.random.bernoulli(key, shape=(size, STEPS))
        answer = seen[:, episode * PERIOD] ^ seen[:, episode * PERIOD + GAP]
        marked, asked = (at == 0) | (at == GAP), at == PERIOD - 1
        return bits(seen, at < PERIOD - 1, marked, asked, answer, at == 0)

    return Problem(
        name="xor",
        title=f"delayed XOR: of two bits among others, after {PERIOD - 1} steps",
        outputs=2,
        loss=optax.softmax_cross_entropy,
        begin=_stateless,
        draw=lambda stream, key, pause: (stream, sample(key, STREAMS)),
        valid=sample(_key(seed, 1), 256),
        test=sample(_key(seed, 2), 256),
        also=("wrong %", wrong),
        floors={"chance, or one bit": math.log(2)},
    )


def coin(seed: int) -> Problem:
    """Coins whose chances are .5, and .5 more or .25 less by two of those seen before."""

    def sample(before: jax.Array, key: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
        """The coins seen, with those before, [B, SECOND + T], and chances [B, T]."""
        drawn = jax.random.bernoulli(key, shape=(len(before), steps))
        seen = jnp.concatenate([before, drawn], axis=1)
        first, second = (seen[:, SECOND - lag : SECOND - lag + steps] for lag in (FIRST, SECOND))
        return seen, 0.5 + 0.5 * first - 0.25 * second

    def batch(seen: jax.Array, chances: jax.Array, mask: Any) -> Batch:
        steps = chances.shape[1]
        always = jnp.ones(steps, bool)
        found = bits(seen[:, SECOND:], always, always, always, seen[:, SECOND:], ~always)
        targets = jnp.stack([1 - chances, chances], axis=-1)
        return found._replace(targets=targets, mask=jnp.broadcast_to(mask, chances.shape))

    def draw(before: jax.Array, key: jax.Array, pause: jax.Array) -> tuple[jax.Array, Batch]:
        coin_key, key = jax.random.split(key)
        seen, chances = sample(before, coin_key, STEPS)
        landed = jax.random.bernoulli(key, chances).astype(jnp.float32)
        return seen[:, -SECOND:], batch(seen, landed, jnp.ones(()))

    def begin(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, shape=(STREAMS, SECOND))

    def held_out(number: int) -> Batch:  # in chances, so that floors are exact in the mean
        before = jnp.zeros((128, SECOND), bool)
        seen, chances = sample(before, _key(seed, number), 2 * STEPS)
        return batch(seen, chances, (jnp.arange(2 * STEPS) >= SECOND).astype(jnp.float32))

    return Problem(
        name="coin",
        title=f"coins, which those of {FIRST} and {SECOND} steps ago make likelier or not",
        outputs=2,
        loss=optax.softmax_cross_entropy,
        begin=begin,
        draw=draw,
        valid=held_out(1),
        test=held_out(2),
        also=("nats too many", lambda outputs, batch: surplus(outputs, batch)),
        floors=coin_floors(),
        digits=4,
        also_digits=4,
    )


def coin_floors() -> dict[str, float]:
    """The least cross-entropies of one who knows none, one or both of the coins; in nats."""

    def entropy(*chances: float) -> float:
        pairs = [(p, 1 - p) for p in chances]
        return -sum(q * math.log(q) for pair in pairs for q in pair if q) / len(chances)

    return {
        "knows neither coin": entropy(0.625),
        f"knows that of {SECOND} steps ago": entropy(0.75, 0.5),
        f"knows that of {FIRST} steps ago": entropy(0.375, 0.875),
        "knows both": entropy(0.5, 0.25, 1.0, 0.75),
    }


def surplus(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Nats over the entropy of the chances that are the targets."""
    known = jnp.log(jnp.maximum(batch.targets, 1e-30))
    gap = jnp.sum(batch.targets * (known - jax.nn.log_softmax(outputs)), axis=-1)
    return jnp.average(gap, weights=batch.mask)


def chaos(seed: int) -> Problem:
    """Mackey-Glass, predicted one step ahead in streams that go on."""
    made = [mackey_glass(n, 3 * seed + k) for k, n in enumerate((8000, 1500, 3000))]
    deviation = made[0].std()
    made = [(each - made[0].mean()) / deviation for each in made]
    values = jnp.asarray(made[0], jnp.float32)
    train, valid, test = (tiled(Series(s[:-1, None], s[1:]), WINDOW) for s in made)
    persistence = guess_floor(test, np.asarray(test.inputs))

    def begin(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (STREAMS,), 0, len(values) - STEPS)

    def draw(start: jax.Array, key: jax.Array, pause: jax.Array) -> tuple[jax.Array, Batch]:
        over = start + STEPS >= len(values)
        start = jnp.where(over, begin(key), start)
        seen = values[start[:, None] + jnp.arange(STEPS + 1)[None]]
        reset = over[:, None] & (jnp.arange(STEPS) == 0)[None]
        mask = jnp.ones((STREAMS, STEPS))
        return start + STEPS, Batch(seen[:, :-1, None], seen[:, 1:, None], mask, reset)

    def beside(outputs: jax.Array, batch: Batch) -> jax.Array:
        wrong = jnp.mean((outputs - batch.targets) ** 2, axis=-1)
        return 100 * jnp.average(wrong, weights=batch.mask) / persistence

    return Problem(
        name="mackey_glass",
        title="Mackey-Glass, one step ahead; squared errors over the variance",
        outputs=1,
        loss=optax.squared_error,
        begin=begin,
        draw=draw,
        valid=valid,
        test=test,
        also=("% of persistence's", beside),
        floors={
            "mean in training": guess_floor(test, 0.0),
            "persistence: what is now": persistence,
            "linear, of the last 2": linear_floor(train, test, 2),
            f"linear filter, {WINDOW.washout} taps": linear_floor(train, test, WINDOW.washout),
        },
        digits=6,
    )


def characters(seed: int, data_dir: Path | None) -> Problem:
    """The next character: of Penn Treebank where it is, of Python's manual elsewhere."""
    source = "ptb" if (root := root_of(data_dir)) and (root / "ptb").is_dir() else "manual"
    text = read(source, data_dir, seed=seed)
    symbols = len(text.symbols)
    codes = jax.tree.map(jnp.asarray, streams(text.train, STREAMS, STEPS, seed))

    def expand(piece: Codes) -> Batch:
        batch = next_symbols(piece, symbols)
        return batch._replace(mask=scored(batch))

    def held_out(sentences: Any) -> Batch:
        whole = streams(sentences[:SENTENCES], 20, STEPS)
        joined = (np.concatenate([*a], axis=1) for a in whole)  # [C, B, T] -> [B, C T]
        return expand(Codes(*joined))

    def begin(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (), 0, len(codes.target))

    def draw(at: jax.Array, key: jax.Array, pause: jax.Array) -> tuple[jax.Array, Batch]:
        return (at + 1) % len(codes.target), expand(Codes(*(a[at] for a in codes)))

    floors = symbol_floors(text.train, text.test[:SENTENCES], symbols)._asdict()
    return Problem(
        name="text",
        title=f"characters of {text.name}; bits",
        outputs=symbols,
        loss=optax.softmax_cross_entropy,
        begin=begin,
        draw=draw,
        valid=held_out(text.valid),
        test=held_out(text.test),
        also=("wrong %", wrong),
        floors=floors,
        scale=1 / math.log(2),
    )


def bits(
    seen: jax.Array, there: Any, marked: Any, asked: Any, answer: jax.Array, start: Any
) -> Batch:
    """A batch of three channels with two answers.

    Args:
        seen: [B, T] the bits.
        there: [T] where they are shown.
        marked: [T] where they count.
        asked: [T] where an answer counts.
        answer: [B, T] what it is.
        start: [T] where everything before is forgotten.
    """
    size = len(seen)
    value = jnp.where(seen, 1.0, -1.0) * there[None]
    flags = [jnp.broadcast_to(flag.astype(jnp.float32), value.shape) for flag in (marked, asked)]
    return Batch(
        inputs=jnp.stack([value, *flags], axis=-1),
        targets=jax.nn.one_hot(answer.astype(int), 2),
        mask=flags[1],
        reset=jnp.broadcast_to(start, (size, len(start))),
    )


def wrong(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Per cent of the answers."""
    right = jnp.argmax(outputs, axis=-1) == jnp.argmax(batch.targets, axis=-1)
    return 100 * jnp.maximum(jnp.average(~right, weights=batch.mask), 0)  # and no -0.0 by rounding


def grown(pause: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The pauses to go on with, from the losses of a segment; both [L]."""
    longer = np.minimum(np.ceil(GROWTH * pause), LONGEST).astype(int)
    return np.where(loss < LEARNED, longer, pause)


def _stateless(key: jax.Array) -> jax.Array:
    return jnp.zeros(())


def _key(seed: int, number: int) -> jax.Array:
    """Keys of held-out data; training splits those of other seeds."""
    return jax.random.fold_in(jax.random.key(seed), 2**31 - 1 - number)
