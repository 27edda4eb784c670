"""`SABCell` beside a loop with a list of past states: what it recalls, and what it credits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localgrad

N, INPUTS, B, T = 3, 2, 2, 8
MODELS = {
    "every_step": {"slots": T, "top_k": 3},
    "some_steps": {"slots": 4, "top_k": 2, "attend_every": 2, "truncate": 3},
    "forgets": {"slots": 2, "top_k": 2, "attend_every": 2, "truncate": 4},
    "never_cut": {"slots": 3, "top_k": 3, "attend_every": 3, "truncate": None},
}
close = functools.partial(chex.assert_trees_all_close, rtol=0, atol=1e-12)


class Built(NamedTuple):
    """A cell in float64, its parameters and inputs [B, T, INPUTS]."""

    cell: localgrad.SABCell
    params: Any
    inputs: jax.Array


def built(seed: int = 0, **options: Any) -> Built:
    cell = localgrad.SABCell(N, param_dtype=jnp.float64, **options)
    rng = np.random.default_rng(seed)
    carry = cell.initialize_carry(jax.random.key(0), (B, INPUTS))
    shapes = jax.eval_shape(cell.init, jax.random.key(0), carry, jnp.zeros((B, INPUTS)))["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), shapes)
    return Built(cell, params, jnp.asarray(rng.normal(size=(B, T, INPUTS))))


def by_flax(it: Built, params: Any, inputs: jax.Array) -> jax.Array:
    return nn.RNN(it.cell).apply({"params": {"cell": params}}, inputs)


def by_hand(it: Built, params: Any, inputs: jax.Array) -> jax.Array:
    return jax.vmap(lambda xs: looped(it.cell, params, xs)[0])(inputs)


def looped(cell: localgrad.SABCell, params: Any, xs: Any) -> tuple[jax.Array, list[jax.Array]]:
    """One example's outputs [T, 2 N], and for each step when its best slots were; -1 is m_0."""
    h = c = jnp.zeros(N)
    past: list[tuple[int, jax.Array]] = []
    outputs, seen = [], []
    vector = jnp.concatenate([params["query"]["kernel"], params["key"]["kernel"]])[:, 0]
    for t, x in enumerate(xs):
        if cell.truncate is not None and (t + 1) % cell.truncate == 0:
            h, c = jax.lax.stop_gradient((h, c))
        drive = functools.partial(driven, params["lstm"], x, h)
        i, f, o = (jax.nn.sigmoid(drive(gate)) for gate in "ifo")
        c = f * c + i * jnp.tanh(drive("g"))
        h = o * jnp.tanh(c)
        slots = [(-1, jnp.zeros(N)), *past]
        scores = jnp.stack([jnp.tanh(jnp.concatenate([h, m])) @ vector for _, m in slots])
        best = jnp.argsort(-scores)[: cell.top_k]
        seen.append(jnp.asarray([at for at, _ in slots])[best])
        if len(slots) > cell.top_k:
            above = jnp.maximum(scores - (scores[best[-1]] + 1e-7), 0)
            scores = above / (above.sum() + 1e-7)
        s = sum(a * m for a, (_, m) in zip(scores, slots, strict=True))
        h = h + s
        if (t + 1) % cell.attend_every == 0:
            past = [*past, (t, h)][-cell.slots :]
        outputs.append(jnp.concatenate([h, s]))
    return jnp.stack(outputs), seen


def driven(lstm: Any, x: jax.Array, h: jax.Array, gate: str) -> jax.Array:
    back = lstm["h" + gate]
    return x @ lstm["i" + gate]["kernel"] + h @ back["kernel"] + back["bias"]


