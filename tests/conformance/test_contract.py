"""What every rule of the table must do on every model of it.

For each case three calls are compiled and shared by its tests: of 20 steps and of one in streaming
mode, with weights and resets, and of 20 steps in episodic mode without. Of a rule whose updates are
random, the mean over keys is held to the oracle, and the rest to one key.
"""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import numpy as np
import pytest

from catalogue import RULES
from localgrad import Batch
from tests.conformance import draws, oracles
from tests.conformance.table import (
    CASES,
    MODELS,
    B,
    Case,
    T,
    build,
    cases_of,
    groups,
    made,
    plain,
    rule_of,
)

close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)
STEPS = [1] * T
WINDOW = 5
ROUGH = [9, 1, 9, 1]
RAGGED = [1, 3, 9, 1, 6]


@pytest.fixture(scope="module", params=cases_of(CASES))
def case(request) -> Iterator[Case]:
    """Each pair of the table in turn; what it compiled is dropped after its last test."""
    yield request.param
    rule_of.cache_clear()
    start.cache_clear()


@pytest.fixture(scope="module")
def batch(case) -> Batch:
    """The table's batch with weights (some 0) and resets."""
    rng = np.random.default_rng(1)
    mask = rng.choice([0.0, 0.5, 1.0, 2.0], (B, T))
    return numpy(build(case.model).batch)._replace(mask=mask, reset=rng.random((B, T)) < 0.1)


@pytest.fixture(scope="module")
def whole(case, batch) -> tuple[Any, Any]:
    """Updates and state after one call."""
    return stream(case, batch, [T])


def numpy(tree: Any) -> Any:
    """Arrays that can be sliced and changed without compiling anything."""
    return jax.tree.map(np.array, tree)


def streaming(case: Case) -> Any:
    """The rule as it is streamed here: a whole call has 4 windows."""
    return rule_of(case, streaming=True, window=WINDOW)


@functools.cache
def start(case: Case) -> Any:
    """The state of a streaming rule before its first call."""
    return streaming(case).init(build(case.model).params)


def stream(case: Case, batch: Batch, lengths: list[int]) -> tuple[Any, Any]:
    """Feeds a batch in calls of these lengths: the summed updates, and the last state."""
    params, rule, state = build(case.model).params, streaming(case), start(case)
    total = jax.tree.map(np.zeros_like, params)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        piece = jax.tree.map(lambda a, e=end, n=length: a[:, e - n : e], batch)
        updates, state = rule(params, state, piece)
        total = jax.tree.map(lambda a, b: a + b, total, numpy(updates))
    return total, state


def carried(state: Any) -> Any:
    """All that a state takes to the next call: all but the last call's loss."""
    return plain(state._replace(loss=None))


def only(state: Any, example: int) -> list:
    """What a state holds of one example."""
    held = [leaf for leaf in jax.tree.leaves(carried(state)) if B in leaf.shape]
    return [np.asarray(leaf).take(example, axis=leaf.shape.index(B)) for leaf in held]


REACHES = {"tbptt": (3, 1), "strided": (2, 4)}
"""Horizon and stride of the oracles that truncate."""


@functools.cache
def program(model: str, oracle: str):
    """An oracle for one model, compiled: `(params, steps, feedback) -> updates`."""
    built = build(model)
    if oracle == "bptt":
        return jax.jit(lambda params, steps, _: oracles.bptt(built.model, params, steps))
    if oracle in REACHES:
        reach = REACHES[oracle]
        return jax.jit(lambda params, steps, _: oracles.tbptt(built.model, params, steps, *reach))
    net = oracles.net_of(MODELS[model].cells, built.model, oracles.steps_of(built.batch))
    if oracle == "readout":
        return jax.jit(lambda params, steps, _: oracles.readout(net, params, steps))
    if oracle == "deep":
        return jax.jit(lambda params, steps, _: oracles.deep(net, params, steps, "cut"))
    return jax.jit(lambda params, steps, fed: oracles.local(net, params, steps, oracle, fed))


