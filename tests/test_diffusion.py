import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj
from diffusion_jax.diffusion import look_up

TARGETS = ("pred_x_0", "pred_eps", "pred_v")
TWO_STEPS = dj.schedule_from_beta(np.array([0.36, 0.5]))  # sqrt(alpha_bar_1) = 0.8, sqrt(1 - alpha_bar_1) = 0.6


def column(*values):
    return jnp.array(values, jnp.float32)[:, None]


def test_q_sample_by_hand(variant):
    x_t = variant(dj.q_sample)(TWO_STEPS, column(1, 3), jnp.array([1, 0]), column(2, 7))
    np.testing.assert_allclose(x_t, column(0.8 + 1.2, 3), rtol=1e-6)


@pytest.mark.parametrize("from_type", TARGETS)
@pytest.mark.parametrize("to_type", TARGETS)
def test_conversions_by_hand(from_type, to_type):
    """At a = 0.8, s = 0.6: x_0 = 1 and eps = 2 make x_t = 2 and v = 0.8 * 2 - 0.6 * 1 = 1; x_0 = 5, eps = 0 make 4 and -3."""
    values = {"pred_x_0": column(1, 5), "pred_eps": column(2, 0), "pred_v": column(1, -3)}
    converted = dj.convert(TWO_STEPS, values[from_type], column(2, 4), jnp.array([1, 1]), from_type, to_type)
    np.testing.assert_allclose(converted, values[to_type], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [dj.linear_schedule, dj.cosine_schedule])
@pytest.mark.parametrize("target_type", TARGETS)
def test_x_0_survives_the_round_trip_at_both_ends(variant, make, target_type):
    schedule, T = make(500), 500
    x_0, eps = (jax.random.normal(key, (2, 4, 4, 1)) for key in jax.random.split(jax.random.key(1)))
    t = jnp.array([1, T])

    @variant
    def round_trip(x_0, eps):
        x_t = dj.q_sample(schedule, x_0, t, eps)
        prediction = dj.convert(schedule, eps, x_t, t, "pred_eps", target_type)
        return dj.convert(schedule, prediction, x_t, t, target_type, "pred_x_0")

    back = round_trip(x_0, eps)
    chex.assert_equal_shape([back, x_0])
    lost = 1 / schedule.signal[np.array([1, T])] / schedule.noise[np.array([1, T])]
    for i in range(2):
        np.testing.assert_allclose(back[i], x_0[i], atol=1e-6 * lost[i])


def test_float32_keeps_the_noise_of_the_first_step():
    """sqrt(1 - alpha_bar_1) taken in float32 is off by 5e-3 at T = 4000."""
    schedule = dj.cosine_schedule(4000)
    x_1 = dj.q_sample(schedule, column(0), jnp.array([1]), column(1))
    assert x_1.dtype == jnp.float32
    np.testing.assert_allclose(x_1[0, 0], schedule.noise[1], rtol=1e-6)


@pytest.mark.parametrize("target_type", TARGETS)
def test_a_perfect_prediction_has_no_loss(variant, keys, target_type):
    """With x_0 = 0, x_t = s eps, so every target is known from x_t alone."""
    schedule = dj.cosine_schedule(20)

    def perfect(x_t, t):
        a, s = (jnp.asarray(column, jnp.float32)[t].reshape(-1, 1, 1, 1) for column in schedule)
        return {"pred_x_0": 0 * x_t, "pred_eps": x_t / s, "pred_v": a * x_t / s}[target_type]

    loss = variant(lambda x, keys: dj.diffusion_loss(schedule, perfect, x, keys, target_type))(jnp.zeros((8, 4, 4, 1)), keys)
    chex.assert_shape(loss, (8, 4, 4, 1))
    np.testing.assert_allclose(loss, 0, atol=1e-9)


def test_the_loss_draws_t_uniformly_from_1_to_T_and_standard_noise():
    T, n = 5, 20_000
    schedule = dj.cosine_schedule(T)
    keys = jax.random.split(jax.random.key(3), n)
    x_0 = jnp.zeros((n, 1))
    t = dj.diffusion_loss(schedule, lambda x_t, t: t[:, None].astype(jnp.float32), x_0, keys, "pred_x_0", "l1")
    counts = np.bincount(np.asarray(t, int).ravel(), minlength=T + 1)
    assert counts[0] == 0
    assert len(counts) == T + 1
    chi_square = ((counts[1:] - n / T) ** 2 / (n / T)).sum()
    assert chi_square < 23.5  # the 0.9999 quantile at 4 degrees of freedom
    eps = dj.diffusion_loss(schedule, lambda x_t, t: 0 * x_t, x_0, keys, "pred_eps", "l2") * 2
    assert float(eps.mean()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)


def test_an_examples_loss_depends_on_its_own_key_alone(keys):
    schedule, x_0 = dj.cosine_schedule(50), jax.random.normal(jax.random.key(5), (8, 3))
    predict = lambda x_t, t: x_t * t[:, None].astype(jnp.float32)  # noqa: E731
    whole = dj.diffusion_loss(schedule, predict, x_0, keys)
    part = dj.diffusion_loss(schedule, predict, x_0[3:5], keys[3:5])
    np.testing.assert_array_equal(whole[3:5], part)


