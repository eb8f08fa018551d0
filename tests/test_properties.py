"""Properties that the tables must have for every schedule, in float64, over schedules that hypothesis chooses."""

import math
from decimal import Decimal, localcontext
from functools import cache, partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ho import alpha_bar_of, beta_of
from hypothesis import given

import diffusion_jax as dj
from diffusion_jax.diffusion import posterior_coefficients
from diffusion_jax.sampling import strided_timesteps

LENGTHS = st.integers(1, 4000)
BETAS = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-7, 0.9999))
SCHEDULES = st.one_of(LENGTHS.map(dj.linear_schedule), LENGTHS.map(dj.cosine_schedule), BETAS.map(dj.schedule_from_beta))


@st.composite
def schedules_and_times(draw, count):
    """A schedule and `count` of its timesteps, distinct and decreasing."""
    schedule = draw(SCHEDULES.filter(lambda schedule: schedule.num_timesteps >= count))
    times = draw(st.sets(st.integers(0, schedule.num_timesteps), min_size=count, max_size=count))
    return schedule, sorted(times, reverse=True)


@given(BETAS)
def test_alpha_bar_is_the_product_of_one_minus_beta(beta):
    schedule = dj.schedule_from_beta(beta)
    np.testing.assert_allclose(beta_of(schedule)[1:], beta, atol=1e-13)
    np.testing.assert_allclose(
        alpha_bar_of(schedule)[1:], [math.prod(1 - beta[:t]) for t in range(1, len(beta) + 1)], rtol=1e-12
    )


@cache
def exact_noise(name: str, T: int) -> list[float]:
    """1 - alpha_bar_t for t in 1..T by another route: products and logarithms of 40 digits, or a trigonometric identity."""
    if name == "cosine":  # f_0 - f_t = cos^2 u_0 - cos^2 u_t = sin(u_t - u_0) sin(u_t + u_0); only beta_T is cut
        u = [math.pi / 2 * (t / T + 0.008) / 1.008 for t in range(T + 1)]
        noise = [math.sin(u[t] - u[0]) * math.sin(u[t] + u[0]) / math.cos(u[0]) ** 2 for t in range(1, T)]
        return [*noise, 1 - 0.001 * (math.cos(u[T - 1]) / math.cos(u[0])) ** 2]
    with localcontext() as context:
        context.prec = 40
        logs = [Decimal(0)]
        for i in range(1000):
            logs.append(logs[-1] + (1 - Decimal("1e-4") - i * (Decimal("0.02") - Decimal("1e-4")) / 999).ln())
        noise = []
        for t in range(1, T + 1):
            whole, part = divmod(1000 * t, T)
            after = logs[min(whole + 1, 1000)]
            noise.append(float(1 - (logs[whole] + (after - logs[whole]) * part / T).exp()))
    return noise


