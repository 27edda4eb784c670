"""Beyond the theory: its claims on rank and plateaus, measured on nonlinear networks and digits.

A GRU and a tanh rate network learn scikit-learn's digits row by row, by plain SGD with clipping by
global norm, from initial weights of several scales; all rules get the same initial weights, batches
and updates. Of one training the two phenomena look at different things, so it is done once.

Letters: S seeds, E scales of the initial weights, U updates, N units, O outputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import localgrad
from experiments.choices import CELLS, RULES, CellName, RuleName, Settings
from experiments.linear_dynamics.table import Finding, Row, several
from experiments.tasks import accuracy
from experiments.tasks.digits import CLASSES, digits, split_digits
from experiments.train import one_by_one
from localgrad import theory

LOSS = optax.softmax_cross_entropy_with_integer_labels
CHANCE = float(np.log(CLASSES))
SETTINGS = Settings(features=64, alpha=0.5, horizon=1, window=1)
RATE, CLIP, BATCH = 0.3, 1.0, 32
SHOWN = 64  # digits on which hidden states are looked at
SMOOTH = 10  # updates over which a batch's loss is averaged before its fall is timed
LEARNERS: tuple[tuple[CellName, RuleName], ...] = (
    ("gru", "bptt"),
    ("gru", "tbptt"),
    ("gru", "eprop"),
    ("gru", "eprop_random"),
    ("rate", "bptt"),
    ("rate", "rflo"),
)
CELL_LABELS = {"gru": "GRU", "rate": "rate network"}


class Asked(Protocol):
    """What the caller may choose: where randomness starts, and a run of seconds."""

    seed: int
    short: bool


class Trained(NamedTuple):
    """One rule's runs.

    Attributes:
        losses: [E, S, U] each batch's mean loss, before its update.
        accuracy: [E, S] on held-out digits, after training.
        untrained: [E, S] the same before.
        before: the cell's parameters before training, leaves [E, S, ...].
        after: and after.
        span: [E, S, N, O] what the rule's errors reach the units by: the random feedback, or the
            readout after training.
        states: [2, E, S, D, T, N] hidden states on D held-out digits, before and after.
    """

    losses: np.ndarray
    accuracy: np.ndarray
    untrained: np.ndarray
    before: Any
    after: Any
    span: np.ndarray
    states: np.ndarray


def label(cell: CellName, rule: RuleName) -> str:
    """A rule's name in the table and the figures."""
    return f"{CELL_LABELS[cell]}, {RULES[rule].label(SETTINGS).replace(',', '')}"


def scales(short: bool) -> np.ndarray:
    """What the initial weights are multiplied by, E of them."""
    return np.array([1.0, 0.1, 0.01]) if short else np.array([1.0, 0.3, 0.1, 0.03, 0.01, 0.003])


@functools.lru_cache(maxsize=2)
def train_all(seed: int, short: bool) -> dict[tuple[CellName, RuleName], Trained]:
    """Trains every rule from every scale and seed."""
    learners = (*LEARNERS, ("gru", "readout_only"))
    if short:
        learners = (("gru", "bptt"), ("gru", "eprop_random"))
    keys = jax.random.split(jax.random.key(seed), 2 if short else 3)
    updates = 60 if short else 500
    return {
        (cell, rule): train(cell, rule, keys, scales(short), updates) for cell, rule in learners
    }


