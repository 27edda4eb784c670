"""Closed forms of fixed points, stability and rates against Jacobians, flows and root searches."""

import numpy as np
import pytest

from localgrad import theory


def rules(rng: np.random.Generator) -> list:
    return [theory.bptt(), theory.tbptt(1), theory.rflo(rng.normal(), rng.uniform(-0.8, 0.8))]


def draw(rng: np.random.Generator) -> theory.Modes:
    return theory.Modes(
        rng.choice([-1, 1]) * rng.uniform(0.3, 1.5), rng.uniform(-0.8, 0.8), rng.uniform(0.3, 1.5)
    )


def differences(rule, point, task, step: float = 1e-6) -> np.ndarray:
    """The Jacobian by central differences."""
    moved = np.array(point, np.float64)[:, None] + step * np.hstack([np.eye(3), -np.eye(3)])
    ends = -np.array(theory.descent(rule, theory.Modes(*moved), task))
    return (ends[:, :3] - ends[:, 3:]) / (2 * step)


@pytest.mark.parametrize("seed", range(6))
def test_closed_forms_are_the_jacobians(seed):
    rng = np.random.default_rng(seed)
    teacher, s = draw(rng), rng.choice([-1, 1]) * rng.uniform(0.3, 2.0)
    for rule in rules(rng):
        point, endless = theory.optimum(s, teacher), theory.Endless(teacher)
        jacobian = theory.jacobian(rule, point, endless)
        np.testing.assert_allclose(jacobian, differences(rule, point, endless), atol=1e-6)
        tau, det = theory.characteristic(rule, s, teacher)
        values = np.linalg.eigvals(jacobian)
        values = values[np.argsort(np.abs(values))]
        scale = np.abs(values).max()
        assert abs(values[0]) < 1e-9 * scale  # along the manifold
        np.testing.assert_allclose(-values[1:].sum().real, tau, rtol=1e-8)
        np.testing.assert_allclose((values[1] * values[2]).real, det, rtol=1e-6, atol=1e-9 * scale)
        rate = theory.convergence_rate(rule, s, teacher)
        np.testing.assert_allclose(rate, -values[1:].real.max(), rtol=1e-6, atol=1e-9 * scale)


def test_bptt_and_tbptt_are_stable_nodes_and_rflo_where_the_signs_agree():
    rng = np.random.default_rng(0)
    for _ in range(20):
        teacher, s = draw(rng), rng.choice([-1, 1]) * rng.uniform(0.3, 2.0)
        endless, point = theory.Endless(teacher), theory.optimum(s, teacher)
        for rule in (theory.bptt(), theory.tbptt(1)):
            assert theory.verdict(theory.jacobian(rule, point, endless)).kind == "stable node"
        good = theory.rflo(np.sign(s) * rng.uniform(0.1, 3), rng.uniform(-0.8, 0.8))
        assert theory.verdict(theory.jacobian(good, point, endless)).kind.startswith("stable")


@pytest.mark.parametrize(
    "r, kind",
    [(0.5, "stable"), (-0.08, "saddle"), (-0.1, "stable spiral"), (-0.13, "unstable spiral")],
)
def test_window_of_stability_at_the_wrong_sign(r, kind):
    """p* = .3, w* = .8, rho = .2, s = 1: a saddle to r = -.09, stable to the Hopf point -.1205."""
    teacher = theory.Modes(0.3, 0.8, 1.0)
    rule = theory.rflo(r, 0.2)
    jacobian = theory.jacobian(rule, theory.optimum(1.0, teacher), theory.Endless(teacher))
    assert theory.verdict(jacobian).kind.startswith(kind)
    found = theory.limits(1.0, 0.2, teacher)
    np.testing.assert_allclose(found.saddle_node, -0.09, rtol=1e-12)
    np.testing.assert_allclose(found.hopf, -0.1205, atol=5e-5)


