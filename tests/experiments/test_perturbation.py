"""The experiment on perturbations: its data, floors and theory by independent facts; short runs."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import localgrad
from experiments import perturbation
from experiments.__main__ import main
from experiments.claims import Claim
from experiments.datasets import mackey_glass, scaled, weather
from experiments.folder import Pieces
from experiments.perturbation import claims, learner, moments, problems, report, series, variance
from experiments.perturbation.rows import ROWS, Row
from experiments.perturbation.windows import (
    Series,
    Window,
    guess_floor,
    linear_floor,
    sampler,
    tiled,
)

REAL = os.environ.get("LOCALGRAD_DATA")
real = pytest.mark.skipif(not REAL, reason="LOCALGRAD_DATA names no folder of real data")
HEADER = "date,Visibility,DryBulbFarenheit,DryBulbCelsius,WindSpeed"


@pytest.fixture(autouse=True)
def nothing_is_found_by_itself(monkeypatch):
    monkeypatch.delenv("LOCALGRAD_DATA", raising=False)


def ramp(rows=50):
    """A series whose rows say which they are."""
    inputs = np.stack([np.arange(rows), -np.arange(rows)], axis=1).astype(float)
    return Series(inputs, 2.0 * np.arange(rows))


def test_mackey_glass_has_the_variance_and_the_memory_of_the_equation():
    chaos = mackey_glass(3000, seed=1)
    assert np.array_equal(chaos, mackey_glass(3000, seed=1))
    assert not np.array_equal(chaos, mackey_glass(3000, seed=2))
    x = np.arctanh(chaos) + 1
    assert 0.2 < x.min() and x.max() < 1.4  # its attractor at a delay of 17
    assert abs(chaos.var() - 0.0466) < 0.002
    # dx/dt + 0.1 x is a function of x(t - 17) alone, but for the steps of Euler and of the sample.
    slope = (x[19:] - x[17:-2]) / 2
    past = x[1:-18]
    production = slope + 0.1 * x[18:-1]
    np.testing.assert_allclose(production, 0.2 * past / (1 + past**10), atol=6e-3)


def test_windows_show_the_series_and_score_each_row_once():
    window = Window(steps=7, washout=3)
    batch = tiled(ramp(), window)
    rows = np.asarray(batch.inputs)[..., 0]
    scored = rows[np.asarray(batch.mask) > 0]
    assert scored.tolist() == list(range(3, 3 + 4 * len(rows)))
    assert scored[-1] + 4 >= 50
    np.testing.assert_array_equal(batch.targets[..., 0], 2 * rows)
    drawn = sampler(window)(ramp(), jax.random.key(0), 500)
    first = np.asarray(drawn.inputs)[:, 0, 0]
    assert first.min() == 0 and first.max() == 50 - 7
    np.testing.assert_array_equal(drawn.inputs[..., 0], first[:, None] + np.arange(7))
    np.testing.assert_array_equal(drawn.targets[..., 0], 2 * drawn.inputs[..., 0])


def test_a_linear_filter_finds_a_filter_that_is_there():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(400, 2))
    targets = 0.5 + inputs[:, 0] - 2 * np.roll(inputs[:, 1], 2)
    window = Window(steps=9, washout=2)
    train, test = (
        tiled(Series(inputs[a], targets[a]), window) for a in np.split(np.arange(400), 2)
    )
    assert linear_floor(train, test, taps=3) < 1e-10
    assert 3 < linear_floor(train, test, taps=2) < 5  # the lagged term's variance, 4
    assert abs(guess_floor(test, np.asarray(test.targets)) - 0) < 1e-12


def test_the_published_direction_of_mackey_glass_is_a_delay_line():
    there, back = series.ahead(0, 20), series.behind(0, 20)
    assert back.floors["linear filter, 20 taps"] < 1e-9
    assert 0.009 < there.floors["linear filter, 20 taps"] < 0.013
    assert there.floors["linear filter, 20 taps"] < there.floors["linear, of now"]
    for problem in (there, back):
        assert abs(problem.floors["mean in training"] - 0.0466) < 0.003
        lag = series.DELAY if problem is there else -series.DELAY
        x, d = np.asarray(problem.test.inputs)[0, :, 0], np.asarray(problem.test.targets)[0, :, 0]
        shown = x[lag:], d[:-lag]
        if lag < 0:
            shown = x[:lag], d[-lag:]
        np.testing.assert_allclose(*shown, rtol=1e-6)


def test_copy_asks_for_what_was_shown_and_its_floors_can_be_counted():
    problem = problems.copy(0, 20, length=3, delay=2, symbols=4)
    batch = problem.sample(None, jax.random.key(0), 50)
    shown, asked = np.asarray(batch.inputs).argmax(-1), np.asarray(batch.targets)
    assert (shown[:, 3:] == [0, 0, 5, 5, 5]).all() and not asked[:, :5].any()
    assert set(np.unique(shown[:, :3])) == {1, 2, 3, 4}
    np.testing.assert_array_equal(asked[:, 5:].argmax(-1), shown[:, :3])
    assert problem.floors["always 0"] == pytest.approx(3 / 8 / 6)
    assert problem.floors["each step's mean"] == pytest.approx(3 / 8 * (1 - 1 / 4) / 6)
    assert problem.floors["linear filter, 6 taps"] < 1e-9
    assert problem.floors["linear filter, 3 taps"] == pytest.approx(3 / 8 * 0.75 / 6, rel=0.05)
    assert float(problem.also[1](asked, batch)) == 0


def test_the_sign_is_at_the_first_step_and_counts_at_the_last():
    problem = problems.sign(0, 20)
    batch = problem.sample(None, jax.random.key(0), 200)
    np.testing.assert_array_equal(batch.inputs[:, 0, 0], batch.targets[:, -1, 0])
    np.testing.assert_array_equal(batch.mask, np.eye(10)[[-1] * 200])
    assert problem.floors["always 0"] == 1
    assert problem.floors["linear filter, 10 taps"] < 1e-9
    assert float(problem.also[1](-batch.targets, batch)) == 100


def test_weather_leaves_celsius_out_and_scales_by_the_first_rows(tmp_path):
    folder = tmp_path / "weather_wth"
    folder.mkdir()
    rows = [f"d,{v},{f},{c},{w}" for v, f, c, w in [(10, 16, -9, 7), (9, 20, -7, 3), (8, 40, 4, 5)]]
    (folder / "WTH.csv").write_text("\n".join([HEADER, *rows]))
    table = weather(tmp_path)
    assert table.columns == ("Visibility", "DryBulbFarenheit", "WindSpeed") and table.target == 1
    np.testing.assert_array_equal(table.values[:, 1], [16, 20, 40])
    np.testing.assert_allclose(scaled(table.values, 2)[:, 1], [0, 1, 6])
    (folder / "WTH.csv").write_text("date,Visibility\nd,1")
    with pytest.raises(ValueError, match="must have a column DryBulbFarenheit; got date, Vis"):
        weather(tmp_path)


def test_without_the_weather_the_error_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no WTH.csv in .*weather_wth. Put the WTH.csv of"):
        weather(tmp_path)


@real
def test_the_real_weather_has_the_known_floors(monkeypatch):
    monkeypatch.setenv("LOCALGRAD_DATA", str(REAL))
    table = weather(None)
    assert table.values.shape == (35064, 9)
    hours = {h: series.forecast(0, 20, h, Path(str(REAL))) for h in series.HOURS}
    for h, known in ((1, 0.000598), (24, 0.00582), (48, 0.01083)):  # on rows that differ a little
        assert hours[h].floors["what is now"] == pytest.approx(known, rel=0.1)
        assert hours[h].test.inputs.shape == hours[1].test.inputs.shape
        assert hours[h].floors["linear, of now"] < hours[h].floors["what is now"]


def small_net(steps=6):
    cell = nn.SimpleCell(3, bias_init=nn.initializers.normal(1.0))
    model = localgrad.Network((cell,), readout=nn.Dense(2))
    keys = jax.random.split(jax.random.key(3), 3)
    inputs = jax.random.normal(keys[0], (1, steps, 2))
    batch = localgrad.Batch(inputs, jax.random.normal(keys[1], (1, steps, 2)))
    carry = model.initialize_carry(keys[2], inputs[:, 0].shape)
    return model, model.init(keys[2], carry, inputs[:, 0])["params"], batch


@pytest.mark.slow
def test_theory_has_the_librarys_gradients_for_means():
    model, params, batch = small_net()
    linear = moments.linearised(params, batch.inputs[0], batch.targets[0])
    full = localgrad.bptt(model, optax.l2_loss, reduction="sum")
    short = localgrad.tbptt(model, optax.l2_loss, horizon=1, reduction="sum")
    for credit, rule in (("total", full), ("causal", full), ("step", short)):
        found = moments.node_moments(linear, credit, activity=False).mean
        exact, _ = rule(params, rule.init(params), batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, exact)


@pytest.mark.slow
def test_theory_of_total_credit_is_the_sum_written_out():
    """|g|^2 Q + |G|^2 for the recurrent layer; the readout's credit is of its step."""
    _, params, batch = small_net()
    linear = moments.linearised(params, batch.inputs[0], batch.targets[0])
    said = moments.node_moments(linear, "total", activity=False)
    g = np.asarray(linear.losses, np.float64).sum(0)
    hidden, readout = (np.asarray(x, np.float64) for x in linear.inputs)
    cell = float(moments.square(said.mean["cells_0"]))
    expected = g @ g * 3 * (hidden**2).sum() + cell
    own = np.asarray(linear.losses, np.float64).reshape(6, 6, 5)
    for t in range(6):
        for s in range(6):
            pairs = own[t, s, 3:] @ own[s, t, 3:] + (2 * (own[t] ** 2).sum() if s == t else 0)
            expected += readout[s] @ readout[t] * pairs
    assert float(said.variance) == pytest.approx(float(expected), rel=1e-4)


