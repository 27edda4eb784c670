"""Every benchmark on a tiny plan: it runs, its checks of equal gradients hold, and it reports."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import (
    aligned,
    compilation,
    grid,
    harness,
    measures,
    peers,
    report,
    samples,
    scaling,
    sharding,
    sizes,
    variance,
)
from benchmarks.__main__ import CELL_NAMES, SECTION_NAMES, parser

pytestmark = pytest.mark.long
PLAN = harness.Plan(
    cells=("rate",),
    stacked=("rate",),
    depths=(1, 2),
    widths=(4,),
    rules=("eprop",),
    units=(4,),
    steps=(6,),
    main=(4, 6),
    windows=(2,),
    exact=(6, 3),
    memory=(4, 8),
    streamed=3,
    batch=2,
    scaled_rules=("eprop", "rtrl"),
    scaled_units=(4, 6),
    scaled_steps=(6, 3),
    aligned_units=(6,),
    aligned_width=4,
    aligned_depths=(1, 2),
    aligned_batch=2,
    aligned_steps=3,
    samples=(1, 4),
    samples_at_once=2,
    samples_of_others=8,
    samples_of_devices=8,
    sampled_units=4,
    sampled_steps=3,
    sampled_lengths=(4, 8),
    sampled_window=2,
    spread_rules=("eprop",),
    spread_devices=(1, 2),
    spread_units=4,
    spread_steps=3,
    grid_rules=("eprop", "rtrl"),
    grid_units=(4,),
    grid_batch=2,
    grid_steps=3,
    grid_room=2**14,
    sizes_divided=64,
    varied_units=4,
    varied_steps=6,
    varied_windows=(1, 3),
    varied_copies=(1, 2),
    varied_ranks=(1,),
    varied_draws=20,
    seconds=0.0,
)
BENCHMARKS = {
    "speed": measures.speed,
    "windows": measures.windows,
    "sizes": sizes.sizes,
    "peers": peers.peers,
    "memory": measures.memory,
    "latency": measures.latency,
    "compile": compilation.compilation,
    "depth": measures.depth,
    "scaling": scaling.scaling,
    "aligned": aligned.aligned,
    "samples": samples.samples,
    "devices": sharding.sharding,
    "variance": variance.variance,
    "grid": grid.grid,
}


LONG = ("sizes", "samples", "devices", "compile")  # many, for several devices, again and again
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in BENCHMARKS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.few(4)
def test_benchmark_gives_tables_and_bars(name, tmp_path):
    items = list(BENCHMARKS[name](PLAN))
    tables = [item for item in items if isinstance(item, report.Table)]
    bars = [item for item in items if isinstance(item, report.Bar)]
    assert tables and len(tables) + len(bars) == len(items)
    assert bars or name in ("windows", "depth", "grid")
    for table in [*tables, report.table_of_bars(bars)]:
        lines = str(table).splitlines()
        assert len({len(line) for line in lines[3:]}) == 1, "the columns are aligned"
        page = table.markdown.splitlines()
        assert len({line.count("|") for line in page if line.startswith("|")}) == 1
    report.write_json(tmp_path / "found.json", "cpu", {name: items})
    found = json.loads((tmp_path / "found.json").read_text())["sections"][name]
    assert [item.get("title") for item in found if "title" in item] == [t.title for t in tables]


def test_different_gradients_are_an_error():
    with pytest.raises(RuntimeError, match="a beside b: gradients differ by 1.0e\\+00"):
        harness.check_close([jnp.zeros(2)], [jnp.ones(2)], "a beside b")


@pytest.mark.parametrize(("steps", "chunk"), [(1000, 25), (100_000, 250), (7, 1)])
def test_the_chunk_divides_the_steps(steps, chunk):
    assert harness.root(steps) == chunk


@pytest.mark.parametrize(
    ("measured", "limit", "at_least", "met"),
    [(1.004, 1.0, False, True), (1.01, 1.0, False, False), (19.9, 20.0, True, False)],
)
def test_a_bar_is_met_as_printed(measured, limit, at_least, met):
    assert report.Bar("claim", measured, limit, at_least).met == met


def test_the_command_line_names_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*BENCHMARKS, *harness.CELLS))
    assert tuple(BENCHMARKS) == SECTION_NAMES and tuple(harness.CELLS) == CELL_NAMES


def test_quick_and_full_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--quick", "--full"])
    assert "not allowed with" in capsys.readouterr().err
