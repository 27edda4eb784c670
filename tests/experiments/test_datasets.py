"""Data: loaders on small files written here, videos and floors beside plain loops.

The real files are tested where the environment variable LOCALGRAD_DATA names their folder.
"""

import collections
import gzip
import math
import os
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from experiments.datasets import (
    GLYPHS,
    Codes,
    Glyphs,
    bouncing,
    glyphs,
    minibatches,
    next_frames,
    next_symbols,
    of_classes,
    scored,
    streams,
    subset,
    symbol_floors,
    text,
    video_floors,
)
from experiments.datasets.bouncing import film, trajectory
from experiments.datasets.files import read_idx

REAL = os.environ.get("LOCALGRAD_DATA")
real = pytest.mark.skipif(not REAL, reason="LOCALGRAD_DATA names no folder of real data")
LINES = [" the cat <unk> N \n", " a cat \n", "\n", " the the cat \n"]


@pytest.fixture(autouse=True)
def nothing_is_found_by_itself(monkeypatch):
    monkeypatch.delenv("LOCALGRAD_DATA", raising=False)


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def idx(array):
    return b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 7), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 4, 5), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        write(folder / "mnist" / f"{part}-images-idx3-ubyte.gz", idx(images))
        write(folder / "mnist" / f"{part}-labels-idx1-ubyte", idx(labels))  # not compressed
        arrays[part] = images, labels
    return arrays


def write_ptb(folder):
    for split, lines in (("train", LINES), ("valid", LINES[1:2]), ("test", LINES[:1])):
        write(folder / "ptb" / f"ptb.{split}.txt.gz", "".join(lines).encode())


# Glyphs.


def test_digits_need_nothing_and_are_split_by_seed():
    found, again, other = glyphs("digits"), glyphs("digits"), glyphs("digits", seed=1)
    assert found.train.shape == (1438, 8, 8) and found.test.shape == (359, 8, 8)
    assert found.train.dtype == np.float32 and found.train_labels.dtype == np.int32
    assert found.train.min() == 0 and found.train.max() == 1
    np.testing.assert_array_equal(found.train, again.train)
    assert not np.array_equal(found.train, other.train)
    seen = {image.tobytes() for image in found.train}
    assert not any(image.tobytes() in seen for image in found.test)


def test_digits_of_some_classes_are_those_of_all():
    whole, low, high = (glyphs(name) for name in ("digits", "digits_0_4", "digits_5_9"))
    assert set(low.train_labels) == set(range(5)) and set(high.test_labels) == set(range(5, 10))
    assert len(low.train) + len(high.train) == len(whole.train)
    np.testing.assert_array_equal(whole.test[whole.test_labels < 5], low.test)
    with pytest.raises(ValueError, match=r"classes must name some of digits 0 to 4's.*\[7\]"):
        of_classes(low, [7], "sevens")


def test_mnist_from_idx_files(tmp_path, monkeypatch):
    arrays = write_mnist(tmp_path)
    found = glyphs("mnist", tmp_path)
    np.testing.assert_array_equal(found.train, arrays["train"][0] / np.float32(255))
    np.testing.assert_array_equal(found.test_labels, arrays["t10k"][1])
    assert found.train.dtype == np.float32 and found.train.max() <= 1
    monkeypatch.setenv("LOCALGRAD_DATA", str(tmp_path))
    np.testing.assert_array_equal(glyphs("mnist", download=True).train, found.train)