def train(
    name: CellName, rule: RuleName, keys: jax.Array, sizes: np.ndarray, updates: int
) -> Trained:
    """All runs of one rule, in one jitted function."""
    task = digits("rows")
    model = localgrad.Network((CELLS[name].make(SETTINGS),), readout=nn.Dense(CLASSES))

    def chain(key: jax.Array) -> optax.GradientTransformationExtraArgs:
        made = RULES[rule].make(model, LOSS, SETTINGS, key)
        return optax.chain(made, optax.clip_by_global_norm(CLIP), optax.sgd(RATE))

    tx = chain(jax.random.key(0))  # `update` never reads the key: random feedback is in the state

    def step(at: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = at
        change, state = tx.update(None, state, params, batch=task.sample(key, BATCH))
        return (optax.apply_updates(params, change), state), optax.tree.get(state, "loss")

    def score(params: Any) -> jax.Array:
        return accuracy(localgrad.evaluate(model, LOSS, params, task.test)[1], task.test)

    def hidden(params: Any) -> Any:
        shown, cell = task.test.inputs[:SHOWN], CELLS[name].make(SETTINGS)
        return nn.RNN(cell).apply({"params": {"cell": params["cells_0"]}}, shown)

    def init(key: jax.Array) -> Any:
        x = task.test.inputs[:, 0]
        return model.init(key, model.initialize_carry(key, x.shape), x)["params"]

    def run(
        size: jax.Array, first: Any, own: jax.Array, data: jax.Array
    ) -> tuple[jax.Array, Any, Any, jax.Array]:
        first = jax.tree.map(lambda v: v * size.astype(v.dtype), first)
        start = (first, chain(own).init(first))
        (last, state), losses = jax.lax.scan(step, start, jax.random.split(data, updates))
        fixed = getattr(state[0], "feedback", None)
        span = last["readout"]["kernel"] if fixed is None else fixed["cells_0"]
        return losses, first, last, span

    draw, own, data = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    drawn = one_by_one(init, draw)
    runs = jax.jit(jax.vmap(jax.vmap(run, (None, 0, 0, 0)), (0, None, None, None)))
    losses, first, last, span = jax.block_until_ready(runs(jnp.asarray(sizes), drawn, own, data))
    scores = jax.jit(jax.vmap(jax.vmap(score)))
    right, untrained = (jax.block_until_ready(scores(params)) for params in (last, first))
    seen = jax.jit(jax.vmap(jax.vmap(hidden)))
    states = np.stack([seen(params) for params in (first, last)])
    found = Trained(losses, right, untrained, first["cells_0"], last["cells_0"], span, states)
    return jax.tree.map(np.asarray, found)


def learned_ranks(config: Asked) -> Finding:
    """How many directions the cell's weights change in, and which, and what its states fill.

    In a linear network RFLO's change, of all matrices that end in the same units together, has at
    most 9 directions, all in the span of the feedback: the 10 errors of a softmax add up to zero.
    In a nonlinear one each unit, and each gate, weighs the errors by its own slopes.
    """
    runs = train_all(config.seed, config.short)
    sizes, units = scales(config.short), SETTINGS.features
    rows, data = [], {"cases": {}, "floor": CLASSES / units, "units": units}
    for (cell, rule), found in runs.items():
        name = label(cell, rule)
        right = 100 * found.accuracy[0]
        if rule == "readout_only":
            rows.append(Row("16", name, "no change", f"accuracy {right.mean():.1f} %"))
            continue
        kept = [spectra(found, place) for place in range(len(sizes))]
        near = int(np.argmin(np.abs(np.log(sizes / 0.01))))
        first, small = kept[0], kept[near]
        bound = "linear: 9, all in span" if rule == "rflo" else "not predicted"
        bound = "linear RFLO: 9, in span" if rule == "eprop_random" else bound
        rows.append(
            Row("16", f"{name}: ranks and spans of the change", bound,
                f"participation {mean_of(first['ratio'])} ({mean_of(small['ratio'])} from weights "
                f"scaled by .01); in best 9 {mean_of(first['best'], 2)}; "
                f"in span {mean_of(first['inside'], 2)}; accuracy {right.mean():.1f} %")
        )  # fmt: skip
        before, after = (
            np.array([[theory.state_dimension(one) for one in scale] for scale in seen])
            for seen in found.states
        )
        rows.append(
            Row("16", f"{name}: dimensions that hidden states fill", "not predicted",
                f"{mean_of(before[0])} -> {mean_of(after[0])} (from weights scaled by .01: "
                f"{mean_of(before[near])} -> {mean_of(after[near])})")
        )  # fmt: skip
        gates = {gate: values.mean() for gate, values in first["gates"].items()}
        rows.append(
            Row("16", f"{name}: participation, recurrent matrix of", "not predicted",
                ", ".join(f"{gate} {value:.1f}" for gate, value in gates.items()))
        )  # fmt: skip
        data["cases"][name] = {"rule": rule, "cell": cell, "scales": sizes, "kept": kept,
                               "accuracy": found.accuracy}  # fmt: skip
    some = runs["gru", "bptt"]
    rows.append(floors(some, units))
    return Finding(rows, data)


def spectra(found: Trained, place: int) -> dict[str, Any]:
    """Singular values of every seed's change from one scale, and what they say, [S] each."""
    values, ratio, inside, gates = [], [], [], {}
    for seed in range(found.accuracy.shape[1]):
        before, after = (
            jax.tree.map(lambda leaf, seed=seed: leaf[place, seed], tree)
            for tree in (found.before, found.after)
        )
        changes = theory.weight_change_rank(before, after, joint=True)
        values.append(changes["joint"].singular_values)
        ratio.append(theory.participation_ratio(values[-1]))
        inside.append(share_inside(before, after, found.span[place, seed]))
        for path, change in changes.items():
            if path.startswith("h"):
                gate = path.split("/")[0]
                gates.setdefault(gate, []).append(
                    theory.participation_ratio(change.singular_values)
                )
    power = np.square(np.array(values))
    return {
        "values": np.array(values),
        "ratio": np.array(ratio),
        "best": power[:, : CLASSES - 1].sum(1) / power.sum(1),
        "inside": np.array(inside),
        "gates": {gate: np.array(found) for gate, found in gates.items()},
    }


def share_inside(before: Any, after: Any, span: np.ndarray) -> float:
    """The share of the squared change of all matrices that lies in the span of `span` [N, O]."""
    basis = np.linalg.qr(span.astype(np.float64))[0]
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    change = np.concatenate([new - old for old, new in pairs if np.ndim(old) == 2])
    return float(np.square(change @ basis).sum() / np.square(change).sum())


def floors(some: Trained, units: int) -> Row:
    """What chance gives: accuracy without training, and a change of random entries."""
    shapes = [leaf.shape[2:] for leaf in jax.tree.leaves(some.before) if leaf.ndim == 4]
    rows = sum(shape[0] for shape in shapes)
    noise = np.linalg.svd(np.random.default_rng(0).normal(size=(rows, units)), compute_uv=False)
    power = np.square(noise)
    chance = 100 * digits("rows").floors.accuracy
    return Row(
        "16", "floors: untrained GRU; a constant answer; a change of noise", "",
        f"accuracy {100 * some.untrained[0].mean():.1f} %; {chance:.1f} %; "
        f"participation {theory.participation_ratio(noise):.1f}, in best 9 "
        f"{power[: CLASSES - 1].sum() / power.sum():.2f}, in span {CLASSES / units:.2f}",
    )  # fmt: skip


def plateaus(config: Asked) -> Finding:
    """How long the loss stays at chance, as the initial weights shrink.

    Where all weights are tiny a GRU is a leaky linear network whose gates stand at a half. There
    BPTT and truncated BPTT wait `ln(1/scale)` times a number of updates that the data's
    correlations fix, `slopes`; fixed random feedback does not wait.
    """
    runs = train_all(config.seed, config.short)
    sizes = scales(config.short)
    predicted = slopes()
    small = sizes <= 0.1
    rows, data = [], {"scales": sizes, "cases": {}, "late": {}}
    for (cell, rule), found in runs.items():
        if rule == "readout_only":
            continue
        name = label(cell, rule)
        leaves, half, late = (updates_to(found.losses, part * CHANCE) for part in (0.9, 0.5, 0.1))
        slope = slope_of(sizes[small], leaves[small])
        slow = slope_of(sizes[small], half[small])
        rows.append(
            Row("17", f"{name}: updates to .9 of chance's loss, per ln(1/scale)",
                f"linear: {predicted[rule]:.1f}", f"{slope:.1f}; to half {slow:.1f}; "
                f"to half at scale {sizes[0]:g}, {sizes[-1]:g}: "
                f"{several(half.mean(1)[[0, -1]], 3)}")
        )  # fmt: skip
        rows.append(
            Row("17", f"{name}: updates from half to a tenth, scale 1", "not predicted",
                f"{(late - half)[0].mean():.0f}" if np.isfinite(late[0]).all() else "not reached")
        )  # fmt: skip
        data["cases"][name] = {"rule": rule, "cell": cell, "leaves": leaves, "half": half,
                               "losses": found.losses, "slope": predicted[rule]}  # fmt: skip
    return Finding(rows, data)


def updates_to(losses: np.ndarray, level: float) -> np.ndarray:
    """[E, S]: after how many updates the smoothed loss was below a level, or infinity."""
    total = np.cumsum(np.pad(losses, ((0, 0), (0, 0), (1, 0))), -1)
    smooth = (total[..., SMOOTH:] - total[..., :-SMOOTH]) / SMOOTH
    below = smooth < level
    return np.where(below.any(-1), below.argmax(-1) + float(SMOOTH), np.inf)


def slope_of(sizes: np.ndarray, times: np.ndarray) -> float:
    """Updates per unit of ln(1/scale), of the mean over seeds; NaN if some run never got there."""
    mean = times.mean(1)
    if len(sizes) < 2 or not np.isfinite(mean).all():
        return float("nan")
    return float(np.polyfit(-np.log(sizes), mean, 1)[0])


def slopes() -> dict[RuleName, float]:
    """Updates per ln(1/scale) that the linear theory gives where all weights are tiny.

    Units leak a half, so that the state is `B s` with `s_t = s_{t-1}/2 + x_t/2`, and with C the
    correlation of classes and s, C_0 that of classes and the last `x/2`, the readout A and B grow
    by `A += rate C B^T`, `B += rate A^T G`: G is C for BPTT and symmetric e-prop, whose traces hold
    s, and C_0 for one-step truncated BPTT.
    """
    (images, labels), _ = split_digits(0, 0.2)
    steps = images.reshape(len(images), 8, 8).astype(np.float64)
    answers = np.eye(CLASSES)[labels]
    answers -= answers.mean(0)
    kept = 0.5 ** np.arange(8, 0, -1)
    whole = answers.T @ np.einsum("t,eti->ei", kept, steps) / len(steps)
    last = answers.T @ (0.5 * steps[:, -1]) / len(steps)

    def wait(reached: np.ndarray) -> float:
        squared = np.abs(np.linalg.eigvals(whole @ reached.T)).max()
        return float(1 / np.log1p(RATE * np.sqrt(squared)))

    return {"bptt": wait(whole), "eprop": wait(whole), "tbptt": wait(last),
            "eprop_random": 0.0, "rflo": 0.0}  # fmt: skip


def mean_of(values: np.ndarray, digits: int = 1) -> str:
    """A mean over seeds and half its range."""
    return f"{values.mean():.{digits}f} ± {np.ptp(values) / 2:.{digits}f}"
