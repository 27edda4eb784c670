"""The experiment on online rules: its streams and floors by independent facts; short runs."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import online
from experiments.__main__ import main
from experiments.claims import Claim
from experiments.online import claims, figures, lags, learner, problems, report
from experiments.online.rows import CHUNK, ROWS

BUDGET = learner.Budget(units=4, calls=2, checks=2, seeds=2, seed=0)


@pytest.fixture(autouse=True)
def nothing_is_found_by_itself(monkeypatch):
    monkeypatch.delenv("LOCALGRAD_DATA", raising=False)


def drawn(problem, calls, pause=1, seed=0):
    """Calls of one stream after another, joined."""
    keys = jax.random.split(jax.random.key(seed), calls)
    _, found = jax.lax.scan(
        lambda stream, key: problem.draw(stream, key, jnp.asarray(pause)),
        problem.begin(jax.random.key(seed)),
        keys,
    )
    return jax.tree.map(lambda a: np.concatenate(np.asarray(a), axis=1), found)


@pytest.mark.parametrize("pause", [1, 5, problems.LONGEST])
@pytest.mark.few(1)
def test_copy_asks_for_each_bit_that_was_marked_once(pause):
    size, length = 50, problems.LENGTH
    batch = jax.tree.map(np.asarray, problems.copied(jax.random.key(0), size, jnp.asarray(pause)))
    period = 2 * length + pause
    whole = problems.STEPS // period
    assert batch.mask[0].sum() == whole * length  # an episode that is cut asks for nothing
    np.testing.assert_array_equal(batch.mask, batch.inputs[..., 2])
    np.testing.assert_array_equal(batch.reset[0].nonzero()[0] % period, 0)
    for start in range(0, whole * period, period):
        shown = batch.inputs[:, start : start + length, 0]
        asked = batch.targets[:, start + period - length : start + period].argmax(-1)
        assert set(np.unique(shown)) == {-1, 1} and batch.inputs[:, start : start + length, 1].all()
        np.testing.assert_array_equal(shown > 0, asked)
        assert not batch.inputs[:, start + length : start + period, :2].any()
        assert batch.mask[:, start + period - length : start + period].all()


def test_xor_is_of_the_two_marked_bits_of_its_episode():
    batch = drawn(problems.xor(0), 5)
    marks, asked = batch.inputs[..., 1], batch.mask
    assert marks.sum(1).tolist() == (2 * asked.sum(1)).tolist() and batch.inputs[..., 0].any()
    for row in range(problems.STREAMS):
        pairs = batch.inputs[row, marks[row] > 0, 0].reshape(-1, 2)
        answers = batch.targets[row, asked[row] > 0].argmax(-1)
        np.testing.assert_array_equal(pairs[:, 0] != pairs[:, 1], answers)
        first = marks[row].nonzero()[0].reshape(-1, 2)[:, 0]
        np.testing.assert_array_equal(batch.reset[row].nonzero()[0], first)
        assert (asked[row].nonzero()[0] - first == problems.PERIOD - 1).all()


def test_coins_have_the_known_floors():
    known = [0.6616, 0.6277, 0.5192, 0.4545]
    np.testing.assert_allclose([*problems.coin_floors().values()], known, atol=5e-5)


def test_the_chances_of_a_coin_go_on_from_call_to_call():
    problem = problems.coin(0)
    batch = drawn(problem, 1000)
    seen, landed = batch.inputs[..., 0] > 0, batch.targets[..., 1]
    a, b = (np.roll(seen, lag, axis=1) for lag in (problems.FIRST, problems.SECOND))
    counted = np.arange(seen.shape[1]) >= problems.SECOND
    for first in (False, True):
        for second in (False, True):
            there = (a == first) & (b == second) & counted[None]
            share, count = landed[there].mean(), there.sum()
            chance = 0.5 + 0.5 * first - 0.25 * second
            assert abs(share - chance) <= 4 * math.sqrt(chance * (1 - chance) / count)
    assert not batch.reset.any() and batch.mask.all()


def test_who_knows_the_chances_of_a_coin_is_at_the_floor():
    problem = problems.coin(0)
    logits = jnp.log(jnp.maximum(problem.test.targets, 1e-12))
    value = jnp.average(problem.loss(logits, problem.test.targets), weights=problem.test.mask)
    assert abs(float(value) - problem.floors["knows both"]) < 0.01
    assert abs(float(problem.also[1](logits, problem.test))) < 1e-6
    assert float(problem.also[1](jnp.zeros_like(logits), problem.test)) > 0.1


def test_mackey_glass_goes_on_and_a_filter_knows_it_better_than_what_is_now():
    problem = problems.chaos(0)
    batch = drawn(problem, 4)
    went_on = ~batch.reset[:, 1:]
    gaps = (batch.inputs[:, 1:] - batch.targets[:, :-1])[..., 0]
    assert went_on.mean() > 0.9 and not gaps[went_on].any()
    floors = [*problem.floors.values()]
    assert floors == sorted(floors, reverse=True) and 0.9 < floors[0] < 1.1
    inputs, targets = (np.asarray(a) for a in problem.test[:2])
    np.testing.assert_allclose(targets[:, :-1], inputs[:, 1:])


def test_the_text_asks_for_what_it_shows_next():
    problem = problems.characters(0, None)
    batch = drawn(problem, 3)
    shown, asked = batch.inputs[:, 1:].argmax(-1), batch.targets[:, :-1].argmax(-1)
    inside = (batch.mask[:, 1:] > 0) & (batch.mask[:, :-1] > 0)
    assert inside.mean() > 0.8
    np.testing.assert_array_equal(shown[inside], asked[inside])
    assert not batch.mask[batch.reset].any()
    assert problem.floors["bigram"] < problem.floors["unigram"] < problem.floors["uniform"]


def test_a_pause_grows_only_where_it_was_learned():
    pauses = problems.grown(np.array([1, 10, 30, 10]), np.array([0.05, 0.09, 0.0, 0.2]))
    assert pauses.tolist() == [2, 12, problems.LONGEST, 10]


def test_the_mean_of_chunks_is_that_of_their_steps():
    rng = np.random.default_rng(0)
    losses = rng.random((2, 3, 4, problems.STEPS))
    mask = (rng.random(losses.shape) < 0.2).astype(float)
    mask[..., :CHUNK] = 0
    parts = [np.split(a, problems.STEPS // CHUNK, axis=-1) for a in (losses * mask, mask)]
    sums, weights = (np.stack([p.sum(axis=(2, 3)) for p in part], axis=2) for part in parts)
    means = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
    np.testing.assert_allclose(
        learner.mean_loss(means, mask), (losses * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    )


def test_of_rates_as_good_as_each_other_the_middle_one_is_taken():
    problem, grid = problems.xor(0), (1e-3, 1e-2, 1e-1)
    best = learner.best_of
    assert best({1e-3: 0.5, 1e-2: 0.2, 1e-1: 0.1}, grid, problem) == 1e-1
    assert best({1e-3: 0.5, 1e-2: 0.1005, 1e-1: 0.1}, grid, problem) == 1e-2
    assert best({1e-3: 1e-9, 1e-2: 1e-5, 1e-1: 0.1}, grid, problem) == 1e-2
    assert best({1e-3: math.nan, 1e-2: math.nan, 1e-1: math.inf}, grid, problem) == 1e-2


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.few(4)
def test_every_row_takes_its_network_in_streams(name):
    row, problem = ROWS[name], problems.xor(0)
    model = row.model(8, problem.outputs)
    x = problem.test.inputs[: problems.STREAMS, 0]
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    params = jax.eval_shape(model.init, jax.random.key(1), carry, x)["params"]
    rule = row.rule(model, problem.loss, jax.random.key(2), x)
    state = jax.eval_shape(rule.init, params)
    _, batch = problem.draw(problem.begin(jax.random.key(0)), jax.random.key(0), jnp.ones(()))
    piece = jax.tree.map(lambda a: a[:, : row.chunk or problems.STEPS], batch)
    updates, after = jax.eval_shape(rule.__call__, params, state, piece)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert problems.STEPS % (row.chunk or 1) == 0 and list(row.rates) == sorted(row.rates)
    assert ROWS[row.reference].family == "bptt" and ROWS[row.reference].cells is row.cells
    assert row.family in figures.COLOURS


@pytest.mark.long
@pytest.mark.slow
def test_credit_of_exact_rules_in_chunks_is_the_gradient(monkeypatch):
    """RTRL, and e-prop on units that are apart; one step back is something else."""
    monkeypatch.setattr(lags, "PAUSES", (1, 8))
    monkeypatch.setattr(lags, "SIZE", 2)
    problem = problems.copy(0)
    for name in ("rtrl", "eprop_lru", "tbptt1"):
        keys = learner.keys_of(BUDGET)
        row = ROWS[name]
        model, x = row.model(BUDGET.units, problem.outputs), problem.test.inputs[:1, 0]
        made = [
            model.init(key, model.initialize_carry(key, x.shape), x)["params"]
            for key in keys[1, : BUDGET.seeds]
        ]
        trained = jax.tree.map(lambda *a: jnp.stack(a), *made)
        found = lags.cosines(name, problem, trained, BUDGET)
        assert found.shape == (2, 2, BUDGET.seeds)
        if name == "tbptt1":
            assert found[:, 1].max() < 0.99
        else:
            np.testing.assert_allclose(found, 1, atol=1e-4)


@pytest.mark.slow  # as `perturbation`, which learns alike, is run in full
def test_a_short_run_learns_prints_draws_and_is_not_run_twice(tmp_path, capsys, monkeypatch):
    config = online.Config(
        problems=("copy", "mackey_glass"),
        rows=("bptt", "tbptt1"),
        seeds=2,
        workers=1,
        short=True,
        workdir=tmp_path,
    )
    online.run(config)
    text = capsys.readouterr().out
    assert "chance" in text and "persistence" in text and "µs a step" in text
    content = json.loads((tmp_path / "results.json").read_text())
    first, second = (panel["rows"]["tbptt1"] for panel in content["panels"])
    assert np.shape(first["test"]) == np.shape(second["test"]) == (2, 3)
    assert first["test"][0][0] != first["test"][0][-1]
    assert np.shape(content["cosines"]["rows"]["tbptt1"]) == (2, len(lags.PAUSES), 2)
    assert content["prices"]["bptt"]["state"] == 0 < content["prices"]["bptt"]["microseconds"]
    for name in ("curves", "lags", "prices"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(learner, "learned", None)
    monkeypatch.setattr(online, "cosines_of", lambda config, panel: {})
    online.run(config)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["panels"] == content["panels"]
    other = ["--seed", "1", "--seeds", "2", "--rows", "bptt", "--problems", "copy", "--short"]
    assert main(["online", "--workdir", str(tmp_path), *other]) == 2
    assert "Remove that folder, or give other --workdir." in capsys.readouterr().err


def test_columns_that_are_not_there_have_no_note():
    """BPTT alone is held against nothing: its price has no cosines."""
    panel = report.Panel(problems.copy(0), {"bptt": None})
    prices = {"bptt": lags.Price(microseconds=2.0, state=0.0, parameters=1234)}
    columns = ["rule", "parameters", "updates", "µs a step", "state, KiB"]
    table, said = report.prices_table(prices, {}), report.notes_of([panel], prices, {})
    assert re.split(r"\s\s+", table.splitlines()[0]) == columns
    assert not re.search("cosine|other rows", said)
    assert all(name in said for name in ("parameters, updates", "µs a step", "state, KiB", "pause"))
    near = {"tbptt1": np.zeros((2, len(lags.PAUSES), 3))}
    both = prices | {"tbptt1": prices["bptt"]}
    assert "cosine, " in report.prices_table(both, near)
    assert "cosine " in report.notes_of([panel], both, near)
    assert "µs" not in report.notes_of([panel], {}, {})


def test_a_failed_claim_is_an_error(monkeypatch, capsys, tmp_path):
    wrong = Claim("a rule is magic", "it is not", False)
    panel = report.Panel(problems.xor(0), {})
    monkeypatch.setattr(online, "panels_of", lambda config: [panel])
    monkeypatch.setattr(online.figures, "curves", lambda panels, path: None)
    monkeypatch.setattr(claims, "of_panel", lambda panel: [wrong])
    assert main(["online", "--problems", "xor", "--workdir", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert "FAILS  a rule is magic: it is not" in out.out
    assert "error: a claim failed" in out.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "seeds must be at least 1; got 0."),
        (["--checks", "7"], "checks (7) must divide the calls (600)."),
        (["--rows", "eprop"], "rows must hold bptt, which others are measured against."),
        (["--rows", "bptt", "rflo"], "rows must hold bptt_rate, which others are measured"),
        (["--rows", "bptt", "rtlr"], "unknown row 'rtlr'; choose from: bptt, tbptt10, "),
        (["--problems"], "problems is empty; name at least one."),
        (["--data-dir", "/nowhere"], "data_dir must be a folder; got /nowhere."),
    ],
)
def test_a_wrong_number_is_an_error_of_one_line(capsys, tmp_path, argv, message):
    assert main(["online", "--workdir", str(tmp_path), *argv]) == 2
    assert f"error: {message}" in capsys.readouterr().err
