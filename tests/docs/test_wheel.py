"""What is installed is whole: the wheel, unpacked, runs README's code where there is no clone."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = {
    "optax.chain(rule": "assert losses[-100:].mean() < losses[:100].mean() / 4, losses",
    "import theory": "assert f'{theory.endpoint(rule, start, teacher).s:.4f}' == '0.9219'\n"
    "assert f'{theory.convergence_rate(rule, 0.9219, teacher):.3f}' == '2.371'\n"
    "assert theory.stationary_points(rule, delay)[0].kind == 'stable node'\n"
    "assert f'{theory.suggest_decay(delay).decay:.4f}' == '0.7071'",
}
"""What README says of each snippet, by something that stands in it."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's own files, in a folder of their own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    if "ProxyError" in made.stdout or "No matching distribution" in made.stdout:
        pytest.skip("the build's own requirements cannot be fetched here")
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = folder.glob("localgrad-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.long
def test_the_wheel_holds_the_library_alone(installed):
    names = {path.name for path in installed.iterdir()}
    assert names == {"localgrad", *(name for name in names if name.endswith(".dist-info"))}
    files = {str(path.relative_to(installed)) for path in (installed / "localgrad").rglob("*.py")}
    assert files == {str(p.relative_to(ROOT)) for p in (ROOT / "localgrad").rglob("*.py")}
    assert (installed / "localgrad" / "py.typed").exists()


@pytest.mark.long
@pytest.mark.parametrize("sign", CHECKS)
def test_readmes_code_runs_in_an_empty_folder(installed, tmp_path, sign):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == len(CHECKS)
    (snippet,) = [code for code in snippets if sign in code]
    where = f"assert localgrad.__file__.startswith({str(installed)!r}), localgrad.__file__"
    code = f"import localgrad\n{where}\n{snippet}\n{CHECKS[sign]}\n"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir())
