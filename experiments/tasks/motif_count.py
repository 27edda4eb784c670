"""Motif count: rising and falling ramps, a silent delay, and the question which were more.

The task of the public study of deep e-prop (Peter, Säckl and Patel, "Deep e-prop: online credit
assignment across time and depth in deep recurrent networks", technical note, 2026,
https://github.com/simonpeter02/e-prop-in-deep-networks), made from its description.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from experiments.tasks.base import Task, drawn_task
from localgrad import Batch


def motif_count(
    seed: int = 0,
    *,
    motifs: int = 3,
    motif_steps: int = 3,
    pause: int = 2,
    delay: int = 12,
    amplitude: float = 2.0,
    noise: float = 0.15,
    channel_noise: float = 0.01,
    test_size: int = 2048,
) -> Task:
    """Makes the task: T = motifs (motif_steps + pause) + delay + 1, I = 5.

    Channel 0 holds the ramps, from -amplitude to amplitude or back, with noise; 1 and 3 noise; 2
    the recall signal of the last step, where the answer is due; 4 is always 1.

    Args:
        seed: fixes the test sequences.
        motifs: how many ramps, odd.
        motif_steps: steps of each.
        pause: silent steps after each.
        delay: silent steps before the recall.
        amplitude: where a rising ramp ends.
        noise: standard deviation of the noise on the ramps and on channel 1.
        channel_noise: standard deviation of channel 3.
        test_size: the number of test sequences.

    Returns:
        The task.
    """
    if motifs < 1 or motifs % 2 == 0:
        raise ValueError(f"motifs must be odd, so that there is a majority; got {motifs}.")
    if motif_steps < 2:
        raise ValueError(f"motif_steps must be at least 2, to rise or fall; got {motif_steps}.")
    steps = motifs * (motif_steps + pause) + delay + 1
    ramp = jnp.linspace(-amplitude, amplitude, motif_steps)

    def sample(key: jax.Array, batch_size: int) -> Batch:
        side_key, ramp_key, first_key, third_key = jax.random.split(key, 4)
        falling = jax.random.bernoulli(side_key, shape=(batch_size, motifs))
        signs = jnp.where(falling, -1.0, 1.0)[..., None]
        shape = (batch_size, motifs, motif_steps)
        ramps = signs * ramp[None, None] + noise * jax.random.normal(ramp_key, shape)
        spaced = jnp.pad(ramps, ((0, 0), (0, 0), (0, pause))).reshape(batch_size, -1)
        recall = jnp.zeros((batch_size, steps)).at[:, -1].set(1.0)
        channels = [
            jnp.pad(spaced, ((0, 0), (0, delay + 1))),
            noise * jax.random.normal(first_key, (batch_size, steps)),
            recall,
            channel_noise * jax.random.normal(third_key, (batch_size, steps)),
            jnp.ones((batch_size, steps)),
        ]
        labels = (2 * falling.sum(1) > motifs).astype(jnp.int32)
        return Batch(
            inputs=jnp.stack(channels, axis=-1),
            targets=jnp.broadcast_to(labels[:, None], (batch_size, steps)),
            mask=recall,
        )

    return drawn_task(
        name="motif_count",
        title=f"motif count, delay {delay}",
        summary=f"T={steps} steps, {motifs} ramps up or down, {delay} silent steps, the majority",
        classes=2,
        sample=sample,
        seed=seed,
        test_size=test_size,
    )