def test_theory_of_activity_is_what_many_draws_show():
    """Linear arithmetic alone: draws of the noise through the same derivatives."""
    _, params, batch = small_net()
    linear = moments.linearised(params, batch.inputs[0], batch.targets[0])
    said = moments.node_moments(linear, "step", activity=True)
    noise = np.random.default_rng(0).normal(size=(40_000, linear.losses.shape[1]))
    gaps = noise @ np.asarray(linear.losses).T
    made = [
        np.einsum("dt,dtn,tk->dkn", gaps, np.einsum("dm,tnm->dtn", noise, a), x)
        for a, x in zip(linear.nodes, linear.inputs, strict=True)
    ]
    found = sum(m.var(axis=0).sum() for m in made)
    assert found == pytest.approx(float(said.variance), rel=0.05)
    np.testing.assert_allclose(made[1].mean(0)[:-1], said.mean["readout"]["kernel"], atol=0.1)


def tiny(updates=4):
    """A problem of one step, which every network can learn."""
    window = Window(steps=3, washout=1)
    data = Series(jnp.ones((20, 1)), jnp.ones(20))
    batch = tiled(Series(np.ones((20, 1)), np.ones(20)), window)
    also = ("% of variance", lambda outputs, batch: jnp.zeros(()))
    return problems.Problem(
        name="tiny",
        title="tiny",
        units=2,
        outputs=1,
        batch_size=2,
        updates=updates,
        loss=optax.squared_error,
        data=data,
        sample=sampler(window),
        valid=batch,
        test=batch,
        also=also,
        floors={"always 0": 1.0},
    )


