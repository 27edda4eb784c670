"""The theory of linear networks beside simulations: a short run, and what a failure looks like."""

import json

import jax
import numpy as np
import pytest

from experiments import linear_dynamics
from experiments.__main__ import main
from experiments.linear_dynamics import ranks
from experiments.linear_dynamics.table import Finding, Row, table

pytestmark = pytest.mark.long
CHEAP = ("window", "nonlinearity")


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear_dynamics")
    config = linear_dynamics.Config(phenomena=CHEAP, short=True, workdir=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_dynamics, "as_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            linear_dynamics.run(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_dynamics, "PHENOMENA", dict.fromkeys(CHEAP, interrupt))
        return linear_dynamics.run(config), folder  # nothing is computed again


def test_every_claim_holds(short):
    findings, _ = short
    assert tuple(findings) == CHEAP
    rows = [row for finding in findings.values() for row in finding.rows]
    assert sum(row.bar is not None for row in rows) == 4
    assert [row for row in rows if not row.holds] == []
    assert np.isfinite([row.error for row in rows if row.bar is not None]).all()


def test_another_seed_is_another_simulation(short):
    """Of networks that were trained, which the claims hold for too."""
    with jax.enable_x64(True):
        other = ranks.nonlinearity(100, seed=1).rows
    for one, two in zip(short[0]["nonlinearity"].rows, other, strict=True):
        assert one.claim == two.claim and two.holds
        assert one.error is None or one.error != two.error


def test_every_phenomenon_is_told_the_seed(monkeypatch):
    """The last argument of each function, but of those that take the whole configuration."""
    told = {}
    for name, look in linear_dynamics.PHENOMENA.items():
        if name.startswith("learned"):
            continue
        for module in ("aligned", "points", "journeys", "ranks"):
            if hasattr(getattr(linear_dynamics, module), name):
                at = f"experiments.linear_dynamics.{module}.{name}"
                monkeypatch.setattr(at, lambda *args, name=name: told.update({name: args[-1]}))
        look(linear_dynamics.Config(seed=7))
    assert set(told.values()) == {7} and len(told) == 13


def test_writes_json_and_figures(short):
    findings, folder = short
    content = json.loads((folder / "results.json").read_text())
    assert content["config"]["short"] is True and "jax" in content["versions"]
    assert set(content["seconds"]) == set(CHEAP)
    for name, finding in findings.items():
        assert [row["claim"] for row in content["rows"][name]] == [r.claim for r in finding.rows]
        assert all(row["holds"] for row in content["rows"][name])
    for name in CHEAP:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_float64_stays_inside(short):
    assert not jax.config.jax_enable_x64


def test_a_failure_is_visible(monkeypatch, capsys, tmp_path):
    rows = [
        Row("3", "the sun goes round the earth", "1", "0", 1.0, 0.1),
        Row("4", "it broke", "1", "nan", float("nan"), 0.1),
        Row("5", "so be it", "1", "1", 0.0, 0.1),
        Row("6", "who knows", "not predicted", "7"),
    ]
    lines = table(rows).splitlines()
    assert [line.split()[-1] for line in lines[2:5]] == ["FAILS", "FAILS", "holds"]
    assert lines[-2:] == ["6  who knows", "      7"]
    monkeypatch.setitem(linear_dynamics.PHENOMENA, "saddle", lambda config: Finding(rows, {}))
    monkeypatch.setattr(linear_dynamics.figures, "draw", lambda findings, folder: [])
    command = ["linear_dynamics", "--phenomena", "saddle", "--workdir", str(tmp_path)]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "2 of 3 claims of the theory FAIL:\n  row 3: the sun goes round the earth\n" in said.out
    assert "error: a claim failed" in said.err
    (found,) = json.loads((tmp_path / "results.json").read_text())["rows"].values()
    assert [row["holds"] for row in found] == [False, False, True, True]
    assert found[1]["error"] is None
    monkeypatch.setitem(linear_dynamics.PHENOMENA, "saddle", lambda config: Finding(rows[2:], {}))
    assert main(command) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phenomena": ("sadle",)}, "unknown phenomenon 'sadle'; choose from: trajectories, "),
        ({"phenomena": ()}, "no phenomenon given; choose from: trajectories, saddle"),
        ({"updates": 3}, "updates must be at least 20; got 3."),
    ],
)
def test_what_cannot_run_says_so(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        linear_dynamics.run(linear_dynamics.Config(**changes, workdir=tmp_path))
