"""The exact likelihood, by the probability flow, of data whose density is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import diffusion_jax as dj
from diffusion_jax.diffusion import look_up

T = 500
PATHS = {
    "cosine": dj.cosine_schedule(T),
    "flow": dj.flow_schedule(T),
    "exploding": dj.variance_exploding_schedule(T),
}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)
MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[0.8, 0.5], [0.5, 0.6]])
WEIGHTS, CENTRES, DEVIATIONS = np.array([0.3, 0.7]), np.array([-1.2, 0.6]), np.array([0.35, 0.5])
KEYS = jax.random.split(jax.random.key(0), 6)


def columns(schedule, t, x_t):
    return (look_up(column, t, x_t)[:, None] for column in schedule)


def gaussian(schedule):
    """E[x_0 | x_t] for data N(MEAN, COVARIANCE), by the eigenvectors of the covariance."""
    values, axes = (jnp.asarray(part, jnp.float32) for part in np.linalg.eigh(COVARIANCE))
    mean = jnp.asarray(MEAN, jnp.float32)[None]

    def denoise(x_t, t):
        signal, noise = columns(schedule, t, x_t)
        gains = signal * values[None] / (signal**2 * values[None] + noise**2)
        return mean + ((x_t - signal * mean) @ axes * gains) @ axes.T

    return denoise


def mixture(schedule):
    """E[x_0 | x_t] for data of the mixture in each coordinate."""

    def denoise(x_t, t):
        signal, noise = (column[..., None] for column in columns(schedule, t, x_t))
        weights, centres, variances = (jnp.asarray(a, jnp.float32)[None, None] for a in (WEIGHTS, CENTRES, DEVIATIONS**2))
        total = signal**2 * variances + noise**2
        difference = x_t[..., None] - signal * centres
        logits = jnp.log(weights) - jnp.log(total) / 2 - difference**2 / (2 * total)
        return (jax.nn.softmax(logits, -1) * (centres + signal * variances / total * difference)).sum(-1)

    return denoise


@EVERY_PATH
def test_the_density_of_a_gaussian(path):
    """With the noise of t = 1 added, as the density is."""
    schedule = PATHS[path]
    x_0 = jnp.asarray(np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 6), jnp.float32)
    log_density = dj.flow_log_density(schedule, gaussian(schedule), x_0, KEYS, 256)
    widened = scipy.stats.multivariate_normal(MEAN, COVARIANCE + schedule.sigma[1] ** 2 * np.eye(2))
    atol = 0.01 if path == "exploding" else 4e-3  # there x_T is N(mean, .) with a mean that sigma_T = 80 does not quite hide
    np.testing.assert_allclose(log_density, widened.logpdf(x_0), atol=atol)


@EVERY_PATH
def test_the_density_of_a_mixture_and_its_convergence(path):
    schedule, x_0 = PATHS[path], jnp.asarray(np.random.default_rng(1).normal(0, 1, (6, 3)), jnp.float32)
    total = DEVIATIONS**2 + schedule.sigma[1] ** 2
    exact = np.log((WEIGHTS * scipy.stats.norm.pdf(x_0[..., None], CENTRES, total**0.5)).sum(-1)).sum(1)
    errors = [
        np.abs(dj.flow_log_density(schedule, mixture(schedule), x_0, KEYS, steps) - exact).max() for steps in (16, 32, 256)
    ]
    assert errors[2] < 0.01
    assert errors[0] > 3 * errors[1]


def test_random_signs_estimate_the_trace_without_bias_from_each_examples_key():
    schedule, many = PATHS["cosine"], jax.random.split(jax.random.key(2), 400)
    x_0 = jnp.array([[0.9, -0.4]], jnp.float32)
    exact = dj.flow_log_density(schedule, gaussian(schedule), x_0, KEYS[:1], 32)
    estimate = lambda keys, probes: dj.flow_log_density(  # noqa: E731
        schedule, gaussian(schedule), jnp.broadcast_to(x_0, (len(keys), 2)), keys, 32, probes
    )
    drawn = np.asarray(estimate(many, 1))
    assert drawn.std() > 0.01
    assert abs(drawn.mean() - exact[0]) < 4 * drawn.std() / 20
    np.testing.assert_allclose(drawn[3:5], estimate(many[3:5], 1), rtol=1e-5)
    assert np.asarray(estimate(many, 8)).std() < 0.5 * drawn.std()


@EVERY_PATH
def test_bits_of_levels_are_at_least_their_entropy_and_little_more(path):
    schedule, n, deviation = PATHS[path], 2000, 0.05
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    mass = np.diff(scipy.stats.norm.cdf(edges, 0.1, deviation))
    entropy = -(mass * np.log2(np.maximum(mass, 1e-30))).sum()
    levels = np.clip(np.rint((np.random.default_rng(3).normal(0.1, deviation, (n, 1)) + 1) * 127.5), 0, 255)
    x_0, keys = jnp.asarray(levels / 127.5 - 1, jnp.float32), jax.random.split(jax.random.key(4), n)

    def denoise(x_t, t):
        signal, noise = columns(schedule, t, x_t)
        return 0.1 + signal * deviation**2 / (signal**2 * deviation**2 + noise**2) * (x_t - signal * 0.1)

    bits = np.asarray(dj.flow_bits(schedule, denoise, x_0, keys, 128), np.float64)
    error = 4 * bits.std() / n**0.5
    assert -error - 0.01 < bits.mean() - entropy < error + 0.2


@EVERY_PATH
def test_what_is_certain_costs_next_to_nothing(path):
    """Pixels that are always black: evenly spread over its level, each would cost 1.6 bits under the cosine schedule."""
    x_0, keys = -jnp.ones((500, 2)), jax.random.split(jax.random.key(5), 500)
    bits = np.asarray(dj.flow_bits(PATHS[path], lambda x_t, t: jnp.full_like(x_t, -1.0), x_0, keys, 64), np.float64) / 2
    assert -4 * bits.std() / 500**0.5 - 0.01 < bits.mean() < 0.6


def test_a_flow_that_has_no_length_is_refused():
    x_0 = jnp.zeros((6, 1))
    for schedule, steps in ((dj.flow_schedule(2), 8), (dj.cosine_schedule(1), 8), (PATHS["cosine"], 0)):
        with pytest.raises(ValueError, match="two rows with signal and noise and at least one step"):
            dj.flow_log_density(schedule, lambda x_t, t: x_t, x_0, KEYS, steps)


def test_two_rows_with_signal_and_noise_are_enough():
    schedule, x_0 = dj.schedule_from_columns(np.array([1.0, 0.5, 0.25]), np.array([0.0, 0.25, 2])), jnp.array([[0.7]])

    def denoise(x_t, t):
        """Of data N(0, 1)."""
        signal, noise = (look_up(column, t, x_t)[:, None] for column in schedule)
        return x_t * signal / (signal**2 + noise**2)

    density = dj.flow_log_density(schedule, denoise, x_0, KEYS[:1], 64)
    np.testing.assert_allclose(density, scipy.stats.norm.logpdf(0.7, scale=1.25**0.5), atol=1e-3)
    assert np.isfinite(dj.flow_log_density(schedule, denoise, x_0, KEYS[:1], 1)).all()
