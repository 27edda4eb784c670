"""Training: a whole run of one rule is one jitted function, its seeds vmapped, called in segments.

The segments are there for the progress bar and for the checkpoints between them: at each, every
seed is tested on held-out data, and the rule's last update is compared with BPTT's at the same
parameters and on the same batch. Letters: S seeds, C checkpoints, B batch, T time steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.devices import make_mesh, spread
from experiments.tasks import Task, accuracy

QUICKLY = {"xla_backend_optimization_level": 1}
"""Of XLA: a run of a minute or less spends more on being compiled than on learning. This takes a
quarter off the first and adds nothing to the second (level 0 makes it five times longer)."""


class Budget(NamedTuple):
    """What every rule of a comparison gets.

    Attributes:
        steps: how many updates.
        batch_size: B.
        learning_rate: the optimizer's.
        clip: the updates' largest global norm.
        seeds: S, how many runs.
        checkpoints: C, how many times a run is looked at; divides `steps`.
        seed: where all the randomness starts.
    """

    steps: int
    batch_size: int
    learning_rate: float
    clip: float
    seeds: int
    checkpoints: int
    seed: int

    @property
    def segment(self) -> int:
        """The number of updates between two checkpoints."""
        if self.steps % self.checkpoints:
            raise ValueError(
                f"steps ({self.steps}) must be a multiple of checkpoints ({self.checkpoints})."
            )
        return self.steps // self.checkpoints


class Problem(NamedTuple):
    """A network with a task.

    Attributes:
        model: a `localgrad.Network`.
        loss: the loss of one time step.
        task: what it learns.
    """

    model: Any
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    task: Task


class Run(NamedTuple):
    """The state of a run; stacked over seeds outside the jitted functions."""

    params: Any
    opt_state: Any


class Probe(NamedTuple):
    """A rule's update before the optimizer, with the parameters and the batch it was made from."""

    updates: Any
    params: Any
    batch: localgrad.Batch


class History(NamedTuple):
    """A finished run of S seeds.

    Attributes:
        steps: [C + 1] the number of updates made at each test.
        test_loss: [S, C + 1].
        test_accuracy: [S, C + 1].
        train_loss: [S, steps] each batch's mean loss, before its update.
        alignment: group of parameters -> `Alignment` of [S, C] each, before updates
            `steps[1:]`.
    """

    steps: np.ndarray
    test_loss: np.ndarray
    test_accuracy: np.ndarray
    train_loss: np.ndarray
    alignment: dict[str, localgrad.Alignment]


class RecordState(NamedTuple):
    """The update that last passed through `record`."""

    recorded: Any


def record() -> optax.GradientTransformation:
    """An identity transformation that remembers the last update, as `recorded` in its state."""

    def init(params: Any) -> RecordState:
        return RecordState(optax.tree.zeros_like(params))

    def update(updates: Any, state: RecordState, params: Any = None) -> tuple[Any, RecordState]:
        del state, params
        return updates, RecordState(updates)

    return optax.GradientTransformation(init, update)


class Shared(NamedTuple):
    """What all rules of one problem share, so that only the rule differs between their runs.

    Attributes:
        params: initial parameters [S, ...].
        rule_keys: [S] what each seed's random feedback comes from.
        draw: `checkpoint -> Batch` of [S, segment, B, T, ...], the batches up to it.
        test: `params -> (loss [S], accuracy [S])` on held-out data.
        align: `Probe -> {group: Alignment}` of an update to BPTT's, [S] each.
        options: what XLA is told of every program of the run.
    """

    params: Any
    rule_keys: jax.Array
    draw: Callable[[int], localgrad.Batch]
    test: Callable[[Any], tuple[jax.Array, jax.Array]]
    align: Callable[[Probe], dict[str, localgrad.Alignment]]
    options: dict[str, Any]


class Trainer(NamedTuple):
    """What one rule has of its own.

    Attributes:
        run: the state of all seeds before the first update.
        advance: `(Run, Batch of [S, segment, B, T, ...]) -> (Run, Probe, losses [S, segment])`,
            compiled.
    """

    run: Run
    advance: Callable[[Run, localgrad.Batch], tuple[Run, Probe, jax.Array]]


