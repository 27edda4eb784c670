"""The command line: `python -m experiments NAME [options]`.

An experiment is a module with a frozen dataclass `Config`, whose docstring is its help text, and a
function `run(config)`. It enters by one line of `EXPERIMENTS`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import matplotlib
import tyro

from experiments import compare, deep, linear_dynamics, online, perturbation, ptncn
from experiments.claims import ClaimFailed

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
    matplotlib.use("Agg")  # the command opens no windows; a notebook keeps its own backend
    runs = {module.Config: module.run for module in EXPERIMENTS.values()}
    try:
        runs[type(config)](config)
    except ClaimFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
