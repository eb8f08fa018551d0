import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ho import alpha_bar_of, beta_of

import diffusion_jax as dj
from diffusion_jax import likelihood
from diffusion_jax.losses import draw_time_and_noise, time_density


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
        likelihood._log_mass(jnp.array(x), jnp.array(mean), jnp.float32(sigma)), expected, rtol=2e-3, atol=1e-3
    )
    total = np.exp(likelihood._log_mass(jnp.array(x), jnp.array(mean), jnp.float32(sigma))).reshape(33, 256).sum(1)
    np.testing.assert_allclose(total, 1, atol=1e-3)


@pytest.mark.parametrize("sigma_type", ["upper_bound", "lower_bound", "fixed_large"])
def test_each_term_is_the_divergence_by_quadrature(sigma_type):
    """Of two normal densities on a line, that a posterior of eq. 7 and the same with x_0_hat for x_0 have."""
    schedule = dj.cosine_schedule(8)
    x_0, x_0_hat = jnp.array([[0.2], [-0.6]]), jnp.array([[0.5], [-0.5]])
    for t in range(2, 9):
        times = jnp.full(2, t)
        bits = dj.bound_bits(schedule, lambda x, _: x_0_hat, x_0, times, jnp.array([[0.3], [1.0]]), sigma_type)
        x_t = dj.q_sample(schedule, x_0, times, jnp.array([[0.3], [1.0]]))
        (mean_q, w), (mean_p, _) = dj.posterior(schedule, x_0, x_t, times), dj.posterior(schedule, x_0_hat, x_t, times)
        variance = float(w[0]) if sigma_type == "lower_bound" else beta_of(schedule)[t]
        for i in range(2):
            q = scipy.stats.norm(float(mean_q[i, 0]), float(w[0]) ** 0.5)
            p = scipy.stats.norm(float(mean_p[i, 0]), variance**0.5)
            expected = q.expect(lambda x, p=p, q=q: (q.logpdf(x) - p.logpdf(x)) / np.log(2))
            np.testing.assert_allclose(bits[i], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("signal", "noise"), [(0.5, 0.75**0.5), (0.5, 2.0)])
def test_the_prior_term_is_the_divergence_of_what_is_left(signal, noise):
    schedule = dj.schedule_from_columns(np.array([1.0, signal]), np.array([0.0, noise]))
    x_0 = jnp.array([[0.5, -1.0]])
    expected = 0
    for value in (0.5, -1.0):
        q, p = scipy.stats.norm(value * signal, noise), scipy.stats.norm(0, (signal**2 + noise**2) ** 0.5)
        expected += q.expect(lambda x, p=p, q=q: (q.logpdf(x) - p.logpdf(x)) / np.log(2))
    np.testing.assert_allclose(dj.prior_bits(schedule, x_0), [expected], rtol=1e-5)


@pytest.mark.parametrize(("sigma_type", "slack"), [("lower_bound", 0.03), ("upper_bound", 0.5)])
def test_the_bound_is_just_above_the_entropy_of_data_that_is_known(sigma_type, slack):
    """Pixels that are black or white with chances 1 and 3 of 4 hold 0.811 bits; their best denoiser is Bayes' rule."""
    schedule, entropy = dj.schedule_from_beta(np.geomspace(1e-6, 0.2, 400)), 0.25 * 2 + 0.75 * np.log2(4 / 3)

    def denoise(x_t, t):
        a, s = (jnp.asarray(column)[t][:, None] for column in (schedule.signal, schedule.noise))
        return jnp.tanh(a * x_t / s**2 + jnp.log(3.0) / 2)

    key, white_key = jax.random.split(jax.random.key(0))
    x_0 = jnp.where(jax.random.bernoulli(white_key, 0.75, (400, 5_000)), 1.0, -1.0)
    eps = jax.random.normal(key, x_0.shape)
    terms = dj.bound_bits(schedule, denoise, x_0, jnp.arange(1, 401), eps, sigma_type)
    bits = float(terms.sum() + dj.prior_bits(schedule, x_0).mean()) / 5_000
    assert entropy - 0.01 < bits < entropy + slack


