"""Bad input raises a `ValueError` that names the argument, both sides and the way out."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import localgrad
from localgrad import Batch, Network
from tests.conformance import zoo
from tests.conformance.table import REFUSALS, build, cases_of, message_of, rule_of

B, T, IN, N, OUT = 2, 5, 3, 4, 6
KEY = jax.random.key(0)
BATCH = Batch(np.ones((B, T, IN)), np.ones((B, T, OUT)))
NETWORK = Network((nn.GRUCell(N),), readout=nn.Dense(OUT))


@pytest.fixture(scope="module", autouse=True)
def float64():
    """Precision does not matter here."""
    yield


@functools.cache
def params_of(model, features=(IN,)):
    x = jnp.ones((B, *features))
    shapes = jax.eval_shape(
        lambda: model.init(KEY, model.initialize_carry(KEY, x.shape), x)["params"]
    )
    return jax.tree.map(lambda a: np.full(a.shape, 0.1, a.dtype), shapes)


def run(batch=BATCH, factory=localgrad.eprop, model=NETWORK, params=None, **options):
    """Makes a rule and one update."""
    rule = factory(model, optax.l2_loss, **options)
    params = params_of(model) if params is None else params
    return rule(params, rule.init(params), batch)


def refused(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        call(*args, **kwargs)


@pytest.mark.parametrize("case", cases_of(REFUSALS))
@pytest.mark.parametrize("streaming", [False, True], ids=["episodic", "streaming"])
def test_a_rule_refuses_a_cell_it_cannot_credit(case, streaming):
    with jax.enable_x64(True):
        built = build(case.model)
        with pytest.raises(ValueError, match=message_of(case)):
            rule = rule_of(case, streaming)
            rule(built.params, rule.init(built.params), built.batch)


BATCHES = {
    "rank": (Batch(np.ones(T), BATCH.targets), r"inputs must be \[B, T, .*\(5,\).*batch axis"),
    "steps": (
        Batch(BATCH.inputs, np.ones((B, T - 1, OUT))),
        r"batch\.targets must be .* B = 2, T = 5 as in batch\.inputs; got shape \(2, 4, 6\)",
    ),
    "examples": (
        Batch(BATCH.inputs, np.ones((1, T, OUT))),
        r"batch\.targets must be .* B = 2, T = 5 as in batch\.inputs; got shape \(1, 5, 6\)",
    ),
    "empty": (Batch(np.ones((B, 0, IN)), np.ones((B, 0, OUT))), r"\(2, 0, 3\).*at least 1"),
    "nothing": (Batch((), BATCH.targets), "holds no array"),
    "features": (
        Batch(np.ones((B, T, IN + 1)), BATCH.targets),
        r"params do not fit GRUCell.*\(4, 4\).*\(3, 4\).*last axis of batch\.inputs",
    ),
    "mask shape": (
        BATCH._replace(mask=np.ones((T, B))),
        r"batch\.mask must be an array \[B, T\] = \(2, 5\).*got \(5, 2\)",
    ),
    "mask list": (BATCH._replace(mask=[[1.0] * T] * B), r"batch\.mask must be an array.*list"),
    "mask dtype": (BATCH._replace(mask=np.ones((B, T), complex)), "mask must be real.*complex"),
    "reset shape": (
        BATCH._replace(reset=np.zeros(B, bool)),
        r"batch\.reset must be an array \[B, T\] = \(2, 5\).*got \(2,\)",
    ),
    "reset dtype": (BATCH._replace(reset=np.zeros((B, T))), "reset must be bool; got .*float"),
    "a tuple": (tuple(BATCH[:2]), r"batch must be a localgrad\.Batch.*got tuple"),
}


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_must_fit(factory, name):
    batch, message = BATCHES[name]
    refused(f"(?s){message}", run, batch, factory)


class Coded(nn.Module):
    """An encoder of symbols that a layer does not see as such."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="i")(jax.nn.one_hot(x, 5))


class AnyWidth(zoo.Cell):
    """It takes inputs of any width."""

    @nn.compact
    def __call__(self, h, x):
        h = zoo.leaky(h, self.layer("h")(h) + x.sum(-1, keepdims=True))
        return h, h