@pytest.mark.slow
def test_rates_fall_on_a_line_and_more_are_tried_beyond_an_edge(monkeypatch, tmp_path):
    row = ROWS["readout_only"]._replace(rates=(1e-4, 1e-3))
    monkeypatch.setitem(ROWS, "readout_only", row)
    budget = learner.Budget(seeds=2, checks=2, seed=0)
    (found,) = learner.compete([tiny()], ["readout_only"], budget, 1, Pieces(tmp_path))
    outcome = found["readout_only"]
    assert min(outcome.tried) == 1e-4 and 1e-3 < outcome.rate < max(outcome.tried)
    assert outcome.rate == min(outcome.tried, key=outcome.tried.get)
    assert outcome.test.shape == (2, 3) and outcome.steps.tolist() == [0, 2, 4]
    seen = []
    own = learner.Learner(0, lambda run, rates, keys, data: seen.append(rates) or run, None)
    keys = jax.random.split(jax.random.key(0))
    list(learner.segments(own, tiny(), [1.0, 2.0], keys, budget))
    np.testing.assert_allclose(
        np.concatenate(seen, axis=1), [[1, 0.75, 0.5, 0.25], [2, 1.5, 1, 0.5]]
    )


def outcome(*final):
    test = np.stack([np.ones(len(final)), np.array(final)], axis=1)
    return learner.Outcome(0.1, 0.1, {}, np.array([0, 10]), test, np.zeros(len(final)), 1.0)


