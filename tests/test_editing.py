from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj

T = 60
SCHEDULE = dj.cosine_schedule(T)
MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[0.8, 0.5], [0.5, 0.6]])
A, S = (jnp.asarray(column, jnp.float32) for column in (SCHEDULE.signal, SCHEDULE.noise))
GAINS = jnp.stack([a * COVARIANCE @ np.linalg.inv(a**2 * COVARIANCE + s**2 * np.eye(2)) for a, s in zip(A, S, strict=True)])


def best_denoise(x_t, t):
    """E[x_0 | x_t] for data N(MEAN, COVARIANCE), as [B, N, 2]."""
    mean = jnp.asarray(MEAN, jnp.float32)[None, None]
    row = t.astype(int)
    return mean + jnp.einsum("bij,bnj->bni", GAINS[row], x_t - A[row][:, None, None] * mean)


def draw(denoise, table, start=None, points=4000):
    keys = jax.random.split(jax.random.key(0), 4)
    return np.asarray(jax.jit(lambda start: dj.sample(denoise, table, keys, (points, 2), start))(start))


def test_guidance_is_the_same_for_every_target_and_keeps_the_variance_of_the_class():
    x_t, t = jnp.array([[0.4, -1.0]]), jnp.array([20])
    of_class, of_none = jnp.array([[0.5, 0.1]]), jnp.array([[-0.3, 0.2]])
    results = []
    for target_type in ("pred_x_0", "pred_eps", "pred_v"):
        say = lambda x_0, f, kind=target_type: lambda x, t: (dj.convert(SCHEDULE, x_0, x, t, "pred_x_0", kind), f)  # noqa: E731
        network = dj.guided(say(of_class, jnp.full((1, 2), 0.7)), say(of_none, jnp.full((1, 2), 0.1)), 2.5)
        x_0_hat, f = dj.make_denoiser(SCHEDULE, network, target_type)(x_t, t)
        np.testing.assert_array_equal(f, np.full((1, 2), 0.7, np.float32))
        results.append(x_0_hat)
    np.testing.assert_allclose(results, [of_none + 2.5 * (of_class - of_none)] * 3, atol=1e-5)


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_negative_guidance_scale_is_named(scale):
    with pytest.raises(ValueError, match=f"guidance scale must be at least 0, got {scale}"):
        dj.guided(lambda x, t: x, lambda x, t: x, scale)


def test_each_example_may_have_its_own_guidance_scale_and_a_compiled_program_any():
    with_class, without = (lambda x, t, number=number: x + number for number in (5.0, 3.0))
    scales, x_t = jnp.array([[0.0], [1.0], [2.5]]), jnp.zeros((3, 2))
    expected = [[3.0, 3.0], [5.0, 5.0], [8.0, 8.0]]
    np.testing.assert_allclose(dj.guided(with_class, without, scales)(x_t, jnp.ones(3)), expected)
    guide = jax.jit(lambda scale: dj.guided(with_class, without, scale)(x_t, jnp.ones(3)))
    np.testing.assert_allclose(guide(scales), expected)
    np.testing.assert_allclose(guide(2.0), np.full((3, 2), 7.0))
    with pytest.raises(ValueError, match="guidance scale must be at least 0"):
        dj.guided(with_class, without, -scales)


def test_rounds_of_inpainting_lead_to_the_law_of_the_rest_given_what_is_known():
    """x_2 given x_1 = 1.5 is normal, with a mean and a variance known from the data's."""
    given, known = jnp.array([[[True, False]]]), jnp.array([[[1.5, 99.0]]])
    gain = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    mean, variance = MEAN[1] + gain * (1.5 - MEAN[0]), COVARIANCE[1, 1] - gain * COVARIANCE[0, 1]
    errors = []
    for times in (1, 12):
        table = dj.resampled(SCHEDULE, dj.ancestral_table(SCHEDULE), times)
        x = draw(dj.inpainting(best_denoise, known, given), table).reshape(-1, 2)
        np.testing.assert_array_equal(x[:, 0], np.float32(1.5))
        errors.append([abs(x[:, 1].mean() - mean), abs(x[:, 1].var() - variance)])
    assert errors[0][0] > 0.2  # replacement alone is biased
    assert errors[1][0] < 0.04
    assert errors[1][1] < 0.02 < errors[0][1]