def test_a_stream_has_its_number_of_examples_and_its_example():
    for factory in (localgrad.bptt, localgrad.rtrl, localgrad.eprop, localgrad.readout_only):
        refused("holds B = 2 .* batch_size=3. .* batch_size=2", run, factory=factory, batch_size=3)
    tbptt = functools.partial(localgrad.tbptt, horizon=2)
    symbols = Batch(np.ones((B, T), int), BATCH.targets)
    coded = Network(NETWORK.cells, NETWORK.readout, encoder=Coded())
    params = {**params_of(NETWORK), "encoder": {"i": {"kernel": np.ones((5, 3))}}}
    refused(r"needs example=.*a\[0, 0\]", run, symbols, model=coded, params=params, batch_size=B)
    refused("needs example=.* several widths", run, model=AnyWidth(), batch_size=B)
    wrong = {"batch_size": B, "example": np.ones(IN + 2)}
    refused(r"params do not fit GRUCell.*\(5, 4\).*\(3, 4\)", run, **wrong)
    other = {"batch_size": B, "example": np.ones(IN, np.float16)}
    refused(r"float32.*float16.*a\[0, 0\], batch\.inputs", run, factory=tbptt, **other)
    whole = Batch(np.ones((B, T, IN), int), BATCH.targets)
    refused(
        r"int32.*keeps inputs of .*float32.*or else the parameters", run, whole, tbptt, batch_size=B
    )


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r'reduction must be "mean" or "sum"; got \'avg\'', {"reduction": "avg"}),
        ("batch_size must be a positive integer or None; got 0", {"batch_size": 0}),
        ("batch_size must be a positive integer or None; got True", {"batch_size": True}),
        ("window must be a positive integer or None; got 0", {"window": 0}),
        ("window must be a positive integer or None; got 2.5", {"window": 2.5}),
        (r'feedback must be "symmetric".*array \(N, O\).*got \'mirror\'', {"feedback": "mirror"}),
        (r"pass key=jax\.random\.key\(seed\)", {"feedback": "random"}),
        (
            r"typed PRNG key: pass jax\.random\.key.*uint32",
            {"feedback": "random", "key": jax.random.PRNGKey(0)},
        ),
        ("typed PRNG key.*int", {"feedback": "random", "key": 0}),
        ("got a key, but with feedback='symmetric' it draws nothing. Leave key out", {"key": KEY}),
        (
            "got a key, but with feedback=weights that are given",
            {"feedback": np.ones((N, OUT)), "key": KEY},
        ),
        ("feedback of cells_0 holds NaN", {"feedback": np.full((N, OUT), np.nan)}),
        (r"must be \(N, O\) = \(4, 6\); got shape \(6, 4\)", {"feedback": np.ones((OUT, N))}),
        (r"\['cells_0'\]; got \['gru'\]", {"feedback": {"gru": np.ones((N, OUT))}}),
        (r"one array a cell, for \['cells_0'\]", {"feedback": [np.ones((N, OUT))] * 2}),
        ("horizon must be a positive integer.*got 0", {"factory": localgrad.tbptt, "horizon": 0}),
        ("horizon must be .*got 2.0", {"factory": localgrad.tbptt, "horizon": 2.0}),
        ("stride must be .*got 0", {"factory": localgrad.tbptt, "horizon": 1, "stride": 0}),
        (r"order=2 on cell.* dense.*localgrad\.rtrl", {"factory": localgrad.snap, "order": 2}),
        (
            r"would take .* more than max_influence_bytes = .* batch_size=2 .*localgrad\.snap",
            {"factory": localgrad.rtrl, "batch_size": B, "max_influence_bytes": 1000},
        ),
    ],
)
def test_a_factory_checks_its_arguments(message, options):
    refused(f"(?s){message}", run, **options)


def test_feedback_weights_need_a_readout():
    bare = {"model": nn.GRUCell(N), "feedback": np.ones((N, OUT))}
    refused("has no readout. Wrap it.*Network.*symmetric", run, **bare)


