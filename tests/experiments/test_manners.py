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

import pytest

from experiments import compare, progress
from experiments.__main__ import main
from experiments.folder import claim_folder, write_results

ROOT = Path(__file__).parents[2]

ENDLESS = """
import signal, sys
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp
from experiments import __main__ as command, compare
from experiments.folder import write_results

def run(config):
    write_results(config.results, {"found": 1}, finished=False)
    endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, lambda x: 1 - x, x))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(endless, jnp.zeros(()))
        print("begun", flush=True)
        endless(jnp.ones(())).block_until_ready()

compare.run = run
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests run under
command.main(["compare", "--results", sys.argv[1]])
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


@dataclasses.dataclass(frozen=True)
class Options:
    results: Path
    seeds: int = 3
    rules: tuple[str, ...] = ("bptt",)
    workers: int = 2


def test_results_of_other_options_are_never_overwritten(tmp_path, capsys):
    config = Options(tmp_path / "new")
    made = {"config": dataclasses.asdict(config)}
    claim_folder(config.results, config)
    write_results(config.results, made, finished=False)
    assert [path.name for path in config.results.iterdir()] == ["unfinished.json"]
    assert not capsys.readouterr().out
    refuse(config, capsys)
    write_results(config.results, made)
    assert [path.name for path in config.results.iterdir()] == ["results.json"]
    refuse(config, capsys)
    (config.results / "results.json").write_text("{")
    with pytest.raises(ValueError, match="its options cannot be read"):
        claim_folder(config.results, config)


def refuse(config, capsys):
    """What is there may be replaced by a run with its options, and by no other."""
    claim_folder(config.results, dataclasses.replace(config, workers=1))
    assert "is of the same options, and will be replaced" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another run \(seeds 3 there, 5 here\). Remove that"):
        claim_folder(config.results, dataclasses.replace(config, seeds=5))


def test_the_command_looks_at_its_folder_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "submit", None)
    write_results(tmp_path, {"config": {}})
    assert main(["compare", "--results", str(tmp_path)]) == 2
    assert "error: " in (err := capsys.readouterr().err) and "is of another run" in err


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


def test_no_figure_needs_pyplot():
    """Which would take a notebook's own way of showing pictures from it."""
    for path in (ROOT / "experiments").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) .*pyplot|matplotlib\.use", path.read_text(), re.M)
