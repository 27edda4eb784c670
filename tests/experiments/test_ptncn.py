"""The experiment with P-TNCN: fair rivals, scores that a plain loop gives too, runs that go on."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import ptncn
from experiments.__main__ import main
from experiments.claims import Claim
from experiments.datasets import Text, bouncing, glyphs
from experiments.ptncn import checkpoints, continual
from experiments.ptncn.continual import Kept
from experiments.ptncn.found import best_source
from experiments.ptncn.learner import make_learner, make_score
from experiments.ptncn.problems import of_text, of_video
from experiments.ptncn.rows import ROOM, ROWS, parameters_of, units_for
from experiments.ptncn.sources import canvas_for, halves, pooled
from experiments.ptncn.training import MOST_RATES, beyond, drawn, learned

SYMBOLS = 5


@functools.cache
def problem(steps=7):
    """Sentences that count upwards, some longer than a call."""
    rng = np.random.default_rng(0)
    sentences = tuple(
        ((rng.integers(SYMBOLS) + np.arange(n)) % SYMBOLS).astype(np.int32)
        for n in rng.integers(2, 20, 40)
    )
    text = Text("counting", tuple("abcde"), sentences[:24], sentences[24:32], sentences[32:])
    return of_text(text, 4, steps, scored=3)[0], text


@pytest.mark.slow
def test_all_rivals_have_no_more_parameters_and_nearly_as_many():
    counted, _ = problem()
    for name, row in ROWS.items():
        units = units_for(row, counted, 3000)
        found, more = (
            parameters_of(row.model(n, counted.size, counted.outputs), counted.size)
            for n in (units, units + 1)
        )
        assert found <= 3000 < more, name


@pytest.mark.slow
def test_rtrl_gets_as_many_units_as_its_room_allows():
    counted, _ = problem()
    row = ROWS["gru_rtrl"]._replace(room=2e6)
    units = units_for(row, counted, 100_000)
    per_stream = units * 3 * (units * units + units * SYMBOLS)  # and fewer for the biases
    assert 0.7 * 2e6 < 4 * counted.batch_size * per_stream <= 2e6
    assert f"in {ROOM // 2**20} MiB" in row.label, "a table says so"


@pytest.mark.parametrize("name", ["lstm_bptt", "ptncn"])
@pytest.mark.slow
def test_a_score_is_the_mean_over_sentences_read_one_by_one(name):
    counted, text = problem()
    learner = make_learner(ROWS[name], counted, 400)
    run = learner.init(jax.random.split(jax.random.key(0), 2))
    found = make_score(learner)(run.params, jax.tree.map(jnp.asarray, counted.test))[:, -1]
    for seed in range(2):
        params = jax.tree.map(lambda a, seed=seed: a[seed], run.params)
        nats = []
        for sentence in text.test:
            carry = learner.model.initialize_carry(jax.random.key(0), (1, SYMBOLS))
            x = jnp.zeros((1, SYMBOLS))
            for t, symbol in enumerate(sentence):
                carry, y = learner.model.apply({"params": params}, carry, x)
                p = y if name == "ptncn" else jax.nn.softmax(y)
                x = jax.nn.one_hot(jnp.array([symbol]), SYMBOLS)
                if name == "ptncn":
                    carry = learner.model.apply({"params": params}, carry, x, method="observe")
                if t:
                    nats.append(-np.log(p[0, symbol]))
        np.testing.assert_allclose(found[seed], np.mean(nats) / np.log(2), rtol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    counted, _ = problem()
    learner = make_learner(ROWS["ptncn"], counted, 400)
    ticks = []
    whole = learned(learner, 3, 2, lambda: ticks.append(1))
    learned(learner, 2, 2, lambda: None, tmp_path)
    again = []
    resumed = learned(learner, 3, 2, lambda: again.append(1), tmp_path)
    assert len(ticks) == 4 and len(again) == 2, "a choice of rates, made or found, and epochs"
    np.testing.assert_array_equal(resumed.valid, whole.valid)
    np.testing.assert_array_equal(resumed.test, whole.test)
    assert resumed.tried == whole.tried and resumed.rate == whole.rate
    assert whole.test.std() > 0, "seeds differ"
    with pytest.raises(ValueError, match="holds a run made with .*'seeds': 2.*Remove that folder"):
        learned(learner, 3, 3, lambda: None, tmp_path)
    with pytest.raises(ValueError, match="holds a run of 3 epochs, and this one has 1"):
        learned(learner, 1, 2, lambda: None, tmp_path)


def death(*args, **kwargs):
    """What happens to a run that is stopped."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("broken", [pytest.param("save", marks=pytest.mark.slow), "replace"])