def make_shared(problem: Problem, budget: Budget, options: Mapping[str, Any] = QUICKLY) -> Shared:
    """Draws and builds what all rules of a problem share.

    Each batch is divided among as many devices as there are and as divide its size.

    Args:
        problem: the network with its task.
        budget: what every rule gets.
        options: what XLA is told; those that this jaxlib does not know are left out.

    Returns:
        What the rules share.
    """
    model, loss, task = problem
    mesh = make_mesh(data=math.gcd(budget.batch_size, jax.device_count()))
    exact = localgrad.bptt(model, loss)
    told = known(options)
    param_keys, rule_keys, data_keys = jax.random.split(
        jax.random.key(budget.seed), (3, budget.seeds)
    )

    def init(key: jax.Array) -> Any:
        x = task.test.inputs[:, 0]
        return model.init(key, model.initialize_carry(key, x.shape), x)["params"]

    def draw(key: jax.Array, checkpoint: int) -> localgrad.Batch:
        keys = jax.random.split(jax.random.fold_in(key, checkpoint), budget.segment)
        return jax.vmap(lambda key: task.sample(key, budget.batch_size))(keys)

    def test(params: Any) -> tuple[jax.Array, jax.Array]:
        value, outputs, _ = localgrad.evaluate(model, loss, params, task.test)
        return value, accuracy(outputs, task.test)

    def align(probe: Probe) -> dict[str, localgrad.Alignment]:
        reference, _ = exact(probe.params, exact.init(probe.params), probe.batch)
        return localgrad.compare(probe.updates, reference)

    draws = jax.jit(jax.vmap(draw, in_axes=(0, None)), compiler_options=told)
    return Shared(
        params=spread(mesh, one_by_one(init, param_keys)),
        rule_keys=spread(mesh, rule_keys),
        draw=lambda checkpoint: spread(mesh, draws(data_keys, checkpoint), data=2),
        test=jax.jit(jax.vmap(test), compiler_options=told),
        align=jax.jit(jax.vmap(align), compiler_options=told),
        options=told,
    )


def known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of XLA's that this jaxlib knows."""

    def is_known(name: str) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: options[name]}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: options[name] for name in options if is_known(name)}


def of_first_seeds(shared: Shared, count: int) -> Shared:
    """What the first seeds share, for a rule too slow for all of them."""

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[:count], tree)

    return shared._replace(
        params=first(shared.params),
        rule_keys=first(shared.rule_keys),
        draw=lambda checkpoint: first(shared.draw(checkpoint)),
    )


def one_by_one(init: Callable[[jax.Array], Any], keys: jax.Array) -> Any:
    """What `init` draws from each key, stacked.

    Not by `vmap`: on a CPU of few cores jaxlib's batched QR, of orthogonal initializers, can wait
    for itself for ever where a program holds several.
    """
    drawn = [jax.block_until_ready(jax.jit(init)(key)) for key in keys]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)


def make_trainer(
    shared: Shared,
    make_rule: Callable[[jax.Array], localgrad.LearningRule],
    optimizer: Callable[[float], optax.GradientTransformation],
    budget: Budget,
) -> Trainer:
    """Builds and compiles the run of one rule.

    Args:
        shared: what all rules share.
        make_rule: the rule from a PRNG key, which fixes its random feedback.
        optimizer: the optimizer from a learning rate.
        budget: what every rule gets.

    Returns:
        The run of all seeds, ready to go.
    """

    def chain(key: jax.Array) -> optax.GradientTransformationExtraArgs:
        return optax.chain(
            make_rule(key),
            record(),
            optax.clip_by_global_norm(budget.clip),
            optimizer(budget.learning_rate),
        )

    def start(params: Any, key: jax.Array) -> Run:
        return Run(params, chain(key).init(params))

    tx = chain(jax.random.key(0))  # `update` never reads the factory's key: see `start`.

    def step(at: tuple[Run, Any], batch: localgrad.Batch) -> tuple[tuple[Run, Any], jax.Array]:
        (params, opt_state), _ = at
        updates, opt_state = tx.update(None, opt_state, params, batch=batch)
        run = Run(optax.apply_updates(params, updates), opt_state)
        return (run, params), optax.tree.get(opt_state, "loss")

    def advance(run: Run, batches: localgrad.Batch) -> tuple[Run, Probe, jax.Array]:
        (run, before), losses = jax.lax.scan(step, (run, run.params), batches)
        last = jax.tree.map(lambda leaf: leaf[-1], batches)
        probe = Probe(optax.tree.get(run.opt_state, "recorded"), before, last)
        return run, probe, losses

    # Not jitted: what it draws and fills is compiled once for all rules.
    run = jax.vmap(start)(shared.params, shared.rule_keys)
    run = jax.device_put(run, shared.rule_keys.sharding)
    stays = (jax.tree.map(lambda a: a.sharding, run), None, None)
    jitted = jax.jit(jax.vmap(advance), out_shardings=stays, compiler_options=shared.options)
    return Trainer(run, jitted.lower(run, shared.draw(0)).compile())


def train(trainer: Trainer, shared: Shared, budget: Budget, tick: Callable[[], object]) -> History:
    """Trains all seeds of one rule.

    Args:
        trainer: the rule's run.
        shared: what it was made from.
        budget: what it was made with.
        tick: called after each of the C segments, to move a progress bar.

    Returns:
        What happened.
    """
    run = trainer.run
    tests, losses, alignments = [shared.test(run.params)], [], []
    for checkpoint in range(budget.checkpoints):
        run, probe, segment = trainer.advance(run, shared.draw(checkpoint))
        tests.append(shared.test(run.params))
        losses.append(segment)
        alignments.append(jax.block_until_ready(shared.align(probe)))
        tick()
    test_loss, test_accuracy = zip(*tests, strict=True)
    return History(
        steps=np.arange(budget.checkpoints + 1) * budget.segment,
        test_loss=np.stack(test_loss, axis=1),
        test_accuracy=np.stack(test_accuracy, axis=1),
        train_loss=np.concatenate(losses, axis=1),
        alignment=jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *alignments),
    )
