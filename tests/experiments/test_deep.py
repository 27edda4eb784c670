"""The experiment of e-prop in depth: its bound, its bookkeeping, a short run, a failed claim."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import localgrad
from experiments import deep
from experiments.__main__ import main
from experiments.claims import Claim
from experiments.deep import claims, memory, report, study, trials
from experiments.deep.memory import Size
from experiments.deep.stacks import LOSS, ROWS, STACKS, rows_at
from experiments.deep.trials import crossing, linear_floors, reading
from experiments.tasks.crowded_cue import ceiling, crowded_cue


def test_the_ceiling_is_what_the_best_linear_decision_reaches():
    """Fisher's discriminant, fitted to many patterns seen through random weights."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(size=(25, 2)), rng.normal(size=(25, 3))]
    labels = rng.choice([-1.0, 1.0], size=200_000)
    patterns = np.concatenate([labels[:, None], rng.normal(size=(len(labels), 23))], axis=1)
    seen = patterns @ np.concatenate(kernels, axis=1)[:-1]
    centred = seen - labels[:, None] * (labels @ seen / len(labels))
    weights = np.linalg.solve(centred.T @ centred, labels @ seen)
    accuracy = np.mean(np.sign(seen @ weights) == labels)
    assert abs(accuracy - ceiling(kernels)) < 4 * np.sqrt(0.25 / len(labels))
    assert ceiling(kernels[:1]) < ceiling(kernels) < 1


def test_the_ceiling_counts_every_kernel_that_reads_the_input():
    for name, stack in STACKS.items():
        model, x = stack.make(2), jnp.zeros((1, stack.channels + 1))
        carry = model.initialize_carry(jax.random.key(0), x.shape)
        params = jax.eval_shape(model.init, jax.random.key(1), carry, x)["params"]
        columns = sum(kernel.shape[1] for kernel in reading(params, stack.channels + 1))
        assert columns == stack.readers * stack.features == stack.channels // 8, name


def test_the_cue_is_gone_from_the_answer_and_in_the_pattern():
    last, whole = linear_floors(crowded_cue(channels=16), 2000)
    assert abs(last - 0.5) < 0.06 and whole > 0.95


def test_a_pattern_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="steps must be at least .* = 25; got 20"):
        crowded_cue(delay=20)


def test_crossing_of_a_curve_that_never_or_always_is_above():
    steps = np.array([0, 10, 20])
    assert crossing(steps, np.array([0.5, 0.6, 0.7]), 0.9) == np.inf
    assert crossing(steps, np.array([0.95, 0.6, 0.7]), 0.9) == 0


def test_the_studys_kernels_have_its_spectral_radius():
    for seed in range(4):
        kernel = np.asarray(study.scaled(jax.random.key(seed), (32, 32)))
        radius = np.abs(np.linalg.eigvals(kernel)).max()
        assert radius == pytest.approx(0.9, rel=0.02)


def test_sizes_are_what_init_allocates():
    found = memory.size("gru", 6, 3)
    model, x = STACKS["gru"].make(3, 6), jnp.zeros((1, 6))
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    params = model.init(jax.random.key(1), carry, x)["params"]
    state = localgrad.deep_eprop(model, LOSS, batch_size=1).init(params)
    assert found.deep_eprop == sum(leaf.nbytes for leaf in jax.tree.leaves(state.held))
    state = localgrad.rtrl(model, LOSS, batch_size=1).init(params)
    assert found.rtrl == sum(leaf.nbytes for leaf in jax.tree.leaves(state.influence))


def test_at_one_layer_only_the_rules_that_differ_are_tried():
    assert rows_at(1, full=2) == ("bptt", "deep_eprop")
    assert rows_at(2, full=2) == tuple(ROWS) and len(rows_at(4, full=2)) == 4


def test_a_size_that_contradicts_a_claim_fails_it():
    good = Size(width=8, depth=2, eprop=1, deep_eprop=5, rtrl=10, tape=1)
    one = good._replace(depth=1, deep_eprop=1)
    assert all(claim.holds for claim in claims.of_memory([one, good]))
    bad = [one._replace(deep_eprop=2), good._replace(deep_eprop=2)]
    assert not any(claim.holds for claim in claims.of_memory(bad))


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.slow  # as `compare`, which trains alike, is run in full
def test_a_short_run_goes_on_measures_prints_and_draws(tmp_path, capsys, monkeypatch):
    config = deep.Config(
        parts=("crowd", "memory"),
        stacks=("lru",),
        depths=(1, 2),
        full=3,
        delays=(2, 12),
        batch_size=8,
        seeds=2,
        repeats=1,
        workers=1,
        short=True,
        workdir=tmp_path,
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(deep, "sizes", interrupt)
        deep.run(config)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "learned", interrupt)  # what was finished is not learned again
        found = deep.run(config)
    text = capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    assert [trial["depth"] for trial in content["crowd"]] == [1, 2]
    rules = content["crowd"][1]["rules"]
    np.testing.assert_allclose(rules["deep_eprop"]["cosine"]["12"], 1, atol=1e-4)
    assert np.all(np.array(rules["no_spatial"]["norm_ratio"]["12"])[:, 0] == 0)
    assert np.all(np.array(rules["eprop"]["cosine"]["12"])[:, 0] < 0.9)
    assert rules["deep_eprop"]["state_bytes"] > 2 * rules["eprop"]["state_bytes"]
    for name in ("accuracies", "alignments", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "ceiling of a lowest layer" in text and "FAIL" in text  # nothing is learned in two steps
    exact = [claim for claim in found if claim.text.startswith("LRU: deep e-prop is BPTT")]
    assert [claim.holds for claim in exact] == [True]


@pytest.mark.slow
def test_the_studys_part_runs(tmp_path, capsys):
    config = deep.Config(parts=("study",), study_seeds=2, short=True, workdir=tmp_path)
    found = deep.run(config)
    assert "there" in capsys.readouterr().out
    assert sum("cosine to BPTT" in claim.text for claim in found) == 3
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_claim_is_an_error(monkeypatch, capsys, tmp_path):
    wrong = Claim("the sun goes round the earth", "it does not", False)
    monkeypatch.setattr(claims, "of_memory", lambda sizes: [wrong])
    monkeypatch.setattr(deep, "sizes", lambda name: [Size(8, 1, 1, 1, 1, 1)])
    assert main(["deep", "--parts", "memory", "--workdir", str(tmp_path)]) == 1
    out = capsys.readouterr()
    assert "FAILS  the sun goes round the earth: it does not" in out.out
    assert "error: a claim failed" in out.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--delays", "8", "2"], "delays must ascend; got (8, 2)."),
        (["--depths", "0"], "depths must be at least 1; got (0,)."),
        (["--seeds", "0"], "seeds must be at least 1; got 0."),
        (["--checkpoints", "7"], "7 checkpoints must divide the 300 updates."),
        (["--stacks"], "stacks is empty; name at least one."),
    ],
)
def test_a_wrong_number_is_an_error_of_one_line(capsys, tmp_path, argv, message):
    assert main(["deep", "--workdir", str(tmp_path), *argv]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_short_numbers_stay_short():
    assert report._layers(np.array([[1.0, 0.25, -0.5, 0.0]])) == "1.00  .25 -.50  .00"
