"""What a module holds beside its parameters: fixed, by value, and never written."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import localgrad

B, T, N, IN = 2, 6, 4, 3
RNG = np.random.default_rng(0)
LEAKS, MASK = np.linspace(0.2, 0.9, N), np.array([1.0, 0.0, 2.0])


class Fixed(nnx.Variable):
    """A variable that is not trained."""


class Leaky(nnx.Module):
    """Leaky units whose time constants, input mask and running averages are fixed."""

    def __init__(self, does="nothing", mask=MASK):
        rngs, options = nnx.Rngs(0), {"param_dtype": float, "rngs": nnx.Rngs(0)}
        self.does, self.i = does, nnx.Linear(IN, N, **options)
        self.h = nnx.Linear(N, N, use_bias=False, **options)
        self.mask, self.leaks = mask, Fixed(jnp.asarray(LEAKS))
        self.ones = jnp.ones(N)
        self.norm = nnx.BatchNorm(
            N,
            use_running_average=does != "norm",
            epsilon=0,
            use_bias=False,
            use_scale=False,
            dtype=float,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(0.5, deterministic=does != "dropout", rngs=rngs)

    def __call__(self, h, x):
        drive = self.i(x * self.mask[None]) + self.within(self.does)(self.h, h)
        h = (1 - self.leaks[None]) * h + self.leaks[None] * jnp.tanh(drive)
        if self.does == "array":
            self.ones = 0.9 * self.ones
        if self.does == "variable":
            self.leaks[...] = 0.9 * self.leaks[...]
        if self.does == "memory":
            self.last = nnx.Variable(h)
        return h, self.dropout(self.norm(h)) * self.ones[None]

    @staticmethod
    def within(does):
        """How a layer is called."""

        def changed(layer, h):
            layer.kernel[...] = 0.9 * layer.kernel[...]
            return layer(h)

        lifted = {"remat": nnx.remat, "jit": nnx.jit, "writes": nnx.remat}
        call = changed if does == "writes" else lambda layer, h: layer(h)
        return lifted[does](call) if does in lifted else call

    def initialize_carry(self, input_shape, rngs):
        return jnp.zeros((*input_shape[:-1], N))


@pytest.fixture
def batch(x64):
    return localgrad.Batch(
        jnp.asarray(RNG.normal(size=(B, T, IN))), jnp.asarray(RNG.normal(size=(B, T, N)))
    )


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop, localgrad.rtrl])
@pytest.mark.few(1)
def test_constants_are_part_of_the_model(factory, batch):
    """The same cell in Linen, whose leaks are fixed and whose inputs are masked before."""
    model, params = localgrad.from_nnx(Leaky())
    rule = factory(model, optax.l2_loss, batch_size=B, example=batch.inputs[0, 0])
    found, _ = jax.jit(rule)(params, rule.init(params), batch)
    assert set(found) == {"i", "h"}
    cell = localgrad.RateCell(N, alpha=LEAKS, param_dtype=float)
    rule = factory(cell, optax.l2_loss, batch_size=B, example=batch.inputs[0, 0])
    params = nnx.to_pure_dict(params)
    batch = batch._replace(inputs=batch.inputs * MASK[None, None])
    expected, _ = rule(params, rule.init(params), batch)
    chex.assert_trees_all_close(nnx.to_pure_dict(found), expected, rtol=1e-12)


@pytest.mark.parametrize("factory", [localgrad.snap, localgrad.bptt])
@pytest.mark.parametrize("does", ["remat", "jit"])
@pytest.mark.few(1)
def test_what_a_transform_hands_back_is_not_changed(does, factory, batch):
    updates = []
    for how in (does, "nothing"):
        model, params = localgrad.from_nnx(Leaky(how))
        rule = factory(model, optax.l2_loss)
        updates.append(jax.jit(rule)(params, rule.init(params), batch)[0])
    chex.assert_trees_all_close(*updates, rtol=1e-12)


def test_models_are_equal_by_the_values_of_their_constants(batch):
    mask = MASK.copy()
    one, other, third = (localgrad.from_nnx(Leaky(mask=m))[0] for m in (mask, MASK, 2 * MASK))
    mask[:] = 0  # it is the model's own by now
    assert one == other and hash(one) == hash(other)
    assert one != third
    params = localgrad.from_nnx(Leaky())[1]
    losses = [localgrad.evaluate(m, optax.l2_loss, params, batch)[0] for m in (one, other, third)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("norm", r"Leaky changes norm/mean \(BatchStat\)"),
        ("dropout", r"Leaky draws from dropout/rngs/count \(RngCount\)"),
        ("array", r"Leaky changes ones \(array\)"),
        ("variable", r"Leaky changes leaks \(Fixed\)"),
        ("memory", r"Leaky changes last \(Variable\)"),
        ("writes", r"Leaky changes h/kernel \(Param\)"),
    ],
)
def test_what_a_step_changes_is_refused_by_name(does, message, batch):
    model, params = localgrad.from_nnx(Leaky(does))
    rule = localgrad.eprop(model, optax.l2_loss)
    with pytest.raises(ValueError, match=f"^{message} in its step"):
        rule(params, rule.init(params), batch)


def test_a_layer_with_a_fixed_kernel_is_no_synapse(batch):
    module = Leaky()
    module.h.kernel = Fixed(module.h.kernel[...])
    model, params = localgrad.from_nnx(module)
    exact = localgrad.bptt(model, optax.l2_loss)
    assert set(exact(params, exact.init(params), batch)[0]) == {"i"}
    local = localgrad.eprop(model, optax.l2_loss)
    with pytest.raises(ValueError, match="state of one unit reaches another's outside any layer"):
        local(params, local.init(params), batch)


def test_constants_have_values():
    with pytest.raises(ValueError, match=r"Leaky.*has no value here.*outside of jax.jit"):
        nnx.eval_shape(lambda: localgrad.from_nnx(Leaky())[1])
    with pytest.raises(ValueError, match="must be an NNX module"):
        localgrad.from_nnx(nn.GRUCell(N))


class Wired(nn.RNNCellBase):
    """Leaky units in Linen: collections hold the leaks, a mask of the wiring, running averages."""

    bare: bool = False
    writes: bool = False

    @nn.compact
    def __call__(self, h, x):
        draw = nn.initializers.lecun_normal()
        leaks = self.variable("times", "leaks", lambda: jnp.asarray(LEAKS)[None])
        mask = self.variable("wiring", "mask", lambda: jnp.tril(jnp.ones((N, N)), 1)).value
        if self.bare:
            heard = h @ (self.param("w", draw, (N, N), float) * mask)
        else:
            heard = nn.Dense(N, use_bias=False, param_dtype=float, name="h")(h)
        drive = nn.Dense(N, param_dtype=float, name="i")(x) + heard
        h = (1 - leaks.value) * h + leaks.value * jnp.tanh(drive)
        if self.writes:
            leaks.value = 0.9 * leaks.value
        norm = nn.BatchNorm(True, epsilon=0, use_bias=False, use_scale=False, dtype=float)
        return h, norm(h)

    def initialize_carry(self, key, input_shape):
        return jnp.zeros((*input_shape[:-1], N))

    @property
    def num_feature_axes(self):
        return 1


def drawn(module):
    """Variables whose running averages tell."""
    carry = module.initialize_carry(jax.random.key(0), (B, IN))
    variables = module.init(jax.random.key(1), carry, jnp.ones((B, IN)))
    averages = jax.tree.map(lambda a: a + jnp.arange(N) / N, variables["batch_stats"])
    return {**variables, "batch_stats": averages}


@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop, localgrad.rtrl])
@pytest.mark.few(2)
def test_collections_of_a_linen_cell_are_constants(factory, batch):
    """The same cell whose leaks are an attribute, and whose readout does what the averages do."""
    variables = drawn(Wired())
    model, params = localgrad.from_linen(Wired(), variables)
    rule = factory(model, optax.l2_loss, batch_size=B, example=batch.inputs[0, 0])
    found, _ = jax.jit(rule)(params, rule.init(params), batch)
    averages = variables["batch_stats"]["BatchNorm_0"]

    def loss(y, target):
        return optax.l2_loss((y - averages["mean"][None]) / jnp.sqrt(averages["var"][None]), target)

    cell = localgrad.RateCell(N, alpha=LEAKS, param_dtype=float)
    rule = factory(cell, loss, batch_size=B, example=batch.inputs[0, 0])
    expected, _ = rule(params, rule.init(params), batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-12)


def test_a_networks_parts_have_their_own_collections(batch):
    """RTRL of two layers with a normalised readout is BPTT's gradient by autodiff of the whole."""
    norm = nn.BatchNorm(True, dtype=float, param_dtype=float)
    network = localgrad.Network((Wired(), Wired(bare=True)), readout=norm)
    variables = drawn(network)
    model, params = localgrad.from_linen(network, variables)
    rule = localgrad.rtrl(model, optax.l2_loss)
    found, _ = rule(params, rule.init(params), batch)

    def loss(params):
        carry, total = network.initialize_carry(jax.random.key(0), (B, IN)), 0.0
        for t in range(T):
            held = {**variables, "params": params}
            carry, y = network.apply(held, carry, batch.inputs[:, t])
            total += optax.l2_loss(y, batch.targets[:, t]).mean()
        return total / T

    chex.assert_trees_all_close(found, jax.grad(loss)(params), rtol=1e-10)


