"""Data from a mixture of two Gaussians on a line, whose best denoiser, distribution and probability flow have closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import diffusion_jax as dj
from diffusion_jax.diffusion import look_up

WEIGHTS, MEANS, VARIANCES = (0.3, 0.7), (-1.2, 0.6), (0.35**2, 0.5**2)
SAMPLERS = {
    "upper_bound": dj.ancestral_table,
    "lower_bound": partial(dj.ancestral_table, sigma_type="lower_bound"),
    "ddim 0": dj.ddim_table,
    "ddim 0.5": partial(dj.ddim_table, eta=0.5),
    "dpm solver": dj.dpm_solver_table,
    "dpm solver sde": partial(dj.dpm_solver_table, eta=1.0),
}
BINS, DRAWS, LEVEL = 20, 200_000, 1e-4
CRITICAL = scipy.stats.chi2.isf(LEVEL, BINS - 1)


def best_denoiser(schedule: dj.NoiseSchedule):
    """E[x_0 | x_t]: the components' linear denoisers, weighted by their shares in the density of x_t."""

    def denoise(x_t, t):
        a, s = (look_up(column, t, x_t)[:, None] for column in schedule)
        logits, means = [], []
        for weight, mean, variance in zip(WEIGHTS, MEANS, VARIANCES, strict=True):
            total = a**2 * variance + s**2
            logits.append(jnp.log(weight) - jnp.log(total) / 2 - (x_t - a * mean) ** 2 / (2 * total))
            means.append(mean + a * variance / total * (x_t - a * mean))
        shares = jax.nn.softmax(jnp.stack(logits), axis=0)
        return (shares * jnp.stack(means)).sum(0)

    return denoise


def distribution(x: np.ndarray) -> np.ndarray:
    """P(x_0 <= x) of the data."""
    parts = zip(WEIGHTS, MEANS, VARIANCES, strict=True)
    return sum(weight * scipy.stats.norm.cdf(x, mean, var**0.5) for weight, mean, var in parts)


def chi_square(x: np.ndarray) -> float:
    """Pearson's statistic of x in bins that each hold the same share of the data."""
    bins = np.clip(np.nan_to_num(distribution(x.ravel())) * BINS, 0, BINS - 1).astype(int)
    counts, expected = np.bincount(bins, minlength=BINS), x.size / BINS
    return float(((counts - expected) ** 2).sum() / expected)


@pytest.fixture(scope="module")
def statistic():
    """statistic(table) of the real `sample` with the best denoiser, T = 1000."""
    denoise = best_denoiser(dj.cosine_schedule(1000))
    optimized = {"xla_backend_optimization_level": 2}  # worth its time here, unlike in the rest of the suite
    draw = jax.jit(lambda table, keys: dj.sample(denoise, table, keys, (DRAWS // 8,)), compiler_options=optimized)
    return lambda table: chi_square(np.asarray(draw(table, jax.random.split(jax.random.key(3), 8)), np.float64))


def test_the_statistic_sees_two_percent():
    """Samples that are 2 percent too wide, or shifted by 2 percent of the data's deviation, are rejected almost surely."""
    centres = (np.arange(1, BINS) / BINS)[:, None]
    grid = np.linspace(-6, 6, 200_001)
    edges = np.interp(centres.ravel(), distribution(grid), grid)
    mean = np.dot(WEIGHTS, MEANS)
    deviation = (np.dot(WEIGHTS, np.array(MEANS) ** 2 + VARIANCES) - mean**2) ** 0.5
    for wrong in (distribution(edges / 1.02), distribution(edges - 0.02 * deviation)):
        shares = np.diff(wrong, prepend=0, append=1)
        noncentrality = DRAWS * BINS * ((shares - 1 / BINS) ** 2).sum()
        assert scipy.stats.ncx2.sf(CRITICAL, BINS - 1, noncentrality) > 0.99


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_the_steps_give_the_data(statistic, name):
    assert statistic(SAMPLERS[name](dj.cosine_schedule(1000))) < CRITICAL


@pytest.mark.parametrize("name", SAMPLERS)
def test_more_steps_come_closer_to_the_data(statistic, name):
    distances = [statistic(SAMPLERS[name](dj.cosine_schedule(1000), sampling_timesteps=S)) for S in (3, 10, 50)]
    assert distances[0] > 2 * distances[1] > 4 * distances[2]


@pytest.mark.parametrize(("scale", "is_right"), [(1.0, True), (1.02, False)])
def test_one_call_of_the_exact_average_velocity_gives_the_data(scale, is_right):
    """From t = T on rectified flow, where x_T is normal, every point keeps its quantile (eq. 20)."""
    flow, grid = dj.flow_schedule(8), np.linspace(-4, 4, 8001)

    def network(x_t, t, s):
        x_0 = jnp.interp(jax.scipy.stats.norm.cdf(x_t), distribution(grid), grid)
        return jnp.where(((t == 8) & (s == 0))[:, None], scale * (x_t - x_0), jnp.nan)

    table, keys = dj.ddim_table(flow, 0.0, 1), jax.random.split(jax.random.key(3), 8)
    denoise = dj.make_denoiser(flow, dj.jumping(network, table), "pred_u")
    samples = dj.sample(denoise, table, keys, (DRAWS // 8,))
    assert (chi_square(np.asarray(samples, np.float64)) < CRITICAL) == is_right
