"""MeanFlow against the closed form for Gaussian data, where the flow only scales: from x_t to
x_s = mean_s + (x_t - mean_t) deviation_s / deviation_t."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import diffusion_jax as dj

T, M, V = 8, 0.6, 0.3
FLOW = dj.flow_schedule(T)
QUADRATURE = np.polynomial.hermite_e.hermegauss(4)


def moved(x_t, t, s):
    """x_s on the flow line through x_t, for data N(M, V)."""
    deviation_t, deviation_s = (jnp.sqrt((1 - time / T) ** 2 * V + (time / T) ** 2)[:, None] for time in (t, s))
    return M * (1 - s / T)[:, None] + (x_t - M * (1 - t / T)[:, None]) * deviation_s / deviation_t


def exact(x_t, t, s):
    """The average velocity between s and t; at s = t its limit, by the derivative."""
    gap = jnp.where(t == s, 1.0, t - s)[:, None]
    slope = jax.jvp(lambda s: moved(x_t, t, s), (s,), (jnp.ones_like(s),))[1]
    return T * jnp.where((t == s)[:, None], slope, (x_t - moved(x_t, t, s)) / gap)


def data_and_noise():
    """All pairs of quadrature nodes of x_0 ~ N(M, V) and eps ~ N(0, 1), with their weights."""
    nodes, weights = QUADRATURE
    normal = [jnp.asarray(part.ravel())[:, None] for part in np.meshgrid(nodes, nodes)]
    return M + V**0.5 * normal[0], normal[1], np.outer(weights, weights).ravel() / (2 * np.pi)


@pytest.mark.parametrize(("t", "s"), [(8, 0), (8, 5), (3, 1), (4, 4), (1, 0)])
def test_the_expected_gradient_is_zero_at_the_average_velocity_and_the_loss_rises_around_it(t, s):
    with jax.enable_x64(True):
        x_0, eps, weights = data_and_noise()
        t, s = (jnp.full(len(weights), time, jnp.float64) for time in (t, s))

        def expected(change):
            def network(x_t, t, s):
                return exact(x_t, t, s) + change[0] + change[1] * x_t + change[2] * (x_t**2 + t[:, None])

            return jnp.asarray(weights) @ dj.mean_flow_loss(T, network, x_0, t, s, eps, power=0.0)[:, 0]

        gradient = jax.grad(expected)(jnp.zeros(3))
        np.testing.assert_allclose(gradient, 0, atol=1e-11)
        for change in np.eye(3):  # the target moves with the network, but has no gradient
            assert jax.grad(expected)(0.01 * change) @ change > 1e-4


def test_the_target_is_the_identity_written_out():
    """For u = x_t t s the derivative along the path is t s v / T + x_t s."""
    x_0, eps = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 1.5]])
    loss = dj.mean_flow_loss(8, lambda x, t, s: x * (t * s)[:, None], x_0, jnp.array([6]), jnp.array([2]), eps, power=0.0)
    x_t, v = np.array([0.25 * 1 + 0.75 * 0.5, -0.25 * 2 + 0.75 * 1.5]), np.array([-0.5, 3.5])
    squared = (x_t * 12 - (v - 4 * (12 * v / 8 + 2 * x_t))) ** 2
    np.testing.assert_allclose(loss[0], squared, rtol=1e-6)


def test_another_velocity_takes_the_place_of_the_sampled_one():
    """u = 0 has no derivative, so the loss is the velocity squared."""
    seen = {}

    def velocity(x_t, t, v):
        seen.update(x_t=x_t, t=t, v=v)
        return 3.0 * v

    x_0, eps, t = jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 1.5]]), jnp.array([6])
    loss = dj.mean_flow_loss(8, lambda x, t, s: 0.0 * x, x_0, t, jnp.array([2]), eps, velocity, power=0.0)
    np.testing.assert_allclose(loss, [[1.5**2, 10.5**2]], rtol=1e-6)
    np.testing.assert_allclose(seen["v"], eps - x_0)
    np.testing.assert_allclose(seen["x_t"], 0.25 * x_0 + 0.75 * eps)
    np.testing.assert_array_equal(seen["t"], [6])


def test_guidance_mixes_in_the_velocity_without_the_class():
    velocity = dj.guided_velocity(lambda x_t, t, s: (10 * t + s)[:, None] + 0 * x_t, 3.0)
    np.testing.assert_allclose(velocity(jnp.zeros((1, 1)), jnp.array([2.0]), jnp.array([[2.0]])), [[3 * 2 - 2 * 22]])


@pytest.mark.parametrize("calls", [1, 5])
def test_any_number_of_calls_takes_noise_exactly_to_the_data(calls, variant, keys):
    table = dj.padded(dj.ddim_table(FLOW, 0.0, calls), 8)
    draw = variant(lambda table: dj.sample(dj.make_denoiser(FLOW, dj.jumping(exact, table), "pred_u"), table, keys, (3,)))
    begin = dj.sample_trajectory(lambda x, t: x, table, keys, (3,))[-1]
    np.testing.assert_allclose(draw(table), M + V**0.5 * begin, atol=2e-6)


def test_a_consistency_step_predicts_the_data_and_noises_it_again():
    """The exact prediction leaves data N(M, V) as they are, so x_s has the mean and variance of eq. 1 at each time."""
    table = dj.consistency_table(FLOW, 3)
    np.testing.assert_array_equal(table.t, [8, 5, 3])
    keys = jax.random.split(jax.random.key(0), 40_000)
    path = dj.sample_trajectory(dj.make_denoiser(FLOW, dj.jumping(exact, table), "pred_u"), table, keys, (1,))
    for x_t, time in zip(path, [0, 3, 5, 8], strict=True):
        signal, noise = 1 - time / T, time / T
        variance = signal**2 * V + noise**2
        assert float(x_t.mean()) == pytest.approx(signal * M, abs=4 * np.sqrt(variance / 40_000))
        assert float(x_t.var()) == pytest.approx(variance, rel=4 * np.sqrt(2 / 40_000))
    np.testing.assert_allclose(path[0], M + (path[1] - M * 5 / 8) * np.sqrt(V / (V * 25 / 64 + 9 / 64)), atol=1e-5)


def test_the_loss_has_the_gradient_of_its_prediction_alone():
    x_0, eps, t, s = jnp.ones((2, 3)), jnp.full((2, 3), 0.5), jnp.array([5.0, 8.0]), jnp.array([1.0, 8.0])

    def loss(w, target):
        network = lambda x, t, s: w * x * t[:, None]  # noqa: E731
        if target is None:
            return dj.mean_flow_loss(T, network, x_0, t, s, eps, power=0.0).sum()
        return ((network((1 - t[:, None] / T) * x_0 + t[:, None] / T * eps, t, s) - target) ** 2).sum()

    v = eps - x_0
    x_t = (1 - t[:, None] / T) * x_0 + t[:, None] / T * eps
    target = v - (t - s)[:, None] * (0.7 * t[:, None] * v / T + 0.7 * x_t)
    np.testing.assert_allclose(jax.grad(loss)(0.7, None), jax.grad(loss)(0.7, target), rtol=1e-5)


def test_the_weight_is_of_the_gradient_and_not_of_the_value():
    power = 0.5
    x_0, eps, t = jnp.array([[1.0, -2.0], [0.1, 0.2]]), jnp.array([[0.5, 1.5], [0.3, 0.1]]), jnp.array([6.0, 3.0])

    def each(w, power):
        return dj.mean_flow_loss(T, lambda x, t, s: w * x, x_0, t, 0 * t, eps, power=power).mean(1)

    values, gradients = each(0.7, 0.0), jax.jacrev(each)(0.7, 0.0)
    np.testing.assert_allclose(each(0.7, power), values, rtol=1e-6)
    np.testing.assert_allclose(jax.jacrev(each)(0.7, power), gradients / (values + 1e-3) ** power, rtol=1e-5)


def test_other_times_than_the_tables_give_nan():
    predict = dj.jumping(lambda x_t, t, s: x_t + s[:, None], dj.ddim_table(FLOW, 0.0, 2))
    np.testing.assert_array_equal(predict(jnp.zeros((3, 1)), jnp.array([8.0, 4.0, 5.0])), [[4.0], [0.0], [np.nan]])


def test_bfloat16_data_give_a_float32_loss():
    x_0, t = jnp.ones((2, 3), jnp.bfloat16), jnp.array([5.0, 8.0])
    loss = dj.mean_flow_loss(T, lambda x_t, t, s: 0.5 * x_t, x_0, t, 0 * t, jnp.ones((2, 3)))
    assert loss.dtype == jnp.float32


def test_a_prediction_of_another_shape_is_refused():
    x_0, t = jnp.zeros((2, 3)), jnp.ones(2)
    with pytest.raises(ValueError, match=r"prediction must have the shape of the data, \(2, 3\), got \(2, 1\)"):
        dj.mean_flow_loss(T, lambda x, t, s: x[:, :1], x_0, t, t, x_0)


PATHS = {"cosine": dj.cosine_schedule(T), "flow": FLOW, "exploding": dj.variance_exploding_schedule(T)}


def on_the_flow(schedule, x_t, t, s):
    """x_s on the probability flow of data N(M, V), which scales the distance from the mean."""
    (signal_t, noise_t), (signal_s, noise_s) = ([jnp.asarray(c)[:, None] for c in schedule.at(time)] for time in (t, s))
    deviation_t, deviation_s = (jnp.sqrt(a**2 * V + b**2) for a, b in ((signal_t, noise_t), (signal_s, noise_s)))
    return M * signal_s + (x_t - M * signal_t) * deviation_s / deviation_t


@pytest.mark.parametrize("calls", [1, 2, 5])
@pytest.mark.parametrize("path", PATHS)
def test_the_target_of_a_jump_takes_noise_exactly_to_the_data_on_every_path(path, calls, keys):
    schedule = PATHS[path]
    table = dj.ddim_table(schedule, 0.0, calls)

    def network(x_t, t, s):
        x_s = on_the_flow(schedule, x_t, np.asarray(t), np.asarray(s))
        return dj.jump_target(schedule, x_t, t, x_s.astype(x_t.dtype), s)

    x_t = jnp.asarray(schedule.noise[-1], jnp.float32) * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    begin, predict = x_t, dj.jumping(network, table)
    for number, t in enumerate(table.t):
        x_t = table.a[number] * x_t + table.b[number] * predict(x_t, jnp.full(len(x_t), t, jnp.float32))
    expected = on_the_flow(schedule, begin, np.full(8, T), np.zeros(8))
    np.testing.assert_allclose(x_t, expected, rtol=1e-4, atol=1e-4)


def test_the_target_of_a_jump_is_written_out():
    """On the flow with T = 8, from t = 6 to s = 2: a = 1 / 3, b = 3/4 - 1/12 = 2/3."""
    x_0 = dj.jump_target(FLOW, jnp.array([[3.0]]), jnp.array([6]), jnp.array([[2.0]]), jnp.array([2]))
    np.testing.assert_allclose(x_0, [[1.5]], rtol=1e-6)


@pytest.mark.slow
def test_one_call_of_a_small_network_draws_two_gaussians_in_the_plane():
    """1/2 N((-5, 0), I) + 1/2 N((5, 0), I), in units of its deviations, after 6,000 steps of MeanFlow without weights.

    20,000 samples have a Kolmogorov distance from their own law of more than .0115 once in a hundred times. So the test fails
    for a law that is .132 away in its first coordinate: a normal one with the same variance is .22 away, and weights of 1/3
    and 2/3 are .167 away. Here it is .07; four other seeds gave .03 to .085.
    """
    deviations, batch, steps = jnp.array([[26**0.5, 1]], jnp.float32), 256, 6000
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def network(params, x_t, t, s):
        h = jnp.concatenate([x_t, t[:, None] / T, (t - s)[:, None] / T], 1)
        for kernel, bias in params[:-1]:
            h = jax.nn.silu(h @ kernel + bias)
        return h @ params[-1][0] + params[-1][1]

    def mirrored(x):
        return jnp.concatenate([x, -x])  # the law is symmetric, and so is the batch

    def loss(params, key):
        keys = jax.random.split(key, 5)
        sides = jax.random.rademacher(keys[0], (batch, 1), jnp.float32) * jnp.array([[5, 0]], jnp.float32)
        x_0, eps = (jax.random.normal(k, (batch, 2), jnp.float32) for k in keys[1:3])
        first, second = T * jax.random.uniform(keys[3], (2, batch))
        t = jnp.maximum(first, second)
        s = jnp.where(jax.random.bernoulli(keys[4], 0.5, (batch,)), t, jnp.minimum(first, second))
        x_0, times = mirrored((sides + x_0) / deviations), (jnp.tile(time, 2) for time in (t, s))
        return dj.mean_flow_loss(T, partial(network, params), x_0, *times, mirrored(eps), power=0.0).mean()

    @jax.jit
    def trained(params):
        def step(carry, number):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, jax.random.fold_in(jax.random.key(0), number)), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    rng = np.random.default_rng(0)
    sizes = itertools.pairwise((4, 128, 128, 128, 2))
    params = [(rng.normal(0, m**-0.5, (m, n)).astype(np.float32), np.zeros((1, n), np.float32)) for m, n in sizes]
    table = dj.ddim_table(FLOW, 0.0, 1)
    denoise = dj.make_denoiser(FLOW, dj.jumping(partial(network, trained(params)), table), "pred_u")
    across, down = np.asarray(dj.sample(denoise, table, jax.random.split(jax.random.key(1), 20_000), (2,)) * deviations).T
    assert stats.kstest(across, lambda x: (stats.norm.cdf(x + 5) + stats.norm.cdf(x - 5)) / 2).statistic < 0.12
    assert stats.kstest(down, stats.norm.cdf).statistic < 0.05
    assert np.abs(np.corrcoef([across, abs(across), down, abs(down)])[:2, 2:]).max() < 0.1
