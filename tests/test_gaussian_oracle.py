"""For data N(mu, Sigma) the best denoiser is linear, so every sampler's output is Gaussian with a mean and a covariance that
follow an exact recursion. Here the recursion is written twice: from the implementation's tables, and without them."""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj

T = 500
TOLERANCE = 1e-10
MU = np.array([0.7, -0.4])
SIGMA = np.array([[0.9, 0.5], [0.5, 0.6]])
SAMPLERS = {
    **{name: partial(dj.ancestral_table, sigma_type=name) for name in ("upper_bound", "lower_bound", "zero")},
    **{f"ddim {eta}": partial(dj.ddim_table, eta=eta) for eta in (0.0, 0.5, 1.0)},
    **{f"dpm solver {eta}": partial(dj.dpm_solver_table, eta=eta) for eta in (0.0, 1.0)},
}
EVERY_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)


def table_and_schedule(name: str, schedule: str, S: int) -> tuple[dj.SamplerTable, dj.NoiseSchedule]:
    made = {"linear": dj.linear_schedule, "cosine": dj.cosine_schedule}[schedule](T)
    return SAMPLERS[name](made, sampling_timesteps=S), made


def linear_denoiser(a: float, s: float) -> tuple[np.ndarray, np.ndarray]:
    """G and g of E[x_0 | x_t] = G x_t + g, by the regression of x_0 on x_t = a x_0 + s eps."""
    G = a * SIGMA @ np.linalg.inv(a**2 * SIGMA + s**2 * np.eye(2))
    return G, MU - a * G @ MU


def moments_by_table(table: dj.SamplerTable, schedule: dj.NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x_0 by eq. 8 with the implementation's coefficients, over the state (x_t, y_1, y_2, y_3)."""
    I, O = np.eye(2), np.zeros((2, 2))  # noqa: E741
    mean, covariance = np.zeros(8), np.zeros((8, 8))
    covariance[:2, :2] = table.scale[0] ** 2 * I
    for t, _, a, b, c, _, d, e, f in zip(*table, strict=True):
        G, g = linear_denoiser(*schedule.at(t))
        M = np.block([[a * I + b * G, *(weight * I for weight in d)], [e * I + f * G, O, O, O], [O, I, O, O], [O, O, I, O]])
        mean = M @ mean + np.concatenate([b * g, f * g, np.zeros(4)])
        covariance = M @ covariance @ M.T
        covariance[:2, :2] += c**2 * I
    return mean[:2], covariance[:2, :2]


def log_alpha_bar_by_hand(schedule: str) -> list[float]:
    if schedule == "cosine":
        f = [2 * math.log(math.cos((t / T + 0.008) / 1.008 * math.pi / 2)) for t in range(T)]
        return [value - f[0] for value in f] + [f[-1] - f[0] + math.log(0.001)]
    logs = np.concatenate([[0], np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))])
    return [float(logs[2 * t]) for t in range(T + 1)]


