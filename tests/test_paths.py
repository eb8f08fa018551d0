"""Every solver on every path: its order of convergence, the law that paths share, targets, float32, one compiled program."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from walks import best_x_0_hat, denoiser, walk

import diffusion_jax as dj
from diffusion_jax.diffusion import edm_target, look_up
from diffusion_jax.losses import draw_times, time_density

T = 1000
PATHS = {
    "linear": dj.linear_schedule(T),
    "cosine": dj.cosine_schedule(T),
    "flow": dj.flow_schedule(T),
    "exploding": dj.variance_exploding_schedule(T),
    "neither": dj.schedule_from_columns(1 / (1 + np.arange(T + 1) / T), np.arange(T + 1) ** 2 / (20 * T)),
}
SOLVERS = {
    "ddim": (dj.ddim_table, 1),
    "dpm solver": (dj.dpm_solver_table, 2),
    "dpm solver 3m": (partial(dj.dpm_solver_table, order=3), 3),
    "heun": (dj.heun_table, 2),
    "unipc 1": (partial(dj.unipc_table, order=1), 2),
    "unipc 2": (dj.unipc_table, 3),
    "unipc 3": (partial(dj.unipc_table, order=3), 4),
    "unipc 2 in the signal": (partial(dj.unipc_table, variable="signal"), 3),
    "unipc 3 in the signal": (partial(dj.unipc_table, order=3, variable="signal"), 4),
    "deis 2": (partial(dj.deis_table, order=2), 2),
    "deis 3": (dj.deis_table, 3),
}
STOCHASTIC = {
    **{name: partial(dj.ancestral_table, sigma_type=name) for name in ("upper_bound", "lower_bound")},
    "ddim 0.5": partial(dj.ddim_table, eta=0.5),
    "dpm solver sde": partial(dj.dpm_solver_table, eta=1.0),
    "dpm solver 3m sde": partial(dj.dpm_solver_table, eta=1.0, order=3),
    "heun with churn": partial(dj.heun_table, churn=10.0, churn_range=(0.05, 50.0)),
}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
TARGETS = ("pred_x_0", "pred_eps", "pred_v", "pred_u", "edm")
START = np.random.default_rng(5).standard_normal((40, 2))


def times_between(schedule: dj.NoiseSchedule, high: float, low: float, steps: int) -> np.ndarray:
    """So many steps, evenly spaced in the log-SNR, and one to 0."""
    return np.append(schedule.time_of(np.geomspace(high, low, steps + 1)), 0)


@pytest.fixture(scope="module")
def exact():
    """exact(sigma): v = x_t / signal at the noise-to-signal ratio sigma, on the flow that has v = 20.1 START at sigma = 20.1.

    Ends are from 20 to 0.05, up to the rounding of times.
    """

    def flow(log_sigma, v):
        return (v.reshape(-1, 2) - best_x_0_hat(v.reshape(-1, 2), np.exp(log_sigma))).ravel()

    span, start = (np.log(20.1), np.log(0.0499)), 20.1 * START.ravel()
    solution = scipy.integrate.solve_ivp(flow, span, start, "DOP853", rtol=1e-12, atol=1e-13, dense_output=True).sol

    def at(sigma):
        assert 0.0499 < sigma < 20.1
        return solution(np.log(sigma)).reshape(-1, 2)

    return at


@EVERY_PATH
@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(path, name, exact):
    schedule, (make_table, order) = PATHS[path], SOLVERS[name]
    errors, lengths = [], np.array([80, 160, 320])
    for steps in lengths:
        times = np.float64(np.float32(times_between(schedule, 20, 0.05, steps)))
        (signal, noise), table = schedule.at(times), make_table(schedule, sampling_timesteps=times)
        at_low = {len(times) - 1: -2, 2 * len(times) - 3: -2}[len(table.t)]
        v = walk(table, denoiser(schedule), signal[0] * exact(noise[0] / signal[0]))[at_low] / signal[-2]
        errors.append(np.sqrt(np.mean((v - exact(noise[-2] / signal[-2])) ** 2)))
    slope = -np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.45 if "unipc 3" in name else 0.25)
    assert errors[-1] < {1: 2e-2, 2: 2e-4, 3: 1e-5, 4: 1e-6}[order]


def test_one_log_snr_grid_gives_the_same_samples_on_every_path_by_one_compiled_program():
    """Rows of the same noise-to-signal ratios, the best denoiser: x_t / signal is the same, to float32's last digits."""
    sigma = np.append(0.0, np.geomspace(0.02, 30, 40))
    signals = 1 / np.sqrt(1 + sigma**2), 1 / (1 + sigma), np.ones(41)  # variance-preserving, flow, exploding
    schedules = [dj.schedule_from_columns(signal, signal * sigma) for signal in signals]
    keys, start, traces = jax.random.split(jax.random.key(0), 8), 30 * jax.random.normal(jax.random.key(1), (8, 2)), []

    @jax.jit
    def draw(schedule, table):
        def predict(x_t, t):
            signal, noise = (look_up(column, t, x_t)[:, None] for column in schedule)
            return mixture(x_t / signal, noise / signal)

        traces.append(0)
        denoise = dj.make_denoiser(schedule, predict, "pred_x_0")
        return dj.sample(denoise, table, keys, (2,), schedule.signal[-1] * start)

    for name in (*SOLVERS, "heun with churn"):
        make_table = STOCHASTIC[name] if name in STOCHASTIC else SOLVERS[name][0]
        one, *others = (draw(schedule, dj.padded(make_table(schedule), 80)) for schedule in schedules)
        assert np.all(np.isfinite(one))
        for other in others:
            np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5, err_msg=name)
    assert len(traces) == 1