def test_a_loss_keeps_the_batch_axis():
    rule = localgrad.eprop(NETWORK, lambda y, target: optax.l2_loss(y, target).mean())
    params = params_of(NETWORK)
    message = (
        r"one value a row.*B = 10; got \(\) for outputs \(10, 6\).*Do not average over the batch"
    )
    refused(message, lambda: rule(params, rule.init(params), BATCH))
    refused("loss must be a function.*got None", localgrad.eprop, NETWORK, None)


LOSSES = {
    "broadcast": (
        lambda y, target: (y - target[:, :1].T) ** 2,
        Network((nn.GRUCell(N),), readout=nn.Dense(1)),
        r"compares rows with each other: got shape \(10, 10\).*lack the outputs' last axis",
    ),
    "integer": (
        lambda y, target: (y.argmax(-1) != 0).astype(int),
        NETWORK,
        "must be a floating number; got dtype int",
    ),
    "tuple": (lambda y, target: (y, target), NETWORK, "one value a row.*got tuple"),
    "shapes": (
        lambda y, target: optax.l2_loss(y, target[:, :2]),
        NETWORK,
        r"failed for outputs \(10, 6\) and targets \(10, 6\), the 10 rows",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_treats_rows_by_themselves(name):
    loss, model, message = LOSSES[name]
    params = params_of(model)
    rule = localgrad.bptt(model, loss)
    refused(f"(?s){message}", lambda: rule(params, rule.init(params), BATCH))
    refused(f"(?s){message}", localgrad.evaluate, model, loss, params, BATCH)


class Centred(zoo.Cell):
    """Its units see the batch's mean."""

    of_carry: bool = False

    @nn.compact
    def __call__(self, h, x):
        if self.of_carry:
            h = h - h.mean(0, keepdims=True)
        else:
            x = x - x.mean(0, keepdims=True)
        h = jnp.tanh(self.layer("i")(x) + self.layer("h")(h))
        return h, h


class CentredReadout(nn.Module):
    """A readout that sees the batch's mean."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUT)(x - x.mean(0, keepdims=True))


@pytest.mark.parametrize(
    "model",
    [
        Network((Centred(),), nn.Dense(OUT)),
        Network((Centred(of_carry=True),), nn.Dense(OUT)),
        Network((nn.GRUCell(N),), CentredReadout()),
    ],
    ids=["input", "carry", "readout"],
)
@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop])
def test_examples_know_nothing_of_each_other(model, factory):
    refused("mixes the examples of a batch", run, model=model, factory=factory)
    params = params_of(model)
    refused("mixes the examples", localgrad.evaluate, model, optax.l2_loss, params, BATCH)


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop])
def test_params_must_fit(factory):
    params = params_of(NETWORK)
    cell, inner = nn.GRUCell(N), params_of(nn.GRUCell(N))
    go = functools.partial(run, factory=factory)
    hint = r".*'params' entry of this model's variables"
    refused(rf"Network: .*missing are \['cells_0'\].*{hint}", go, params={"params": params})
    refused(
        rf"GRUCell: .*unknown are \['params'\].*{hint}", go, model=cell, params={"params": inner}
    )
    refused(r"unknown are \['cells_1'\]", go, params=params | {"cells_1": inner})
    refused(r"missing are \['cells_0'\]", go, params={"readout": params["readout"]})
    fewer = {name: leaf for name, leaf in inner.items() if name != "hn"}
    refused('"kernel" in scope "/hn"', go, params=params | {"cells_0": fewer})
    integers = jax.tree.map(lambda a: a.astype(int), params)
    refused("must be floating point; got dtype int", go, params=integers)
    model, _ = localgrad.from_nnx(nnx.LSTMCell(IN, N, rngs=nnx.Rngs(0)))
    _, other = localgrad.from_nnx(nnx.SimpleCell(IN, N, rngs=nnx.Rngs(0)))
    refused("params do not fit LSTMCell: .*missing are .*'hf'", go, model=model, params=other)


def test_a_state_belongs_to_its_rule():
    params = params_of(NETWORK)
    episodic = localgrad.eprop(NETWORK, optax.l2_loss)
    streaming = localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B)
    bptt = localgrad.bptt(NETWORK, optax.l2_loss)
    for rule, state, made in (
        (streaming, episodic.init(params), "without batch_size"),
        (episodic, streaming.init(params), "with batch_size"),
        (episodic, bptt.init(params), "BackpropState"),
    ):
        refused(f"not its own .*{made}.*its own init", rule, params, state, BATCH)


def test_a_state_has_its_rules_shapes():
    params = params_of(NETWORK)
    make = functools.partial(localgrad.tbptt, NETWORK, optax.l2_loss, batch_size=B)
    random = localgrad.eprop(NETWORK, optax.l2_loss, feedback="random", key=KEY)
    wider, lstm = Network((nn.GRUCell(N + 1),), nn.Dense(OUT)), Network((nn.LSTMCell(N),))
    x = jnp.ones(IN)
    for rule, other, model in (
        (localgrad.eprop(NETWORK, optax.l2_loss), random, NETWORK),
        (random, localgrad.eprop(NETWORK, optax.l2_loss), NETWORK),
        (make(horizon=3, example=x), make(horizon=4, example=x), NETWORK),
        (make(horizon=1), localgrad.tbptt(wider, optax.l2_loss, horizon=1, batch_size=B), wider),
        (make(horizon=1), localgrad.tbptt(lstm, optax.l2_loss, horizon=1, batch_size=B), lstm),
        (
            make(horizon=1),
            localgrad.tbptt(NETWORK, optax.l2_loss, horizon=1, batch_size=7),
            NETWORK,
        ),
    ):
        state = other.init(params_of(model))
        refused("(?s)not its own: state.* has shape .*own init", rule, params, state, BATCH)


def test_a_network_is_made_of_cells():
    cell = nn.GRUCell(N)
    refused("same cell object twice.*one object a layer", Network, (cell, cell))
    refused("cells is empty", Network, ())
    refused("holds Dense, which has no initialize_carry.*into readout", Network, (nn.Dense(3),))
    refused(r"must be a sequence of cells; got one GRUCell.*cells=\(cell,\)", Network, cell)


def test_a_model_is_a_flax_cell():
    raw = nnx.GRUCell(IN, N, rngs=nnx.Rngs(0))
    refused("NNX module GRUCell; pass it through .*from_nnx", localgrad.eprop, raw, optax.l2_loss)
    refused("must be a Flax cell", localgrad.eprop, lambda c, x: (c, x), optax.l2_loss)
    refused("must be an NNX module; got GRUCell", localgrad.from_nnx, nn.GRUCell(N))
    refused("Dense is no recurrent cell", localgrad.eprop, nn.Dense(N), optax.l2_loss)
    refused("without nn.RNN", localgrad.bptt, nn.RNN(nn.GRUCell(N)), optax.l2_loss)
    layer = nnx.Linear(IN, N, rngs=nnx.Rngs(0))
    refused("Linear is no recurrent cell", localgrad.from_nnx, layer)


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop, localgrad.rtrl])
def test_a_step_is_pure(factory):
    layers = {"i": {"kernel": np.ones((IN, N))}, "h": {"kernel": np.ones((N, N))}}
    statistics = layers | {"BatchNorm_0": {"scale": np.ones(N), "bias": np.ones(N)}}
    hint = r".*from_linen.*BatchNorm use_running_average, make Dropout deterministic"
    refused(f"Dropped cannot be run .*{hint}", run, BATCH, factory, zoo.Dropped(), layers)
    refused(
        f"BatchNormed cannot be run .*{hint}", run, BATCH, factory, zoo.BatchNormed(), statistics
    )


def test_a_batch_is_given():
    rule = localgrad.bptt(NETWORK, optax.l2_loss)
    params = params_of(NETWORK)
    refused("batch is missing.*TrainState", rule.update, None, rule.init(params), params)


def test_an_input_has_the_axes_its_cell_takes():
    flat = np.ones((B, T))
    refused(r"GRUCell takes a batch axis and 1 feature axes.*shape \(2,\)", run, Batch(flat, flat))
    embedded = Network((nn.GRUCell(N),), nn.Dense(OUT), encoder=nn.Embed(5, 3))
    params = {**params_of(NETWORK), "encoder": {"embedding": np.ones((5, 3))}}
    tokens = Batch(np.ones((B, T, 1), int), BATCH.targets)
    refused("feature axes.*encoder", run, tokens, model=embedded, params=params)
    options = {"batch_size": B, "example": np.ones((T, IN))}
    refused(r"fed shape \(2, 5, 3\).*of example", run, **options)
    refused("example must hold arrays", run, batch_size=B, example=(IN,))


def test_a_readout_has_parameters():
    params = {"cells_0": params_of(NETWORK)["cells_0"]}
    refused("nothing for the readout .*all of this model's params", run, params=params)


def test_a_carry_fits_the_model():
    params = params_of(NETWORK)
    for carry in (np.ones((B, N)), (np.ones((B + 1, N)),)):
        message = "carry has shapes .* but this model and batch need"
        refused(message, localgrad.evaluate, NETWORK, optax.l2_loss, params, BATCH, carry)


def test_learn_needs_a_streaming_rule_and_an_optimizer():
    params = params_of(NETWORK)
    rule = localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B)
    refused("bare rule", localgrad.learn, rule, params, rule.init(params), BATCH, 1)
    alone = optax.chain(rule)
    refused("bare rule", localgrad.learn, alone, params, alone.init(params), BATCH, 1)
    tx = optax.chain(localgrad.eprop(NETWORK, optax.l2_loss), optax.sgd(0.1))
    refused("episodic.*batch_size=2", localgrad.learn, tx, params, tx.init(params), BATCH, 1)
    localgrad.learn(tx, params, tx.init(params), BATCH, T)  # whole sequences: nothing to forget
    adam = optax.adam(0.1)
    refused("holds no localgrad rule", localgrad.learn, adam, params, adam.init(params), BATCH, 1)


def test_learn_checks_its_chunk():
    tx = optax.chain(localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B), optax.sgd(0.1))
    params = params_of(NETWORK)
    for chunk in (0, 2.0, True):
        message = f"chunk must be a positive integer; got {chunk}. It is counted in time steps"
        refused(message, localgrad.learn, tx, params, tx.init(params), BATCH, chunk)


def test_a_metric_gives_one_value_an_example():
    tx = optax.chain(localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B), optax.sgd(0.1))
    params = params_of(NETWORK)
    metric = lambda y, target: jnp.abs(y - target).mean()  # noqa: E731
    message = r"one value an example.* B = 2; got shape \(\) .*Do not average"
    learn = functools.partial(localgrad.learn, metric=metric)
    refused(message, learn, tx, params, tx.init(params), BATCH, T)
    learn = functools.partial(localgrad.learn, metric="mse")
    refused("metric must be a function .*got 'mse'", learn, tx, params, tx.init(params), BATCH, T)


@pytest.mark.parametrize("behind", [optax.polyak_sgd, optax.lbfgs, optax.contrib.reduce_on_plateau])
def test_an_optimizer_takes_updates_alone(behind):
    tx = optax.chain(localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B), behind())
    params = params_of(NETWORK)
    message = "needs the loss's value beside its gradients.*Use one such as optax.adam"
    refused(message, localgrad.learn, tx, params, tx.init(params), BATCH, T)


def test_sizes_may_be_numpys():
    run(batch_size=np.int64(B), window=np.int32(2))
    tx = optax.chain(localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B), optax.sgd(0.1))
    params = params_of(NETWORK)
    losses = localgrad.learn(tx, params, tx.init(params), BATCH, np.int64(T))[2]
    assert losses.shape == (1,)


def every(label):
    """The same label for all parameters of the network."""
    return jax.tree.map(lambda _: label, params_of(NETWORK))


BEHIND = {
    "before": (lambda rule: optax.chain(optax.clip(1.0), rule, optax.sgd(0.1)), "before its rule"),
    "nested": (
        lambda rule: optax.chain(optax.chain(optax.scale(2.0), rule), optax.sgd(0.1)),
        "before its rule",
    ),
    "named": (
        lambda rule: optax.named_chain(("adam", optax.adam(1.0)), ("rule", rule)),
        "before its rule",
    ),
    "finite": (
        lambda rule: optax.apply_if_finite(optax.chain(rule, optax.sgd(0.1)), 5),
        r"apply_if_finite around a rule.*chain\(rule, optax.apply_if_finite\(",
    ),
    "steps": (
        lambda rule: optax.MultiSteps(optax.chain(rule, optax.sgd(0.1)), 2),
        r"MultiSteps around a rule.*MultiSteps\(\.\.\.\)\.gradient_transformation\(\)",
    ),
    "mask": (
        lambda rule: optax.masked(optax.chain(rule, optax.sgd(0.1)), every(True)),
        r"optax.masked around a rule.*chain\(rule, optax.masked\(",
    ),
    "one group": (
        lambda rule: optax.chain(optax.partition({"a": rule}, every("a")), optax.sgd(0.1)),
        r"optax.partition around a rule.*chain\(rule, optax.partition\(",
    ),
    "flat": (
        lambda rule: optax.flatten(optax.chain(rule, optax.sgd(0.1))),
        r"one array of shape \(.*chain\(rule, optax.flatten",
    ),
    "groups": (
        lambda rule: optax.multi_transform(
            {"a": rule, "b": optax.sgd(0.1)}, {"cells_0": "a", "readout": "b"}
        ),
        r"MaskedNode in place of readout.*multi_transform behind the rule.*localgrad\.mix",
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_optax_has_goes_behind_the_rule(name):
    wrap, message = BEHIND[name]
    tx, params = wrap(localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B)), params_of(NETWORK)
    refused(f"(?s){message}", lambda: localgrad.learn(tx, params, tx.init(params), BATCH, T))


def test_behind_the_rule_they_work():
    params = params_of(NETWORK)
    rule = localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B)
    plain = optax.chain(rule, optax.adam(0.1))
    expected = localgrad.learn(plain, params, plain.init(params), BATCH, T)[0]
    for behind in (optax.apply_if_finite(optax.adam(0.1), 5), optax.flatten(optax.adam(0.1))):
        tx = optax.chain(rule, behind)
        learned = localgrad.learn(tx, params, tx.init(params), BATCH, T)[0]
        chex.assert_trees_all_close(learned, expected, atol=1e-7)


def test_a_state_is_restored_to_a_target(tmp_path):
    rule, params = localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B), params_of(NETWORK)
    tx = optax.chain(rule, optax.sgd(0.1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tx.init(params))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "state")
    hint = r"pass it a target, as in checkpointer.restore\(path, jax.eval_shape"
    refused(f"as a dict.*{hint}", rule, params, state[0], BATCH)
    refused(f"as a dict.*{hint}", localgrad.learn, tx, params, state, BATCH, T)
    refused(f"as a dict.*{hint}", localgrad.reset_state, state)


def test_one_layer_is_not_both_ends():
    layer = nn.Dense(N)
    message = "encoder and readout are the same Dense object.*bptt, tbptt and rtrl"
    refused(message, Network, (nn.GRUCell(N),), readout=layer, encoder=layer)


def test_an_episode_of_one_step_is_asked_about():
    first = jax.tree.map(lambda a: a[:, :1], BATCH)
    params = params_of(NETWORK)
    rule = localgrad.readout_only(NETWORK, optax.l2_loss)
    with pytest.warns(UserWarning, match=r"T = 1.*remembers nothing.*batch_size=2.*batch\.reset"):
        rule(params, rule.init(params), first)
    rule(params, rule.init(params), first)  # compiled: nothing is said again
    stream = localgrad.readout_only(NETWORK, optax.l2_loss, batch_size=B)
    stream(params, stream.init(params), first)
    rule(params, rule.init(params), first._replace(reset=np.ones((B, 1), bool)))


class Root(zoo.Cell):
    """The square root of a state that is positive where sequences begin."""

    below: float = 0.0

    @nn.compact
    def __call__(self, h, x):
        drive = self.layer("i")(x) + self.layer("h")(h)
        h = 0.5 * jnp.sqrt(h - self.below) + jax.nn.sigmoid(drive)
        return h, h


def test_a_trial_stays_in_a_cells_domain_or_says_that_it_cannot():
    batch = Batch(BATCH.inputs, np.ones((B, T, N)))
    params = {"i": {"kernel": np.ones((IN, N))}, "h": {"kernel": np.ones((N, N))}}
    jax.eval_shape(lambda: run(batch, model=Root(), params=params))
    refused(
        "outside of its domain.*initialize_carry", run, batch, model=Root(below=5.0), params=params
    )


class Alone(nn.Module):
    """Written for one example, and does not say how many axes its input has."""

    @nn.compact
    def __call__(self, h, x):
        w, u = (self.param(name, nn.initializers.ones, (N, size)) for name, size in SIZES)
        h = jnp.tanh(w @ x + u @ h)
        return h, h

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], N))


SIZES = (("w", IN), ("u", N))


class Begins(zoo.Cell):
    """Its initial state is a parameter."""

    def setup(self):
        self.start = self.param("start", nn.initializers.ones, (N,))

    def __call__(self, h, x):
        return h, h

    def initialize_carry(self, rng, input_shape):
        return jnp.broadcast_to(self.start, (*input_shape[:-1], N))


def test_what_a_cell_lacks_is_told_by_its_name():
    refused("Alone, which has no num_feature_axes.*property", Network, (Alone(),))
    params = {name: np.ones((N, size)) for name, size in SIZES}
    refused("Alone fails on a carry .* nn.vmap around it", run, model=Alone(), params=params)
    start = {"start": np.ones(N)}
    refused("Begins.initialize_carry fails .*without parameters", run, model=Begins(), params=start)


class Leaks(zoo.Cell):
    """A value leaves jax.vmap by a list."""

    @nn.compact
    def __call__(self, h, x):
        left, drive = [], self.layer("i")(x) + self.layer("h")(h)
        jax.vmap(lambda a: left.append(a) or a)(drive)
        return left[0], left[0]


def test_a_value_that_leaves_a_transformation_is_told():
    params = {"i": {"kernel": np.ones((IN, N))}, "h": {"kernel": np.ones((N, N))}}
    message = "Leaks keeps a value of a transformation inside its step.*Return"
    refused(message, run, model=Leaks(), params=params)


class AloneInANetwork(Alone):
    """The same, but says so."""

    num_feature_axes = 1


def test_a_network_names_its_cell_as_a_rule_does():
    x, shape = jnp.ones((B, IN)), (B, IN)
    refused(
        "Begins.initialize_carry fails .*without parameters",
        lambda: Network((Begins(),)).initialize_carry(KEY, shape),
    )
    network = Network((nn.GRUCell(IN), AloneInANetwork()))
    carry = network.initialize_carry(KEY, shape)
    message = "AloneInANetwork fails on a carry .* nn.vmap around it"
    refused(message, network.init, KEY, carry, x)


class Iterated(nn.RNNCellBase):
    """A cell whose new state is an iteration of some length."""

    features: int
    num_feature_axes = 1

    @nn.compact
    def __call__(self, carry, x):
        drive = nn.Dense(self.features)(x) + nn.Dense(self.features)(carry)
        near = lambda at: (at[0] + 1, at[1] / 2 + jnp.tanh(drive) / 2)  # noqa: E731
        _, carry = jax.lax.while_loop(lambda at: at[0] < 3, near, (0, carry))
        return carry, carry

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))


def test_a_loop_of_unknown_length_is_named():
    network = Network((nn.SimpleCell(N), Iterated(N)), readout=nn.Dense(OUT))
    message = r"eprop takes .* cells_1 \(Iterated\), .* Use lax.scan .*localgrad.weight_pert"
    refused(message, run, model=network)
    run(factory=functools.partial(localgrad.weight_perturbation, key=KEY), model=network)

    def loss(outputs, targets):
        halved = jax.lax.while_loop(lambda at: at.max() > 1, lambda at: at / 2, outputs)
        return optax.l2_loss(halved, targets)

    rule = localgrad.bptt(NETWORK, loss)
    params = params_of(NETWORK)
    refused("bptt takes .* the loss, with a loop", rule, params, rule.init(params), BATCH)