def test_posterior_by_hand(variant):
    mean, variance = variant(lambda x_0, x_t, t: dj.posterior(TWO_STEPS, x_0, x_t, t))(
        column(2, 2), column(3, 3), jnp.array([2, 1])
    )
    k, m, w = 0.5**0.5 * 0.36 / 0.68, 0.8 * 0.5 / 0.68, 0.5 * 0.36 / 0.68
    np.testing.assert_allclose(mean, column(k * 3 + m * 2, 2), rtol=1e-6)  # at t = 1 it is x_0 itself
    np.testing.assert_allclose(variance, [w, 0], rtol=1e-6)


def test_clip_bounds_x_0_hat_only(variant):
    denoise = variant(dj.make_denoiser(TWO_STEPS, lambda x_t, t: x_t, "pred_x_0", clip=1.0))
    np.testing.assert_array_equal(denoise(column(-3, 0.5, 9), jnp.array([1, 1, 1])), column(-1, 0.5, 1))


def test_unknown_choices_are_named(keys):
    x = jnp.zeros((8, 2))
    predict = lambda x_t, t: x_t  # noqa: E731
    with pytest.raises(ValueError, match=r"target_type must be one of pred_x_0, pred_eps, pred_v, pred_u, edm; got 'x0'"):
        dj.make_denoiser(TWO_STEPS, predict, "x0")
    with pytest.raises(ValueError, match="got 'noise'"):
        dj.convert(TWO_STEPS, x, x, jnp.ones(8, int), "pred_eps", "noise")
    with pytest.raises(ValueError, match="got 'eps'"):
        dj.diffusion_loss(TWO_STEPS, predict, x, keys, "eps")
    with pytest.raises(ValueError, match="loss_type must be one of l2, l1; got 'mse'"):
        dj.diffusion_loss(TWO_STEPS, predict, x, keys, loss_type="mse")


@pytest.mark.parametrize(
    ("schedule", "target_type", "t"),
    [(dj.flow_schedule(8), "pred_eps", 8), (dj.cosine_schedule(8), lambda signal, noise: (signal, noise), 1)],
    ids=["no signal", "x_t itself"],
)
def test_a_target_that_does_not_determine_x_0_is_refused(schedule, target_type, t):
    with pytest.raises(ValueError, match=f"x_0 does not follow from .* at t = {t} of this"):
        dj.make_denoiser(schedule, lambda x_t, t: x_t, target_type)


def test_a_clip_of_zero_is_refused():
    with pytest.raises(ValueError, match="clip must be positive or None, got 0"):
        dj.make_denoiser(TWO_STEPS, lambda x_t, t: x_t, clip=0.0)


def test_rows_are_joined_by_lines_that_have_their_slope_at_the_last_row_too():
    t = jnp.array([0.5, 2.25, 3.0])
    values, slopes = jax.jvp(lambda t: look_up(np.array([0.0, 1, 3, 7]), t, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(values, [0.5, 4, 7])
    np.testing.assert_allclose(slopes, [1, 4, 4])
    pair = jax.jvp(lambda t: look_up(np.array([2.0, 7]), t, t), (jnp.ones(1),), (jnp.ones(1),))
    np.testing.assert_allclose(pair, [[7], [5]])
    assert np.isnan(look_up(np.array([0.0, 1, 3, 7]), jnp.array([-0.5, 3.5, 4.5]), t)).all()


def test_a_network_may_be_told_the_log_snr_as_a_number_from_0_to_1000():
    path = dj.schedule_from_columns(signal=np.array([1.0, 1, 0]), noise=np.array([0.0, 1, 1]))
    network = dj.normalized(path, lambda x_t, told: told[:, None], "log_snr")
    np.testing.assert_allclose(network(jnp.ones((3, 1)), jnp.arange(3)), [[0], [500], [1000]], rtol=1e-6)


def test_a_prediction_without_a_fraction_has_the_lower_bound_of_the_variance(keys):
    """With a fraction of 0, ancestral sampling with learned variances is that with the lower bound."""
    schedule, table = dj.cosine_schedule(8), dj.ancestral_table(dj.cosine_schedule(8), "learned")
    denoise = dj.make_denoiser(schedule, lambda x_t, t: 0.5 * x_t, "pred_v")
    with_zeros = dj.make_denoiser(schedule, lambda x_t, t: (0.5 * x_t, 0 * x_t), "pred_v")
    learned, zeros = (dj.sample(each, table, keys, (3,)) for each in (denoise, with_zeros))
    expected = dj.sample(denoise, dj.ancestral_table(schedule, "lower_bound"), keys, (3,))
    np.testing.assert_allclose(learned, expected, rtol=1e-5)
    np.testing.assert_allclose(zeros, expected, rtol=1e-5)