@pytest.mark.slow
def test_a_run_that_dies_while_it_is_saved_goes_on_from_the_epoch_before(
    tmp_path, monkeypatch, broken
):
    counted, _ = problem()
    learner = make_learner(ROWS["gru_bptt"], counted, 400)
    whole = learned(learner, 2, 2, lambda: None)
    learned(learner, 1, 2, lambda: None, tmp_path)
    if broken == "save":
        monkeypatch.setattr(checkpoints.checkpoint, "save", death)
    else:
        monkeypatch.setattr(checkpoints.os, "replace", death)
    with pytest.raises(KeyboardInterrupt):
        learned(learner, 2, 2, lambda: None, tmp_path)
    monkeypatch.undo()
    resumed = learned(learner, 2, 2, lambda: None, tmp_path)
    np.testing.assert_array_equal(resumed.valid, whole.valid)


def test_a_run_whose_last_epoch_is_damaged_goes_on_from_the_one_before(tmp_path):
    def run(epoch):
        return checkpoints.Run(
            {"w": jnp.full(3, float(epoch))}, jax.random.split(jax.random.key(epoch), 2)
        )

    def progress(epoch):
        return checkpoints.Progress(0.1, {0.1: 2.0}, [[epoch]], epochs=epoch)

    settings = {"seeds": 2}
    assert checkpoints.restore(tmp_path, run(0), settings, 4) is None
    for epoch in (1, 2, 3):
        checkpoints.save(tmp_path, run(epoch), progress(epoch), settings)
    found, done = checkpoints.restore(tmp_path, run(0), settings, 4)
    np.testing.assert_array_equal(found.params["w"], 3.0)
    assert done == progress(3) and jnp.all(found.opt_state == run(3).opt_state)
    assert sorted(path.name for path in tmp_path.glob("progress*")) == [
        "progress_2.json",
        "progress_3.json",
    ]
    with pytest.raises(ValueError, match="holds a run of 3 epochs, and this one has 2"):
        checkpoints.restore(tmp_path, run(0), settings, 2)
    with pytest.raises(ValueError, match="made with {'seeds': 2}, and this one has {'seeds': 3}"):
        checkpoints.restore(tmp_path, run(0), {"seeds": 3}, 4)
    for path in (tmp_path / "run" / "3").rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="step 3 .*Step 2 is used instead"):
        found, done = checkpoints.restore(tmp_path, run(0), settings, 4)
    np.testing.assert_array_equal(found.params["w"], 2.0)
    assert done == progress(2)
    checkpoints.save(tmp_path, run(4), progress(3), settings)
    np.testing.assert_array_equal(
        checkpoints.restore(tmp_path, run(0), settings, 4)[0].params["w"], 4.0
    )


