"""For data N(m, v) on a line and the best denoiser, the error of each target is Gaussian with a known variance, so the expected
loss at every t has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ho import beta_of

import diffusion_jax as dj

T, M, V = 6, 0.8, 0.3
SCHEDULE = dj.cosine_schedule(T)
TARGETS = ("pred_x_0", "pred_eps", "pred_v")
ALPHA_BAR = np.array([np.prod(1 - beta_of(SCHEDULE)[: t + 1]) for t in range(1, T + 1)])
LEFT = 1 / (1 / V + ALPHA_BAR / (1 - ALPHA_BAR))  # Var[x_0 | x_t], from adding precisions
ERROR_VARIANCE = {  # eps = (x_t - a x_0) / s and v = (a x_t - x_0) / s, each with x_t known
    "pred_x_0": LEFT,
    "pred_eps": LEFT * ALPHA_BAR / (1 - ALPHA_BAR),
    "pred_v": LEFT / (1 - ALPHA_BAR),
}
EXPECTED = {"l2": lambda variance: variance / 2, "l1": lambda variance: np.sqrt(2 * variance / np.pi)}


def best_prediction(target_type: str):
    def predict(x_t, t):
        alpha_bar, left = jnp.asarray(ALPHA_BAR)[t - 1][:, None], jnp.asarray(LEFT)[t - 1][:, None]
        a, s = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
        x_0_hat = left * (M / V + a / s**2 * x_t)
        return {"pred_x_0": x_0_hat, "pred_eps": (x_t - a * x_0_hat) / s, "pred_v": (a * x_t - x_0_hat) / s}[target_type]

    return predict


@pytest.mark.parametrize("target_type", TARGETS)
def test_the_squared_loss_of_the_best_prediction_is_exact(target_type):
    """The error is linear in x_0 and eps, so Gauss-Hermite quadrature over both integrates its square without an error."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    normal = [part.ravel() for part in np.meshgrid(nodes, nodes)]
    weights = np.outer(weights, weights).ravel() / (2 * np.pi)
    with jax.enable_x64(True):
        x_0, eps = (jnp.asarray(part)[:, None] for part in (M + V**0.5 * normal[0], normal[1]))
        for time in range(1, T + 1):
            t = jnp.full(len(weights), time)
            loss = dj.loss_at(SCHEDULE, best_prediction(target_type), x_0, t, eps, target_type)[:, 0]
            assert float(weights @ loss) == pytest.approx(ERROR_VARIANCE[target_type][time - 1] / 2, rel=1e-10)


@pytest.mark.parametrize(("target_type", "loss_type"), [("pred_x_0", "l2"), ("pred_v", "l1")])
def test_the_drawn_loss_of_the_best_prediction_at_each_t(target_type, loss_type):
    n = 60_000
    data_key, key = jax.random.split(jax.random.key(1))
    x_0 = M + V**0.5 * jax.random.normal(data_key, (n, 1))
    keys = jax.random.split(key, n)
    loss = jax.jit(lambda x, k: dj.diffusion_loss(SCHEDULE, best_prediction(target_type), x, k, target_type, loss_type))
    losses = np.asarray(loss(x_0, keys), np.float64).ravel()
    says_t = lambda x_t, t: t[:, None].astype(jnp.float32)  # noqa: E731  its l1 distance to 0 is the t that each key drew
    t = np.asarray(dj.diffusion_loss(SCHEDULE, says_t, 0 * x_0, keys, "pred_x_0", "l1"), int).ravel()
    for time in range(1, T + 1):
        here, expected = losses[t == time], EXPECTED[loss_type](ERROR_VARIANCE[target_type][time - 1])
        assert abs(here.mean() - expected) < 4.5 * here.std() / len(here) ** 0.5
        assert here.std() / len(here) ** 0.5 < 0.02 * expected
    assert losses.mean() == pytest.approx(EXPECTED[loss_type](ERROR_VARIANCE[target_type]).mean(), rel=0.03)


@pytest.mark.parametrize("loss_type", EXPECTED)
def test_the_gradient_of_the_loss_is_its_finite_difference(loss_type):
    """In float64, over gain and offset, a little away from the best prediction; none of the errors changes sign on the way."""
    h, change = 1e-6, np.array([0.1, -0.2])
    with jax.enable_x64(True):
        x_0, keys = 1 + jax.random.normal(jax.random.key(4), (64, 1), jnp.float64), jax.random.split(jax.random.key(5), 64)

        @jax.jit
        def loss(change):
            best = best_prediction("pred_v")
            predict = lambda x_t, t: (1 + change[0]) * best(x_t, t) + change[1]  # noqa: E731
            return dj.diffusion_loss(SCHEDULE, predict, x_0, keys, "pred_v", loss_type).mean()

        gradient = jax.grad(loss)(jnp.asarray(change))
        difference = [(loss(jnp.asarray(change + step)) - loss(jnp.asarray(change - step))) / (2 * h) for step in h * np.eye(2)]
        np.testing.assert_allclose(gradient, difference, rtol=1e-6)
        assert np.abs(gradient).min() > 1e-3


def test_a_table_of_weights_weighs_each_example_by_its_t():
    keys, x_0 = jax.random.split(jax.random.key(0), 64), jnp.ones((64, 2))
    says_t = lambda x_t, t: jnp.broadcast_to(t[:, None], x_t.shape).astype(jnp.float32)  # noqa: E731
    t = np.asarray(dj.diffusion_loss(SCHEDULE, says_t, 0 * x_0, keys, "pred_x_0", "l1"), int)
    weight = np.linspace(2.0, 5.0, T + 1)
    weighted, plain = (dj.diffusion_loss(SCHEDULE, says_t, x_0, keys, "pred_x_0", weight=w) for w in (weight, None))
    np.testing.assert_allclose(weighted, weight[t] * plain, rtol=1e-6)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_that_is_not_positive_is_named(cap):
    with pytest.raises(ValueError, match=f"cap must be positive, got {cap}"):
        dj.min_snr_weight(SCHEDULE, cap=cap)
