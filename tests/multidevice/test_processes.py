"""Two processes of four devices each, which talk over loopback, give the numbers of one device."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import localgrad
from experiments.devices import axis_of, collectives, make_mesh, spread

B, T, CALLS, LIMIT = 8, 6, 2, 300


RULES = (localgrad.eprop, localgrad.node_perturbation)  # the second draws


def learned(make_rule, mesh=None):
    """Parameters and losses after a few calls, with a mesh or without; and its collectives."""
    model = localgrad.Network((localgrad.RateCell(4, alpha=0.3),), readout=nn.Dense(4))
    x = jax.random.normal(jax.random.key(0), (B, T + 1, 4))
    batch = localgrad.Batch(x[:, :-1], x[:, 1:])
    carry = model.initialize_carry(jax.random.key(0), (B, 4))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]

    def make(streams):
        noise = {} if make_rule is localgrad.eprop else {"scale": 0.1, "key": jax.random.key(7)}
        rule = make_rule(model, optax.l2_loss, batch_size=streams, **noise)
        return optax.chain(rule, optax.adam(1e-2))

    tx, told = make(B), []
    at = params, tx.init(params), batch
    step = jax.jit(lambda p, s, b: localgrad.learn(tx, p, s, b, chunk=T))
    if mesh is not None:
        streams = axis_of(lambda n: make(n).init(params), B, 2 * B)
        at = spread(mesh, at[0]), spread(mesh, at[1], data=streams), spread(mesh, batch, data=0)
        told = collectives(step.lower(*at).compile())
    params, state, batch = at
    losses = []
    for _ in range(CALLS):
        params, state, loss = step(params, state, batch)
        losses += np.asarray(loss).tolist()
    return [np.asarray(a).tolist() for a in jax.tree.leaves(params)], losses, told


def main(address: str, number: str) -> None:
    """One of the two processes; prints what it found as a line of JSON."""
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    for make_rule in RULES:
        params, losses, told = learned(make_rule, make_mesh(data=8))
        print(json.dumps([params, losses, [c.operation for c in told]]), flush=True)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_device():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    root = str(Path(__file__).parents[2])
    flags = re.sub(r"(?<=device_count=)\d+", "4", os.environ["XLA_FLAGS"])
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": root}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(number)],
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        expected = [learned(make_rule)[:2] for make_rule in RULES]
        for process in started:
            out, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, err
            lines = out.splitlines()[-len(RULES) :]
            for line, (params, losses) in zip(lines, expected, strict=True):
                *found, told = json.loads(line)
                chex.assert_trees_all_close(found, [params, losses], rtol=1e-4, atol=1e-6)
                assert told == ["all-reduce"]
    finally:
        for process in started:
            process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
