"""Bad input raises a `ValueError` that names the argument, both sides and the way out."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad
from localgrad import Batch, Network
from tests.conformance import zoo
from tests.conformance.table import REFUSALS, RULES, build, name_of, rule_of

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


@pytest.mark.parametrize("case", REFUSALS, ids=name_of)
@pytest.mark.parametrize("streaming", [False, True], ids=["episodic", "streaming"])
def test_a_rule_refuses_a_cell_it_cannot_credit(case, streaming):
    with jax.enable_x64(True):
        built = build(case.model)
        name = case.rule.split("_random")[0]
        message = rf"(?s){name}.*{RULES[case.rule].refuses[case.model]}"
        with pytest.raises(ValueError, match=message):
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


def test_a_stream_has_its_number_of_examples_and_its_example():
    for factory in (localgrad.bptt, localgrad.rtrl, localgrad.eprop, localgrad.readout_only):
        refused("holds B = 2 .* batch_size=3. .* batch_size=2", run, factory=factory, batch_size=3)
    tbptt = functools.partial(localgrad.tbptt, horizon=2)
    refused("tbptt needs example=.* buffers inputs", run, factory=tbptt, batch_size=B)
    refused("needs example=", run, model=zoo.Concat(N), batch_size=B)
    wrong = {"batch_size": B, "example": np.ones(IN + 2)}
    refused(r"params do not fit GRUCell.*\(5, 4\).*\(3, 4\)", run, **wrong)
    other = {"batch_size": B, "example": np.ones(IN, np.float16)}
    refused(r"float32.*float16.*example=batch\.inputs\[0, 0\]", run, factory=tbptt, **other)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r'reduction must be "mean" or "sum"; got \'avg\'', {"reduction": "avg"}),
        ("batch_size must be a positive integer or None; got 0", {"batch_size": 0}),
        ("window must be a positive integer or None; got 0", {"window": 0}),
        ("window must be a positive integer or None; got 2.5", {"window": 2.5}),
        (r'feedback must be "symmetric".*array \(N, O\).*got \'mirror\'', {"feedback": "mirror"}),
        (r"pass key=jax\.random\.key\(seed\)", {"feedback": "random"}),
        (
            r"typed PRNG key: pass jax\.random\.key.*uint32",
            {"feedback": "random", "key": jax.random.PRNGKey(0)},
        ),
        ("typed PRNG key.*int", {"feedback": "random", "key": 0}),
        ("feedback of cells_0 holds NaN", {"feedback": np.full((N, OUT), np.nan)}),
        (r"must be \(N, O\) = \(4, 6\); got shape \(6, 4\)", {"feedback": np.ones((OUT, N))}),
        (r"\['cells_0'\]; got \['gru'\]", {"feedback": {"gru": np.ones((N, OUT))}}),
        (r"one array a cell, for \['cells_0'\]", {"feedback": [np.ones((N, OUT))] * 2}),
        ("horizon must be a positive integer.*got 0", {"factory": localgrad.tbptt, "horizon": 0}),
        ("horizon must be .*got 2.0", {"factory": localgrad.tbptt, "horizon": 2.0}),
        (r"order must be 1; got 2.*localgrad\.rtrl", {"factory": localgrad.snap, "order": 2}),
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
    message = r"one value an example.*B = 10 here; got shape \(\).*Do not average over the batch"
    refused(message, lambda: rule(params, rule.init(params), BATCH))
    refused("loss must be a function.*got None", localgrad.eprop, NETWORK, None)


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


class NNXDropped(nnx.Module):
    """A cell that drops units."""

    def __init__(self):
        self.cell = nnx.GRUCell(IN, N, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))


class NNXNormed(nnx.Module):
    """A cell with statistics of batches."""

    def __init__(self):
        self.cell = nnx.GRUCell(IN, N, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(N, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop, localgrad.rtrl])
def test_a_step_is_pure(factory):
    layers = {"i": {"kernel": np.ones((IN, N))}, "h": {"kernel": np.ones((N, N))}}
    statistics = layers | {"BatchNorm_0": {"scale": np.ones(N), "bias": np.ones(N)}}
    hint = r".*BatchNorm, Dropout"
    refused(f"Dropped cannot be run .*{hint}", run, BATCH, factory, zoo.Dropped(), layers)
    refused(
        f"BatchNormed cannot be run .*{hint}", run, BATCH, factory, zoo.BatchNormed(), statistics
    )
    refused("NNXDropped holds Rng.*Remove BatchNorm, Dropout", localgrad.from_nnx, NNXDropped())
    refused("NNXNormed holds BatchStat", localgrad.from_nnx, NNXNormed())


def test_learn_checks_its_chunk():
    tx = optax.chain(localgrad.eprop(NETWORK, optax.l2_loss, batch_size=B), optax.sgd(0.1))
    params = params_of(NETWORK)
    for chunk in (0, 2.0):
        message = f"chunk must be a positive integer, in time steps; got {chunk}"
        refused(message, localgrad.learn, tx, params, tx.init(params), BATCH, chunk)
