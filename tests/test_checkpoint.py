"""Runs are resumed bit by bit, whatever was damaged or killed; another model's tree is refused."""

import functools
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.checkpoint_managers import preservation_policy

import localgrad
from catalogue import RULES
from localgrad import checkpoint
from tests.conformance.table import MACHINERY, MODELS, B, Case, build, plain, rule_of
from tests.rules import reservoirs

ROOT = Path(__file__).parents[1]
STEPS = 5


def tree_of(step=0):
    """Every kind of leaf; one array is large enough for a file of its own."""
    rng = np.random.default_rng(step)
    return {
        "large": jnp.asarray(rng.normal(size=(30, 40)), jnp.float32),
        "opt": optax.adam(0.1).init({"a": jnp.full((3, 2), float(step))}),
        "halves": jnp.full(5, 0.1 * step, jnp.bfloat16),
        "complex": jnp.full(2, 1j * step),
        "flags": jnp.arange(4) < step,
        "key": jax.random.split(jax.random.key(step, impl="rbg"), 2),
        "numpy": rng.normal(size=3),
        "counter": np.int64(2**40 + step),
        "position": 2**40 + step,
        "rate": 0.1 * step,
        "empty": ((), None, optax.EmptyState()),
    }


def assert_same(found, expected):
    """To the bit, and of the same types."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
        a, b = (np.asarray(plain(x)) for x in (a, b))
        assert a.shape == b.shape and a.tobytes() == b.tobytes()


def write(folder, steps=(1, 2)):
    """A folder of these steps; their metric is the step."""
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    with checkpoint.open(folder, options) as manager:
        for step in steps:
            assert checkpoint.save(manager, step, tree_of(step), metrics={"loss": float(step)})


def read(folder, target=None, step=None):
    with checkpoint.open(folder) as manager:
        return checkpoint.restore(manager, tree_of() if target is None else target, step)


def test_what_is_saved_comes_back(tmp_path):
    assert read(tmp_path) is None
    write(tmp_path)
    step, found = read(tmp_path)
    assert step == 2
    assert_same(found, tree_of(2))
    assert_same(read(tmp_path, step=1)[1], tree_of(1))
    with ocp.CheckpointManager(tmp_path) as manager:  # Orbax's ordinary files
        like, expected = (t | {"counter": None} for t in (tree_of(), tree_of(2)))
        assert_same(manager.restore(2, args=ocp.args.StandardRestore(like)), expected)


# Resumed bit by bit


def streamed(model, params, batch, rule):
    """One learner's fresh tree, and how it goes on over its stream."""
    tx = optax.chain(rule, optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    @jax.jit
    def learn(params, opt_state, piece):
        updates, opt_state = tx.update(None, opt_state, params, batch=piece)
        return optax.apply_updates(params, updates), opt_state

    def step(tree):
        at = tree["position"]
        piece = jax.tree.map(lambda a: a[:, at : at + STEPS], batch)
        params, opt_state = learn(tree["params"], tree["opt_state"], piece)
        return {"params": params, "opt_state": opt_state, "position": at + STEPS}

    return {"params": params, "opt_state": tx.init(params), "position": 0}, step


def assert_resumed(folder, fresh, step):
    """Saved in the middle of a stream, and gone on with, it ends as if it had gone on."""
    with checkpoint.open(folder) as manager:
        middle = step(fresh)
        assert checkpoint.save(manager, 1, middle)
        end = step(middle)
        found = checkpoint.restore(manager, fresh)[1]
        assert_same(found, middle)
        assert_same(step(found), end)


def pairs():
    """Every rule, in Linen and in NNX, where it takes the model; what tells little is slow."""
    cases = [Case(rule, model) for rule in RULES for model in ("rate", "nnx_two")]
    quick = [(name, "rate") for name in MACHINERY]
    quick += [("tbptt", "nnx_two"), ("weight_perturbation", "nnx_two")]
    return [
        pytest.param(c, id="-".join(c), marks=() if c in quick else pytest.mark.slow)
        for c in cases
        if RULES[c.rule].refusal(MODELS[c.model].traits) is None
    ]


@pytest.mark.parametrize("case", pairs())
@pytest.mark.few(3)
def test_every_rule_is_resumed_bit_by_bit(case, tmp_path, x64):
    built = build(case.model)
    rule = rule_of(case, streaming=True, reduction="mean")
    assert_resumed(tmp_path, *streamed(built.model, built.params, built.batch, rule))


def frames(model, loss, **options):
    """A stream of probabilities for a model that predicts them."""
    rows = jax.random.uniform(jax.random.key(0), (3, 2 * STEPS + 1, 4))
    carry = model.initialize_carry(jax.random.key(0), (3, 4))
    params = model.init(jax.random.key(1), carry, rows[:, 0])["params"]
    batch = localgrad.Batch(rows[:, :-1], rows[:, 1:])
    return model, params, batch, localgrad.lra(model, loss, batch_size=3, **options)


def by_reservoir():
    model, params, batch = reservoirs.problem()
    rule = localgrad.force(model, optax.l2_loss, batch_size=reservoirs.B)
    return model, params, batch, rule


def by_decorrelation():
    cell = localgrad.DecorrelatedCell(nn.SimpleCell(4))
    model = localgrad.Network((cell,), readout=nn.Dense(2))
    x = jax.random.normal(jax.random.key(0), (B, 2 * STEPS, 3))
    carry = model.initialize_carry(jax.random.key(0), (B, 3))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
    rule = localgrad.decorrelation(model, optax.l2_loss, batch_size=B)
    return model, params, localgrad.Batch(x, x[..., :2]), rule


def by_members(make):
    """Rules that hold others, on a network of the table."""
    built = build("two_rates")
    return built.model, built.params, built.batch, make(built.model)


def shared(model, **options):
    return {"model": model, "loss": optax.l2_loss, "batch_size": B, **options}


APART = {
    "lra": lambda: frames(localgrad.PTNCN((5, 3), 4), localgrad.binary_cross_entropy),
    "force": by_reservoir,
    "decorrelation": by_decorrelation,
    "average": lambda: by_members(
        lambda m: localgrad.average(localgrad.uoro(**shared(m, key=jax.random.key(0))), samples=2)
    ),
    "mix": lambda: by_members(
        lambda m: localgrad.mix(
            {
                "noise": localgrad.node_perturbation(**shared(m, key=jax.random.key(0))),
                "rest": localgrad.eprop(**shared(m)),
            },
            lambda params: {name: "noise" if name == "cells_0" else "rest" for name in params},
        )
    ),
    "dni": lambda: by_members(lambda m: localgrad.dni(**shared(m))),
    "activity_perturbation": lambda: by_members(
        lambda m: localgrad.activity_perturbation(**shared(m, key=jax.random.key(0)))
    ),
}
QUICK = ("lra", "force", "average")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in APART]
)
@pytest.mark.few(1)
def test_rules_without_a_row_are_resumed_bit_by_bit(name, tmp_path, x64):
    assert_resumed(tmp_path, *streamed(*APART[name]()))