def moments_by_hand(name: str, schedule: str, S: int) -> tuple[np.ndarray, np.ndarray]:
    """The same without the implementation: along each principal axis, where data are N(m, v), one number at a time.

    Ancestral steps combine two Gaussian messages about x_s, from x_0_hat and from x_t, by adding their precisions; DDIM steps
    are Song et al.'s eqs. 12 and 16 in eps_hat; DPM-Solver++(2M) steps are Lu et al.'s algorithm 2 in lambda, h and r, at
    eta = 1 in its SDE form, where x_0_hat's e^-h is e^-2h, and what e^-2h takes from the noise comes back fresh.
    """
    logs = log_alpha_bar_by_hand(schedule)
    times = [round(T * i / S) for i in range(S, -1, -1)]
    variances, axes = np.linalg.eigh(SIGMA)
    results = []
    for m, v in zip(axes.T @ MU, variances, strict=True):
        mean, covariance, h_before = np.zeros(2), np.diag([1.0, 0.0]), None  # of x_t and the x_0_hat before
        for t, s in pairwise(times):
            noise_t, noise_s = -math.expm1(logs[t]), -math.expm1(logs[s])
            signal_t, signal_s = math.exp(logs[t] / 2), math.exp(logs[s] / 2)
            step_signal, step_noise = math.exp((logs[t] - logs[s]) / 2), -math.expm1(logs[t] - logs[s])
            precision = 1 / v + signal_t**2 / noise_t  # of x_0 given x_t
            gain, offset = signal_t / noise_t / precision, m / v / precision
            on_before = 0.0
            if s == 0:
                on_x_t, on_x_0_hat, added = 0.0, 1.0, 0.0
            elif name.startswith("dpm solver"):
                h = 0.5 * (logs[s] - math.log(noise_s) - logs[t] + math.log(noise_t))
                r = h_before / h if h_before else math.inf
                eta = float(name.split()[-1])
                on_x_t, added = math.sqrt(noise_s / noise_t) * math.exp(-eta * h), -noise_s * math.expm1(-2 * eta * h)
                on_x_0_hat = -signal_s * math.expm1(-(1 + eta) * h) * (1 + 1 / (2 * r))
                on_before, h_before = signal_s * math.expm1(-(1 + eta) * h) / (2 * r), h
            elif name.startswith("ddim"):
                sigma_2 = float(name.split()[1]) ** 2 * noise_s / noise_t * step_noise
                on_eps_hat = math.sqrt(max(noise_s - sigma_2, 0))
                on_x_t = on_eps_hat / math.sqrt(noise_t)
                on_x_0_hat = signal_s - on_eps_hat * signal_t / math.sqrt(noise_t)
                added = sigma_2
            else:
                posterior = 1 / (1 / noise_s + step_signal**2 / step_noise)
                on_x_t, on_x_0_hat = posterior * step_signal / step_noise, posterior * signal_s / noise_s
                added = {"upper_bound": step_noise, "lower_bound": posterior, "zero": 0.0}[name]
            M = np.array([[on_x_t + on_x_0_hat * gain, on_before], [gain, 0]])
            mean = M @ mean + [on_x_0_hat * offset, offset]
            covariance = M @ covariance @ M.T + np.diag([added, 0])
        results.append((mean[0], covariance[0, 0]))
    means, variances = np.array(results).T
    return axes @ means, axes @ np.diag(variances) @ axes.T


@EVERY_SAMPLER
@pytest.mark.parametrize("S", [3, 10, 50, 500])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_tables_give_the_moments_derived_by_hand(name, schedule, S):
    mean, covariance = moments_by_table(*table_and_schedule(name, schedule, S))
    by_hand = moments_by_hand(name, schedule, S)
    np.testing.assert_allclose(mean, by_hand[0], atol=TOLERANCE)
    np.testing.assert_allclose(covariance, by_hand[1], atol=TOLERANCE)


@EVERY_SAMPLER
@pytest.mark.parametrize("row", [0, 4, 8, 9])
def test_one_coefficient_off_by_two_percent_is_seen(name, row):
    table, schedule = table_and_schedule(name, "cosine", 10)
    right = np.vstack(moments_by_hand(name, "cosine", 10))
    for column in "abcd":
        wrong = getattr(table, column).copy()
        wrong[row] *= 1.02
        moved = np.abs(np.vstack(moments_by_table(table._replace(**{column: wrong}), schedule)) - right).max()
        assert moved > TOLERANCE or not np.any(getattr(table, column)[row])


@pytest.fixture(scope="module")
def draw():
    """The real `sample` with the best denoiser, 8 keys of 4000 points each; compiled once."""
    schedule = dj.cosine_schedule(T)
    best = [linear_denoiser(schedule.signal[t], schedule.noise[t]) for t in range(1, T + 1)]
    G, g = (jnp.asarray(np.stack(part), jnp.float32) for part in zip(*best, strict=True))

    def denoise(x_t, t):
        row = t.astype(int) - 1
        return jnp.einsum("bij,bnj->bni", G[row], x_t) + g[row][:, None, :]

    optimized = {"xla_backend_optimization_level": 2}
    return jax.jit(lambda table, keys: dj.sample(denoise, table, keys, (4000, 2)), compiler_options=optimized)


@EVERY_SAMPLER
@pytest.mark.parametrize("S", [3, 50])
def test_the_real_sampler_agrees_within_its_standard_error(draw, name, S):
    table, _ = table_and_schedule(name, "cosine", S)
    x = np.asarray(draw(dj.padded(table, 50), jax.random.split(jax.random.key(S), 8)), np.float64).reshape(-1, 2)
    mean, covariance = moments_by_hand(name, "cosine", S)
    n, deviation = len(x), np.sqrt(np.diag(covariance))
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4.5 * deviation / n**0.5)
    spread = np.sqrt((covariance**2 + np.outer(deviation, deviation) ** 2) / n)  # of a Gaussian's sample covariance
    np.testing.assert_array_less(np.abs(np.cov(x.T) - covariance), 4.5 * spread)
