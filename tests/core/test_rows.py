"""Rows of a batch: what one example gives tells neither of others, nor of its row, nor of how many.

Rules run modules on all steps of a window at once, so a module that does would get other numbers.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import localgrad
from localgrad.core.model.isolation import require_apart
from localgrad.core.model.modules import LinenModule
from tests.conformance import zoo

B, T, N, IN, OUT = 3, 6, 4, 4, 2
BATCH = localgrad.Batch(jnp.ones((B, T, IN)), jnp.ones((B, T, OUT)))


class Through(nn.Module):
    """A layer behind an operation."""

    do: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUT)(OPERATIONS[self.do](x))


class Inside(zoo.Cell):
    """A cell with an operation on its carry."""

    do: str = ""

    @nn.compact
    def __call__(self, h, x):
        h = zoo.leaky(OPERATIONS[self.do](h), self.layer("i")(x) + self.layer("h")(h))
        return h, h


def drawn(draw, shape):
    return draw(jax.random.key(7), shape=shape)


NOISE = functools.partial(drawn, jax.random.normal)
COUNTING = {
    "dropout": lambda h: h * 2.0 * drawn(jax.random.bernoulli, h.shape),
    "noise": lambda h: h + 0.1 * NOISE(h.shape),
    "little noise": lambda h: h + 0.01 * NOISE(h.shape),
    "division": lambda h: h / h.shape[0],
    "row number": lambda h: h + jnp.arange(h.shape[0])[:, None],
    "first row": lambda h: h.at[0].multiply(2.0),
    "last row": lambda h: h.at[-1].set(0.0),
}
MIXING = {
    "mean": lambda h: h - h.mean(0, keepdims=True),
    "far out": lambda h: jnp.where(jnp.abs(h) > 1e3, h.mean(0, keepdims=True), h),
    "branch": lambda h: lax.cond(h.sum() > 1e6, jnp.sin, lambda h: h, h),
    "outliers": lambda h: h - jax.nn.relu(h.max() - 1e4),
    "neighbours": lambda h: h + jnp.roll(jax.nn.relu(h - 1e4), 1, axis=0),
    "attention": lambda h: h + jax.nn.relu(h @ h.T - 1e6) @ h,
    "loop": lambda h: lax.scan(lambda c, x: (c + jax.nn.relu(x - 1e4), x + c), 0 * h[0], h)[1],
}
APART = {
    "one draw for all": lambda h: h + NOISE((1, h.shape[-1])),
    "one mask for all": lambda h: h * drawn(jax.random.bernoulli, (1, h.shape[-1])),
    "softmax": jax.nn.softmax,
    "attention": lambda h: jnp.einsum("bi,bj,bj->bi", h, h, h),
    "map": lambda h: lax.map(jnp.tanh, h),
    "vmap": jax.vmap(lambda row: row / jnp.linalg.norm(row)),
    "own maximum": lambda h: h + h[jnp.arange(h.shape[0]), h.argmax(-1)][:, None],
    "along axis": lambda h: h + jnp.take_along_axis(h, h.argmax(-1, keepdims=True), -1),
    "one-hot": lambda h: h + jnp.zeros_like(h).at[jnp.arange(h.shape[0]), h.argmax(-1)].set(1.0),
    "symbols": lambda h: jnp.take(jnp.eye(4), (h > 0).sum(-1), axis=0),
    "spectrum": lambda h: h + jnp.abs(jnp.fft.fft(h)).astype(h.dtype),
    "pool": lambda h: h + nn.max_pool(h[..., None], (2,), padding="SAME")[..., 0],
    "convolution": lambda h: jax.vmap(functools.partial(jnp.convolve, mode="same"))(h, h),
    "half precision": lambda h: jnp.tanh(h.astype(jnp.bfloat16) * 3).astype(h.dtype),
    "gates": lambda h: sum(jnp.split(jnp.concatenate([h, -h, h], -1), 3, -1)),
}
OPERATIONS = {
    f"{kind} {name}": f
    for kind, each in (("counting", COUNTING), ("mixing", MIXING), ("apart", APART))
    for name, f in each.items()
}


def models(do):
    """The operation as the encoder, in the cell, and in the readout."""
    cell = nn.SimpleCell(N)
    return {
        "Through": localgrad.Network((cell,), nn.Dense(OUT), encoder=Through(do)),
        "Inside": localgrad.Network((Inside(do=do),), nn.Dense(OUT)),
        "readout (Through)": localgrad.Network((cell,), Through(do)),
    }


def begin(model):
    """Its parameters."""
    carry = model.initialize_carry(jax.random.key(0), (B, IN))
    return model.init(jax.random.key(1), carry, BATCH.inputs[:, 0])["params"]


def attempt(factory, model):
    """One call, as far as shapes go."""
    params = jax.eval_shape(functools.partial(begin, model))
    rule = factory(model, optax.l2_loss)
    return jax.eval_shape(lambda params: rule(params, rule.init(params), BATCH)[0], params)


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop])
@pytest.mark.few(3)
def test_rows_have_no_number(factory, name):
    for label, model in models(f"counting {name}").items():
        message = (
            rf"{label.split(' (')[0]}.* by their place or number.*draw noise outside the model"
        )
        with pytest.raises(ValueError, match=message):
            attempt(factory, model)


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("factory", [localgrad.bptt, localgrad.eprop])
def test_rows_do_not_meet_out_of_sight(factory, name):
    for label, model in models(f"mixing {name}").items():
        message = rf"{label.split(' (')[0]}.* mixes the examples of a batch"
        with pytest.raises(ValueError, match=message):
            attempt(factory, model)


@pytest.mark.parametrize("name", APART)
@pytest.mark.few(1)
def test_rows_by_themselves_are_taken(name):
    for model in models(f"apart {name}").values():
        attempt(localgrad.bptt, model)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.few(1)
def test_rounding_is_no_refusal(dtype, wide):
    size = 256 if wide else N
    cells = nn.GRUCell(size, dtype=dtype), nn.LSTMCell(size, dtype=dtype)
    normal = nn.initializers.normal()
    rate = localgrad.RateCell(size, param_dtype=dtype, recurrent_kernel_init=normal)
    for cell in (*cells, rate):
        attempt(localgrad.bptt, localgrad.Network((cell,), nn.Dense(OUT, dtype=dtype)))


def test_noise_in_half_precision_is_refused():
    class Noisy(Inside):
        @nn.compact
        def __call__(self, h, x):
            h = nn.SimpleCell(N, dtype=jnp.bfloat16, name="cell")(h, x)[0]
            return (h := h + 0.5 * NOISE(h.shape).astype(h.dtype)), h

    with pytest.raises(ValueError, match="by their place or number"):
        attempt(localgrad.bptt, localgrad.Network((Noisy(),), nn.Dense(OUT)))


def test_images_and_symbols():
    class Images(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3))(x))
            x = nn.avg_pool(nn.LayerNorm()(x), (2, 2))
            return nn.Dense(2)(x.mean((1, 2)))

    for module, x in ((Images(), jnp.ones((B, 6, 6, 1))), (nn.Embed(5, 2), jnp.zeros(B, int))):
        variables = module.init(jax.random.key(0), x)
        flat = {
            tuple(k.key for k in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        }
        require_apart("encoder", LinenModule(module), flat, x)


def test_refused_when_it_is_evaluated_too():
    model = models("counting noise")["readout (Through)"]
    params = begin(model)
    with pytest.raises(ValueError, match=r"readout \(Through\) treats the rows"):
        localgrad.evaluate(model, optax.l2_loss, params, BATCH)


def test_what_a_division_by_the_batch_size_would_give():
    """The refusal is no whim: merged steps would count as examples."""
    x = np.ones((2, 3, 4))
    merged = OPERATIONS["counting division"](x.reshape(6, 4)).reshape(2, 3, 4)
    stepwise = np.stack([OPERATIONS["counting division"](step) for step in x])
    assert not np.allclose(merged, stepwise)