# What is damaged

ignored = pytest.mark.filterwarnings(
    # Orbax leaves its other reads behind, half done, when one of them fails.
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


@pytest.fixture
def collected():
    yield
    gc.collect()  # while the test's filters hold


def flip(path, at=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1 << 4
    path.write_bytes(bytes(data))


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "flipped": flip,
}


def large_file(step):
    """Where the large array lies."""
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@ignored
@pytest.mark.parametrize(
    ("damage", "which", "why"),
    [
        ("flipped", large_file, r"\['large'\]: not what was saved"),
        ("cut", large_file, "cannot be read"),
        ("zeroed", "default/manifest.ocdbt", "cannot be read: ValueError: DATA_LOSS"),
        ("cut", "default/_METADATA", "cannot be read"),
        ("missing", "default", "it has no folder default"),
        ("emptied", "_CHECKPOINT_METADATA", "it has no record"),
        ("cut", "metrics/metrics", "JSONDecodeError: Unterminated string"),
    ],
)
@pytest.mark.few(3)
def test_a_damaged_step_is_skipped(damage, which, why, tmp_path, collected):
    write(tmp_path)
    path = which(tmp_path / "2") if callable(which) else tmp_path / "2" / which
    DAMAGES[damage](path)
    with pytest.warns(UserWarning, match=f"step 2 .*{why}") as told:
        with checkpoint.open(tmp_path) as manager:
            step, found = checkpoint.restore(manager, tree_of())
            assert len(told) == 1 and "skipped" in str(told[0].message)
            assert_same(found, tree_of(1))
            assert step == manager.latest_step() == 1 and (tmp_path / "2.damaged").is_dir()
            assert checkpoint.save(manager, 2, tree_of(3), metrics={"loss": 3.0})
            assert_same(checkpoint.restore(manager, tree_of())[1], tree_of(3))
    if "metrics" not in str(which):
        assert "Step 1 is used instead" in str(told[0].message)


@ignored
@pytest.mark.slow
def test_no_damage_of_any_file_passes_for_what_was_saved(tmp_path, collected):
    """Each file of the newest step, cut, zeroed, emptied, gone, and with bytes changed."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    write(good)
    rng, outcomes = np.random.default_rng(0), []
    for file in [p.relative_to(good) for p in (good / "2").rglob("*") if p.is_file()]:
        size = (good / file).stat().st_size
        flips = [lambda p, k=k: flip(p, k) for k in rng.choice(size, min(size, 20), replace=False)]
        for damage in [*DAMAGES.values(), *flips]:
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            damage(bad / file)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                step, found = read(bad)
            said = [w for w in told if "skipped: step 2 " in str(w.message)]
            assert len(said) == (step == 1)
            assert_same(found, tree_of(step))
            outcomes.append(step)
    assert set(outcomes) == {1, 2}


@ignored
def test_where_no_step_is_whole_nothing_is_touched(tmp_path, collected):
    write(tmp_path)
    for step in ("1", "2"):
        flip(large_file(tmp_path / step))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="(?s)skipped: step 2 .*; step 1 .*No other step is there"):
        read(tmp_path)
    with pytest.raises(ValueError, match="skipped: step 2 .*No other step"):
        read(tmp_path, step=2)
    assert sorted(tmp_path.rglob("*")) == before
    for step in ("1", "2"):
        DAMAGES["emptied"](tmp_path / step / "metrics/metrics")
    with pytest.raises(ValueError):  # Orbax's own
        checkpoint.open(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_orbax_saved_alone_is_not_taken(tmp_path):
    with checkpoint.open(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree_of()))
        with pytest.raises(ValueError, match="not made by checkpoint.save.*step 3 "):
            checkpoint.restore(manager, tree_of())


# What is another model's


@functools.cache
def network(width=4, make=localgrad.eprop, optimizer=optax.adam, **options):
    """The tree of a learner."""
    model = localgrad.Network((nn.GRUCell(width),), readout=nn.Dense(2))
    x = jnp.zeros((3, 2))
    carry = model.initialize_carry(jax.random.key(0), x.shape)
    params = model.init(jax.random.key(1), carry, x)["params"]
    rule = make(model, optax.l2_loss, batch_size=3, **options)
    return params, optax.chain(rule, optimizer(0.1)).init(params)


KERNEL = r"  \[0\]\['cells_0'\]\['hn'\]\['kernel'\]: "
OTHERS = {
    "wider": (lambda: network(5), KERNEL + r"float32\[4,4\] saved, float32\[5,5\] in target\n"),
    "rule": (
        lambda: network(make=localgrad.tbptt, horizon=3),
        r"  \[1\]\[0\]\.\w.*: float32\S+ saved, nothing in target\n",
    ),
    "optimizer": (
        lambda: network(optimizer=optax.sgd),
        r"  \[1\]\[1\]\[0\].count: int32\[\] saved, nothing in target\n",
    ),
    "dtype": (
        lambda: jax.tree.map(lambda a: a.astype(jnp.bfloat16), network()),
        KERNEL + r"float32\[4,4\] saved, bfloat16\[4,4\] in target\n",
    ),
    "None": (lambda: (network()[0], None), "saved, nothing in target\n"),
}


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    """A folder with two steps of a network."""
    folder = tmp_path_factory.mktemp("learner")
    with checkpoint.open(folder) as manager:
        for step in (1, 2):
            assert checkpoint.save(manager, step, network())
    return folder


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.few(2)
def test_another_tree_is_refused_leaf_by_leaf(name, learner):
    make, message = OTHERS[name]
    before = sorted(learner.rglob("*"))
    with pytest.raises(ValueError, match="step 2 .*another model, rule or optimizer") as error:
        read(learner, make())
    assert re.search(message, str(error.value))
    assert sorted(learner.rglob("*")) == before


def test_all_that_differs_is_told_and_nothing_else(tmp_path):
    tree = tree_of()
    write(tmp_path, [1])
    other = tree | {
        "key": jax.random.split(jax.random.key(0), 2),
        "complex": jnp.zeros((2, 1), jnp.complex64),
        "position": jnp.asarray(0),
        "more": jnp.zeros(1),
    }
    del other["flags"]
    with pytest.raises(ValueError) as error:
        read(tmp_path, other)
    assert str(error.value).split("\n")[1:-1] == [
        "  ['complex']: complex64[2] saved, complex64[2,1] in target",
        "  ['key']: key<rbg>[2] saved, key<fry>[2] in target",
        "  ['more']: nothing saved, float32[1] in target",
        "  ['position']: int64[] saved, int32[] in target",
        "  ['flags']: bool[4] saved, nothing in target",
    ]


def donated():
    """An array that a function took for its own."""
    a = jnp.ones(2)
    a.delete()
    return a


UNSAVABLE = {
    "string": (lambda: "gru", "is 'gru'; only arrays"),
    "complex": (lambda: 1j, "is 1j; only"),
    "abstract": (lambda: jax.ShapeDtypeStruct((2,), float), "is ShapeDtypeStruct"),
    "large": (lambda: 2**70, f"is {2**70}, beyond 64 bits"),
    "strings": (lambda: np.array(["a"]), "has dtype <U1"),
    "objects": (lambda: np.array([None]), "has dtype object"),
    "halved": (lambda: jnp.ones(2, jnp.int4), "has dtype int4"),
    "none": (lambda: jnp.zeros((0, 3)), r"is empty, of shape \(0, 3\)"),
    "donated": (donated, "was donated.*save what that function gave"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_cannot_be_saved_is_named(name, tmp_path):
    make, reason = UNSAVABLE[name]
    with checkpoint.open(tmp_path) as manager:
        with pytest.raises(ValueError, match=rf"^tree\['b'\] {reason}"):
            checkpoint.save(manager, 1, {"a": jnp.ones(2), "b": make()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tree", [{}, None, 1.0])
def test_a_tree_is_a_tree(tree, tmp_path):
    with checkpoint.open(tmp_path) as manager:
        with pytest.raises(ValueError, match="tree must be a dict or tuple that holds arrays"):
            checkpoint.save(manager, 1, tree)


def test_steps_are_numbers_and_go_forward(tmp_path):
    write(tmp_path, [10, 20, 30])
    with checkpoint.open(tmp_path) as manager:
        for step in (tree_of(), "3", 3.5, -1, True):
            with pytest.raises(ValueError, match="step must be an integer, 0 or more; got"):
                checkpoint.save(manager, step, tree_of())
        begin, tree = checkpoint.restore(manager, tree_of(), step=10)
        with pytest.raises(ValueError, match="(?s)step 11 lies before step 30, the last.*delete"):
            checkpoint.save(manager, 11, tree)
        with pytest.raises(ValueError, match=r"step 11 is not in .*; there are \[10, 20, 30\]"):
            checkpoint.restore(manager, tree_of(), step=11)
        for later in (20, 30):
            manager.delete(later)
        assert checkpoint.save(manager, 11, tree_of(11))
        assert_same(checkpoint.restore(manager, tree_of())[1], tree_of(11))


def test_a_directory_is_one(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be a local one; got 'gs://bucket/run'"):
        checkpoint.open("gs://bucket/run")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must not be a file; got .*file"):
        checkpoint.open(tmp_path / "file")
    monkeypatch.setenv("HOME", str(tmp_path))
    with checkpoint.open("~/run") as manager:
        assert Path(manager.directory) == tmp_path / "run"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_failing_machine_is_no_damage(error, tmp_path, monkeypatch):
    write(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def fails(*args, **kwargs):
        raise error

    with checkpoint.open(tmp_path) as manager:
        monkeypatch.setattr(manager, "restore", fails)
        with pytest.raises(type(error)):
            checkpoint.restore(manager, tree_of())
    assert sorted(tmp_path.rglob("*")) == before


def test_who_may_only_read_renames_nothing(tmp_path):
    write(tmp_path)
    flip(large_file(tmp_path / "2"))
    before = sorted(tmp_path.rglob("*"))
    options = ocp.CheckpointManagerOptions(read_only=True)
    with checkpoint.open(tmp_path, options) as manager:
        with pytest.warns(UserWarning, match="step 2 .*Step 1 is used instead"):
            assert checkpoint.restore(manager, tree_of())[0] == 1
    assert sorted(tmp_path.rglob("*")) == before


# A run


def test_the_options_are_orbaxs(tmp_path):
    """The best step and the newest are kept; what the options do not ask for is not saved."""
    loss_of = lambda metrics: metrics["loss"]  # noqa: E731
    policy = [
        preservation_policy.LatestN(2),
        preservation_policy.BestN(get_metric_fn=loss_of, reverse=True, n=1),
    ]
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=2,
        best_fn=loss_of,
        best_mode="min",
        preservation_policy=preservation_policy.AnyPreservationPolicy(policy),
    )
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 5.0}
    with checkpoint.open(tmp_path, options) as manager:
        for step, loss in losses.items():
            assert checkpoint.save(manager, step, tree_of(step), metrics={"loss": loss})
            assert not checkpoint.save(manager, step + 1, tree_of(), metrics={"loss": 0.0})
        manager.wait_until_finished()
        assert manager.all_steps() == [4, 8, 10] and manager.best_step() == 4
        assert_same(checkpoint.restore(manager, tree_of(), manager.best_step())[1], tree_of(4))
        assert checkpoint.save(manager, 11, tree_of(), metrics={"loss": 9.0}, force=True)
        assert checkpoint.restore(manager, tree_of())[0] == 11
    with checkpoint.open(tmp_path / "few", ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in range(4):
            checkpoint.save(manager, step, tree_of(step))
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]


TOLD = """
import hashlib
from tests.conformance.table import plain
bits = b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(plain(tree)))
print("ends", hashlib.sha256(bits).hexdigest())
"""


def recipe(path):
    """The page's code, as a program that ends by telling all bits of what it learned."""
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    path.write_text("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) + TOLD)
    return path


def start(program, folder, steps):
    return subprocess.Popen(
        [sys.executable, program, str(folder), str(steps)],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(program.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
    )


def ended(run):
    """From which step a run went, and its last bits."""
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    return int(re.search(r"from step (\d+)\n", out)[1]), re.search("ends (.*)", out)[1]


def newest(folder):
    """The newest step that Orbax says is there."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(2, 120), (20, 800)])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(kills, steps, tmp_path):
    """It goes on from the newest step that was there, be it killed in a save or at its start."""
    program, folder = recipe(tmp_path / "run.py"), tmp_path / "killed"
    rng, before = random.Random(0), 0
    for kill in range(kills):
        run = start(program, folder, steps)
        try:
            if kill % 5 == 4:
                time.sleep(rng.uniform(0, 6))
            else:
                assert run.stdout.readline() == f"from step {before}\n"
                while newest(folder) < before + 5 * rng.randint(1, 4):
                    assert run.poll() is None
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.2))
        finally:
            run.kill()
            run.communicate()
        assert run.returncode == -signal.SIGKILL
        assert newest(folder) >= before
        before = newest(folder)
    begun, end = ended(start(program, folder, steps))
    assert begun == before > 5 * kills / 2
    assert ended(start(program, tmp_path / "whole", steps)) == (0, end)
    left = [path.name for path in folder.iterdir()]
    assert len(left) <= 3 and all(name.isdigit() for name in left), left