def expected(case: Case, batch: Batch, cut: Any = (), oracle: str | None = None) -> dict:
    """What the case's oracle (or another) says of a batch, with credit cut before some steps."""
    oracle = oracle or RULES[case.rule].expectation
    params = build(case.model).params
    if oracle not in ("bptt", *REACHES):
        params = groups(params)
    feedback = getattr(start(case), "feedback", None)
    return groups(program(case.model, oracle)(params, oracles.steps_of(batch, cut), feedback))


def holds(case: Case, updates: Any, exact: dict, batch: Batch, streaming: bool = True) -> None:
    """The updates of one call are what they must be; those of a random rule, on average."""
    row = RULES[case.rule]
    if not row.random:
        return close(updates, {group: exact[group] for group in updates})
    built = build(case.model)

    def draw(key: jax.Array) -> Any:
        rule = made(
            case,
            functools.partial(row.make, key=key),
            streaming,
            window=WINDOW if streaming else None,
        )
        found = groups(rule(built.params, rule.init(built.params), batch)[0])
        return {group: found[group] for group in updates}

    return draws.assert_mean(draws.sample(draw), {group: exact[group] for group in updates})


@pytest.mark.every_pair
def test_a_stream_gives_what_the_oracle_gives(case, batch, whole):
    holds(case, groups(whole[0]), expected(case, batch), batch)


@pytest.mark.machinery
def test_an_episode_gives_what_the_oracle_gives(case):
    built, rule = build(case.model), rule_of(case)
    updates, state = rule(built.params, rule.init(built.params), built.batch)
    holds(case, groups(updates), expected(case, built.batch), built.batch, streaming=False)
    assert state.loss.shape == ()
    chex.assert_trees_all_equal_structs(state, rule.init(built.params))


def test_single_steps_change_nothing_or_truncate(case, batch, whole):
    split_holds(case, batch, whole, [WINDOW, T - WINDOW] if RULES[case.rule].gridded else STEPS)


@pytest.mark.machinery
def test_a_split_changes_nothing_or_truncates(case, batch, whole):
    if RULES[case.rule].gridded:
        pytest.skip("it is split between windows only")
    # Each length of a call is compiled, so there are but few.
    split_holds(case, batch, whole, RAGGED if case.model == "rate_alpha" else ROUGH)


def split_holds(case: Case, batch: Batch, whole: tuple[Any, Any], lengths: list[int]) -> None:
    """Calls of these lengths end where one call does, and learn the same or as much as is left."""
    updates, state = stream(case, batch, lengths)
    close(carried(state), carried(whole[1]))
    if RULES[case.rule].windowed:
        close(updates, whole[0])
    else:
        close(groups(updates), expected(case, batch, cut=np.cumsum(lengths)))


@pytest.mark.machinery
def test_one_step_gives_the_plain_gradient(case, batch):
    row, first = RULES[case.rule], jax.tree.map(lambda a: a[:, :1], batch)
    first = first._replace(mask=np.linspace(0.5, 1, B)[:, None])
    updates = groups(stream(case, first, [1])[0])
    # The oracle is compiled for T steps already.
    alone = batch._replace(mask=np.pad(first.mask, ((0, 0), (0, T - 1))))
    plain = expected(case, alone, oracle="bptt")
    held = {group: updates[group] for group in plain if row.plain is None or group in row.plain}
    assert held
    holds(case, held, plain, first)


def test_what_a_rule_credits_is_nowhere_zero(case, whole):
    row = RULES[case.rule]
    for path, said in streaming(case).credits(build(case.model).params).items():
        assert said.startswith("nothing") == (
            row.credits is not None and path[0] not in row.credits
        )
    for group, tree in groups(whole[0]).items():
        for leaf in jax.tree.leaves(tree):
            columns = np.abs(leaf).reshape(-1, leaf.shape[-1]).max(0)
            if row.credits is None or group in row.credits:
                assert np.all(columns > 0), group
            else:
                assert np.all(columns == 0), group


