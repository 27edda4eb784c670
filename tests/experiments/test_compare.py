"""The comparison end to end, tiny: table, JSON and figures, and what must hold in them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import localgrad
from experiments import compare
from experiments.tasks import delayed_recall
from experiments.train import Budget, Problem, make_shared, make_trainer, record, train

pytestmark = pytest.mark.long
LOSS = optax.softmax_cross_entropy_with_integer_labels
BUDGET = Budget(steps=6, batch_size=4, learning_rate=0.01, clip=1.0, seeds=2, checkpoints=2, seed=0)


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    config = compare.Config(
        tasks=("delayed_recall",),
        cells=("gru",),
        rules=("bptt", "rtrl", "rflo", "readout_only"),
        steps=4,
        checkpoints=2,
        batch_size=3,
        features=5,
        seeds=2,
        repeats=1,
        workdir=folder,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "with_costs", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare.run(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "train", interrupt)  # what was finished is not trained again
        return compare.run(config), folder


def test_writes_json_and_figures(panels):
    (panel,), folder = panels
    for name in ("learning_curves.png", "alignment.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "results.json").read_text())
    assert content["config"]["features"] == 5
    (written,) = content["panels"]
    assert [rule["name"] for rule in written["rules"]] == [row.name for row in panel.rows]
    curves = written["rules"][0]["history"]
    assert np.shape(curves["test_loss"]) == (2, 3) and curves["steps"] == [0, 2, 4]
    assert written["rules"][0]["cost"]["milliseconds"] > 0


def test_exact_rules_agree_and_the_floor_does_not_move(panels):
    (panel,), _ = panels
    bptt, rtrl, _, readout = (row.history for row in panel.rows)
    assert len(bptt.train_loss) == 2 and len(rtrl.train_loss) == 1  # which is the first
    np.testing.assert_allclose(bptt.train_loss[:1], rtrl.train_loss, rtol=1e-4)
    np.testing.assert_allclose(rtrl.alignment["cells_0"].cosine, 1, atol=1e-4)
    np.testing.assert_allclose(rtrl.alignment["cells_0"].norm_ratio, 1, atol=1e-4)
    assert np.all(readout.alignment["cells_0"].norm_ratio == 0)
    np.testing.assert_allclose(readout.alignment["readout"].cosine, 1, atol=1e-4)


def test_all_rules_start_alike(panels):
    (panel,), _ = panels
    bptt, _, _, readout = (row.history for row in panel.rows)
    np.testing.assert_array_equal(bptt.test_loss[:, 0], readout.test_loss[:, 0])
    np.testing.assert_allclose(bptt.train_loss[:, 0], readout.train_loss[:, 0], rtol=1e-6)


def test_a_refused_rule_says_why(panels):
    (panel,), _ = panels
    row = panel.rows[2]
    assert row.name == "rflo" and row.history is None and row.cost is None
    assert "rflo" in row.refusal and "eprop" in row.refusal


def test_the_table_shows_every_row_and_the_floor(panels):
    (panel,), _ = panels
    text = compare.report.table(panel)
    assert all(row.label in text for row in panel.rows)
    assert "chance" in text and "RFLO, random refused: " in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_vmapped_seeds_are_the_seeds_one_by_one():
    """A run of all seeds at once is plain optax, seed by seed."""
    task = delayed_recall(delay=2, test_size=8)
    model = localgrad.Network(cells=(localgrad.RateCell(5, alpha=0.4),), readout=nn.Dense(4))
    shared = make_shared(Problem(model, LOSS, task), BUDGET)

    def make_rule(key):
        return localgrad.rflo(model, LOSS, key=key)

    trainer = make_trainer(shared, make_rule, optax.adam, BUDGET)
    history = train(trainer, shared, BUDGET, lambda: None)
    for seed in range(2):
        params = jax.tree.map(lambda leaf, s=seed: leaf[s], shared.params)
        rule = make_rule(shared.rule_keys[seed])
        tx = optax.chain(rule, optax.clip_by_global_norm(1.0), optax.adam(0.01))
        state, losses, update = tx.init(params), [], jax.jit(tx.update)
        for step in range(BUDGET.steps):
            checkpoint, place = divmod(step, BUDGET.segment)
            batch = jax.tree.map(lambda a, s=seed, p=place: a[s, p], shared.draw(checkpoint))
            updates, state = update(None, state, params, batch=batch)
            params = optax.apply_updates(params, updates)
            losses.append(optax.tree.get(state, "loss"))
        np.testing.assert_allclose(history.train_loss[seed], jnp.stack(losses), rtol=1e-4)


def test_record_passes_updates_on_and_keeps_them():
    params = {"w": jnp.ones(3)}
    tx = optax.chain(record(), optax.scale(2.0))
    updates, state = tx.update({"w": jnp.arange(3.0)}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], [0, 2, 4])
    np.testing.assert_array_equal(optax.tree.get(state, "recorded")["w"], [0, 1, 2])