def test_a_learned_variance_lies_between_its_bounds_in_log_space():
    schedule, x_0, x_0_hat, eps = dj.cosine_schedule(8), *(jnp.array([[value]]) for value in (0.2, 0.5, 0.3))
    denoise = lambda f: lambda *_: (x_0_hat, jnp.full((1, 1), f))  # noqa: E731
    for t in range(1, 9):
        bits = [dj.bound_bits(schedule, denoise(f), x_0, jnp.array([t]), eps, "learned") for f in (0.0, 0.5, 1.0)]
        fixed = (
            dj.bound_bits(schedule, lambda *_: x_0_hat, x_0, jnp.array([t]), eps, s) for s in ("lower_bound", "upper_bound")
        )
        np.testing.assert_allclose([bits[0], bits[2]], list(fixed), rtol=1e-5)
        if t > 1:
            _, w = dj.posterior(schedule, x_0, x_0, jnp.array([t]))
            mean_q, mean_p = (dj.posterior(schedule, x, x_0, jnp.array([t]))[0].item() for x in (x_0, x_0_hat))
            c_2 = np.sqrt(beta_of(schedule)[t] * w.item())
            expected = (np.log(c_2 / w.item()) + (w.item() + (mean_q - mean_p) ** 2) / c_2 - 1) / 2 / np.log(2)
            np.testing.assert_allclose(bits[1], [expected], rtol=2e-4)


def test_the_bound_is_least_at_the_variance_that_the_error_has():
    """For data N(0, v), c^2 = w + m^2 Var[x_0 | x_t] (Bao et al. 2022, eq. 8); Gauss-Hermite quadrature is exact here."""
    schedule, v = dj.cosine_schedule(8), 0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    normal = [part.ravel() for part in np.meshgrid(nodes, nodes)]
    weights = np.outer(weights, weights).ravel() / (2 * np.pi)
    with jax.enable_x64(True):
        x_0, eps = (jnp.asarray(part)[:, None] for part in (v**0.5 * normal[0], normal[1]))
        for t in range(2, 9):
            a, s = schedule.signal[t], schedule.noise[t]
            times = jnp.full(len(weights), t)
            gain = a * v / (a**2 * v + s**2)
            alpha_bar = alpha_bar_of(schedule)[t - 1]
            w = beta_of(schedule)[t] * (1 - alpha_bar) / s**2
            best = w + alpha_bar * beta_of(schedule)[t] ** 2 / s**4 * (v - gain * a * v)

            def expected_bits(f, gain=gain, times=times):
                denoise = lambda x_t, t: (gain * x_t, jnp.full(x_t.shape, f))  # noqa: E731
                return weights @ dj.bound_bits(schedule, denoise, x_0, times, eps, "learned")

            f = np.log(best / w) / np.log(beta_of(schedule)[t] / w)
            assert 0 < f < 1
            assert abs(float(jax.grad(expected_bits)(f))) < 1e-10 < abs(float(jax.grad(expected_bits)(f + 0.05)))


SCHEDULE = dj.cosine_schedule(6)


def test_twice_the_hybrid_loss_is_the_squared_error_and_a_thousandth_of_the_bound(keys):
    x_0 = jnp.linspace(-1, 1, 24).reshape(8, 3)
    t, eps = draw_time_and_noise(SCHEDULE, x_0, keys)
    assert len(np.unique(t)) > 2
    predict = lambda x_t, t: (jnp.tanh(x_t), jnp.full(x_t.shape, 0.3))  # noqa: E731
    hybrid = dj.hybrid_loss(SCHEDULE, predict, x_0, keys, "pred_v")
    squared = dj.loss_at(SCHEDULE, lambda x_t, t: jnp.tanh(x_t), x_0, t, eps, "pred_v")
    bits = dj.bound_bits(SCHEDULE, dj.make_denoiser(SCHEDULE, predict, "pred_v"), x_0, t, eps, "learned")
    np.testing.assert_allclose(2 * (hybrid - squared).sum(1), 1e-3 * 6 * bits, rtol=1e-2, atol=1e-6)
    weight = np.linspace(0.5, 2, 7)
    weighted = dj.hybrid_loss(SCHEDULE, predict, x_0, keys, "pred_v", weight)
    np.testing.assert_allclose(weighted - hybrid, (weight[t] - 1)[:, None] * squared, rtol=1e-3, atol=1e-6)