@pytest.mark.machinery
def test_a_step_without_weight_teaches_nothing(case, batch, whole):
    targets = np.where(batch.mask[..., None] == 0, np.nan, batch.targets)
    assert np.isnan(targets).any()
    updates, state = stream(case, batch._replace(targets=targets), [T])
    chex.assert_trees_all_equal((updates, state), whole)


@pytest.mark.machinery
def test_a_call_without_weight_gives_zeros_and_moves_on(case, batch, whole):
    updates, state = stream(case, batch._replace(mask=np.zeros((B, T))), [T])
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, updates))
    assert state.loss == 0
    close(carried(state), carried(whole[1]))


@pytest.mark.machinery
def test_padding_on_the_right_teaches_nothing(case, batch):
    lengths = np.array([T, 1, 10, 7, 19, 2, 5])
    padding = np.arange(T)[None] >= lengths[:, None]
    ragged = batch._replace(mask=np.where(padding, 0, 1.0), reset=np.zeros((B, T), bool))
    blank = jax.tree.map(lambda a: np.where(_over(padding, a), np.zeros_like(a), a), ragged.inputs)
    updates, state = stream(case, ragged, [T])
    other, other_state = stream(case, ragged._replace(inputs=blank), [T])
    close((updates, state.loss), (other, other_state.loss))


def _over(flags: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Flags [B, T] with the axes of a [B, T, ...]."""
    return flags.reshape(flags.shape + (1,) * (a.ndim - 2))


def test_a_reset_is_a_fresh_start_of_that_example(case, batch):
    if RULES[case.rule].random:
        pytest.skip("noise differs from step to step; the mean with resets is held to the oracle")
    at, example = T - 4, B - 1
    here = np.arange(B) == example
    reset = np.zeros((B, T), bool)
    reset[example, at] = True
    mask = np.where(here[:, None] & (np.arange(T) >= at)[None], batch.mask + 0.1, 0)
    old = batch._replace(reset=reset, mask=mask)
    new = jax.tree.map(lambda a: a[:, at:], old._replace(reset=np.zeros((B, T), bool)))
    updates, state = stream(case, old, STEPS)
    fresh_updates, fresh_state = stream(case, new, [1] * 4)
    close(updates, fresh_updates)
    close(only(state, example), only(fresh_state, example))
    if RULES[case.rule].windowed:
        close(stream(case, old, [T])[0], fresh_updates)


@pytest.mark.machinery
def test_the_order_of_examples_does_not_matter(case, batch, whole):
    if RULES[case.rule].random:
        pytest.skip("noise differs from example to example")
    order = np.random.default_rng(2).permutation(B)
    updates, state = stream(case, jax.tree.map(lambda a: a[order], batch), [T])
    close(updates, whole[0])
    for place, example in enumerate(order):
        close(only(state, place), only(whole[1], example))


def test_an_example_does_not_reach_another(case, batch, whole):
    inputs, targets = batch.inputs.copy(), batch.targets.copy()
    inputs[0], targets[0] = inputs[1], targets[1] + 1
    _, state = stream(case, batch._replace(inputs=inputs, targets=targets), [T])
    for example in range(1, B):
        chex.assert_trees_all_equal(only(state, example), only(whole[1], example))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), only(state, 0), only(whole[1], 0))
    assert any(changed)


@pytest.mark.machinery
@pytest.mark.parametrize("length", [1, T])
def test_a_state_keeps_its_types(case, batch, length):
    params, rule = build(case.model).params, streaming(case)
    updates, state = rule(params, start(case), jax.tree.map(lambda a: a[:, :length], batch))
    assert types(state) == types(start(case))
    assert types(updates) == types(params)


def test_shapes_are_known_without_numbers(case, batch, whole):
    params, rule = jax.eval_shape(lambda: build(case.model).params), streaming(case)
    state = jax.eval_shape(rule.init, params)
    assert types(state) == types(start(case))
    assert types(jax.eval_shape(rule.__call__, params, state, batch)) == types(whole)


def types(tree: Any) -> tuple:
    """Structure, shapes, dtypes and weakness of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(a.shape, a.dtype, getattr(a, "weak_type", False)) for a in leaves]