def test_updates_to_a_level_are_read_off_the_curve():
    np.testing.assert_allclose(outcome(0.5, 0.0, 0.9).updates_to(0.5), [10, 5, np.inf])


def test_the_table_has_rows_and_floors():
    panel = report.Panel(tiny(), {"bptt": outcome(0.1, 0.2), "np_step": outcome(0.9, 0.9)})
    text = report.panel_table(panel)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert any(row.startswith("BPTT 0.1500 ± 0.0707 0.0 ± 0.0 0.1 ") for row in rows)
    assert rows[-1] == "always 0 1.0000"
    content = report.panel_as_json(panel)
    assert content["rows"]["np_step"]["test"] == [[1.0, 0.9], [1.0, 0.9]]
    json.dumps(content, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "rows", "there", "not_there"),
    [
        ("sign", ["bptt"], ["rate ", "to its own ", "ms "], ["recall", "other rows"]),
        ("recall", ["bptt", "np_step"], ["cross-entropy", "other rows"], []),
    ],
)
def test_a_footnote_is_of_the_tables_that_are_there(name, rows, there, not_there):
    panel = report.Panel(tiny()._replace(name=name), {row: outcome(0.1, 0.2) for row in rows})
    said = report.notes_of([panel])
    assert all(word in said for word in there) and not any(word in said for word in not_there)
    alone = report.notes_of([])  # under the table of several numbers of units
    assert [line.split("  ")[0] for line in alone.splitlines() if line[0] != " "] == [
        "test",
        "to BPTT's",
    ]