def test_notmnist_is_filtered_before_it_is_split(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 6, 6), dtype=np.uint8)
    images[4], images[9], images[20], images[25] = 0, 255, images[3], images[3]
    labels = np.arange(30, dtype=np.uint8) % 10
    (tmp_path / "notmnist").mkdir()
    np.savez(tmp_path / "notmnist" / "notmnist_10k.npz", images=images, labels=labels)
    found = glyphs("notmnist", tmp_path)
    assert len(found.train) == 21 and len(found.test) == 5  # 30, less 2 blank, less 2 again
    both = np.concatenate([found.train, found.test])
    of = dict(zip(map(bytes, images), labels, strict=True)) | {bytes(images[3]): labels[3]}
    back = np.rint(both * 255).astype(np.uint8)
    assert {bytes(i) for i in back} == {bytes(i) for i in images} - {
        bytes(images[4]),
        bytes(images[9]),
    }
    kept = np.concatenate([found.train_labels, found.test_labels])
    np.testing.assert_array_equal(kept, [of[bytes(image)] for image in back])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-1], "must be an idx file of bytes"),
        (lambda content: b"\0\0\x0d" + content[3:], "must be an idx file of bytes"),
        (lambda content: b"", "got 0 bytes"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path, spoil, message):
    path = tmp_path / "a"
    path.write_bytes(spoil(idx(np.zeros((2, 3), np.uint8))))
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_missing_files_say_what_to_put_where(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").unlink()
    told = r"no train-labels-idx1-ubyte in .*/mnist\. Put the four idx files of MNIST there \(.gz"
    with pytest.raises(FileNotFoundError, match=f"{told}.*--download"):
        glyphs("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"in DIR/mnist\..*--data-dir DIR.*LOCALGRAD_DATA"):
        glyphs("mnist")
    with pytest.raises(FileNotFoundError, match=r"notmnist_10k\.npz.*--download, has none"):
        glyphs("notmnist", tmp_path, download=True)
    with pytest.raises(FileNotFoundError, match=r"ptb\.train\.txt, .*in DIR/ptb.*Mikolov's"):
        text("ptb", download=True)


def test_download_without_tensorflow_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    for read in (
        lambda: glyphs("mnist", download=True),
        lambda: text("shakespeare", download=True),
    ):
        with pytest.raises(ValueError, match=r"lacks tensorflow_datasets.*localgrad\[data\]"):
            read()


def test_download_takes_tensorflow_datasets():
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("importlib_resources")
    with tfds.testing.mock_data(num_examples=4):
        found = glyphs("mnist", download=True)
        pieces = text("shakespeare", download=True)
    assert found.train.shape == found.test.shape == (4, 28, 28)
    assert 0.4 < found.train.mean() < 0.6 and found.train.dtype == np.float32
    assert found.train_labels.shape == (4,)
    assert len(pieces.train) and len(pieces.test)


# Videos.


def filmed(key, images, batch_size, count, frames, canvas, speed):
    """`film` by plain loops, of the same draws."""
    keys = jax.random.split(key, 3)
    which = np.asarray(jax.random.randint(keys[0], (batch_size, count), 0, len(images)))
    start = np.asarray(jax.random.uniform(keys[1], (batch_size, count, 2)))
    angle = np.asarray(jax.random.uniform(keys[2], (batch_size, count), maxval=2 * math.pi))
    _, h, w = images.shape
    result = np.zeros((batch_size, frames, *canvas), images.dtype)
    for b in range(batch_size):
        for k in range(count):
            y, x = start[b, k]
            dy, dx = speed * np.sin(angle[b, k]), speed * np.cos(angle[b, k])
            for f in range(frames):
                y, x = y + dy, x + dx
                if y <= 0 or y >= 1:
                    y, dy = min(max(y, 0.0), 1.0), -dy
                if x <= 0 or x >= 1:
                    x, dx = min(max(x, 0.0), 1.0), -dx
                top, left = int(y * (canvas[0] - h)), int(x * (canvas[1] - w))
                for i in range(h):
                    for j in range(w):
                        old = result[b, f, top + i, left + j]
                        result[b, f, top + i, left + j] = max(old, images[which[b, k], i, j])
    return result


@pytest.mark.parametrize(
    ("count", "canvas", "speed"), [(2, (16, 12), 0.1), (1, (9, 16), 0.35), (3, (5, 4), 0.5)]
)
@pytest.mark.few(1)
def test_videos_equal_plain_loops(count, canvas, speed, x64):
    images = np.random.default_rng(0).random((6, 5, 4))
    told = {"count": count, "frames": 25, "canvas": canvas, "speed": speed}
    key = jax.random.key(3)
    found = film(key, jnp.asarray(images), 4, **told)
    np.testing.assert_array_equal(found, filmed(key, images, 4, **told))


def test_trajectory_by_hand(x64):
    start, angle = jnp.array([[0.5, 0.75]]), jnp.zeros(1)
    way = trajectory(start, angle, 6, 0.2)[:, 0]
    np.testing.assert_allclose(way[:, 0], 0.5)
    np.testing.assert_allclose(way[:, 1], [0.95, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_glyphs_stay_inside_at_their_speed(x64):
    keys = jax.random.split(jax.random.key(0))
    start = jax.random.uniform(keys[0], (500, 2))
    angle = jax.random.uniform(keys[1], (500,), maxval=2 * math.pi)
    way = np.asarray(trajectory(start, angle, 40, 0.1))
    assert way.min() == 0 and way.max() == 1
    gone = np.linalg.norm(np.diff(way, axis=0), axis=-1)
    free = np.all((way > 0) & (way < 1), axis=-1)
    np.testing.assert_allclose(gone[free[1:]], 0.1, rtol=1e-9)
    assert gone.max() <= 0.1 + 1e-12 and not free.all()


def test_pixels_are_kept_where_nothing_overlaps():
    whole = glyphs("digits")
    one = bouncing(whole, count=1, canvas=(16, 16), test_size=30)
    mass = {float(image.sum()) for image in np.float64(whole.test)}
    sums = np.float64(one.test).sum((2, 3))
    assert (sums == sums[:, :1]).all() and set(sums[:, 0]) <= mass
    two = bouncing(whole, count=2, canvas=(16, 16), test_size=5)
    assert two.shape == two.test.shape[1:] == (20, 16, 16)
    assert two.test.min() == 0 and two.test.max() == 1


def test_starts_and_directions_are_uniform():
    draw = lambda images, speed: film(  # noqa: E731
        jax.random.key(0), images, 4000, count=1, frames=2, canvas=(11, 11), speed=speed
    )
    dot = jnp.ones((1, 1, 1))
    at = np.asarray(draw(dot, 0.0)).reshape(4000, 2, 121).argmax(-1)[:, 0]
    times = np.bincount(at, minlength=121).reshape(11, 11)
    assert times[10].sum() == times[:, 10].sum() == 0  # whole pixels, towards 0
    assert np.abs(times[:10, :10] - 40).max() < 5 * np.sqrt(40)
    frames = np.asarray(draw(dot, 0.3)).reshape(4000, 2, 121).argmax(-1)
    inside = np.isin(frames[:, 0], [11 * i + j for i in (4, 5, 6) for j in (4, 5, 6)])
    steps = np.stack([frames // 11, frames % 11], -1)[inside]
    moved = steps[:, 1] - steps[:, 0]
    for axis in (0, 1):
        up = np.mean(moved[:, axis] > 0) / np.mean(moved[:, axis] != 0)
        assert abs(up - 0.5) < 5 * 0.5 / np.sqrt(len(moved))


@pytest.mark.slow
def test_videos_under_transforms_and_by_seed():
    video = bouncing(glyphs("digits_0_4"), 3, canvas=(12, 12), frames=5, test_size=4)
    again = bouncing(glyphs("digits_0_4"), 3, canvas=(12, 12), frames=5, test_size=4)
    other = bouncing(glyphs("digits_0_4"), 4, canvas=(12, 12), frames=5, test_size=4)
    np.testing.assert_array_equal(video.test, again.test)
    assert not np.array_equal(video.test, other.test)
    keys = jax.random.split(jax.random.key(1), 3)
    expected = jnp.stack([video.sample(key, 2) for key in keys])
    mapped = jax.jit(jax.vmap(lambda key: video.sample(key, 2)))(keys)
    scanned = jax.lax.scan(lambda carry, key: (carry, video.sample(key, 2)), 0, keys)[1]
    np.testing.assert_array_equal(mapped, expected)
    np.testing.assert_array_equal(scanned, expected)
    assert expected.dtype == jnp.float32 and expected.shape == (3, 2, 5, 12, 12)


def test_training_and_test_videos_show_different_glyphs():
    given = Glyphs("flat", np.full((3, 2, 2), 0.25), np.full((3, 2, 2), 0.75), *2 * (np.zeros(3),))
    video = bouncing(given, canvas=(4, 4), frames=2, test_size=3)
    assert set(np.unique(video.sample(jax.random.key(0), 3))) == {0, 0.25}
    assert set(np.unique(video.test)) == {0, 0.75}


# Text.


def test_ptb_is_coded_as_its_authors_do(tmp_path):
    write_ptb(tmp_path)
    found = text("ptb", tmp_path)
    assert len(found.symbols) == len(set(found.symbols)) == 49
    spelt = ["".join(found.symbols[code] for code in sentence) for sentence in found.train]
    assert spelt == ["the_cat_<unk>_N", "a_cat", "the_the_cat"]
    order = "# $ ' & * - / . 1 0 3 2 5 4 7 6 9 8 < > N \\ _ a c b e d g f i h k j m l o n q p s r u"
    order += " t w v y x z"
    assert list(found.symbols) == order.split()
    assert [s.tolist() for s in found.valid] == [[23, 22, 24, 23, 43]]


def test_ptb_words_end_in_eos_and_begin_after_one(tmp_path):
    write_ptb(tmp_path)
    found = text("ptb_words", tmp_path)
    assert found.symbols == ("<eos>", "cat", "the", "<unk>", "N", "a")
    assert [s.tolist() for s in found.train] == [[0, 2, 1, 3, 4, 0], [0, 5, 1, 0], [0, 2, 2, 1, 0]]
    write(tmp_path / "ptb" / "ptb.test.txt.gz", b" a dog \n")
    with pytest.raises(ValueError, match="Penn Treebank holds 'dog', .* 6 symbols"):
        text("ptb_words", tmp_path)


def test_shakespeare_is_split_by_characters(tmp_path):
    whole = ("To be, or not to be!\n" * 200)[:4005]
    write(tmp_path / "tiny_shakespeare" / "input.txt", whole.encode())
    found = text("shakespeare", tmp_path)
    spelt = ["".join(found.symbols[c] for s in part for c in s) for part in found[2:]]
    assert [len(part) for part in spelt] == [3604, 200, 201 - 1]  # a last piece of one is left out
    assert "".join(spelt) == whole[:-1]
    assert [len(s) for s in found.train] == [100] * 36 + [4]


def test_manual_needs_nothing_and_repeats_nothing():
    found, again, other = text("manual"), text("manual"), text("manual", seed=1)
    parts = [[s.tobytes() for s in part] for part in found[2:]]
    sentences = [sentence for part in parts for sentence in part]
    assert len(sentences) == len(set(sentences)) > 1000
    assert sum(map(len, sentences)) / 4 > 100_000
    assert len(parts[0]) == len(sentences) * 8 // 10
    assert parts == [[s.tobytes() for s in part] for part in again[2:]]
    assert parts[0] != [s.tobytes() for s in other.train]
    spelt = ["".join(found.symbols[code] for code in sentence) for sentence in found.train]
    assert all(one[0].isalpha() and one[-1] in ".:" and "  " not in one for one in spelt)
    assert sum(" the " in one for one in spelt) > len(spelt) / 4


# Batches.


def ragged(count, seed=0, most=50):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 7, n).astype(np.int32) for n in rng.integers(2, most, count)]


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 7), (6, 10), (83, 50)])
def test_streams_hold_every_sentence_once(batch_size, steps):
    sentences = ragged(83)
    codes = streams(sentences, batch_size, steps, seed=3)
    assert codes.target.shape == codes.last.shape == (len(codes.target), batch_size, steps)
    target, last = (np.moveaxis(a, 0, 1).reshape(batch_size, -1) for a in codes)
    found = []
    for row, before in zip(target, last, strict=True):
        length = (row >= 0).sum()
        assert (row[length:] == -1).all() and (before[length:] == -1).all()
        starts = np.flatnonzero(before[:length] == -1)
        for sentence in np.split(np.arange(length), starts[1:]):
            np.testing.assert_array_equal(before[sentence[1:]], row[sentence[:-1]])
            found.append(row[sentence].tobytes())
    assert collections.Counter(found) == collections.Counter(s.tobytes() for s in sentences)
    total, longest = sum(map(len, sentences)), max(map(len, sentences))
    assert len(target[0]) < max(total / batch_size + steps + 2, longest + steps)


def test_minibatches_hold_every_sentence_once_each_from_its_beginning():
    sentences = ragged(83)
    codes = minibatches(sentences, 10, 20, seed=3)
    assert codes.target.shape == codes.last.shape == (len(codes.target), 10, 20)
    rows = list(zip(codes.target.reshape(-1, 20), codes.last.reshape(-1, 20), strict=True))
    found = []
    for row, before in rows:
        length = (row >= 0).sum()
        assert (row[length:] == -1).all() and before[0] == -1
        np.testing.assert_array_equal(before[1:length], row[: max(length - 1, 0)])
        found += [row[:length].tobytes()] if length else []
    cut = [s[at : at + 20].tobytes() for s in sentences for at in range(0, len(s), 20)]
    assert collections.Counter(found) == collections.Counter(cut)
    assert len(rows) < len(cut) + 10
    other = minibatches(sentences, 10, 20, seed=4)
    assert (other.target != codes.target).any()


def test_streams_are_shuffled_by_seed_and_as_long_under_any():
    sentences = ragged(60)
    one, again, other = (streams(sentences, 4, 9, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    np.testing.assert_array_equal(one.target, again.target)
    assert one.target.shape == other.target.shape and (one.target != other.target).any()


def test_subset_is_fixed_and_without_repeats():
    sentences = [np.array([k, k]) for k in range(50)]
    first = lambda chosen: [s[0] for s in chosen]  # noqa: E731
    assert first(subset(sentences, 3)) == [0, 1, 2]
    drawn = first(subset(sentences, 20, seed=1))
    assert drawn == sorted(set(drawn)) == first(subset(sentences, 20, seed=1))
    assert drawn != first(subset(sentences, 20, seed=2))


def test_next_symbols_by_hand():
    codes = Codes(np.array([[2, 0, 1], [1, 2, -1]]), np.array([[-1, 2, 0], [0, -1, -1]]))
    batch = jax.jit(lambda codes: next_symbols(codes, 3))(codes)
    np.testing.assert_array_equal(batch.targets[0], np.eye(3)[[2, 0, 1]])
    np.testing.assert_array_equal(batch.inputs[0], [[0, 0, 0], [0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(batch.inputs[1], [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(batch.reset, [[True, False, False], [False, True, False]])
    np.testing.assert_array_equal(scored(batch), [[0, 1, 1], [1, 0, 0]])
    frames = jnp.arange(12.0).reshape(1, 3, 2, 2)
    assert next_frames(frames).targets.tolist() == frames.reshape(1, 3, 4).tolist()
    np.testing.assert_array_equal(scored(next_frames(frames)), [[0, 1, 1]])


@pytest.mark.slow
def test_a_ptncn_takes_them():
    """It knows nothing of the first symbol, is corrected by it, and learns."""
    codes = jax.tree.map(lambda a: a[0], streams(ragged(8, most=9), 8, 8))
    model = localgrad.PTNCN((6, 5), 7)
    batch = next_symbols(codes, 7)
    carry = model.initialize_carry(jax.random.key(0), (8, 7))
    params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
    loss = localgrad.categorical_cross_entropy
    evaluate = jax.jit(lambda batch: localgrad.evaluate(model, loss, params, batch)[:2])
    _, outputs = evaluate(batch)
    np.testing.assert_allclose(outputs[:, 0], 1 / 7, rtol=1e-6)
    blind, outputs_blind = evaluate(batch._replace(mask=scored(batch)))
    assert not np.array_equal(outputs[:, 1], outputs_blind[:, 1])
    nats = jax.vmap(loss, 1, 1)(outputs_blind, batch.targets)
    assert blind == pytest.approx(np.average(nats, weights=scored(batch)), rel=1e-5)
    rule = localgrad.lra(model, loss)
    updates, _ = rule(params, rule.init(params), batch)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(updates))


# Floors.


def test_symbol_floors_equal_a_count_by_hand():
    train, test, V = ragged(30, 1), ragged(20, 2), 9  # 7 and 8 are never seen in training
    test.append(np.array([8, 7, 3, 8, 8]))
    single, double = collections.Counter(), collections.defaultdict(collections.Counter)
    for sentence in train:
        for a, b in zip(sentence[:-1].tolist(), sentence[1:].tolist(), strict=True):
            single[b] += 1
            double[a][b] += 1
    total, bits = sum(single.values()), []
    p1 = {b: (single[b] + 1) / (total + V) for b in range(V)}
    assert sum(p1.values()) == pytest.approx(1)
    for sentence in test:
        for a, b in zip(sentence[:-1].tolist(), sentence[1:].tolist(), strict=True):
            n, t = sum(double[a].values()), len(double[a])
            p2 = (double[a][b] + t * p1[b]) / (n + t) if n else p1[b]
            bits.append((-math.log2(p1[b]), -math.log2(p2)))
    found = symbol_floors(train, test, V)
    assert found.uniform == math.log2(9)
    assert found[1:] == pytest.approx(np.mean(bits, axis=0), rel=1e-12)


def test_bigram_finds_a_chain():
    chain = [np.arange(start, start + 60) % 5 for start in range(5)]
    found = symbol_floors(chain, chain, 5)
    assert found.unigram == pytest.approx(math.log2(5), rel=1e-3) and found.bigram < 0.1


def test_video_floors_equal_loops():
    rng = np.random.default_rng(0)
    train, test = rng.random((4, 3, 2, 2)), rng.random((5, 3, 2, 2))
    test[0, 0, 0, 0], test[0, 1, 0, 0] = 0, 1  # the copy is certain, and wrong
    found = video_floors(train, test, clip=0.05)
    rows = {"mean": [], "copied": [], "itself": []}
    for m in range(5):
        for f in (1, 2):
            for i in range(2):
                for j in range(2):
                    x = test[m, f, i, j]
                    guesses = np.mean(train[:, 1:, i, j]), test[m, f - 1, i, j], x
                    for row, guess, least in zip(rows, guesses, (0.05, 0.05, 0), strict=True):
                        p = min(max(guess, least), 1 - least)
                        nats = -x * math.log(p) if x else 0
                        nats -= (1 - x) * math.log(1 - p) if x < 1 else 0
                        rows[row].append((nats, (x - guess) ** 2))
    for name, row in rows.items():
        np.testing.assert_allclose(getattr(found, name), np.mean(row, axis=0), atol=1e-10)


def test_copying_beats_the_mean_for_slow_glyphs():
    video = bouncing(glyphs("digits"), canvas=(16, 16), speed=0.01, test_size=20)
    found = video_floors(video.sample(jax.random.key(0), 50), video.test)
    assert found.itself.cross_entropy < found.copied.cross_entropy < found.mean.cross_entropy
    assert 0 == found.itself.squared_error < found.copied.squared_error < found.mean.squared_error


# Refusals.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: glyphs("letters"), "glyphs must be one of digits, .*'letters'"),
        (lambda: text("novel"), "text must be one of manual, .*'novel'"),
        (lambda: bouncing(glyphs("digits"), count=0), "count must be at least 1; got 0"),
        (
            lambda: bouncing(glyphs("digits"), speed=-0.1),
            "speed must lie between 0 and 1; got -0.1",
        ),
        (
            lambda: bouncing(glyphs("digits"), canvas=(8, 7)),
            r"canvas must hold a glyph of \(8, 8\) pixels; got \(8, 7\)",
        ),
        (lambda: subset(ragged(3), 4), r"count must lie in 1\.\.3, the sentences; got 4"),
        (lambda: streams(ragged(3), 0, 9), "batch_size must be at least 1; got 0"),
        (lambda: minibatches(ragged(3), 1, 0), "steps must be at least 1; got 0"),
        (lambda: streams(ragged(3), 4, 9), "3 sentences cannot fill 4 streams"),
        (lambda: video_floors(0, 0, clip=0.5), "clip must lie between 0 and 1/2; got 0.5"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Real files.


def counts(name):
    found = text(name, Path(REAL))
    return len(found.symbols), *((len(p), sum(map(len, p))) for p in found[2:])


@real
def test_real_ptb_has_its_counts():
    assert counts("ptb") == (49, (42068, 4975414), (3370, 389672), (3761, 438662))
    found = text("ptb", Path(REAL))
    assert symbol_floors(found.train, found.valid, 49) == pytest.approx(
        (5.615, 4.297, 3.352), abs=1e-3
    )


@real
def test_real_ptb_words_have_their_counts():
    symbols, *splits = counts("ptb_words")
    assert symbols == 10000
    assert [words - lines for lines, words in splits] == [929589, 73760, 82430]  # all but the first


@real
def test_real_shakespeare_has_its_counts():
    symbols, *splits = counts("shakespeare")
    assert symbols == 65
    assert [characters for _, characters in splits] == [1003854, 55770, 55770]


@real
@pytest.mark.parametrize(
    ("name", "train", "test"), [("mnist", 60000, 10000), ("notmnist", 7842, 1961)]
)
def test_real_glyphs_have_their_counts(name, train, test):
    found = GLYPHS[name](Path(REAL), 0, False)
    assert found.train.shape == (train, 28, 28) and found.test.shape == (test, 28, 28)
    assert set(found.train_labels) == set(found.test_labels) == set(range(10))
    assert found.train.max() == 1 and (np.ptp(found.train, axis=(1, 2)) > 0).all()
    video = bouncing(found, test_size=2)
    assert video.test.shape == (2, 20, 64, 64)
