"""The command line: `python -m experiments NAME [options]`.

An experiment is a module with a frozen dataclass `Config`, whose docstring is its help text, and a
function `run(config)`. It enters by one line of `EXPERIMENTS`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn


def stop(kept: str) -> NoReturn:
    """Ends this process and its children at once, whatever their threads are at."""
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, f"\ninterrupted. {kept}\n".encode())  # a print may be under way
    sys.stdout.flush()
    os._exit(130)


def answer_ctrl_c(kept: str) -> None:
    """Lets Ctrl-C stop this process, where it does not ignore it.

    By a handler that raises nothing: an exception would be lost within a callback, such as JAX's of
    the garbage collector, and the run would go on.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: stop(kept))


if __name__ == "__main__":
    answer_ctrl_c("Nothing was begun.")  # the imports take seconds

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
    kept = f"What was finished is kept in {config.workdir}/"
    if __name__ == "__main__":
        answer_ctrl_c(kept)
    try:
        # In a thread, since the main one hears Ctrl-C only where no compiled code keeps it.
        ThreadPoolExecutor(1).submit(runs[type(config)], config).result()
    except ClaimFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        stop(kept)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