def test_the_other_manifold_is_a_saddle_of_bptt_and_tbptt_only():
    teacher = theory.Modes(1.2, 0.7, 1.0)
    endless, point = theory.Endless(teacher), theory.Modes(0.0, 0.3, 0.0)
    expected = {"bptt": 1.2 / (1 - 0.3 * 0.7), "tbptt": 1.2 / np.sqrt(1 - 0.3 * 0.7)}
    for rule in (theory.bptt(), theory.tbptt(1)):
        found = theory.verdict(theory.jacobian(rule, point, endless))
        assert found.kind == "saddle"
        np.testing.assert_allclose(found.rates, [expected[rule.name], -expected[rule.name]])
    moving = theory.descent(theory.rflo(0.9, 0.4), point, endless)
    np.testing.assert_allclose(moving.b, -0.9 * 1.2 / (1 - 0.4 * 0.7))


def test_bptt_is_slowest_where_readout_and_input_balance():
    """At s = sqrt(p*), where BPTT lands from small weights; far away the rate is p*^2/q^3."""
    teacher = theory.Modes(1.2, 0.7, 1.0)
    s = np.geomspace(0.01, 100, 2001)
    rate = np.asarray(theory.convergence_rate(theory.bptt(), s, teacher))
    np.testing.assert_allclose(s[rate.argmin()], np.sqrt(1.2), rtol=5e-3)
    np.testing.assert_allclose(rate[[0, -1]], 1.44 / 0.51**3, rtol=1e-2)
    faster = np.asarray(theory.convergence_rate(theory.rflo(0.9, 0.4), s, teacher)) > rate
    np.testing.assert_allclose(s[faster].max(), 0.384, atol=2e-3)


