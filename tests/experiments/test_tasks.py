"""Tasks: shapes, floors, repeatability, and nothing of the test set in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import TASKS, accuracy, constant_floors, delayed_recall, digits
from experiments.tasks.digits import split_digits


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.few(2)
def test_batches_fit_the_task(name):
    task = TASKS[name](0)
    batch = task.sample(jax.random.key(1), 5)
    steps = batch.inputs.shape[1]
    assert task.name == name
    assert batch.inputs.shape == (5, steps, task.test.inputs.shape[2])
    assert batch.targets.shape == batch.mask.shape == (5, steps)
    assert jnp.issubdtype(batch.targets.dtype, jnp.integer)
    assert 0 <= batch.targets.min() and batch.targets.max() < task.classes
    assert task.test.inputs.shape[1] == steps


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.few(1)
def test_same_seed_same_numbers(name):
    first, again, other = TASKS[name](0), TASKS[name](0), TASKS[name](1)
    np.testing.assert_array_equal(first.test.inputs, again.test.inputs)
    assert not np.array_equal(first.test.inputs, other.test.inputs)
    key = jax.random.key(3)
    np.testing.assert_array_equal(first.sample(key, 4).inputs, again.sample(key, 4).inputs)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.few(2)
def test_floors_are_what_a_constant_prediction_reaches(name):
    task = TASKS[name](0)
    labels = np.asarray(task.test.targets[:, 0])
    best = max(np.mean(labels == c) for c in range(task.classes))
    assert 0 < task.floors.accuracy <= best
    entropy = -sum(p * np.log(p) for c in range(task.classes) if (p := np.mean(labels == c)))
    assert task.floors.loss >= entropy  # No constant prediction beats the test set's own.
    assert task.floors.loss == pytest.approx(np.log(task.classes), rel=0.01)


def test_constant_floors_by_hand():
    floors = constant_floors(np.array([0.25, 0.75]), np.array([0, 0, 0, 1]))
    assert floors.accuracy == 0.25
    assert floors.loss == pytest.approx(-(3 * np.log(0.25) + np.log(0.75)) / 4)


def test_accuracy_counts_only_the_steps_asked_for():
    batch = delayed_recall().sample(jax.random.key(0), 8)
    right = jax.nn.one_hot(batch.targets, 4)
    assert accuracy(right, batch) == 1
    elsewhere = jnp.where(batch.mask[..., None] == 0, -right, right)
    assert accuracy(elsewhere, batch) == 1
    assert accuracy(-right, batch) == 0


def test_digits_training_and_test_sets_are_disjoint_and_whole():
    (train_x, train_labels), (test_x, test_labels) = split_digits(0, 0.2)
    assert len(train_labels) + len(test_labels) == 1797
    assert len(test_labels) == 359
    train_rows = {row.tobytes() for row in train_x}
    assert not any(row.tobytes() in train_rows for row in test_x)


def test_digits_are_normalised_by_training_statistics_alone():
    (train_x, _), (test_x, _) = split_digits(0, 0.2)
    assert np.mean(train_x) == pytest.approx(0, abs=1e-5)
    assert np.std(train_x) == pytest.approx(1, abs=1e-5)
    assert abs(np.mean(test_x)) > 1e-5


def test_digits_training_batches_hold_no_test_digit():
    task = digits("rows", 0)
    batch = task.sample(jax.random.key(0), 2000)
    held_out = {np.asarray(image).tobytes() for image in task.test.inputs}
    assert not any(np.asarray(image).tobytes() in held_out for image in batch.inputs)


def test_pixels_are_the_rows_read_one_by_one():
    rows, pixels = digits("rows", 0), digits("pixels", 0)
    np.testing.assert_array_equal(
        rows.test.inputs.reshape(-1, 64), pixels.test.inputs.reshape(-1, 64)
    )
    assert pixels.test.mask.sum(axis=1).tolist() == [1] * 359
    np.testing.assert_array_equal(pixels.test.mask[:, -1], 1)


def test_delayed_recall_has_its_parts():
    task = delayed_recall(classes=3, cue_steps=2, delay=5, answer_steps=1, noise=1.0)
    inputs, targets, mask, _ = task.sample(jax.random.key(0), 6)
    assert inputs.shape == (6, 8, 4)
    np.testing.assert_array_equal(inputs[:, :2, :3].argmax(-1), targets[:, :2])
    np.testing.assert_array_equal(inputs[:, :2, :3].sum(-1), 1)
    assert jnp.std(inputs[:, 2:7, :3]) == pytest.approx(1, abs=0.25)
    np.testing.assert_array_equal(inputs[:, 7, :3], 0)
    np.testing.assert_array_equal(inputs[..., 3], mask)
    np.testing.assert_array_equal(mask, np.arange(8)[None] >= np.full((6, 1), 7))


def test_nothing_after_the_cue_tells_the_answer():
    inputs, targets, _, _ = delayed_recall(test_size=4000).test
    late = inputs[:, 3:].reshape(4000, -1)
    means = jnp.stack([late[targets[:, 0] == c].mean(axis=0) for c in range(4)])
    assert jnp.abs(means - late.mean(axis=0, keepdims=True)).max() < 5 * 1.25 / np.sqrt(1000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: digits("columns"), "reading must be one of .*'rows', 'pixels'.*'columns'"),
        (lambda: digits("rows", test_share=1.0), "test_share must lie between 0 and 1; got 1.0"),
        (lambda: digits("rows", graded_steps=9), r"graded_steps must lie in 1\.\.8; got 9"),
        (lambda: delayed_recall(classes=1), "classes must be at least 2; got 1"),
        (lambda: delayed_recall(delay=-1), "delay must be at least 0; got -1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
