"""`SABCell`: an LSTM that remembers some of its past states and attends to few of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from localgrad.core.contract.checks import positive_integer

MARGIN = 1e-7
"""By how much a slot must beat the k-th best; the same keeps what is divided by from 0."""


class SABCarry(NamedTuple):
    """What a `SABCell` hands from step to step.

    Attributes:
        h: the state, [B, N].
        c: the LSTM's cell state, [B, N].
        memory: past states, [B, slots, N], the newest last; slots that are empty come first.
        filled: how many slots hold a state, [B].
        since_cut: steps since credit was last cut, [B].
        since_write: steps since a state was last remembered, [B].
    """

    h: jax.Array
    c: jax.Array
    memory: jax.Array
    filled: jax.Array
    since_cut: jax.Array
    since_write: jax.Array


class SABCell(nn.RNNCellBase):
    r"""An LSTM with sparse attentive backtracking: credit jumps to the past states it attends to.

    Every `attend_every` steps the state is remembered in a slot m_j; m_0 = 0 is there from the
    start. The equations of one step, with `b` the k-th largest score and k = `top_k`, are::

        g_t, c_t = LSTM(x_t, h_{t-1}, c_{t-1})
        a_j = query^T tanh(g_t) + key^T tanh(m_j)
        w_j = relu(a_j - b - 1e-7) / (1e-7 + the sum of these)
        s_t = sum_j w_j m_j            h_t = g_t + s_t            y_t = [h_t; s_t]

    As long as there are k slots or fewer, m_0 among them, `w_j = a_j` as it is. Later k - 1 slots
    are recalled, since the k-th best is the bar, and `query^T tanh(g_t)`, a part of every score,
    cancels: what a slot holds decides whether it is recalled, not the state that looks for it.
    `top_k=1` recalls nothing, which makes it a truncated LSTM, for comparison.

    The cell says what is credited, and not the rule: at each step t = 0, 1, ... with t + 1 a
    multiple of `truncate`, no credit passes from the LSTM to h_{t-1} and c_{t-1}, but slots are
    never cut. So `localgrad.bptt`, or `jax.grad` of an `nn.RNN`, credits each loss back to the last
    cut, then the k best slots of the steps on the way, each back to the last cut before it, and so
    on. This is what the authors' code does. The paper is said to truncate around each slot; whether
    it means other cuts than these, which lie at fixed steps, is not known to us.

    `localgrad.rtrl` gives the same numbers, with the slots in its influence, and keeps them however
    a stream is split; `tbptt`, and `bptt` at the start of each call of a stream, cut the slots'
    credit too. Local rules refuse it: slots are no state of a unit's own.

    At most `slots` states are remembered beside m_0; then a new one replaces the oldest, which is
    our addition. With `slots = T // attend_every` nothing is forgotten within T steps.

    *Costs* O(slots N) a step and example beside the LSTM; learning by BPTT keeps the slots of every
    step, T slots N numbers an example.

    Args:
        features: N, the number of units.
        slots: how many states are remembered at most.
        top_k: k, one more than the slots that are recalled at a time; from 1 to `slots`.
        attend_every: steps from one remembered state to the next.
        truncate: steps from one cut to the next; None never cuts, and gives the full gradient of
            the same model.
        kernel_init: initializer of the LSTM's input kernels.
        recurrent_kernel_init: initializer of its recurrent kernels.
        bias_init: initializer of its biases.
        score_init: initializer of query and key.
        dtype: dtype of the computation; None promotes from inputs and parameters.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: if `slots`, `top_k`, `attend_every` or `truncate` is no positive integer, or
            `top_k` exceeds `slots`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, localgrad, optax
        >>> cell = localgrad.SABCell(8, slots=5, top_k=3, attend_every=2, truncate=1)
        >>> model = localgrad.Network((cell,), readout=nn.Dense(2))
        >>> x = jnp.ones((4, 10, 3))  # [B, T, I]
        >>> carry = model.initialize_carry(jax.random.key(0), (4, 3))
        >>> params = model.init(jax.random.key(1), carry, x[:, 0])["params"]
        >>> rule = localgrad.bptt(model, optax.l2_loss)
        >>> updates, state = rule(params, rule.init(params), localgrad.Batch(x, x[..., :2]))
        >>> carry[0].memory.shape, updates["cells_0"]["key"]["kernel"].shape
        ((4, 5, 8), (8, 1))

    Reference:
        Ke, Goyal, Bilaniuk, Binas, Mozer, Pal and Bengio, "Sparse attentive backtracking: temporal
        credit assignment through reminding", NeurIPS, 2018, https://arxiv.org/abs/1809.03702
    """

    features: int
    slots: int
    top_k: int = 5
    attend_every: int = 1
    truncate: int | None = 1
    kernel_init: Callable[..., Any] = initializers.lecun_normal()
    recurrent_kernel_init: Callable[..., Any] = initializers.orthogonal()
    bias_init: Callable[..., Any] = initializers.zeros_init()
    score_init: Callable[..., Any] = initializers.normal(0.01)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        hints = {
            "features": "It is how many units there are.",
            "slots": "It is how many states are remembered at most.",
            "top_k": "It is one more than the slots that are recalled.",
            "attend_every": "It is how many steps lie between two slots.",
            "truncate": "It is how many steps lie between two cuts; None never cuts.",
        }
        for name, hint in hints.items():
            if name != "truncate" or self.truncate is not None:
                setattr(self, name, positive_integer(name, getattr(self, name), hint))
        if self.top_k > self.slots:
            raise ValueError(
                f"top_k must be at most slots, or attention would never be sparse; got "
                f"top_k={self.top_k} and slots={self.slots}. For T steps slots = T // attend_every "
                "remembers all there is."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: SABCarry, x: jax.Array) -> tuple[SABCarry, jax.Array]:
        """One step: `(carry, x [B, I]) -> (carry, y = [h; s] [B, 2 N])`."""
        h, c, since_cut = self._cut(carry)
        lstm = nn.LSTMCell(
            self.features,
            name="lstm",
            kernel_init=self.kernel_init,
            recurrent_kernel_init=self.recurrent_kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        (c, g), _ = lstm((c, h), x)
        query, keys = self._score("query", g), self._score("key", carry.memory)[..., 0]
        scores = jnp.concatenate([query, query + keys], axis=-1)  # that of m_0 comes first
        weights = _sparse(scores, carry.filled, self.top_k)[..., 1:]  # those of m_0 add nothing
        s = jnp.einsum("...j,...jn->...n", weights.astype(g.dtype), carry.memory)
        h = g + s
        memory, filled, since_write = self._remember(carry, h)
        carry = SABCarry(h, c, memory, filled, since_cut, since_write)
        return carry, jnp.concatenate([h, s], axis=-1)

    @nn.nowrap
    def _cut(self, carry: SABCarry) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The LSTM's states, without their past where credit is cut, and the steps since."""
        if self.truncate is None:
            return carry.h, carry.c, carry.since_cut
        since = carry.since_cut + 1
        due = since >= self.truncate
        h, c = (jnp.where(due[..., None], jax.lax.stop_gradient(a), a) for a in (carry.h, carry.c))
        return h, c, jnp.where(due, 0, since)

    @nn.nowrap
    def _remember(self, carry: SABCarry, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The slots after a step, how many are filled, and the steps since one was."""
        since = carry.since_write + 1
        due = since >= self.attend_every
        grown = jnp.concatenate([carry.memory[..., 1:, :], h[..., None, :]], axis=-2)
        memory = jnp.where(due[..., None, None], grown, carry.memory)
        filled = jnp.where(due, jnp.minimum(carry.filled + 1, self.slots), carry.filled)
        return memory, filled, jnp.where(due, 0, since)

    @nn.nowrap
    def _score(self, name: str, states: jax.Array) -> jax.Array:
        """What a score takes from states [..., N]: [..., 1]."""
        layer = nn.Dense(
            1,
            name=name,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.score_init,
        )
        return layer(jnp.tanh(states))

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> SABCarry:
        """Zeros, and no state remembered. The counters are float32, in which they are exact."""
        del rng
        batch = input_shape[:-1]
        h, c = (jnp.zeros((*batch, self.features), self.param_dtype) for _ in range(2))
        memory = jnp.zeros((*batch, self.slots, self.features), self.param_dtype)
        return SABCarry(h, c, memory, *(jnp.zeros(batch, jnp.float32) for _ in range(3)))

    @property
    def num_feature_axes(self) -> int:
        """The input has one feature axis."""
        return 1


def _sparse(scores: jax.Array, filled: jax.Array, top_k: int) -> jax.Array:
    """The weights [B, 1 + slots] of m_0 and the slots, of which the last `filled` [B] count."""
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    filled = filled[..., None]
    place = jax.lax.broadcasted_iota(filled.dtype, scores.shape, scores.ndim - 1)
    held = (place == 0) | (place > scores.shape[-1] - 1 - filled)
    many = 1 + filled > top_k
    candidates = jnp.where(held, scores, -jnp.inf)
    bar = jnp.where(many, jax.lax.top_k(candidates, top_k)[0][..., -1:], 0)
    above = jax.nn.relu(candidates - (bar + MARGIN))
    sparse = above / (above.sum(-1, keepdims=True) + MARGIN)
    return jnp.where(many, sparse, jnp.where(held, scores, 0))