@pytest.mark.parametrize(
    "rule, s, rate",
    [
        (theory.bptt(), 1.09533, 2.8301),
        (theory.tbptt(1), 1.21221, 1.9411),
        (theory.rflo(0.9, 0.4), 0.92190, 2.3709),
        (theory.rflo(-0.9, 0.4), -0.90894, 2.4018),
        (theory.rflo(0.3, 0.4), 1.30693, 0.8828),
        (theory.rflo(0.9, 0.0), 1.03645, 1.6192),
    ],
)
def test_selected_points_and_late_rates(rule, s, rate):
    """Published numbers of an independent program, from (a, b, w) = (.02, .03, 0)."""
    teacher, start = theory.Modes(1.2, 0.7, 1.0), theory.Modes(0.02, 0.0, 0.03)
    found = theory.endpoint(rule, start, teacher)
    assert min(abs(found.candidates - s)) < 1e-5
    np.testing.assert_allclose(theory.convergence_rate(rule, s, teacher), rate, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.few(1)
def test_flows_end_where_predicted(seed):
    rng = np.random.default_rng(100 + seed)
    teacher = draw(rng)
    task = theory.realisable(teacher, 6)
    start = theory.Modes(*rng.normal(size=3) * 0.7)
    for rule in (theory.bptt(), theory.tbptt(1), theory.rflo(rng.choice([-0.9, 0.9]), 0.3)):
        path = theory.integrate(rule, start, task, [0.0, 2000.0])
        end = theory.endpoint(rule, start, teacher)
        last = theory.Modes(*(float(v[-1]) for v in path.modes))
        if theory.loss(last, task) > 1e-12:  # a stationary point at |w| > 1, or still on its way
            continue
        assert min(abs(end.candidates - last.a)) < 1e-5
        if not np.isnan(end.s):
            np.testing.assert_allclose(last.a, end.s, atol=1e-5)


@pytest.mark.slow
def test_the_wrong_sign():
    """Started from a = b with p* < 0, BPTT ends in the saddle; RFLO crosses over and learns."""
    teacher, start = theory.Modes(-1.0, 0.5, 1.0), theory.Modes(0.3, 0.1, 0.3)
    assert theory.endpoint(theory.bptt(), start, teacher).s == 0.0
    endless = theory.Endless(teacher)
    stuck = theory.integrate(theory.bptt(), start, endless, [0.0, 15.0]).modes
    assert abs(stuck.a[-1]) < 1e-5 and abs(stuck.b[-1]) < 1e-5
    learned = theory.integrate(theory.rflo(0.9, 0.4), start, endless, [0.0, 200.0]).modes
    end = theory.endpoint(theory.rflo(0.9, 0.4), start, teacher)
    np.testing.assert_allclose(learned.a[-1], end.s, atol=1e-6)


@pytest.mark.slow
def test_detour():
    """From (1, 1, .6), r = -1, RFLO travels to the other branch; BPTT does not."""
    teacher, start = theory.Modes(1.0, 0.8, 1.0), theory.Modes(1.0, 0.6, 1.0)
    task = theory.Endless(teacher)
    path = theory.integrate(theory.rflo(-1.0, 0.5), start, task, [0.0, 300.0]).modes
    np.testing.assert_allclose(
        [path.a[-1], path.b[-1], path.w[-1]], [-0.5045, -1.9822, 0.8], atol=1e-4
    )
    path = theory.integrate(theory.bptt(), start, task, [0.0, 300.0]).modes
    np.testing.assert_allclose([path.a[-1], path.b[-1], path.w[-1]], [1, 1, 0.8], atol=1e-6)


DELAY = theory.Task(np.eye(300)[1], np.ones(300))  # y_t = x_{t-1}, which no single mode can do


def test_least_squares_of_a_delay():
    best = theory.stationary_points(theory.bptt(), DELAY)[0]
    np.testing.assert_allclose([abs(best.w), abs(best.p), best.loss], [0.5**0.5, 0.125**0.5, 0.375])


@pytest.mark.parametrize("rho, loss", [(0.5, 0.38101), (0.3, 0.40420), (0.5**0.5, 0.375)])
def test_bias_of_rflo_on_a_delay(rho, loss):
    """`w = (-rho + sqrt(rho^2 + 4))/2`, `p = w (1 - w^2)`: least squares only if rho is its w."""
    found = theory.stationary_points(theory.rflo(1.0, rho), DELAY)
    w = (-rho + np.sqrt(rho**2 + 4)) / 2
    assert len(found) == 1
    np.testing.assert_allclose([found[0].w, found[0].p], [w, w * (1 - w**2)], rtol=1e-9)
    np.testing.assert_allclose(found[0].loss, loss, atol=1e-5)
    start = theory.Modes(found[0].p / 0.7, found[0].w, 0.7)
    moving = theory.descent(theory.rflo(1.0, rho), start, DELAY)
    np.testing.assert_allclose(moving, 0.0, atol=1e-12)


@pytest.mark.slow
def test_a_realisable_teacher_is_every_rules_stop():
    task = theory.realisable(theory.Modes(1.2, 0.7, 1.0), 12)
    for rule in (theory.bptt(), theory.tbptt(1), theory.rflo(-0.9, 0.4)):
        found = theory.stationary_points(rule, task)[0]
        np.testing.assert_allclose(found[:2], [0.7, 1.2], rtol=1e-9)
        assert found.kind == "stable node" and np.sign(found.s) == (-1 if rule.gain else 1)
    wrong = theory.stationary_points(theory.rflo(0.9, 0.4), task, s=-0.5)[0]
    assert wrong.kind == "saddle" and wrong.s == -0.5


@pytest.mark.parametrize("seed", [23, 3])
@pytest.mark.slow
def test_what_becomes_of_each_stop(seed):
    """Eigenvalues of differences; on task 23 a saddle of TBPTT(1) has the least loss."""
    task = theory.Task(np.random.default_rng(seed).normal(size=5), theory.lag_weights(5))
    for rule in (theory.bptt(), theory.tbptt(1), theory.rflo(0.9, 0.4)):
        found = theory.stationary_points(rule, task, resolution=801)
        for stop in found:
            point = theory.Modes(stop.s, stop.w, stop.p / stop.s)
            np.testing.assert_allclose(theory.descent(rule, point, task), 0.0, atol=1e-9)
            real = np.linalg.eigvals(differences(rule, point, task)).real
            grows, fades = (real > 1e-4).any(), (real < -1e-4).any()
            kinds = {(True, True): "saddle", (True, False): "unstable", (False, True): "stable"}
            assert stop.kind.startswith(kinds[grows, fades])
        ranks = [(not stop.kind.startswith("stable"), stop.loss) for stop in found]
        assert ranks == sorted(ranks)
        if rule.name == "tbptt" and seed == 23:
            assert min(found, key=lambda stop: stop.loss).kind == "saddle" != found[0].kind


def test_where_nothing_is_learned_is_no_stop_and_not_stable():
    """At `b = 0`, any a, w = 0 neither a nor w has a force on y_t = x_{t-2}: the flow leaves."""
    task, nothing = theory.Task(np.eye(20)[2], np.ones(20)), theory.Modes(1.0, 0.0, 0.0)
    np.testing.assert_allclose(theory.descent(theory.bptt(), nothing, task), 0.0)
    assert theory.verdict(differences(theory.bptt(), nothing, task), rtol=1e-4).kind == "degenerate"
    found = theory.stationary_points(theory.bptt(), task)
    assert [round(abs(stop.w), 3) for stop in found] == [0.817, 0.817]
    near = nothing._replace(w=0.05)
    last = theory.integrate(theory.bptt(), near, task, [0.0, 1000.0]).modes
    assert abs(last.w[-1]) > 0.5
    for stop in found:  # and what is called stable holds it
        beside = theory.Modes(stop.s, stop.w + 0.01, stop.p / stop.s)
        last = theory.integrate(theory.bptt(), beside, task, [0.0, 1000.0]).modes
        np.testing.assert_allclose([last.w[-1], last.a[-1] * last.b[-1]], stop[:2], rtol=1e-6)


@pytest.mark.parametrize("more", [-1.0, 1.0])
def test_more_than_one_neutral_direction_is_degenerate(more):
    assert theory.verdict(np.diag([0.0, 1e-9, more])).kind == "degenerate"
    assert theory.verdict(np.zeros((1, 1))).kind == "degenerate"
    assert theory.verdict(np.diag([1e-9, more, 2 * more])).kind != "degenerate"


def least_squares_apart(rho: float, task: theory.Task) -> float:
    """The least loss among w with E(rho) = 0, where E(w) = 0 gives p: by NumPy's polynomials."""
    w = np.linspace(-0.999, 0.999, 10000)
    target, lags = np.asarray(task.target), np.arange(len(task.target))
    powers = w[:, None] ** lags
    p = powers @ target / (powers**2).sum(1)
    gap = (p[:, None] * powers - target) @ rho**lags * np.sign(w - rho)  # w = rho is no solution
    at = np.flatnonzero(gap[1:] * gap[:-1] < 0)
    lost = 0.5 * ((p[:, None] * powers - target) ** 2).sum(1)
    return float(lost[at].min(initial=np.inf))


@pytest.mark.slow
def test_the_decay_of_least_bias():
    """BPTT's own w for one mode; between them for two, which a grid of decays confirms."""
    lags = np.arange(10)
    modes = [0.9**lags - 0.5 * (lags == 2), 0.4**lags + 0.3 * (lags == 1)]
    task = theory.Task(np.stack(modes), np.ones(10))
    found = theory.suggest_decay(task)
    grid = np.linspace(0.0, 0.98, 50)
    apart = [theory.Task(mode, np.ones(10)) for mode in modes]
    lost = [sum(least_squares_apart(rho, mode) for mode in apart) for rho in grid]
    assert abs(grid[np.argmin(lost)] - found.decay) < 0.02
    assert found.least < found.loss <= min(lost) + 1e-6
    np.testing.assert_allclose(found.loss, min(lost), rtol=1e-2)
    own = [theory.suggest_decay(mode) for mode in apart]
    assert own[1].decay < found.decay < own[0].decay
    for mode, best in zip(apart, own, strict=True):
        full = theory.stationary_points(theory.bptt(), mode, resolution=1001)[0]
        np.testing.assert_allclose(best, [full.w, full.loss, full.loss], rtol=1e-12)


@pytest.mark.few(1)
@pytest.mark.parametrize("own, decay", [([-0.5], 0.0), ([-0.5, 0.6], 0.6), ([0.3, 0.6], 0.3)])
def test_the_decay_where_all_do_equally_well(own, decay):
    target = np.stack([np.power(w, np.arange(10)) for w in own])
    found = theory.suggest_decay(theory.Task(target, np.ones(10)), resolution=101)
    np.testing.assert_allclose(found.decay, decay, atol=1e-9)


def test_what_has_no_closed_form_says_so():
    teacher = theory.Modes(1.2, 0.7, 1.0)
    for call in (
        lambda: theory.characteristic(theory.tbptt(2), 1.0, teacher),
        lambda: theory.stationary_points(theory.tbptt(2), DELAY),
        lambda: theory.conserved(theory.tbptt(2), teacher),
    ):
        with pytest.raises(ValueError, match="horizon"):
            call()


def test_a_stable_wrong_sign_leaves_the_end_untold():
    """From beside a stable point of the wrong sign RFLO stays there."""
    teacher, rule = theory.Modes(0.3, 0.8, 1.0), theory.rflo(-0.10, 0.2)
    start = theory.Modes(1.001, 0.8, 0.3)
    end = theory.endpoint(rule, start, teacher)
    path = theory.integrate(rule, start, theory.Endless(teacher), [0.0, 1000.0])
    assert np.isnan(end.s) and min(abs(end.candidates - path.modes.a[-1])) < 1e-5


@pytest.mark.slow
def test_plateaus_at_the_wrong_sign():
    """BPTT never begins to learn from a = b with p* < 0; TBPTT(1) does, but if w* = 0.

    The slope over ln(1/scale) is 3, not 1, and over ln(1/|w*|) 2.
    """
    half, told, times = [], [], np.linspace(0, 40, 401)
    for scale, w in ((1e-2, 0.1), (1e-3, 0.1), (1e-3, 0.05)):
        teacher, start = theory.Modes(-1.0, w, 1.0), theory.Modes(scale, 0.0, scale)
        task = theory.Endless(teacher)
        path = theory.integrate(theory.tbptt(1), start, task, times)
        half.append(float(theory.half_time(path, task)))
        told.append(theory.plateau(theory.tbptt(1), scale, teacher))
        assert theory.plateau(theory.bptt(), scale, teacher) == np.inf
    np.testing.assert_allclose(np.diff(half), np.diff(told), rtol=5e-3)
    silent = theory.Modes(-1.0, 0.0, 1.0)
    assert theory.plateau(theory.tbptt(1), 1e-3, silent) == np.inf
    never = theory.integrate(
        theory.tbptt(1), theory.Modes(1e-2, 0.0, 1e-2), theory.Endless(silent), 25 * times
    ).modes
    assert abs(never.a[-1]) < 1e-12 and abs(never.b[-1]) < 1e-12


def test_at_the_saddle_node_two_rates_vanish():
    for w, rho, p in ((0.8, 0.2, 0.3), (-0.6, 0.8, 1.0), (0.3, 0.2, 1.1)):
        teacher = theory.Modes(p, w, 1.0)
        rule = theory.rflo(float(theory.limits(1.3, rho, teacher).saddle_node), rho)
        point = theory.optimum(1.3, teacher)
        found = theory.verdict(theory.jacobian(rule, point, theory.Endless(teacher)))
        assert len(found.rates) == 1
        tau, _ = theory.characteristic(rule, 1.3, teacher)
        np.testing.assert_allclose(found.rates, -tau, rtol=1e-6)


def test_rates_near_the_saddle_node_do_not_cancel():
    teacher = theory.Modes(1.1, 0.3, 1.0)
    found = [
        float(theory.convergence_rate(theory.rflo(-1.21 * (1 - e), 0.2), 1.0, teacher))
        for e in (1e-12, 1e-15)
    ]
    np.testing.assert_allclose(found, -1.947690309, rtol=1e-9)


@pytest.mark.parametrize("w", [0.9998, -0.9998])
@pytest.mark.few(1)
def test_points_near_the_edge_are_found(w):
    task = theory.realisable(theory.Modes(1.2, w, 1.0), 20)
    for rule in (theory.bptt(), theory.tbptt(1), theory.rflo(0.9, 0.4)):
        np.testing.assert_allclose(theory.stationary_points(rule, task)[0][:2], [w, 1.2])


TEACHER, START = theory.Modes(1.2, 0.7, 1.0), theory.Modes(0.1, 0.0, 0.2)
GROWS, HOLE = theory.Modes(1.0, 1.2, 1.0), theory.Task([0.0, np.nan], [1.0, 1.0])
NAN = theory.Modes(np.nan, 0.0, 0.2)
TWO = theory.Modes(np.ones(2), np.zeros(2), np.ones(2))
SHORT = theory.Task([0.5, 0.2, 0.1], np.ones(3))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: theory.endpoint(theory.rflo(0.0, 0.2), START, TEACHER), "must not be zero"),
        (
            lambda: theory.endpoint(theory.bptt(), START, GROWS._replace(w=0.5, a=0.0)),
            "not be zero",
        ),
        (
            lambda: theory.endpoint(theory.bptt(), NAN, TEACHER),
            "start.a must be finite; got 1 of 1",
        ),
        (lambda: theory.endpoint(theory.bptt(), START, GROWS), "teacher.w must lie inside"),
        (lambda: theory.endpoint(theory.bptt(), START._replace(a=[1, 2]), TEACHER), "one mode"),
        (lambda: theory.plateau(theory.bptt(), 2.0, TEACHER), "scale must lie inside"),
        (lambda: theory.plateau(theory.rflo(1.0, 0.5), 0.1, GROWS), "teacher.w must lie inside"),
        (lambda: theory.stationary_points(theory.bptt(), theory.Endless(TEACHER)), "got Endless"),
        (
            lambda: theory.stationary_points(theory.bptt(), theory.realisable(TEACHER, 1)),
            "at least two lags",
        ),
        (lambda: theory.stationary_points(theory.bptt(), HOLE), "task.target must be finite"),
        (lambda: theory.stationary_points(theory.tbptt(1), DELAY), "tbptt stops nowhere .* lag 0"),
        (lambda: theory.stationary_points(theory.bptt(), SHORT, s=0.0), "s must not be 0"),
        (lambda: theory.stationary_points(theory.rflo(0.0, 0.1), SHORT), "feedback must not be 0"),
        (lambda: theory.suggest_decay(HOLE), "task.target must be finite"),
        (lambda: theory.suggest_decay(theory.Endless(TEACHER)), "must be a Task; got Endless"),
        (lambda: theory.integrate(theory.bptt(), NAN, SHORT, [0, 1]), "start.a must be finite"),
        (lambda: theory.integrate(theory.bptt(), START, HOLE, [0, 1]), "task.target must be fin"),
        (lambda: theory.rflo("random", 0.5), "feedback must be real numbers, .* got 'random'"),
        (lambda: theory.rflo(1.0, np.nan), "decay must be finite"),
        (lambda: theory.limits(1.0, 1.0, TEACHER), "decay must lie inside"),
        (lambda: theory.limits([1.0, 0.0], 0.5, TEACHER), "s must not be 0"),
        (lambda: theory.optimum(0.0, TEACHER), "s must not be 0; got 0.0. At every point"),
        (lambda: theory.convergence_rate(theory.bptt(), 0.0, TEACHER), "s must not be 0"),
        (lambda: theory.characteristic(theory.bptt(), 1.0, GROWS), "teacher.w must lie inside"),
        (
            lambda: theory.characteristic(theory.rflo(np.ones(3), 0.5), np.ones(2), TEACHER),
            r"shapes must be alike, or broadcast; got s \(2,\), .*feedback \(3,\)",
        ),
        (lambda: theory.loss(START, theory.Task(np.ones((3, 4)), np.ones(4))), "modes must fit"),
        (lambda: theory.loss(START, theory.Task(np.ones(4), np.ones(3))), "task.weight must be"),
        (lambda: theory.loss(START, theory.Endless(GROWS)), "teacher.w must lie inside"),
        (lambda: theory.jacobian(theory.bptt(), NAN, SHORT), "point.a must be finite"),
        (lambda: theory.rank_bound("RFLO", 2, 30), "rule must be one of 'rflo'"),
        (lambda: theory.optimum(np.ones(3), TWO), r"got s \(3,\), a\* \(2,\)"),
        (lambda: theory.verdict(np.full((3, 3), np.nan)), "jacobian must be finite"),
        (lambda: theory.verdict(np.ones((2, 3))), r"jacobian must be \[n, n\]; got shape \(2, 3\)"),
        (lambda: theory.stationary_points(theory.bptt(), SHORT, s=np.ones(2)), "s must be a numb"),
        (
            lambda: theory.stationary_points(theory.rflo(np.ones(2), 0.1), SHORT),
            "feedback must be a number",
        ),
        (
            lambda: theory.stationary_points(theory.rflo(1.0, np.zeros(2)), SHORT),
            "decay must be a number",
        ),
        (
            lambda: theory.stationary_points(theory.bptt(), SHORT, resolution=0),
            "resolution must be a positive integer; got 0",
        ),
        (lambda: theory.stationary_points("bptt", SHORT), r"rule must be bptt\(\).* got 'bptt'"),
        (lambda: theory.stationary_points(theory.bptt(), np.ones(3)), "task must be a Task"),
        (lambda: theory.suggest_decay(np.ones(3)), "task must be a Task or Endless; got ndarray"),
        (lambda: theory.suggest_decay(SHORT, resolution=0), "resolution must be a positive"),
        (lambda: theory.plateau(theory.bptt(), "x", TEACHER), "scale must be real .*got 'x'"),
        (lambda: theory.plateau(theory.bptt(), np.ones(2), TEACHER), "scale must be a number"),
        (
            lambda: theory.endpoint(theory.bptt(), (0.1, 0.0, 0.1), TEACHER),
            r"start must be Modes\(a, w, b\); got \(0.1, 0.0, 0.1\)",
        ),
        (lambda: theory.endpoint("rflo", START, TEACHER), "rule must be .* got 'rflo'"),
        (lambda: theory.realisable(TEACHER, 0), "steps must be a positive integer; got 0"),
        (lambda: theory.realisable(TEACHER, 2.5), "steps must be a positive integer; got 2.5"),
        (lambda: theory.lag_weights(-1), "steps must be a positive integer; got -1"),
        (lambda: theory.unleaky(START, 2.0), r"alpha must be .* lie in \(0, 1\]; got 2.0"),
        (lambda: theory.unleaky(START, np.nan), "alpha must be .* got nan"),
        (lambda: theory.unleaky(START, 0.0), "alpha must be .* got 0.0"),
        (lambda: theory.leaky(START, 0.0), "alpha must be .* got 0.0"),
    ],
)
def test_what_is_asked_wrongly_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()