@pytest.mark.parametrize("T", [1, 10, 137, 500, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_float32_tables_keep_six_digits(name, T):
    schedule = {"linear": dj.linear_schedule, "cosine": dj.cosine_schedule}[name](T)
    noise = np.array(exact_noise(name, T))
    np.testing.assert_allclose(schedule.noise[1:], np.sqrt(noise), rtol=1e-13 if name == "linear" else 1e-11)
    on_device = jax.tree.map(jnp.asarray, schedule)
    assert {table.dtype.name for table in on_device} == {"float32"}
    np.testing.assert_allclose(on_device.noise[1:], np.sqrt(noise), rtol=1e-6)
    np.testing.assert_allclose(on_device.signal[1:-1], np.sqrt(1 - noise[:-1]), rtol=1e-6)
    forward = posterior_coefficients(schedule, np.arange(1, T + 1), np.arange(T))[3]  # beta_t
    np.testing.assert_allclose(np.float32(forward[1:-1]), (np.diff(noise) / (1 - noise[:-1]))[:-1], rtol=1e-6)


def grid_moments(log_density, centre: float, width: float) -> tuple[float, float]:
    """Mean and variance of a density given up to its scale, by sums over a grid that is narrowed three times."""
    for _ in range(4):
        x = np.linspace(centre - 12 * width, centre + 12 * width, 40_001)
        weights = np.exp(log_density(x) - log_density(x).max())
        weights /= weights.sum()
        centre = float(weights @ x)
        width = max(math.sqrt(weights @ (x - centre) ** 2), 2 * (x[1] - x[0]))
    return centre, width**2


@given(schedules_and_times(2), st.floats(-3, 3), st.floats(-3, 3))
def test_the_posterior_is_bayes_rule(schedule_and_times, x_0, eps):
    schedule, (t, s) = schedule_and_times
    k, m, w, _ = (float(c[0]) for c in posterior_coefficients(schedule, np.array([t]), np.array([s])))
    if s == 0:
        assert (k, np.float32(m), w) == (0, 1, 0)
        return
    survives = np.prod(1 - beta_of(schedule)[s + 1 : t + 1])  # of x_s in x_t
    var_s, var_t = 1 - np.prod(1 - beta_of(schedule)[1 : s + 1]), 1 - survives
    x_t = math.sqrt(survives * (1 - var_s)) * x_0 + math.sqrt(1 - survives * (1 - var_s)) * eps

    def log_density(x_s):
        prior = (x_s - math.sqrt(1 - var_s) * x_0) ** 2 / var_s
        return -0.5 * (prior + (x_t - math.sqrt(survives) * x_s) ** 2 / var_t)

    mean, variance = grid_moments(log_density, math.sqrt(1 - var_s) * x_0, math.sqrt(var_s))
    assert k * x_t + m * x_0 == pytest.approx(mean, abs=1e-6 * math.sqrt(variance) + 1e-9)
    assert w == pytest.approx(variance, rel=1e-6)


@given(schedules_and_times(3))
def test_two_posterior_jumps_are_one(schedule_and_times):
    """The forward process is Markov, so q(x_r | x_t, x_0) is q(x_r | x_s, x_0) averaged over q(x_s | x_t, x_0)."""
    schedule, times = schedule_and_times
    t, s, r = (np.array([time]) for time in times)
    k, m, w, _ = posterior_coefficients(schedule, t, r)
    k_1, m_1, w_1, _ = posterior_coefficients(schedule, t, s)
    k_2, m_2, w_2, _ = posterior_coefficients(schedule, s, r)
    np.testing.assert_allclose(k_2 * k_1, k, rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(k_2 * m_1 + m_2, m, rtol=1e-7)
    np.testing.assert_allclose(k_2**2 * w_1 + w_2, w, rtol=1e-7, atol=1e-16)


TABLES = {
    **{name: partial(dj.ancestral_table, sigma_type=name) for name in ("upper_bound", "lower_bound", "zero", "learned")},
    **{f"ddim {eta}": partial(dj.ddim_table, eta=eta) for eta in (0.0, 0.3, 1.0)},
    **{f"dpm {order} {eta}": partial(dj.dpm_solver_table, eta=eta, order=order) for eta in (0.0, 0.5, 1.0) for order in (2, 3)},
    **{f"unipc {order}": partial(dj.unipc_table, order=order) for order in (2, 3)},
    "unipc in the signal": partial(dj.unipc_table, variable="signal"),
    "deis": dj.deis_table,
}


@given(SCHEDULES, st.sampled_from(sorted(TABLES)), st.data())
def test_every_sampler_table_is_finite_and_ends_at_x_0_hat(schedule, name, data):
    S = data.draw(st.integers(1, schedule.num_timesteps))
    table = TABLES[name](schedule, sampling_timesteps=S)
    assert all(len(column) == S and np.all(np.isfinite(column)) for column in table)
    assert np.all(table.c >= 0)
    np.testing.assert_array_equal(table.t, strided_timesteps(schedule.num_timesteps, S)[:-1])
    last = table.b[-1] + table.d[-1].sum()
    assert (table.a[-1], np.float32(last), table.c[-1]) == (0, 1, 0)
