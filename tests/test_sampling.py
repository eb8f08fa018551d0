from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ho import alpha_bar_of, beta_of

import diffusion_jax as dj
from diffusion_jax.sampling import strided_timesteps

SCHEDULES = [dj.linear_schedule(60), dj.cosine_schedule(60), dj.cosine_schedule(10)]
TABLES = [
    *(
        lambda schedule, S, sigma=sigma: dj.ancestral_table(schedule, sigma, S)
        for sigma in ("upper_bound", "lower_bound", "zero")
    ),
    *(lambda schedule, S, eta=eta: dj.ddim_table(schedule, eta, S) for eta in (0.0, 0.5, 1.0)),
    *(lambda schedule, S, eta=eta: dj.dpm_solver_table(schedule, eta, S) for eta in (0.0, 1.0)),
]
NAMES = ["upper", "lower", "zero", "ddim0", "ddim.5", "ddim1", "dpm", "dpm sde"]
EVERY_TABLE = pytest.mark.parametrize("make_table", TABLES, ids=NAMES)
STEPS = pytest.mark.parametrize("S", [1, 3, 7, 10])


@pytest.mark.parametrize("T", [1, 2, 10, 37, 500])
def test_every_stride_strictly_decreases_from_T_to_0(T):
    for S in range(1, T + 1):
        times = strided_timesteps(T, S)
        assert len(times) == S + 1
        assert (times[0], times[-1]) == (T, 0)
        assert np.all(np.diff(times) < 0)
        assert np.ptp(np.diff(times)) <= 1 + (S < T)  # evenly spaced, up to rounding at both ends
    np.testing.assert_array_equal(strided_timesteps(T), np.arange(T, -1, -1))


