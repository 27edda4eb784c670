"""The command line: help that reads well, and errors that list the right names."""

import pytest

from experiments.__main__ import EXPERIMENTS, main
from experiments.choices import CELLS, RULES, lookup
from experiments.tasks import TASKS


def said(capsys, *argv):
    """The exit status and everything printed."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out = capsys.readouterr()
    return stop.value.code, out.out + out.err


def test_help_lists_the_experiments(capsys):
    status, text = said(capsys, "--help")
    assert status == 0
    assert all(name in text for name in EXPERIMENTS)
    assert "Compare learning rules" in text


def test_help_of_compare_explains_every_option(capsys):
    status, text = said(capsys, "compare", "--help")
    assert status == 0
    for option in ("--tasks", "--cells", "--rules", "--steps", "--seeds", "--workdir"):
        assert option in text
    for name in (*TASKS, *CELLS, *RULES):
        assert name in text


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["compere"], EXPERIMENTS),
        ([], EXPERIMENTS),
        (["compare", "--rules", "bppt"], RULES),
        (["compare", "--tasks", "digit"], TASKS),
        (["compare", "--cells", "lstm"], CELLS),
    ],
)
def test_a_wrong_name_lists_the_right_ones(capsys, argv, names):
    status, text = said(capsys, *argv)
    assert status == 2
    assert all(name in text for name in names)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "10", "--checkpoints", "3"], "steps (10) must be a multiple of checkpoints"),
        (["--seeds", "0"], "seeds must be at least 1; got 0."),
        (["--horizon", "0"], "horizon must be at least 1; got 0."),
        (["--learning-rate", "nan"], "learning_rate must be a positive number; got nan."),
        (["--clip", "-1"], "clip must be a positive number; got -1.0."),
        (["--alpha", "2"], "alpha must lie in (0, 1]; got 2.0."),
        (["--rules"], "no rule given; choose from: bptt, "),
    ],
)
def test_a_wrong_number_is_an_error_of_one_line(capsys, tmp_path, argv, message):
    assert main(["compare", "--workdir", str(tmp_path), *argv]) == 2
    out = capsys.readouterr()
    assert f"error: {message}" in out.err
    assert "Traceback" not in out.err


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["compare", "--workdir", str(tmp_path / "file" / "folder")]) == 2
    assert "error: " in (err := capsys.readouterr().err) and "Traceback" not in err


def test_lookup_lists_the_names():
    with pytest.raises(ValueError, match="unknown cell 'lstm'; choose from: gru, rate"):
        lookup("cell", CELLS, "lstm")
