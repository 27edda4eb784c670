"""The command line: `python -m benchmarks [options]`."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CELL_NAMES = ("rate", "GRU", "LSTM", "OptimizedLSTM", "ALIF", "LRU", "RTU")
SECTION_NAMES = (
    "speed",
    "windows",
    "sizes",
    "peers",
    "memory",
    "latency",
    "compile",
    "depth",
    "scaling",
    "aligned",
    "samples",
    "devices",
    "variance",
    "grid",
)
USUAL = tuple(name for name in SECTION_NAMES if name != "grid")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parser() -> argparse.ArgumentParser:
    """What the command takes; made without importing JAX, which must find its settings ready."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="What localgrad's rules cost beside jitted Flax BPTT, in one process and, on a "
        "CPU, on one core: time, windows, other sizes, peers, peak memory, latency of a step, "
        "compiling, depth, growth with N, P-TNCN, noisy samples, devices, variance. For a GPU: "
        "--sections grid --cells rate GRU LSTM, every rule at N = 128, 512 and 2048.",
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="times N=128, T=1000 only; of the grid a tiny one"
    )
    size.add_argument("--full", action="store_true", help="times every N and T")
    made.add_argument("--sections", nargs="+", choices=SECTION_NAMES, default=USUAL)
    made.add_argument("--cells", nargs="+", choices=CELL_NAMES, default=("rate", "GRU"))
    made.add_argument(
        "--seconds", type=float, default=3.0, help="how long to repeat each comparison (default: 3)"
    )
    made.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts this process' time only, for a busy machine (default: wall)",
    )
    made.add_argument(
        "--fresh-pages",
        action="store_true",
        help="leave the allocator as it is: large arrays get new pages from the kernel every call",
    )
    made.add_argument("--figures", type=Path, metavar="FOLDER", help="write figures to this folder")
    made.add_argument(
        "--markdown", type=Path, metavar="PATH", help="write the tables to this file, as they come"
    )
    made.add_argument("--json", type=Path, metavar="PATH", help="write everything to this file")
    return made


def pin() -> set[int]:
    """Keeps this process, and the threads JAX will start, on one core; returns those it had."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    if not hasattr(os, "sched_setaffinity"):
        return set()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    return cores


def keep_pages() -> bool:
    """Has glibc keep freed memory, so that no call pays the kernel for fresh pages.

    That price differs between machines and is highest for BPTT, which allocates most: with it
    every ratio to BPTT is better. Returns whether it worked.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    wanted = {mmap_max: 0, trim_threshold: 2**31 - 1, top_pad: 2**28, arena_max: 1}
    return all([mallopt(name, value) for name, value in wanted.items()])


def unpin(cores: set[int]) -> None:
    """Gives every thread of this process these cores back."""
    if cores:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the arguments ask for, prints tables and bars; returns the exit status."""
    made = parser()
    options = made.parse_args(argv)
    if not options.seconds > 0:
        made.error(f"--seconds must be positive; got {options.seconds}")
    if options.json is not None and not options.json.parent.is_dir():
        made.error(f"--json: there is no folder {options.json.parent}")
    if options.figures is not None and not options.figures.is_dir():
        made.error(f"--figures: there is no folder {options.figures}")
    cores = pin()
    kept = not options.fresh_pages and keep_pages()
    import jax

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

    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu:
        unpin(cores)
    where = ("one core" if cores else "one thread") if on_cpu else "not pinned"
    device = f"{jax.devices()[0].device_kind} ({where}), jax {jax.__version__}"
    pages = "kept" if kept else "fresh"
    print(f"{device}, {options.clock} clock, pages {pages}. Below 1x is faster than the reference.")

    plan = harness.Plan(
        cells=options.cells,
        units=(128,) if options.quick else (32, 128, 256),
        steps=(100, 1000) if options.full else (1000,),
        seconds=options.seconds,
        clock=CLOCKS[options.clock],
        figures=options.figures,
    )
    if options.quick:
        plan = plan._replace(
            grid_rules=("bptt", "eprop"), grid_units=(16,), grid_batch=4, grid_steps=16
        )
    benchmarks = {
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
    found = {name: [] for name in options.sections}
    if options.markdown is not None:
        options.markdown.write_text(f"{device}, {options.clock} clock.\n")
    for name in options.sections:
        for item in benchmarks[name](plan):
            found[name].append(item)
            if isinstance(item, report.Table):
                print(item, flush=True)
                if options.markdown is not None:
                    with options.markdown.open("a") as page:
                        page.write(f"\n{item.markdown}")
    everything = [item for section in found.values() for item in section]
    print(report.table_of_bars([item for item in everything if isinstance(item, report.Bar)]))
    if options.json is not None:
        report.write_json(options.json, device, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
