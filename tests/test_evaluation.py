import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats

import diffusion_jax as dj
from diffusion_jax import evaluation

RNG = np.random.default_rng(0)
REAL, GENERATED = RNG.normal(size=(300, 5)), RNG.normal(size=(200, 5)) @ RNG.normal(size=(5, 5)) + 0.3


def test_the_frechet_distance_is_the_formula_by_scipy():
    c_1, c_2 = np.cov(REAL.T), np.cov(GENERATED.T)
    expected = np.sum((REAL.mean(0) - GENERATED.mean(0)) ** 2) + np.trace(c_1 + c_2 - 2 * scipy.linalg.sqrtm(c_1 @ c_2).real)
    np.testing.assert_allclose(evaluation.frechet_distance(REAL, GENERATED), expected, rtol=1e-8)


def test_the_frechet_distance_of_a_shift_is_its_square_and_of_a_scale_that_of_the_deviations():
    np.testing.assert_allclose(evaluation.frechet_distance(REAL, REAL + 2.0), 5 * 4.0, rtol=1e-9)
    deviations = np.sqrt(np.linalg.eigvalsh(np.cov(REAL.T)))
    np.testing.assert_allclose(
        evaluation.frechet_distance(REAL, 3 * (REAL - REAL.mean(0)) + REAL.mean(0)), 4 * (deviations**2).sum()
    )
    np.testing.assert_allclose(evaluation.frechet_distance(REAL, REAL), 0, atol=1e-9)


def test_features_that_are_constant_are_no_trouble():
    real, generated = (np.concatenate([x, np.ones((len(x), 2))], axis=1) for x in (REAL, GENERATED))
    expected = evaluation.frechet_distance(REAL, GENERATED)
    np.testing.assert_allclose(evaluation.frechet_distance(real, generated), expected, rtol=1e-6)


def test_the_kernel_distance_is_its_definition(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 64)
    kernel = lambda x, y: (np.dot(x, y) / 5 + 1) ** 3  # noqa: E731
    mean = lambda values: np.mean(list(values))  # noqa: E731
    x, y = REAL[:70], GENERATED[:40]
    expected = (
        mean(kernel(x[i], x[j]) for i in range(70) for j in range(70) if i != j)
        + mean(kernel(y[i], y[j]) for i in range(40) for j in range(40) if i != j)
        - 2 * mean(kernel(a, b) for a in x for b in y)
    )
    np.testing.assert_allclose(evaluation.kernel_distance(x, y), expected, rtol=1e-9)


def test_precision_and_recall_are_their_definition(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 64)

    def share(centres, points):
        tree = scipy.spatial.cKDTree(centres)
        radii = tree.query(centres, 4)[0][:, -1]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    expected = share(REAL, GENERATED), share(GENERATED, REAL)
    np.testing.assert_allclose(evaluation.precision_and_recall(REAL, GENERATED), expected)
    assert evaluation.precision_and_recall(REAL, REAL) == (1.0, 1.0)
    assert evaluation.precision_and_recall(REAL, REAL + 100) == (0.0, 0.0)


def test_the_nearest_are_those_of_a_tree(monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK", 64)
    expected = scipy.spatial.cKDTree(GENERATED).query(REAL, 3)[0] ** 2
    np.testing.assert_allclose(evaluation.nearest_squared_distances(REAL, GENERATED, 3), expected, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.004, 0.05, 1.0])
def test_the_mass_of_a_level_is_that_of_scipy(sigma):
    x, mean = (a.ravel() for a in np.meshgrid(np.arange(256) / 127.5 - 1, np.linspace(-1, 1, 33)))
    upper = np.where(x > 0.999, np.inf, (x + 1 / 255 - mean) / sigma)
    lower = np.where(x < -0.999, -np.inf, (x - 1 / 255 - mean) / sigma)
    flip = lower > 0
    expected = scipy.stats.norm.logcdf(np.where(flip, -lower, upper)) + np.log1p(
        -np.exp(scipy.stats.norm.logcdf(np.where(flip, -upper, lower)) - scipy.stats.norm.logcdf(np.where(flip, -lower, upper)))
    )
    np.testing.assert_allclose(
        evaluation._log_mass(jnp.array(x), jnp.array(mean), jnp.float32(sigma)), expected, rtol=2e-3, atol=1e-3
    )
    total = np.exp(evaluation._log_mass(jnp.array(x), jnp.array(mean), jnp.float32(sigma))).reshape(33, 256).sum(1)
    np.testing.assert_allclose(total, 1, atol=1e-3)