def test_the_hybrid_loss_moves_the_prediction_as_the_squared_loss_does_and_the_variance_by_the_bound(keys):
    x_0 = jnp.linspace(-1, 1, 24).reshape(8, 3)

    def loss(params, which):
        predict = lambda x_t, t: (params[0] * x_t, jnp.full(x_t.shape, params[1]))  # noqa: E731
        if which == "hybrid":
            return dj.hybrid_loss(SCHEDULE, predict, x_0, keys, "pred_eps").sum()
        return dj.diffusion_loss(SCHEDULE, predict, x_0, keys, "pred_eps").sum()

    hybrid, squared = (jax.grad(loss)((0.4, 0.5), which) for which in ("hybrid", "l2"))
    np.testing.assert_allclose(hybrid[0], squared[0], rtol=1e-6)
    assert squared[1] == 0
    assert abs(hybrid[1]) > 1e-6


def test_the_bound_from_one_drawn_t_is_right_on_average_and_varies_less_than_at_uniform_t():
    n, v = 20_000, 0.3
    schedule = dj.cosine_schedule(50)
    x_0 = v**0.5 * jax.random.normal(jax.random.key(1), (n, 1))
    eps, keys = jax.random.normal(jax.random.key(2), (n, 1)), jax.random.split(jax.random.key(0), n)

    def predict(x_t, t):
        a, s = jnp.asarray(schedule.signal)[t][:, None], jnp.asarray(schedule.noise)[t][:, None]
        return a * v / (a**2 * v + s**2) * x_t, jnp.full(x_t.shape, 0.5)

    terms = jax.jit(lambda t: dj.bound_bits(schedule, predict, x_0, jnp.full(n, t), eps, "learned"))
    all_terms = np.stack([terms(t) for t in range(1, 51)])

    def predict_v(x_t, t):
        x_0_hat, f = predict(x_t, t)
        return dj.convert(schedule, x_0_hat, x_t, t, "pred_x_0", "pred_v"), f

    estimates = np.asarray(jax.jit(lambda keys: dj.bound_loss(schedule, predict_v, x_0, keys, "pred_v"))(keys), np.float64)
    assert abs(estimates.mean() - all_terms.sum(0).mean()) < 4 * estimates.std() / n**0.5
    probabilities = time_density(schedule, "importance")
    np.testing.assert_allclose(probabilities.sum(), 1)
    uniform = 50 * all_terms[np.arange(n) % 50, np.arange(n)]
    assert estimates.var() < 0.5 * uniform.var()


def test_t_is_drawn_in_proportion_to_the_terms_of_standard_normal_data():
    """Whose best network knows x_0 up to N(0, 1 - alpha_bar_t), and x_{t-1} up to N(0, beta_t)."""
    schedule = dj.cosine_schedule(30)
    levels = np.arange(-600, 600) / 127.5
    mass = np.diff(scipy.stats.norm.cdf(levels / beta_of(schedule)[1] ** 0.5))
    entropy = -np.sum(mass[mass > 0] * np.log(mass[mass > 0]))
    terms = []  # the mean divergence of the posterior, of variance w, from N(k x_t + m x_0_hat, beta)
    for t in range(2, 31):
        beta, left, before = beta_of(schedule)[t], 1 - alpha_bar_of(schedule)[t], 1 - alpha_bar_of(schedule)[t - 1]
        w = (
            beta * before / left
        )  # of N(., w + m^2 left) from N(., beta), which are one: the divergence of w from beta on average
        m = alpha_bar_of(schedule)[t - 1] ** 0.5 * beta / left
        terms.append((np.log(beta / w) + (w + m**2 * left) / beta - 1) / 2)
    shares = (time_density(schedule, "importance") - 0.1 / 30) / 0.9
    np.testing.assert_allclose(shares / shares[1], np.append(entropy, terms) / terms[0], rtol=1e-3)
    narrow = time_density(dj.schedule_from_beta(np.array([1e-8, 0.5])), "importance")  # far less noise than a level
    np.testing.assert_allclose(narrow, [0.05, 0.95])