def mixture(v, ratio):
    """E[x_0 | v] of 1/2 N(-1, 0.3^2) + 1/2 N(1, 0.3^2) in each coordinate."""
    variance = 0.3**2 + ratio**2
    side = jnp.tanh(v / variance)
    return side + 0.3**2 / variance * (v - side)


@EVERY_PATH
@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_with_noise_have_the_datas_moments(path, name):
    """Data N(m, v) on a line: the best denoiser is linear, so mean and variance follow the table exactly; no samples needed."""
    m, v, schedule = 0.7, 0.5, PATHS[path]
    errors = []
    for steps in (40, 160):
        times = times_between(schedule, schedule.sigma[np.isfinite(schedule.sigma)][-1], 0.01, steps)
        mean, covariance = np.zeros(4), np.zeros((4, 4))
        table = STOCHASTIC[name](schedule, sampling_timesteps=times)
        covariance[0, 0] = table.scale[0] ** 2
        for t, _, a, b, c, _, d, e, f in zip(*table, strict=True):
            signal, noise = schedule.at(t)
            gain = signal * v / (signal**2 * v + noise**2)
            M = np.array([[a + b * gain, *d], [e + f * gain, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
            mean = M @ mean + np.array([b, f, 0, 0]) * (m - gain * signal * m)
            covariance = M @ covariance @ M.T + np.diag([c**2, 0, 0, 0])
        errors.append([abs(mean[0] - m), abs(covariance[0, 0] - v)])
    assert max(errors[1]) < 0.05
    assert sum(errors[1]) < 0.6 * sum(errors[0]) or max(errors[0]) < 0.01


@EVERY_PATH
@pytest.mark.parametrize("one", TARGETS)
@pytest.mark.parametrize("other", ["pred_x_0", "edm"])
def test_targets_convert_into_each_other(path, one, other):
    """At rows, between them and at both ends, against x_0 and eps that are known."""
    schedule = PATHS[path]
    t = np.array([0.0, 0.4, 1, 250.75, 500, 999.5, 1000])
    (signal, noise), eps = schedule.at(t), np.linspace(-2, 2, 7)
    x_0 = np.linspace(1, -1.5, 7)
    n = np.sqrt(noise**2 + 0.25 * signal**2)
    values = {
        "pred_x_0": x_0,
        "pred_eps": eps,
        "pred_v": signal * eps - noise * x_0,
        "pred_u": eps - x_0,
        "edm": noise * x_0 / (0.5 * n) - 0.5 * signal * eps / n,
    }
    with jax.enable_x64(True):
        x_t, t, prediction = (jnp.asarray(value)[:, None] for value in (signal * x_0 + noise * eps, t, values[one]))
        converted = np.asarray(dj.convert(schedule, prediction, x_t, t[:, 0], one, other))[:, 0]
    p, q = {"pred_x_0": (1, 0), "pred_eps": (0, 1)}.get(one, (1, 1))
    defined = (one == other) | ((noise * p > 0) | (q > 0)) & ((signal * q > 0) | (p > 0))
    assert defined.sum() >= 5
    np.testing.assert_allclose(converted[defined], values[other][defined], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_is_the_preconditioning_of_karras_et_al(sigma_data):
    """Their D = c_skip x + c_out F on x = x_0 + sigma eps, whatever the path; at sigma_data = 1, F is -v."""
    for schedule in PATHS.values():
        t = jnp.array([30, 400, 990])
        signal, noise = (column[np.array([30, 400, 990])] for column in schedule)
        x_t, F = jax.random.normal(jax.random.key(0), (3, 2)), jax.random.normal(jax.random.key(1), (3, 2))
        x, sigma = np.asarray(x_t) / signal[:, None], (noise / signal)[:, None]
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
        target = partial(edm_target, sigma_data=sigma_data)
        x_0_hat = dj.make_denoiser(schedule, lambda x_t, t, F=F: F, target)(x_t, t)
        np.testing.assert_allclose(x_0_hat, c_skip * x + c_out * np.asarray(F), rtol=1e-4, atol=1e-4)
    p, q = edm_target(*PATHS["cosine"], sigma_data=1.0)
    np.testing.assert_allclose([p, q], [PATHS["cosine"].noise, -PATHS["cosine"].signal], atol=1e-12)


@EVERY_PATH
@pytest.mark.parametrize("target_type", TARGETS)
def test_min_snr_weighs_an_error_of_x_0(path, target_type):
    """The loss of a prediction that is off by an error of x_0 is min(SNR, 5) times that error's, whatever the target."""
    schedule, weight = PATHS[path], dj.min_snr_weight(PATHS[path], target_type)
    assert weight.shape == (T + 1,)
    assert np.isfinite(weight).all()
    rows = np.array([1, 10, 300, 700, 999])
    signal, noise = (column[rows] for column in schedule)
    with jax.enable_x64(True):
        x_0, off = jnp.ones((5, 1)), jnp.full((5, 1), 1.1)
        x_t, t = dj.q_sample(schedule, x_0, jnp.asarray(rows), x_0), jnp.asarray(rows)
        right, wrong = (dj.convert(schedule, value, x_t, t, "pred_x_0", target_type) for value in (x_0, off))
    loss = weight[rows] * np.asarray(wrong - right)[:, 0] ** 2
    np.testing.assert_allclose(loss, np.minimum((signal / noise) ** 2, 5) * 0.01, rtol=1e-6)


def test_min_snr_at_another_cap_and_at_both_ends():
    """At t = 0 the target x_0 has no error to weigh, and without signal the target eps knows nothing of x_0."""
    assert dj.min_snr_weight(PATHS["flow"], "pred_u", cap=0.7)[500] == pytest.approx(0.7 / 4)  # half signal, half noise
    assert dj.min_snr_weight(PATHS["flow"], "pred_x_0", cap=0.7)[0] == 0.7
    assert dj.min_snr_weight(PATHS["flow"], "pred_eps", cap=0.7)[-1] == 1


def test_times_that_are_one_in_float32_are_refused():
    with pytest.raises(ValueError, match="4000 times spaced in karras are too close for float32"):
        dj.sampling_times(dj.cosine_schedule(4000), 4000, "karras")


@EVERY_PATH
def test_float32_bears_the_coefficients_of_coarse_grids(path):
    """`sample` in float32 against the same walk in float64, in five steps of every solver, with noise left out."""
    schedule, largest = PATHS[path], 0.0

    def denoise(x_t, t):
        signal, noise = (look_up(column, t, x_t)[:, None] for column in schedule)
        return mixture(x_t / jnp.maximum(signal, 1e-9), noise / jnp.maximum(signal, 1e-9))

    def in_float64(x_t, t):
        signal, noise = schedule.at(t)
        return np.asarray(mixture(x_t / max(signal, 1e-9), noise / max(signal, 1e-9)), np.float64)

    draw = jax.jit(partial(dj.sample, denoise, shape=(2,)))
    keys = jax.random.split(jax.random.key(0), len(START))
    for name, make_table in ({name: make_table for name, (make_table, _) in SOLVERS.items()} | STOCHASTIC).items():
        for spacing in ("time", "log_snr", "karras", "flow"):
            if "signal" in name and spacing != "flow":  # its nodes would crowd where there is little signal
                continue
            table = make_table(schedule, sampling_timesteps=dj.sampling_times(schedule, 5, spacing))
            table = table._replace(c=np.zeros_like(table.c))
            assert len(np.unique(table.t)) >= 5
            largest = max(largest, np.abs(np.concatenate([table.a, table.b, table.d.ravel()])).max())
            start = np.float32(table.scale[0] * START)
            with jax.enable_x64(True):
                expected = walk(table, in_float64, start.astype(np.float64))[-1]
            assert np.all(np.isfinite(expected))
            drawn = draw(dj.padded(table, 12), keys, start=jnp.asarray(start))
            np.testing.assert_allclose(drawn, expected, rtol=5e-4, atol=2e-4)
    assert largest > 4


def test_ten_karras_steps_are_ten_distinct_times():
    schedule = dj.cosine_schedule(500)
    times = dj.sampling_times(schedule, 10, "karras")
    assert len(np.unique(times)) == 11
    for spacing in ("karras", "log_snr"):
        assert dj.sampling_times(schedule, 10, spacing)[-2:] == pytest.approx([1, 0])
    signal, noise = schedule.at(times[:-1])
    steps = np.diff((noise / signal) ** (1 / 7))
    np.testing.assert_allclose(steps, steps[0], rtol=2e-3)  # times are float32
    steps = np.diff(np.log(np.divide(*schedule.at(dj.sampling_times(schedule, 10, "log_snr")[:-1]))))
    np.testing.assert_allclose(steps, steps[0], rtol=2e-3)


@EVERY_PATH
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 500])
def test_steps_spaced_as_in_flow_are_even_there_and_end_nearer_to_the_data_the_more_there_are(path, steps):
    times = dj.sampling_times(PATHS[path], steps, "flow")
    assert (len(times), times[0], times[-1]) == (steps + 1, T, 0)
    assert np.all(np.diff(times) < 0)
    signal, noise = PATHS[path].at(times[1:-1])
    u = (noise / signal) ** (1 / 1.2) / (1 + (noise / signal) ** (1 / 1.2))
    lowest, highest = 1 / (1 + PATHS[path].sigma[[1, -1]] ** (-1 / 1.2))
    np.testing.assert_allclose(u, np.linspace(highest, max(highest / steps, lowest), steps)[1:], rtol=2e-3)


def test_in_the_signal_standard_normal_data_need_two_nodes():
    """x_0_hat is linear in it along the flow, so from the second step on UniPC of order 2 is nearly exact."""
    for schedule in PATHS.values():
        times = dj.sampling_times(schedule, 6, "flow")
        table, scale = dj.unipc_table(schedule, times, 2, "signal"), np.hypot(*schedule.at(times))
        best = lambda x_t, t, schedule=schedule: schedule.at(t)[0] / np.sum(np.square(schedule.at(t))) * x_t  # noqa: E731
        path = np.array([x[0, 0] for x in walk(table, best, np.full((1, 1), scale[0]))])
        corrected = path[2:-1] / scale[2:-1]  # along the flow x_t / scale stays as it is; the first step is of order 1
        np.testing.assert_allclose(corrected, corrected[0], rtol=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_times_and_their_noise_are_inverse(path):
    schedule, t = PATHS[path], np.linspace(0, 999.9, 777)
    signal, noise = schedule.at(t)
    np.testing.assert_allclose(schedule.time_of(noise / signal), t, atol=1e-8)


def test_a_network_told_the_log_snr_moves_to_another_path():
    """What it sees, and so what it predicts of x_0, are the same at the same noise-to-signal ratio."""
    seen = []
    for schedule in PATHS.values():
        t = jnp.asarray(np.float32(schedule.time_of(np.array([0.1, 1.0, 10.0]))))
        signal, noise = (np.float32(column) for column in schedule.at(np.asarray(t, np.float64)))
        x_t = jnp.asarray(signal + noise * 0.3)[:, None]
        dj.normalized(schedule, lambda x, told: seen.append((x, told)) or x, "log_snr")(x_t, t)
    for x, told in seen[1:]:
        np.testing.assert_allclose(x, seen[0][0], rtol=2e-4)
        np.testing.assert_allclose(told, seen[0][1], rtol=2e-4)
    np.testing.assert_allclose(seen[0][1][1], 500, rtol=1e-3)


def test_on_a_path_that_preserves_variance_the_network_sees_x_t_itself():
    x_t, t = jax.random.normal(jax.random.key(0), (1001, 3)), jnp.arange(1001)
    for path in ("linear", "cosine"):
        x, told = dj.normalized(PATHS[path], lambda x, told: (x, told))(x_t, t)
        np.testing.assert_array_equal(x, x_t)
        np.testing.assert_array_equal(told, t)


@pytest.mark.parametrize(
    ("signal", "noise", "problem"),
    [
        ([1.0, 0.5], [0.1, 0.5], "row 0 must be the data, signal 1 and noise 0, got 1.0 and 0.1"),
        ([1.0, 0.5, 0.6], [0.0, 0.5, 0.5], "noise / signal must increase from row to row, got 0.83.* at t = 2"),
        ([1.0, 0.5, 0.5], [0.0, 0.5, 0.5], "noise / signal must increase from row to row, got 1.0 at t = 2"),
        ([1.0, -0.5], [0.0, 0.5], r"signal not negative, got -0.5 to 1"),
        ([1.0, 1.0], [0.0, np.inf], "must be finite"),
        ([1.0], [0.0], "vectors of one length of at least 2"),
        ([1.0, 0.5], [0.0, 0.5, 0.6], "vectors of one length"),
        (1.0, [0.0, 0.5], "vectors of one length"),
    ],
)
def test_columns_that_are_no_path_are_named(signal, noise, problem):
    with pytest.raises(ValueError, match=problem):
        dj.schedule_from_columns(np.array(signal), np.array(noise))


@pytest.mark.parametrize(("low", "high"), [(0.0, 80.0), (2.0, 2.0), (-1.0, 1.0), (0.1, np.inf)])
def test_sigmas_that_are_no_range_are_named(low, high):
    with pytest.raises(ValueError, match=f"need 0 < sigma_min < sigma_max < infinity, got {low} and {high}"):
        dj.variance_exploding_schedule(10, low, high)


@pytest.mark.parametrize("times", [[10.0, 5.0], [5.0, 5.5, 0.0], [5.0, 5.0, 0.0], [11.0, 0.0], [0.0]])
def test_times_that_do_not_go_down_to_0_are_named(times):
    with pytest.raises(ValueError, match="times must go strictly down to 0, from at most T = 10"):
        dj.ddim_table(dj.cosine_schedule(10), sampling_timesteps=np.array(times))


def test_deis_is_exact_for_eps_hat_linear_in_log_snr_but_in_its_first_and_last_step():
    schedule = PATHS["cosine"]
    times = dj.sampling_times(schedule, 6, "log_snr")
    signal, noise = schedule.at(times)

    def eps_hat(sigma):
        return 0.3 - 0.2 * np.log(sigma)

    def denoise(x_t, t):
        signal, noise = schedule.at(t)
        return (x_t - noise * eps_hat(noise / signal)) / signal

    path = walk(dj.deis_table(schedule, times, order=2), denoise, np.ones((1, 1)))
    for i in range(1, 5):
        integral, _ = scipy.integrate.quad(eps_hat, noise[i] / signal[i], noise[i + 1] / signal[i + 1])
        np.testing.assert_allclose(path[i + 1] / signal[i + 1] - path[i] / signal[i], integral, rtol=1e-9)


def test_one_step_may_be_given_by_its_times():
    one, other = (dj.ddim_table(dj.cosine_schedule(10), sampling_timesteps=steps) for steps in (np.array([10.0, 0.0]), 1))
    chex.assert_trees_all_equal(one, other)


@pytest.mark.parametrize("density", ["uniform", "log_normal", "logit_normal", "importance"])
@EVERY_PATH
def test_times_are_drawn_with_their_density(path, density):
    probabilities = time_density(PATHS[path], density)
    assert probabilities.shape == (T,)
    assert probabilities.sum() == pytest.approx(1)
    assert np.all(probabilities >= 0)
    n = 200_000
    t = np.asarray(draw_times(probabilities, (jnp.arange(n) + 0.5) / n))  # stratified: off by less than one draw a row
    assert t.min() >= 1
    assert t.max() <= T
    np.testing.assert_allclose(np.bincount(t, minlength=T + 1)[1:], n * probabilities, atol=3)
    if density == "log_normal":
        log_sigma_t = np.log(PATHS[path].sigma[t])
        assert np.median(log_sigma_t[np.isfinite(log_sigma_t)]) == pytest.approx(-1.2, abs=0.05)
        log_sigma = np.log(PATHS[path].sigma[1:])
        below = scipy.stats.norm.cdf((log_sigma[1:] + log_sigma[:-1]) / 2, -1.2, 1.2)  # Karras et al. 2022, table 1
        np.testing.assert_allclose(np.cumsum(probabilities)[:-1], below, atol=1e-12)
    if density == "logit_normal":
        # P(|N(0, 1)| < log 3) = 0.728, and half of the quarter that is uniform
        assert np.mean((t > 250) & (t <= 750)) == pytest.approx(0.75 * 0.728 + 0.125, abs=0.003)
        rows = np.arange(1, T)  # three quarters are logit-normal, one is uniform
        below = 0.75 * scipy.stats.norm.cdf(scipy.special.logit((rows + 0.5) / T)) + 0.25 * rows / T
        np.testing.assert_allclose(np.cumsum(probabilities)[:-1], below, atol=1e-12)


def test_weights_that_do_not_sum_to_one_are_proportions():
    t = draw_times(np.array([3.0, 1.0]), (jnp.arange(100) + 0.5) / 100)
    np.testing.assert_array_equal(np.bincount(t), [0, 75, 25])


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="spacing must be one of time, log_snr, karras, flow; got 'sigma'"):
        dj.sampling_times(PATHS["flow"], 10, "sigma")
    with pytest.raises(ValueError, match=r"density must be one of .* got 'beta'"):
        time_density(PATHS["flow"], "beta")
    with pytest.raises(ValueError, match="time must be one of t, log_snr; got 'sigma'"):
        dj.normalized(PATHS["flow"], lambda x_t, t: x_t, "sigma")
    with pytest.raises(ValueError, match="variable must be one of log_snr, signal; got 'x'"):
        dj.unipc_table(PATHS["flow"], variable="x")
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, got 4"):
        dj.unipc_table(PATHS["flow"], order=4)
    with pytest.raises(ValueError, match="churn must be at least 0, got -1"):
        dj.heun_table(PATHS["flow"], churn=-1.0)


def rising(*noise: float) -> dj.NoiseSchedule:
    return dj.schedule_from_columns(np.ones(len(noise)), np.array(noise))


def test_a_heun_step_that_divides_sigma_by_ten_or_more_is_not_corrected():
    np.testing.assert_array_equal(dj.heun_table(rising(0, 1, 10, 100.5)).t, [3, 2, 1])
    np.testing.assert_array_equal(dj.heun_table(rising(0, 1, 9.99, 100.5)).t, [3, 2, 1, 1])


def test_churn_reaches_both_ends_of_its_range_and_adds_its_noise_to_any_row():
    table = dj.heun_table(rising(0, 1, 10, 100.5), churn=3.0, churn_range=(10.0, 10.0))
    assert len(table.t) == 3
    assert table.t[1] == pytest.approx(2 + 10 * (2**0.5 - 1) / 90.5)  # where sigma is sqrt(2) times 10
    assert table.a[0] + table.b[0] == pytest.approx(1)
    assert np.hypot(100.5 * table.a[0], table.c[0]) == pytest.approx(10 * 2**0.5, rel=1e-5)


def test_stratified_times_halve_the_deviation_of_a_batchs_loss():
    """For data N(0, 0.3) and the best denoiser, in batches of 64: 0.47 times, and the same mean."""
    schedule, batch = dj.cosine_schedule(500), 64

    def predict(x_t, t):
        signal, noise = (look_up(column, t, x_t)[:, None] for column in schedule)
        return dj.convert(schedule, 0.3 * signal / (0.3 * signal**2 + noise**2) * x_t, x_t, t, "pred_x_0", "pred_eps")

    def loss(key, stratified):
        u_key, data_key, keys = jax.random.split(key, 3)
        spread = jax.random.uniform(u_key, (1,)) + jnp.arange(batch) / batch
        t = draw_times(time_density(schedule, "uniform"), spread % 1 if stratified else jax.random.uniform(u_key, (batch,)))
        x_0 = 0.3**0.5 * jax.random.normal(data_key, (batch, 16))
        return dj.diffusion_loss(schedule, predict, x_0, jax.random.split(keys, batch), "pred_eps", t=t).mean()

    keys = jax.random.split(jax.random.key(0), 600)
    plain, stratified = (np.asarray(jax.lax.map(partial(loss, stratified=way), keys)) for way in (False, True))
    assert stratified.std() < 0.6 * plain.std()
    assert abs(stratified.mean() - plain.mean()) < 4 * plain.std() / 600**0.5
