"""The command line: `python -m experiments NAME [options]`.

An experiment is a module with a frozen dataclass `Config`, whose docstring is its help text, and a
function `run(config)`. It enters by one line of `EXPERIMENTS`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

try:
    import tyro

    from experiments import compare, deep, linear_dynamics, online, perturbation, ptncn
    from experiments.claims import ClaimFailed
except ModuleNotFoundError as error:
    if error.name not in ("tyro", "tqdm", "matplotlib", "sklearn"):
        raise
    sys.exit(f"error: no {error.name} here: pip install -e '.[experiments,theory]' in the clone.")

EXPERIMENTS: dict[str, Any] = {
    "compare": compare,
    "deep": deep,
    "linear_dynamics": linear_dynamics,
    "online": online,
    "perturbation": perturbation,
    "ptncn": ptncn,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment that the arguments name; returns the exit status."""
    config = tyro.extras.subcommand_cli_from_dict(
        {name: module.Config for name, module in EXPERIMENTS.items()},
        prog="python -m experiments",
        description="Experiments with learning rules for recurrent networks, without BPTT.",
        args=argv,
    )
    runs = {module.Config: module.run for module in EXPERIMENTS.values()}
    try:
        # In a thread, since the main one hears Ctrl-C only where no compiled code keeps it.
        ThreadPoolExecutor(1).submit(runs[type(config)], config).result()
    except ClaimFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        stop(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def stop(config: Any) -> None:
    """Ends this process and its children at once, whatever their threads are at."""
    for child in multiprocessing.active_children():
        child.kill()
    print(f"\ninterrupted. What was finished is kept in {config.workdir}/", file=sys.stderr)
    sys.stdout.flush()
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
