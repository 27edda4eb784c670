"""Delayed recall: a cue, a delay full of distractors, a go signal, the answer.

The task separates rules that carry credit back through time from rules that do not:

* distractors arrive on the cue's own channels, so no fixed input filter removes them, and a frozen
  network forgets the cue under them;
* nothing is asked for before the go signal, so a rule that looks one step back never gives the
  cue's input weights any credit;
* every batch is new, so nothing can be learned by heart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.tasks.base import Task, drawn_task
from localgrad import Batch


def delayed_recall(
    seed: int = 0,
    *,
    classes: int = 4,
    cue_steps: int = 3,
    delay: int = 10,
    answer_steps: int = 3,
    noise: float = 1.25,
    test_size: int = 512,
) -> Task:
    """Makes the delayed recall task: T = cue_steps + delay + answer_steps, I = classes + 1.

    Args:
        seed: fixes the test sequences.
        classes: O, the number of cues.
        cue_steps: for how many steps the one-hot cue is shown.
        delay: how many steps of distractors follow.
        answer_steps: for how many steps the go signal is on and the cue is asked for.
        noise: standard deviation of the distractors, Gaussian on each of the cue's channels.
        test_size: the number of test sequences.

    Returns:
        The task.
    """
    for name, value, least in (
        ("classes", classes, 2),
        ("cue_steps", cue_steps, 1),
        ("delay", delay, 0),
        ("answer_steps", answer_steps, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    steps = cue_steps + delay + answer_steps
    time = jnp.arange(steps)
    cue_on, go_on = time < cue_steps, time >= cue_steps + delay
    distractors_on = ~cue_on & ~go_on

    def sample(key: jax.Array, batch_size: int) -> Batch:
        label_key, noise_key = jax.random.split(key)
        labels = jax.random.randint(label_key, (batch_size,), 0, classes)
        cue = jax.nn.one_hot(labels, classes)[:, None] * cue_on[None, :, None]
        distractors = noise * jax.random.normal(noise_key, (batch_size, steps, classes))
        go = jnp.broadcast_to(go_on.astype(cue.dtype), (batch_size, steps))
        return Batch(
            inputs=jnp.concatenate(
                [cue + distractors * distractors_on[None, :, None], go[..., None]], axis=-1
            ),
            targets=jnp.broadcast_to(labels[:, None], (batch_size, steps)),
            mask=go,
        )

    return drawn_task(
        name="delayed_recall",
        title="delayed recall",
        summary=f"T={steps} steps, 1 of {classes} cues, {delay} steps of distractors, answer",
        classes=classes,
        sample=sample,
        seed=seed,
        test_size=test_size,
    )