KEEPING = dj.ddim_table(SCHEDULE, 0.5, 7)  # if x_0 is known, its steps keep the forward process's marginals, with some noise


def test_what_is_known_is_as_noisy_on_the_way_as_the_forward_process_has_it():
    known, alpha_bar = jnp.full((1, 20000), 1.5), SCHEDULE.at(np.append(KEEPING.t, 0))[0][::-1] ** 2
    denoise = dj.inpainting(lambda x_t, t: x_t, known, True)
    path = dj.sample_trajectory(denoise, KEEPING, jax.random.split(jax.random.key(0), 1), known.shape[1:])[:, 0]
    np.testing.assert_allclose(path.mean(1), 1.5 * alpha_bar**0.5, atol=0.03)
    np.testing.assert_allclose(path.var(1), 1 - alpha_bar, atol=0.03)


def test_a_round_keeps_the_forward_marginal():
    """A round goes from t to t, so if x_0 is a known point, from q(x_t | x_0) to q(x_t | x_0)."""
    table = dj.resampled(SCHEDULE, KEEPING, 3)
    assert list(table.t) == [t for t in KEEPING.t[:-1] for _ in range(3)] + [KEEPING.t[-1]]
    rounds = np.arange(len(table.t)) % 3 != 2
    rounds[-1] = False
    a, b, c, alpha_bar = table.a[rounds], table.b[rounds], table.c[rounds], SCHEDULE.at(table.t[rounds])[0] ** 2
    np.testing.assert_allclose(a * alpha_bar**0.5 + b, alpha_bar**0.5, rtol=1e-12)
    np.testing.assert_allclose(a**2 * (1 - alpha_bar) + c**2, 1 - alpha_bar, rtol=1e-9)
    jax.tree.map(lambda column, same: np.testing.assert_array_equal(column[~rounds], same), table, KEEPING)


def test_what_cannot_be_resampled_or_started_is_named():
    with pytest.raises(ValueError, match="times must be a whole number of at least 1, got 0"):
        dj.resampled(SCHEDULE, dj.ddim_table(SCHEDULE), 0)
    for table in (dj.dpm_solver_table(SCHEDULE), dj.ancestral_table(SCHEDULE, "learned")):
        with pytest.raises(ValueError, match="ancestral or DDIM"):
            dj.resampled(SCHEDULE, table, 2)
    for change in (lambda table: dj.resampled(SCHEDULE, table, 2), lambda table: dj.part_way(table, 30)):
        with pytest.raises(ValueError, match="must go down"):
            change(dj.encoding_table(SCHEDULE))
    with pytest.raises(ValueError, match="from t = 0 or below, and its last is from 10"):
        dj.part_way(dj.padded(dj.ddim_table(SCHEDULE, 0.0, 6), 9), 0)
    with pytest.raises(ValueError, match="must be boolean, true where the data is known, got float32"):
        dj.inpainting(best_denoise, jnp.zeros(2), jnp.array([0.1, 0.9]))
    with pytest.raises(ValueError, match=r"known part must have the shape of the data, \(2, 1\), got \(2, 3\)"):
        dj.inpainting(lambda x, t: x, jnp.zeros((2, 3)), True)(jnp.zeros((2, 1)), jnp.ones(2, int))
    with pytest.raises(ValueError, match=r"share must be one number, got the shape \(3,\)"):
        dj.spherical(jnp.ones(3), jnp.arange(3.0), jnp.ones(3))
    with pytest.raises(ValueError, match=r"start must have the shape \(2, 3\), got \(2, 1\)"):
        dj.sample(lambda x, t: x, dj.ddim_table(SCHEDULE), jax.random.split(jax.random.key(0)), (3,), jnp.zeros((2, 1)))


