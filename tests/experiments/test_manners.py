"""The manners of the command line: what it writes where, how much it says, and how it stops."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from experiments import compare, deep, progress
from experiments.__main__ import main
from experiments.folder import claim_folder, write_results
from experiments.online import report as online
from experiments.report import circumstances, footnote

ROOT = Path(__file__).parents[2]

ENDLESS = """
import signal, sys
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp
from experiments import __main__ as command, compare
from experiments.folder import write_results

def run(config):
    write_results(config.workdir, {"found": 1}, finished=False)
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: 1 - x, x))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(endless, jnp.zeros(()))
        print("begun", flush=True)
        endless(jnp.ones(())).block_until_ready()

compare.run = run
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests run under
command.main(["compare", "--workdir", sys.argv[1]])
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_compiled_code_that_never_would_and_keeps_what_was_done(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert child.stdout.readline() == "begun\n"
        begin = time.perf_counter()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
        seconds = time.perf_counter() - begin
    finally:
        child.kill()
    assert child.returncode == 130 and seconds < 2
    assert f"interrupted. What was finished is kept in {tmp_path}/" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "unfinished.json").read_text()) == {"found": 1}


WHILE_IMPORTING = """
import gc, os, runpy, signal, sys

def interrupt(*_):
    if "jax" in sys.modules and not asked:
        asked.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # until it is heard
            pass

asked = []
{}
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests run under
sys.argv = ["experiments", "compare", "--seeds", "0", "--workdir", sys.argv[1]]
runpy.run_module("experiments", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("where", ["gc.callbacks.append(interrupt)", "sys.addaudithook(interrupt)"])
def test_ctrl_c_is_heard_while_modules_are_imported(where, tmp_path):
    """In a callback of the garbage collector too, where an exception is lost."""
    child = subprocess.run(
        [sys.executable, "-c", WHILE_IMPORTING.format(where), str(tmp_path / "new")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    said = (child.returncode, child.stdout, child.stderr)
    assert said == (130, "", "\ninterrupted. Nothing was begun.\n")
    assert not (tmp_path / "new").exists()


@dataclasses.dataclass(frozen=True)
class Options:
    workdir: Path
    seeds: int = 3
    rules: tuple[str, ...] = ("bptt",)
    workers: int = 2


def test_results_of_other_options_are_never_overwritten(tmp_path, capsys):
    config = Options(tmp_path / "new")
    made = circumstances(config)
    claim_folder(config.workdir, config)
    write_results(config.workdir, made, finished=False)
    assert [path.name for path in config.workdir.iterdir()] == ["unfinished.json"]
    assert not capsys.readouterr().out
    refuse(config, capsys, "goes on")
    write_results(config.workdir, made)
    assert [path.name for path in config.workdir.iterdir()] == ["results.json"]
    refuse(config, capsys, "will be replaced")
    (config.workdir / "results.json").write_text("{")
    with pytest.raises(ValueError, match="its options cannot be read"):
        claim_folder(config.workdir, config)


def refuse(config, capsys, what):
    """A run with the options of what is there may have it, and no other."""
    claim_folder(config.workdir, dataclasses.replace(config, workers=1))
    assert f"is of the same options, and {what}." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another run \(seeds 3 there, 5 here\). Remove that"):
        claim_folder(config.workdir, dataclasses.replace(config, seeds=5))


class Found(NamedTuple):
    curve: object
    rates: dict


def test_pieces_are_made_once_until_all_is_finished(tmp_path, capsys):
    config, made = Options(tmp_path), []

    def make(number):
        made.append(number)
        return Found(jnp.full(3, number / 3), {0.1: None, 0.3: [np.float32(number)]})

    for _ in range(2):  # the second goes on after an interruption
        pieces = claim_folder(tmp_path, config)
        found = [pieces.made(f"row_{number}", lambda n=number: make(n)) for number in (1, 2)]
    assert made == [1, 2]
    np.testing.assert_array_equal(found[1].curve, np.full(3, np.float32(2 / 3)))
    assert isinstance(found[0].curve, np.ndarray) and found[0].rates == {0.1: None, 0.3: [1]}
    (tmp_path / "pieces" / "row_3.part").write_bytes(b"killed while it was written")
    assert pieces.made("row_3", lambda: 3) == 3
    whole = tmp_path / "pieces" / "row_3.pickle"
    whole.write_bytes(whole.read_bytes()[:-2])
    assert pieces.made("row_3", lambda: 4) == pieces.made("row_3", lambda: 5) == 4
    assert f"{whole} cannot be read (" in capsys.readouterr().out
    write_results(tmp_path, circumstances(config))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    claim_folder(tmp_path, config).made("row_1", lambda: make(1))
    assert made == [1, 2, 1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_experiment_that_is_killed_is_ended_by_the_same_command(tmp_path):
    """`kill -9` after each of the first two rows; then the numbers of a run that nobody killed."""
    short = "--tasks delayed_recall --cells gru --rules bptt eprop snap tbptt --steps 4"
    short += " --checkpoints 2 --features 5 --seeds 2 --repeats 1 --workdir"
    command = [sys.executable, "-m", "experiments", "compare", *short.split()]

    def start(folder):
        return subprocess.Popen(
            [*command, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    def histories(folder):
        (panel,) = json.loads((folder / "results.json").read_text())["panels"]
        return {row["name"]: row["history"] for row in panel["rules"]}

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for rows in (1, 2):
        run = start(killed)
        while len(list(killed.glob("pieces/*.pickle"))) < rows:
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.01)
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL and not (killed / "results.json").exists()
    for folder, told in ((killed, "goes on"), (whole, "Comparing 4 learning rules")):
        run = start(folder)
        out, _ = run.communicate(timeout=600)
        assert run.returncode == 0 and told in out, out
    chex.assert_trees_all_equal(histories(killed), histories(whole))


def test_a_run_does_not_go_on_with_other_versions(tmp_path, monkeypatch):
    claim_folder(tmp_path, Options(tmp_path))
    monkeypatch.setattr(localgrad, "__version__", "99")
    with pytest.raises(ValueError, match=r"another run \(localgrad .* there, 99 here\)"):
        claim_folder(tmp_path, Options(tmp_path))


def test_the_command_looks_at_its_folder_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "submit_shared", None)
    write_results(tmp_path, {"config": {}})
    assert main(["compare", "--workdir", str(tmp_path)]) == 2
    assert "error: " in (err := capsys.readouterr().err) and "is of another run" in err


@pytest.mark.parametrize("name", ["compare", "deep", "linear_dynamics", "online", "perturbation"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_randomness_cannot_start_at_claims_no_folder(name, seed, tmp_path, capsys):
    workdir = tmp_path / "new"
    assert main([name, "--seed", str(seed), "--workdir", str(workdir)]) == 2
    assert f"error: seed must lie in [0, 2**32); got {seed}." in capsys.readouterr().err
    assert not workdir.exists()


def test_a_log_gets_a_line_a_minute(monkeypatch):
    """Of a clock that a thousand rows move by a second each."""
    log, now = io.StringIO(), [0.0]
    with progress.progress(total=1000, unit="row", file=log) as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        bar.start_t = bar.last_print_t = 0.0
        for number in range(1000):
            now[0] += 1
            bar.set_description(f"row {number}")
            bar.update()
    lines = [line for line in log.getvalue().split("\n") if line]
    assert "\r" not in log.getvalue()
    assert 17 <= len(lines) <= 19  # the beginning, 16 minutes and the end
    assert [int(re.search(r"(\d+)/1000", line)[1]) for line in lines[1:4]] == [60, 120, 180]


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    assert list(progress.progress(range(3), unit="row", file=screen)) == [0, 1, 2]
    assert screen.getvalue().count("\r") > 1


def test_footnotes_are_of_rows_that_are_there():
    alone = compare.footnote(compare.Config(rules=("bptt", "rflo", "eprop_random"), cells=("gru",)))
    assert not re.search("RTRL|readout|RFLO", alone)
    whole = compare.footnote(compare.Config())
    assert all(text in whole for _, text in compare.NOTES)
    every = compare.footnote(compare.Config(seeds=3, rtrl_seeds=3, windows=1))
    assert "RTRL" not in every


def test_a_heading_names_what_is_shown():
    assert "rate" in deep.header(deep.Config())
    assert deep.header(deep.Config(parts=("memory",))) == "e-prop in depth: memory."


@pytest.mark.parametrize(
    ("notes", "shown", "there", "not_there"),
    [
        (online.NOTES, [online.PAUSE], "pause ", "cosine"),
        (online.NOTES, [online.COSINE], "fresh networks", "pause "),
        (deep.report.NOTES, ["bptt", "rtrl"], "RTRL is BPTT", "no temporal"),
        (deep.report.NOTES, ["no_temporal", "eprop"], "equal rows", "RTRL"),
    ],
)
def test_footnotes_are_of_columns_and_rules_that_are_there(notes, shown, there, not_there):
    said = footnote(notes, shown)
    assert there in said and not_there not in said


def test_no_figure_needs_pyplot():
    """Which would take a notebook's own way of showing pictures from it."""
    for path in (ROOT / "experiments").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) .*pyplot|matplotlib\.use", path.read_text(), re.M)