def test_the_table_of_a_learned_variance_by_hand():
    schedule, w = dj.schedule_from_beta(np.array([0.36, 0.5])), 0.5 * 0.36 / 0.68  # alpha_bar = 1, 0.64, 0.32
    table = dj.ancestral_table(schedule, "learned")  # from the lower bound to the upper
    np.testing.assert_allclose(table.c, [w**0.5, 0], atol=1e-15)
    np.testing.assert_allclose(table.c * np.exp(table.r), [0.5**0.5, 0], atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@STEPS
@pytest.mark.parametrize("make_table", [TABLES[1], *TABLES[3:]], ids=[NAMES[1], *NAMES[3:]])
def test_steps_that_know_x_0_keep_the_forward_marginals(schedule, S, make_table):
    """If x_0 is a known point, q(x_t | x_0) must go to q(x_s | x_0) (Song et al. 2021, lemma 1)."""
    table, times = make_table(schedule, S), strided_timesteps(schedule.num_timesteps, S)
    alpha_bar_t, alpha_bar_s = alpha_bar_of(schedule)[times[:-1]], alpha_bar_of(schedule)[times[1:]]
    np.testing.assert_allclose(table.a * alpha_bar_t**0.5 + table.b + table.d.sum(1), alpha_bar_s**0.5, rtol=1e-12)
    np.testing.assert_allclose(table.a**2 * (1 - alpha_bar_t) + table.c**2, 1 - alpha_bar_s, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("schedule", SCHEDULES)
@STEPS
def test_the_upper_bound_is_exact_for_standard_normal_data(schedule, S):
    """For x_0 ~ N(0, I) the best x_0_hat is sqrt(alpha_bar_t) x_t, and every x_t is N(0, I) (Ho et al. 2020, sec. 3.2)."""
    table = dj.ancestral_table(schedule, "upper_bound", S)
    gain = table.a + table.b * schedule.at(table.t)[0]
    np.testing.assert_allclose((gain**2 + table.c**2)[:-1], 1, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@STEPS
def test_ddim_at_eta_1_is_the_lower_bound_and_zero_is_neither(schedule, S):
    ddim, lower = dj.ddim_table(schedule, 1.0, S), dj.ancestral_table(schedule, "lower_bound", S)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-10), ddim, lower)
    if S > 1:
        zero = dj.ancestral_table(schedule, "zero", S)
        assert np.all(zero.c == 0)
        assert np.abs(zero.a - dj.ddim_table(schedule, 0.0, S).a).max() > 0.01


@pytest.mark.parametrize("shape", [(2,), (4, 4, 1)])
def test_sample_is_the_end_of_its_trajectory(keys, shape):
    seen = []

    def denoise(x_t, t):
        seen.append((x_t.shape, t.shape, t.dtype.name))
        return jnp.tanh(x_t)

    draw_path = jax.jit(lambda table, keys: dj.sample_trajectory(denoise, table, keys, shape))
    draw = jax.jit(lambda table, keys: dj.sample(denoise, table, keys, shape))
    for name, make_table in zip(NAMES, TABLES, strict=True):
        table = make_table(SCHEDULES[2], 4)
        path, x_0 = draw_path(table, keys), draw(table, keys)
        chex.assert_shape(path, (5, 8, *shape))
        chex.assert_type([path, x_0], jnp.float32)
        np.testing.assert_array_equal(path[0], x_0, err_msg=name)
    assert set(seen) == {((8, *shape), (8,), "float32")}


@EVERY_TABLE
def test_each_step_is_eq_11_with_fresh_noise(keys, make_table):
    """Solve each step of a trajectory for its noise: standard, and independent of that of the other steps."""
    schedule, shape = SCHEDULES[2], (4000,)
    table = make_table(schedule, 4)
    path = np.asarray(dj.sample_trajectory(lambda x_t, t: 0.3 * x_t, table, keys, shape))[::-1]
    noises = [path[0]]
    for i in range(4):
        rest = path[i + 1] - (table.a[i] + 0.3 * table.b[i]) * path[i]
        rest -= sum(0.3 * table.d[i, j] * path[i - 1 - j] for j in range(min(i, 3)))
        if table.c[i] == 0:
            np.testing.assert_allclose(rest, 0, atol=1e-5)
        else:
            noises.append(rest / table.c[i])
    flat = np.stack(noises).reshape(len(noises), -1)
    np.testing.assert_allclose(flat.mean(1), 0, atol=5 / 32_000**0.5)
    np.testing.assert_allclose(flat @ flat.T / 32_000, np.eye(len(flat)), atol=5 * (2 / 32_000) ** 0.5)


def test_a_learned_variance_is_that_of_the_network_at_each_element(keys):
    """Solve the first step for its noise, with f = 0, 1/4 and 1 in three places; its deviations are between the bounds."""
    schedule, points = SCHEDULES[2], 8000
    t = schedule.num_timesteps
    beta, w = beta_of(schedule)[t], float(dj.posterior(schedule, jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.array([t]))[1][0])
    f = jnp.repeat(jnp.array([[0.0], [0.25], [1.0]]), points, 1)[None]
    denoise = lambda x_t, t: (0.3 * x_t, jnp.broadcast_to(f, x_t.shape))  # noqa: E731
    table = dj.ancestral_table(schedule, "learned")
    path = np.asarray(dj.sample_trajectory(denoise, table, keys, (3, points)))[::-1]
    noise = path[1] - (table.a[0] + 0.3 * table.b[0]) * path[0]
    expected = [w**0.5, (w**0.75 * beta**0.25) ** 0.5, beta**0.5]
    np.testing.assert_allclose(noise.std((0, 2)), expected, rtol=5 / (2 * 8 * points) ** 0.5)
    np.testing.assert_array_equal(path[-1], np.float32(0.3) * path[-2])  # no noise at the end


def test_a_denoiser_in_half_precision_gives_float32_samples(keys):
    denoise = lambda x_t, t: (0.5 * x_t).astype(jnp.bfloat16)  # noqa: E731
    assert dj.sample(denoise, dj.dpm_solver_table(SCHEDULES[2], 0.0, 3), keys, (2,)).dtype == jnp.float32


def test_a_sample_depends_on_its_key_alone(keys):
    table = dj.ancestral_table(SCHEDULES[2])
    draw = jax.jit(lambda keys: dj.sample_trajectory(lambda x_t, t: jnp.tanh(x_t), table, keys, (5,)))
    whole, part = draw(keys), draw(keys[2:5])
    np.testing.assert_array_equal(whole[-1, 2:5], part[-1])
    np.testing.assert_allclose(whole[:, 2:5], part, rtol=1e-6, atol=1e-6)
    assert len(np.unique(np.asarray(whole[-1]).ravel())) == whole[-1].size


def test_another_sampler_and_number_of_steps_do_not_recompile_and_change_nothing(keys):
    traces = []

    @jax.jit
    def draw(table, keys):
        traces.append(0)
        return dj.sample(lambda x_t, t: jnp.tanh(x_t), table, keys, (3,))

    alone = jax.jit(lambda table: dj.sample_trajectory(lambda x_t, t: jnp.tanh(x_t), table, keys, (3,))[0])

    T = SCHEDULES[0].num_timesteps
    for make_table in TABLES:
        for S in (1, 4, T):
            table = make_table(SCHEDULES[0], S)
            padded = dj.padded(table, T)
            assert all(column.shape == (T, *old.shape[1:]) for column, old in zip(padded, table, strict=True))
            np.testing.assert_allclose(draw(padded, keys), alone(table), rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_outside_0_to_1_is_named(eta):
    with pytest.raises(ValueError, match=f"eta must be between 0 and 1, got {eta}"):
        dj.ddim_table(SCHEDULES[0], eta)