def test_the_rest_of_a_walk_goes_on_where_the_whole_walk_was():
    keys = jax.random.split(jax.random.key(0), 3)
    denoise, table = lambda x_t, t: jnp.tanh(x_t), dj.ddim_table(SCHEDULE, 0.0, 6)
    path = dj.sample_trajectory(denoise, table, keys, (2,))
    rest = dj.part_way(table, 40)
    assert list(rest.t) == [40, 30, 20, 10]
    np.testing.assert_allclose(dj.sample(denoise, rest, keys, (2,), path[4]), path[0], atol=1e-6)
    np.testing.assert_allclose(dj.sample_trajectory(denoise, rest, keys, (2,), path[4]), path[:5], atol=1e-6)
    for make in (partial(dj.dpm_solver_table, SCHEDULE, 0.0), partial(dj.deis_table, SCHEDULE)):
        solver = dj.part_way(make(6), 40)
        for name in ("t", "scale", "a", "b", "c", "r"):
            assert getattr(solver, name)[0] == pytest.approx(getattr(rest, name)[0]), name  # nothing before it to use
        assert not solver.d[0].any()
        assert solver.d[1].any()
    assert list(dj.part_way(dj.ddim_table(SCHEDULE), 3).t) == [3, 2, 1]


def test_half_way_of_the_noise_keeps_half_of_the_image():
    """Data N(m, v) noised to t and denoised: an image x goes on average to m + rho (x - m), rho from the regression of x_0'."""
    x_0 = jnp.asarray(np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, (4, 4000)), jnp.float32)
    t = 30
    x_t = dj.q_sample(SCHEDULE, x_0, jnp.full(4, t), jax.random.normal(jax.random.key(5), x_0.shape))
    again = draw(best_denoise, dj.part_way(dj.ancestral_table(SCHEDULE), t), x_t)
    np.testing.assert_allclose(np.cov(again.reshape(-1, 2).T), COVARIANCE, atol=0.04)  # still of the data
    G = np.asarray(GAINS[t]) * float(A[t])  # x_0' given x_t is of the posterior, whose mean is G (x_0 - m) on average over eps
    cross = np.cov(x_0.reshape(-1, 2).T, again.reshape(-1, 2).T)[:2, 2:]
    np.testing.assert_allclose(cross, COVARIANCE @ G.T, atol=0.04)


def test_an_image_becomes_the_noise_that_it_comes_from():
    """The flow of data N(m, C) is a map x_T = C^(-1/2) (x - m) where x_T is pure noise; the way back ends where it began."""
    x_0 = jnp.asarray(np.random.default_rng(1).multivariate_normal(MEAN, COVARIANCE, (4, 50)), jnp.float32)
    values, axes = np.linalg.eigh(COVARIANCE)
    expected = (np.asarray(x_0) - MEAN) @ (axes / values**0.5) @ axes.T
    errors = []
    for steps in (15, 60):
        noise = draw(best_denoise, dj.encoding_table(SCHEDULE, steps), x_0, points=50)
        back = draw(best_denoise, dj.ddim_table(SCHEDULE, 0.0, steps), jnp.asarray(noise), points=50)
        errors.append([np.abs(noise - expected).max(), np.abs(back - x_0).max()])
    assert np.all(np.array(errors[1]) < [0.15, 0.2])
    assert np.all(np.array(errors[0]) > 2 * np.array(errors[1]))


def test_between_two_points_on_the_sphere():
    x, y = jnp.array([3.0, 0.0]), jnp.array([0.0, 3.0])
    np.testing.assert_allclose(dj.spherical(x, y, 0.0), x, atol=1e-5)
    np.testing.assert_allclose(dj.spherical(x, y, 1.0), y, atol=1e-5)
    np.testing.assert_allclose(dj.spherical(x, y, 1 / 3), [3 * np.cos(np.pi / 6), 1.5], atol=1e-5)
    np.testing.assert_allclose(dj.spherical(x, x, 0.4), x, atol=1e-5)
    assert np.isnan(dj.spherical(x, -x, 0.4)).all()
    x, y = jnp.array([1.0, 0, 0, 0]), jnp.array([-0.5, 0.5, 0.5, 0.5])  # 120 degrees apart
    np.testing.assert_allclose(dj.spherical(x, y, 0.5), [0.5, 0.5, 0.5, 0.5], atol=1e-6)
    x = jnp.array([3.0, 0.0])
    y = 2 * jnp.array([np.cos(1.2), np.sin(1.2)])  # 1.2 from x, and nearer to 0
    expected = (np.sin(0.9) * x + np.sin(0.3) * y) / np.sin(1.2)
    np.testing.assert_allclose(dj.spherical(x, y, 0.25), expected, atol=1e-5)
    np.testing.assert_allclose(dj.spherical(x.reshape(1, 2), y.reshape(1, 2), 0.25), expected[None], atol=1e-5)