@pytest.mark.slow
def test_a_sequence_of_tasks_goes_on_in_the_middle_of_one(tmp_path):
    counted, _ = problem()
    tasks, ticks = [counted, counted._replace(name="again")], []

    def tick():
        ticks.append(1)
        if len(ticks) == 4:
            raise KeyboardInterrupt

    go = functools.partial(continual.one, "gru_bptt", tasks, 400, 2, 2)
    whole = go(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        go(tick, tmp_path)
    resumed = go(lambda: None, tmp_path)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert resumed.rate == whole.rate


@pytest.mark.slow
def test_the_learning_rate_is_the_best_after_an_epoch_and_no_edge_of_those_tried():
    counted, _ = problem()
    row = ROWS["gru_bptt"]._replace(rates=(1e-6, 1e-5))
    outcome = learned(make_learner(row, counted, 400), 1, 2, lambda: None)
    assert set(row.rates) < set(outcome.tried) and len(outcome.tried) <= MOST_RATES + 1
    assert outcome.rate == min(outcome.tried, key=lambda rate: outcome.tried[rate])
    assert outcome.rate > 1e-5, "an epoch wants a higher one"


@pytest.mark.parametrize(
    ("best", "more"), [(0.1, (1.0, 10.0, 100.0)), (0.01, ()), (0.001, (1e-4, 1e-5, 1e-6))]
)
def test_learning_rates_go_on_beyond_an_edge(best, more):
    assert beyond([0.001, 0.01, 0.1], best, 3) == pytest.approx(more)


@pytest.mark.slow
def test_a_fitted_readout_is_better_than_a_drawn_one_and_serves_whole_sentences():
    counted, _ = problem()
    outcome = learned(make_learner(ROWS["esn_ridge"], counted, 2000), 1, 2, lambda: None)
    assert outcome.test.max() < 0.3, "counting is easy, but not across the edges of calls"


@pytest.mark.slow
def test_videos_are_drawn_anew_and_scored_from_the_second_frame():
    video = bouncing(glyphs("digits"), canvas=(9, 9), frames=4, test_size=4)
    seen = of_video(video, batch_size=2, sequences=4, valid=4, scored=2)
    one, two = (jax.random.key_data(drawn(seen, range(2), epoch)) for epoch in (0, 1))
    assert one.shape[:2] == (2, 2) and not np.intersect1d(one, two).size
    learner = make_learner(ROWS["ptncn"], seen, 5000)
    params = learner.init(jax.random.split(jax.random.key(0), 1)).params
    frames = make_score(learner)(params, seen.test)
    assert frames.shape == (1, 5) and np.isnan(frames[0, 0]) and np.isfinite(frames[0, 1:]).all()
    np.testing.assert_allclose(frames[0, -1], frames[0, 1:4].mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="sequences must be a multiple of 2; got 3"):
        of_video(video, batch_size=2, sequences=3, valid=4, scored=2)


def test_pooled_glyphs_are_means():
    given = glyphs("digits")
    large = given._replace(
        **{k: np.kron(getattr(given, k), np.ones((1, 4, 4))) for k in ("train", "test")}
    )
    np.testing.assert_allclose(pooled(large, 4).train, given.train)
    assert pooled(given, 2) is given, "small ones stay"
    assert canvas_for(large) == (73, 73)
    assert [half.name for half in halves(given)] == ["digits 0-4", "digits 5-9"]


def test_what_is_forgotten():
    losses = np.array([[[1.0, 9.0], [4.0, 2.0]]])  # after the second task, 4 on the first
    kept = Kept(losses, 0.1)
    assert kept.forgotten.tolist() == [3.0] and kept.average.tolist() == [3.0]


def test_the_source_is_the_best_there_is(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCALGRAD_DATA", raising=False)
    assert best_source(None, None, "ptb", "manual") == "manual"
    assert best_source(None, tmp_path, "ptb", "manual") == "ptb"
    assert best_source("shakespeare", tmp_path, "ptb", "manual") == "shakespeare"


@pytest.mark.long
@pytest.mark.parametrize(
    ("part", "options", "pictures"),
    [
        ("text", ["--rows", "ptncn", "gru_eprop", "esn_ridge"], ["curves.png"]),
        ("video", ["--rows", "ptncn", "lstm_bptt"], ["curves.png", "frames.png", "frames.gif"]),
        ("zeroshot", [], ["adaptation.png"]),
        ("continual", [], ["matrices.png"]),
    ],
)
@pytest.mark.few(1)
def test_each_part_runs(part, options, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCALGRAD_DATA", raising=False)
    command = ["ptncn", part, "--size", "short", "--seeds", "2", "--workers", "1"]
    assert main([*command, *options, "--workdir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    content = json.loads((folder / "results.json").read_text())
    assert content["claims"] and "P-TNCN" in text and "claims" in text
    for picture in pictures:
        start = (folder / picture).read_bytes()[:4]
        assert start == (b"\x89PNG" if picture.endswith("png") else b"GIF8")


def test_a_failed_claim_is_an_error(monkeypatch, capsys, tmp_path):
    wrong = Claim("the sun goes round the earth", "it does not", False)
    found = ptncn.continual.Found("", {}, [wrong])
    monkeypatch.setattr(ptncn.continual, "run", lambda *_: found)
    command = ["ptncn", "continual", "--workdir", str(tmp_path)]
    assert main(command) == 1
    assert "error: a claim failed" in capsys.readouterr().err
    assert main([*command, "--size", "short"]) == 0, "a glance claims nothing"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["text", "--rows", "lstm_bptt"], "rows must hold ptncn"),
        (["text", "--rows", "ptncn", "crystal_ball"], "unknown row 'crystal_ball'; choose from: "),
        (["video", "--seeds", "0"], "seeds must be at least 1; got 0."),
        (["video", "--epochs", "0"], "epochs must be at least 1; got 0."),
        (["video", "--data-dir", "/nowhere"], "data_dir must be a folder; got /nowhere."),
        (["video", "--source", "runes"], "glyphs must be one of digits"),
        (["zeroshot", "--source", "runes"], "source must be mnist_notmnist or digits_halves"),
        (["continual", "--source", "runes"], "source must be mnist_notmnist or digits_pairs"),
        (["text", "--source", "runes"], "text must be one of manual"),
    ],
)
def test_a_wrong_option_is_an_error_of_one_line(capsys, tmp_path, argv, message):
    assert main(["ptncn", *argv, "--workdir", str(tmp_path)]) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.slow
def test_gradient_rivals_learn_from_what_is_scored_alone():
    """The first symbol of a sentence follows from nothing: it teaches them nothing."""
    counted, _ = problem()
    learner = make_learner(ROWS["lstm_bptt"], counted, 400)
    run = learner.init(jax.random.split(jax.random.key(0), 1))
    pieces = drawn(counted, range(1), 0)
    one, _ = learner.advance(run, jnp.ones(1), jax.tree.map(lambda a: a[:, :1], pieces))
    params = jax.tree.map(lambda a: a[0], run.params)
    batch = counted.expand(jax.tree.map(lambda a: a[0, 0], pieces))
    mask = np.asarray(batch.mask) * (1 - np.asarray(batch.reset))

    def loss(params):
        carry = learner.model.initialize_carry(jax.random.key(0), (4, SYMBOLS))
        total = 0.0
        for t in range(batch.inputs.shape[1]):
            carry = jax.tree.map(lambda a, t=t: jnp.where(batch.reset[:, t, None], 0.0, a), carry)
            carry, y = learner.model.apply({"params": params}, carry, batch.inputs[:, t])
            total += (optax.softmax_cross_entropy(y, batch.targets[:, t]) * mask[:, t]).sum()
        return total / mask.sum()

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params))
    expected = optax.apply_updates(params, updates)
    found = jax.tree.map(lambda a: a[0], one.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
