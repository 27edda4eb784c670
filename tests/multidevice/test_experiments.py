"""An experiment on eight devices finds what it finds on one: its batches are divided among them."""

import chex
import flax.linen as nn
import jax
import optax
import pytest

import localgrad
from experiments import train
from experiments.devices import axis_of, make_mesh, spread
from experiments.tasks import TASKS

LOSS = optax.softmax_cross_entropy_with_integer_labels
BUDGET = train.Budget(
    steps=2, batch_size=16, learning_rate=0.01, clip=1.0, seeds=1, checkpoints=1, seed=0
)


def history(monkeypatch, devices: int):
    task = TASKS["delayed_recall"](0)
    model = localgrad.Network((localgrad.RateCell(4, alpha=0.3),), readout=nn.Dense(task.classes))
    with monkeypatch.context() as context:
        context.setattr(train.jax, "device_count", lambda: devices)
        shared = train.make_shared(train.Problem(model, LOSS, task), BUDGET)
    rule = lambda key: localgrad.eprop(model, LOSS, feedback="random", key=key)  # noqa: E731
    trainer = train.make_trainer(shared, rule, optax.adam, BUDGET)
    assert len(shared.draw(0).inputs.sharding.device_set) == devices
    return train.train(trainer, shared, BUDGET, lambda: None)


@pytest.mark.slow
def test_batches_are_divided_and_nothing_else_changes(monkeypatch):
    assert jax.device_count() == 8, "run with --xla_force_host_platform_device_count=8"
    one, all_of_them = (history(monkeypatch, n) for n in (1, 8))
    chex.assert_trees_all_close(one, all_of_them, rtol=1e-4, atol=1e-6)


def test_axes_are_those_that_differ_and_never_guessed():
    """Of 4 units, 4 streams and 4 copies, only asking tells which axis of size 4 is which."""
    model = localgrad.Network((localgrad.RateCell(4, alpha=0.3),), readout=nn.Dense(4))
    carry = model.initialize_carry(jax.random.key(0), (4, 4))
    x = jax.numpy.ones((4, 4))
    params = model.init(jax.random.key(1), carry, x)["params"]

    def state(streams: int = 4, copies: int = 4):
        rule = localgrad.uoro(model, optax.l2_loss, key=jax.random.key(0), batch_size=streams)
        return localgrad.average(rule, samples=copies).init(params)

    streams = axis_of(lambda n: state(streams=n), 4, 6)
    copies = axis_of(lambda n: state(copies=n), 4, 6)
    right = ("cells_0", "h", "kernel")
    assert streams.copies.state.right[right] == 1 and copies.copies.state.right[right] == 0
    assert streams.copies.state.key == -1 and copies.copies.state.key == 0
    placed = spread(make_mesh(data=2, samples=4), state(), data=streams, samples=copies)
    found = placed.copies.state.right[right]
    assert found.sharding.shard_shape(found.shape) == (1, 2, 4, 4)
    assert placed.carry[0].sharding.shard_shape((4, 4)) == (2, 4)
    with pytest.raises(ValueError, match=r"axes \[0, 1\] differ"):
        axis_of(lambda n: jax.numpy.ones((n, n)), 2, 3)
    with pytest.raises(ValueError, match="takes 16 devices; there are 8"):
        make_mesh(data=8, samples=2)