@pytest.mark.parametrize("sigma_type", ["upper_bound", "lower_bound"])
def test_each_term_is_the_divergence_by_quadrature(sigma_type):
    """Of two normal densities on a line, that a posterior of eq. 10 and the same with x_0_hat for x_0 have."""
    schedule = dj.cosine_schedule(8)
    x_0, x_0_hat = jnp.array([[0.2], [-0.6]]), jnp.array([[0.5], [-0.5]])
    for t in range(2, 9):
        times = jnp.full(2, t)
        bits = evaluation.bound_bits(schedule, lambda x, _: x_0_hat, x_0, times, jnp.array([[0.3], [1.0]]), sigma_type)
        x_t = dj.q_sample(schedule, x_0, times, jnp.array([[0.3], [1.0]]))
        (mean_q, w), (mean_p, _) = dj.posterior(schedule, x_0, x_t, times), dj.posterior(schedule, x_0_hat, x_t, times)
        variance = schedule.beta[t] if sigma_type == "upper_bound" else float(w[0])
        for i in range(2):
            q = scipy.stats.norm(float(mean_q[i, 0]), float(w[0]) ** 0.5)
            p = scipy.stats.norm(float(mean_p[i, 0]), variance**0.5)
            expected = q.expect(lambda x, p=p, q=q: (q.logpdf(x) - p.logpdf(x)) / np.log(2))
            np.testing.assert_allclose(bits[i], expected, rtol=1e-3, atol=1e-5)


def test_the_prior_term_is_the_divergence_of_what_is_left():
    schedule = dj.schedule_from_beta(np.array([0.5, 0.5]))
    x_0 = jnp.array([[0.5, -1.0]])
    expected = 0
    for value in (0.5, -1.0):
        q, p = scipy.stats.norm(value * 0.25**0.5, 0.75**0.5), scipy.stats.norm()
        expected += q.expect(lambda x, p=p, q=q: (q.logpdf(x) - p.logpdf(x)) / np.log(2))
    np.testing.assert_allclose(evaluation.prior_bits(schedule, x_0), [expected], rtol=1e-5)


@pytest.mark.parametrize(("sigma_type", "slack"), [("lower_bound", 0.03), ("upper_bound", 0.5)])
def test_the_bound_is_just_above_the_entropy_of_data_that_is_known(sigma_type, slack):
    """Pixels that are black or white with chances 1 and 3 of 4 hold 0.811 bits; their best denoiser is Bayes' rule."""
    schedule, entropy = dj.schedule_from_beta(np.geomspace(1e-6, 0.2, 400)), 0.25 * 2 + 0.75 * np.log2(4 / 3)

    def denoise(x_t, t):
        a, s = (jnp.asarray(column)[t][:, None] for column in (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar))
        return jnp.tanh(a * x_t / s**2 + jnp.log(3.0) / 2)

    key, white_key = jax.random.split(jax.random.key(0))
    x_0 = jnp.where(jax.random.bernoulli(white_key, 0.75, (400, 5_000)), 1.0, -1.0)
    eps = jax.random.normal(key, x_0.shape)
    terms = evaluation.bound_bits(schedule, denoise, x_0, jnp.arange(1, 401), eps, sigma_type)
    bits = float(terms.sum() + evaluation.prior_bits(schedule, x_0).mean()) / 5_000
    assert entropy - 0.01 < bits < entropy + slack


def test_a_variance_without_a_likelihood_is_refused():
    with pytest.raises(ValueError, match="upper_bound or lower_bound for a likelihood, got 'zero'"):
        evaluation.bound_bits(
            dj.cosine_schedule(3), lambda x, t: x, jnp.zeros((1, 2)), jnp.array([1]), jnp.zeros((1, 2)), "zero"
        )
