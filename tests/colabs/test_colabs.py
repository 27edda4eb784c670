"""The notebooks run, in a short mode: their code cells, one after another, in one namespace.

As stored they hold the outputs of a full run: `jupyter execute --inplace colabs/NAME.ipynb`.
"""

import json
import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import pytest

pytestmark = pytest.mark.long
FOLDER = Path(__file__).parents[2] / "colabs"


def code_cells(path: Path) -> list[str]:
    """The code of a notebook, where lines for IPython do nothing."""
    return [
        re.sub(r"^( *)[%!].*", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
@pytest.mark.few(1)
def test_a_notebook_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCALGRAD_SHORT", "1")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    before = jax.config.jax_enable_x64
    jax.devices()  # A notebook that asks for several finds that it is too late for this process.
    namespace = {"__name__": "__notebook__"}
    try:
        for number, source in enumerate(code_cells(path)):
            exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
            plt.close("all")
    finally:
        plt.close("all")
        jax.config.update("jax_enable_x64", before)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path):
    """From top to bottom, in one go, without an error, with its pictures."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert path.stat().st_size < 2**21  # a clone stays small
