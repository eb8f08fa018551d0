import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from ho import alpha_bar_of, beta_of

from diffusion_jax import cosine_schedule, linear_schedule, schedule_from_beta
from diffusion_jax.schedules import karras_sigmas

BOTH = pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])


def test_tables_of_two_steps_by_hand():
    schedule = schedule_from_beta(np.array([0.36, 0.5]))
    assert schedule.num_timesteps == 2
    np.testing.assert_allclose(beta_of(schedule), [0, 0.36, 0.5])
    np.testing.assert_allclose(alpha_bar_of(schedule), [1, 0.64, 0.32])
    np.testing.assert_allclose(schedule.signal, [1, 0.8, math.sqrt(0.32)])
    np.testing.assert_allclose(schedule.noise, [0, 0.6, math.sqrt(0.68)])


@BOTH
@pytest.mark.parametrize("T", [1, 2, 10, 500, 1000, 4000])
def test_every_schedule_starts_at_the_data_and_ends_at_noise(make, T):
    schedule = make(T)
    assert alpha_bar_of(schedule)[0] == 1
    assert schedule.noise[0] == 0
    assert all(len(table) == T + 1 and table.dtype == np.float64 for table in schedule)
    assert np.all(np.diff(alpha_bar_of(schedule)) < 0)
    assert beta_of(schedule)[0] == 0
    assert np.all((beta_of(schedule)[1:] > 0) & (beta_of(schedule)[1:] < 1))
    assert alpha_bar_of(schedule)[-1] <= 1e-3 * (1 + 1e-9)
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1, atol=1e-15)


def test_linear_is_ho_et_al_at_1000_steps_in_exact_arithmetic():
    getcontext().prec = 50
    start, end, product, expected = Decimal("1e-4"), Decimal("0.02"), Decimal(1), []
    for i in range(1000):
        product *= 1 - (start + (end - start) * i / 999)
        expected.append(product)
    schedule = linear_schedule(1000)
    np.testing.assert_allclose(beta_of(schedule)[1:], np.linspace(1e-4, 0.02, 1000), rtol=1e-10)
    np.testing.assert_allclose(alpha_bar_of(schedule)[1:], [float(p) for p in expected], rtol=1e-13)
    noise = [float((1 - p).sqrt()) for p in expected]
    np.testing.assert_allclose(schedule.noise[1:], noise, rtol=1e-13)


def test_linear_at_other_lengths_is_the_same_process():
    full = alpha_bar_of(linear_schedule(1000))
    np.testing.assert_allclose(alpha_bar_of(linear_schedule(10)), full[::100], rtol=1e-12)
    np.testing.assert_allclose(alpha_bar_of(linear_schedule(4000))[::4], full, rtol=1e-12)
    for T in (1, 3, 10, 137, 4000):
        assert alpha_bar_of(linear_schedule(T))[-1] == pytest.approx(4.0358e-5, rel=1e-4)


def test_cosine_is_nichol_and_dhariwal_eq_17():
    T = 40
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    schedule = cosine_schedule(T)
    np.testing.assert_allclose(alpha_bar_of(schedule)[:T], [value / f[0] for value in f[:T]], rtol=1e-12)
    assert beta_of(schedule)[T] == pytest.approx(0.999)


@BOTH
@pytest.mark.parametrize("T", [0, -3])
def test_no_schedule_without_steps(make, T):
    with pytest.raises(ValueError, match=f"at least 1, got {T}"):
        make(T)


@pytest.mark.parametrize(
    ("beta", "wrong"), [([0.1, 1.0], 1.0), ([0.0], 0.0), ([-0.2, 0.1], -0.2), ([0.3, float("nan")], "nan")]
)
def test_beta_outside_its_range_is_named(beta, wrong):
    with pytest.raises(ValueError, match=f"strictly between 0 and 1, got {wrong}$"):
        schedule_from_beta(np.array(beta))


@pytest.mark.parametrize("shape", [(0,), (2, 2)])
def test_beta_must_be_a_vector(shape):
    with pytest.raises(ValueError, match="vector"):
        schedule_from_beta(np.full(shape, 0.5))


@pytest.mark.parametrize(("count", "expected"), [(1, [5.0]), (2, [0.1, 5.0]), (3, [0.1, ((0.1**0.5 + 5**0.5) / 2) ** 2, 5.0])])
def test_karras_sigmas_by_hand(count, expected):
    np.testing.assert_allclose(karras_sigmas(count, 0.1, 5.0, rho=2.0), expected, rtol=1e-12)