@pytest.mark.parametrize(
    ("beta", "sigma_type", "variance"),
    [
        ([0.3], "lower_bound", 0.3),
        ([0.3, 0.4], "lower_bound", 0.4 * 0.3 / (1 - 0.7 * 0.6)),
        ([0.3, 0.4], "upper_bound", 0.3),
        ([0.3, 0.4], "fixed_large", 0.4 * 0.3 / (1 - 0.7 * 0.6)),
    ],
)
def test_the_last_step_has_the_variance_of_the_step_before_it_or_beta(beta, sigma_type, variance):
    x, x_0_hat = 1 / 255, 0.2
    edges = (np.array([x - 1 / 255, x + 1 / 255]) - x_0_hat) / variance**0.5
    args = jnp.full((1, 1), x), jnp.ones(1, int), jnp.zeros((1, 1))
    bits = dj.bound_bits(dj.schedule_from_beta(np.array(beta)), lambda x_t, t: jnp.full((1, 1), x_0_hat), *args, sigma_type)
    np.testing.assert_allclose(bits, -np.log2(np.diff(scipy.stats.norm.cdf(edges))), rtol=1e-3)


def test_gradients_of_the_bound_are_finite_however_wrong_the_network_is(keys):
    x_0 = jnp.tile(jnp.array([[-1.0, 1.0, 0.0]]), (8, 1))

    def loss(params):
        predict = lambda x_t, t: (jnp.full(x_t.shape, params[0]), jnp.full(x_t.shape, params[1]))  # noqa: E731
        return dj.bound_loss(dj.cosine_schedule(2), predict, x_0, keys, "pred_x_0").sum()

    both = jax.jit(jax.value_and_grad(loss))
    for value in (-1.0, 1.0, 5.0):
        for f in (-1.0, 0.0, 1.0, 2.0):
            assert np.isfinite(jax.tree.leaves(both((value, f)))).all(), (value, f)
    of_one_level = jax.value_and_grad(likelihood._log_mass, argnums=(1, 2))(
        *jnp.array([0, 0, 1e7])
    )  # a level is nothing to that
    assert np.isfinite(jax.tree.leaves(of_one_level)).all()


@pytest.mark.parametrize("loss", [dj.hybrid_loss, dj.bound_loss])
def test_a_network_without_a_variance_is_refused(loss, keys):
    with pytest.raises(ValueError, match="must predict a pair"):
        loss(SCHEDULE, lambda x_t, t: x_t, jnp.zeros((8, 2)), keys)
    with pytest.raises(ValueError, match=r"a pair of one shape, got \[\(8, 2\), \(8, 1\)\]"):
        loss(SCHEDULE, lambda x_t, t: (x_t, x_t[:, :1]), jnp.zeros((8, 2)), keys)


@pytest.mark.parametrize("loss", [dj.diffusion_loss, dj.hybrid_loss])
def test_weights_for_other_timesteps_are_refused(loss, keys):
    for length in (6, 8):
        with pytest.raises(ValueError, match=rf"weight must have the shape \(7,\), for t = 0\.\.T, got \({length},\)"):
            loss(SCHEDULE, lambda x_t, t: (x_t, x_t), jnp.zeros((8, 2)), keys, weight=np.ones(length))


def test_bits_are_refused_where_they_would_be_of_something_else():
    x_0, t, eps = jnp.zeros((2, 3)), jnp.array([2, 1]), jnp.ones((2, 3))
    with pytest.raises(ValueError, match="one of upper_bound, fixed_large, lower_bound, learned; got 'zero'"):
        dj.bound_bits(SCHEDULE, lambda x_t, t: x_t, x_0, t, eps, "zero")
    with pytest.raises(ValueError, match="must predict a pair"):
        dj.bound_bits(SCHEDULE, lambda x_t, t: x_t, x_0, t, eps, "learned")
    with pytest.raises(ValueError, match=r"x_0_hat must have the shape of the data, \(2, 3\), got \(2, 1\)"):
        dj.bound_bits(SCHEDULE, lambda x_t, t: x_t[:, :1], x_0, t, eps)