def test_weights_under_a_mask_of_a_collection_are_credited(batch):
    model, params = localgrad.from_linen(Wired(bare=True), drawn(Wired(bare=True)))
    rule = localgrad.eprop(model, optax.l2_loss)
    updates, _ = rule(params, rule.init(params), batch)
    there = np.tril(np.ones((N, N)), 1) != 0
    assert (np.asarray(updates["w"] != 0) == there).all()


def test_linen_models_are_equal_by_the_values_of_their_constants():
    one, other = (localgrad.from_linen(Wired(), drawn(Wired()))[0] for _ in range(2))
    changed = localgrad.from_linen(Wired(), drawn(Wired()) | {"times": {"leaks": jnp.ones((1, N))}})
    assert one == other and hash(one) == hash(other) and changed[0] != one


def test_what_a_linen_step_writes_or_lacks_is_refused(batch):
    module = Wired(writes=True)
    model, params = localgrad.from_linen(module, drawn(module))
    rule = localgrad.eprop(model, optax.l2_loss)
    with pytest.raises(ValueError, match=r"Wired cannot be run as a pure function.*times"):
        rule(params, rule.init(params), batch)
    rule = localgrad.eprop(Wired(), optax.l2_loss)
    with pytest.raises(ValueError, match=r"Wired cannot be run.*localgrad.from_linen"):
        rule(params, rule.init(params), batch)
    with pytest.raises(ValueError, match=r"with its 'params'.*got the collections \['h', 'i'\]"):
        localgrad.from_linen(Wired(), params)
    with pytest.raises(ValueError, match="Linen module; got GRUCell.*from_nnx"):
        localgrad.from_linen(nnx.GRUCell(IN, N, rngs=nnx.Rngs(0)), {})