def test_a_variance_that_is_not_theorys_fails_its_claim():
    sizes = [(8, steps) for steps in variance.STEPS] + [(n, 20) for n in variance.UNITS if n != 8]
    scale = {"wp": 0, "np_total": 1, "np_causal": 1, "anp_causal": 1}
    scale |= {"np_step": 0, "np_resync": 0, "anp_step": 0}
    points = [
        variance.Point(kind, n, t, v := (1 + (kind == "np_step")) * t**power, 0.0, v, 1.0)
        for n, t in sizes
        for kind, power in scale.items()
    ]
    assert all(claim.holds for claim in claims.of_variance(points))
    wrong = [p._replace(measured=1.1 * p.measured) if p.kind == "wp" else p for p in points]
    assert [c.text for c in claims.of_variance(wrong) if not c.holds] == [
        "variance: WP is within 5 % or three standard errors of P + 1"
    ]


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.long
def test_a_short_run_goes_on_learns_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(series, "SIZES", (4, 8))
    config = perturbation.Config(
        parts=("credit", "weather", "units"),
        rows=("bptt", "anp_step"),
        seeds=2,
        workers=1,
        short=True,
        workdir=tmp_path,
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(perturbation, "over_units", interrupt)
        perturbation.run(config)
    before = json.loads((tmp_path / "unfinished.json").read_text())
    with monkeypatch.context() as patch:
        learned, units = learner.learned, []
        patch.setattr(learner, "learned", lambda *a: units.append(a[2].units) or learned(*a))
        perturbation.run(config)
    assert units == [4, 4, 8, 8]  # what was finished is not learned again
    text = capsys.readouterr().out
    assert "weather is left out: say --data-dir DIR" in text and "always the same" in text
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["panels"] == before["panels"]
    assert [panel["problem"] for panel in content["panels"]] == ["sign", "recall"]
    assert [panel["units"] for panel in content["units"]] == [4, 8]
    assert np.shape(content["panels"][0]["rows"]["anp_step"]["test"]) == (2, 3)
    for name in ("curves", "units"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.slow
def test_a_short_run_measures_variances(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(variance, "UNITS", (4, 8))
    monkeypatch.setattr(variance, "STEPS", (20, 5))
    found = perturbation.run(
        perturbation.Config(parts=("variance",), workers=1, short=True, workdir=tmp_path)
    )
    assert "slope" in capsys.readouterr().out and len(found) == 10
    points = json.loads((tmp_path / "results.json").read_text())["variance"]
    assert len(points) == 3 * 7
    assert all(0.5 < point["measured"] / point["predicted"] < 1.5 for point in points)
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.few(1)
def test_every_row_makes_a_rule_of_its_network(name):
    row, problem = ROWS[name], tiny()
    model = row.model(2, 1)
    batch = problem.sample(problem.data, jax.random.key(0), 2)
    carry = model.initialize_carry(jax.random.key(0), batch.inputs[:, 0].shape)
    params = model.init(jax.random.key(1), carry, batch.inputs[:, 0])["params"]
    rule = row.rule(model, problem.loss, jax.random.key(2))
    updates, _ = rule(params, rule.init(params), batch)
    assert float(moments.square(updates)) > 0
    assert isinstance(row, Row) and list(row.rates) == sorted(row.rates)


def test_a_failed_claim_is_an_error(monkeypatch, capsys, tmp_path):
    wrong = Claim("noise is a gradient", "it is not", False)
    monkeypatch.setattr(perturbation, "panels_of", lambda config, pieces: [])
    monkeypatch.setattr(perturbation, "over_units", lambda config, panels, pieces: [])
    monkeypatch.setattr(report, "units_table", lambda panels: "")
    monkeypatch.setattr(perturbation.figures, "units", lambda panels, path: None)
    monkeypatch.setattr(claims, "of_units", lambda panels: [wrong])
    assert main(["perturbation", "--parts", "units", "--workdir", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert "FAILS  noise is a gradient: it is not" in out.out
    assert "error: a claim failed" in out.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "seeds must be at least 1; got 0."),
        (["--draws", "150"], "draws must be a multiple of 100; got 150."),
        (["--checks", "7"], "checks must divide the 1000 updates; got 7."),
        (["--rows", "wp"], "rows must hold bptt, which the others are measured against."),
        (["--rows", "bptt", "wpp"], "unknown row 'wpp'; choose from: bptt, tbptt1, "),
        (["--parts"], "parts is empty; name at least one."),
        (["--data-dir", "/nowhere"], "data_dir must be a folder; got /nowhere."),
    ],
)
def test_a_wrong_number_is_an_error_of_one_line(capsys, tmp_path, argv, message):
    assert main(["perturbation", "--workdir", str(tmp_path), *argv]) == 2
    assert f"error: {message}" in capsys.readouterr().err