def tried(it: Built, run: Callable[..., jax.Array]) -> tuple[jax.Array, Any]:
    """The outputs, and the gradient of their mean loss, whose targets are 0."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        outputs = run(it, params, it.inputs)
        return optax.l2_loss(outputs).mean(), outputs

    grads, outputs = jax.jit(jax.grad(loss, has_aux=True))(it.params)
    return outputs, grads


def updates_of(rule: localgrad.LearningRule, it: Built) -> Any:
    batch = localgrad.Batch(it.inputs, jnp.zeros((B, T, 2 * N)))
    return rule(it.params, rule.init(it.params), batch)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name",
    [n if n == "forgets" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
@pytest.mark.slow
def test_it_is_its_equations_and_its_cuts(name):
    it = built(**MODELS[name])
    outputs, grads = tried(it, by_hand)
    close(tried(it, by_flax), (outputs, grads))
    close(updates_of(localgrad.bptt(it.cell, optax.l2_loss), it), grads)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_rtrl_credits_the_same():
    it = built(**MODELS["some_steps"])
    rule = localgrad.rtrl(it.cell, optax.l2_loss, window=2)
    close(updates_of(rule, it), tried(it, by_flax)[1])


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_without_cuts_it_is_the_full_gradient():
    """Where `truncate` is None or is never reached; the outputs are the same in any case."""
    cut, late, never = (tried(built(slots=T, top_k=2, truncate=k), by_flax) for k in (1, 9, None))
    close(late, never)
    close(cut[0], never[0])
    a, b = (grads["lstm"]["hf"]["kernel"] for _, grads in (cut, never))
    assert jnp.abs(a - b).max() > 1e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 2}, {"top_k": 3, "attend_every": 2}])
@pytest.mark.slow
def test_credit_reaches_no_step_but_by_its_slots(options):
    """With a cut at every step: exact zeros but where a chain of best slots leads."""
    it = built(1, slots=4, truncate=1, **options)

    def last(inputs: jax.Array) -> jax.Array:
        return by_flax(it, it.params, inputs)[:, -1].sum()

    felt = np.any(jax.grad(last)(it.inputs) != 0, axis=-1)
    for xs, found in zip(it.inputs, felt, strict=True):
        best = [np.asarray(when).tolist() for when in looped(it.cell, it.params, xs)[1]]
        reached, steps = set(), {T - 1}
        while steps:
            reached |= steps
            steps = set().union(*(credited(it.cell, t, best[t]) for t in steps)) - reached
        assert set(np.flatnonzero(found).tolist()) == reached
        assert len(reached) < T
        assert (len(reached) > 1) == (it.cell.top_k > 1)


def credited(cell: localgrad.SABCell, t: int, best: list[int]) -> set[int]:
    """The steps whose slots a step credits: all the best, the bar too, if it recalls any."""
    few = 1 + t // cell.attend_every <= cell.top_k
    recalled = best if few else best[:-1]
    return set(best) - {-1} if set(recalled) - {-1} else set()


@pytest.mark.slow
def test_among_many_slots_the_state_does_not_choose():
    """The query cancels: it changes nothing once there are more than k slots, and no sooner."""
    with jax.enable_x64(True):
        it = built(slots=T, top_k=3, truncate=1)
        other = {**it.params, "query": {"kernel": it.params["query"]["kernel"] + 1.0}}
        states = nn.RNN(it.cell, return_carry=True)
        carry, _ = states.apply({"params": {"cell": it.params}}, it.inputs)
        step = lambda p, carry: it.cell.apply({"params": p}, carry, it.inputs[:, 0])[1]  # noqa: E731
        close(step(it.params, carry), step(other, carry))
        few = carry._replace(filled=jnp.full(B, 2, jnp.float32))
        assert not np.allclose(step(it.params, few), step(other, few))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_streams_and_resets():
    """A stream goes on where it was; an example that begins anew remembers nothing."""
    it = built(**MODELS["some_steps"])
    whole = by_flax(it, it.params, it.inputs)
    fresh = by_flax(it, it.params, it.inputs[:, 3:])
    reset = jnp.zeros((B, T), bool).at[0, 3].set(True)
    batch = localgrad.Batch(it.inputs, jnp.zeros_like(whole), reset=reset)
    _, outputs, carry = localgrad.evaluate(it.cell, optax.l2_loss, it.params, batch)
    close(outputs[1], whole[1])
    close(outputs[0], jnp.concatenate([whole[0, :3], fresh[0]]))
    np.testing.assert_array_equal(carry.filled, [5 // 2, 8 // 2])
    np.testing.assert_array_equal(carry.since_cut, [5 % 3, 8 % 3])
    np.testing.assert_array_equal(carry.since_write, [5 % 2, 8 % 2])
    rule = localgrad.bptt(it.cell, optax.l2_loss, batch_size=B)
    state = rule.init(it.params)
    for start in (0, 4):
        piece = jax.tree.map(lambda a, start=start: a[:, start : start + 4], batch)
        _, state = rule(it.params, state, piece)
    close(state.carry, carry)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.slow
def test_precision(dtype):
    """Counters stay float32; scores that all tie give no infinities."""
    cell = localgrad.SABCell(
        4,
        slots=6,
        top_k=2,
        score_init=nn.initializers.zeros_init(),
        recurrent_kernel_init=nn.initializers.lecun_normal(),
        dtype=dtype,
        param_dtype=dtype,
    )
    rnn = nn.RNN(cell, return_carry=True)
    inputs = jnp.ones((2, 5, 3), dtype)
    params = rnn.init(jax.random.key(1), inputs)
    carry, y = rnn.apply(params, inputs)
    assert {a.dtype for a in (*carry[:3], y, *jax.tree.leaves(params))} == {jnp.dtype(dtype)}
    assert {a.dtype for a in carry[3:]} == {jnp.dtype(jnp.float32)}
    grads = jax.grad(lambda p: rnn.apply(p, inputs)[1].astype(jnp.float32).sum())(params)
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves((carry, y, grads)))


@pytest.mark.parametrize(
    ("rule", "streams"),
    [("eprop", None), ("eprop", B), ("snap", B), ("rflo", None), ("deep_eprop", None)],
)
@pytest.mark.few(1)
def test_local_rules_refuse_it_by_name(rule, streams):
    model = localgrad.Network((localgrad.SABCell(N, 4, top_k=2),), readout=nn.Dense(1))
    x = jnp.ones((B, 3, INPUTS))
    carry = model.initialize_carry(jax.random.key(0), (B, INPUTS))
    params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
    keyed = {"key": jax.random.key(0)} if rule == "rflo" else {}
    made = getattr(localgrad, rule)(model, optax.l2_loss, batch_size=streams, **keyed)
    with pytest.raises(ValueError, match=rf"{rule} cannot credit cells_0 \(SABCell\).*bptt.*rtrl"):
        made(params, made.init(params), localgrad.Batch(x, x[..., :1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 4, "features": 0}, "features must be a positive integer; got 0"),
        ({"slots": 0}, "slots must be a positive integer.*got 0"),
        ({"slots": 4, "top_k": 0}, "top_k must be a positive integer.*got 0"),
        ({"slots": 4, "top_k": 5}, "top_k must be at most slots.*top_k=5 and slots=4.*T // attend"),
        ({"slots": 4, "top_k": 2, "attend_every": 0}, "attend_every must be a positive.*got 0"),
        ({"slots": 4, "top_k": 2, "truncate": 0}, "truncate must be .*got 0.*None never cuts"),
        ({"slots": 4, "top_k": 2, "truncate": True}, "truncate must be .*got True"),
        ({"slots": 4.0, "top_k": 2}, r"slots must be a positive integer.*got 4\.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        localgrad.SABCell(**{"features": N} | options)


SYMBOLS, DELAY, STEPS, STREAMS = 4, 10, 120, 16


def recall(key: jax.Array) -> localgrad.Batch:
    """A symbol, then noise; at the end, which symbol was it?"""
    which, noise = jax.random.split(key)
    symbol = jax.random.randint(which, (STREAMS,), 0, SYMBOLS)
    cue = jnp.zeros((STREAMS, DELAY, SYMBOLS)).at[:, 0].set(jax.nn.one_hot(symbol, SYMBOLS))
    inputs = jnp.concatenate([cue, jax.random.normal(noise, (STREAMS, DELAY, 2))], axis=-1)
    targets = jnp.broadcast_to(symbol[:, None], (STREAMS, DELAY))
    return localgrad.Batch(inputs, targets, jnp.zeros((STREAMS, DELAY)).at[:, -1].set(1))


def learnt(top_k: int, key: jax.Array) -> jax.Array:
    """The mean loss at the end of learning, with credit cut at every step of the LSTM."""
    cell = localgrad.SABCell(16, slots=DELAY, top_k=top_k)
    model = localgrad.Network((cell,), readout=nn.Dense(SYMBOLS))
    loss = optax.softmax_cross_entropy_with_integer_labels
    tx = optax.chain(localgrad.bptt(model, loss), optax.adam(0.01))
    carry = model.initialize_carry(key, (STREAMS, SYMBOLS + 2))
    params = model.init(key, carry, recall(key).inputs[:, 0])["params"]

    def step(at: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = at
        updates, opt_state = tx.update(None, opt_state, params, batch=recall(key))
        return (optax.apply_updates(params, updates), opt_state), opt_state[0].loss

    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[1][-20:].mean()


@pytest.mark.slow
def test_it_learns_what_needs_more_than_a_step_of_credit():
    """Beside the same LSTM that recalls nothing, where no credit reaches the symbol's step."""
    keys = jax.random.split(jax.random.key(0), 2)
    recalling, not_recalling = (
        jax.jit(jax.vmap(functools.partial(learnt, top_k)))(keys) for top_k in (4, 1)
    )
    assert recalling.max() < 0.5 and not_recalling.min() > 0.9 * np.log(SYMBOLS)
