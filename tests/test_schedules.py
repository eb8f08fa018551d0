import numpy as np
import pytest
from ho import alpha_bar_of, beta_of

from diffusion_jax import cosine_schedule, linear_schedule, schedule_from_beta
from diffusion_jax.schedules import karras_sigmas

BOTH = pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])


@BOTH
@pytest.mark.parametrize("T", [1, 2, 10, 137, 500, 1000, 4000])
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


@BOTH
@pytest.mark.parametrize("T", [0, -3])
def test_no_schedule_without_steps(make, T):
    with pytest.raises(ValueError, match=f"at least 1, got {T}"):
        make(T)


@pytest.mark.parametrize(("beta", "wrong"), [([0.1, 1.0], 1.0), ([0.0], 0.0)])
def test_beta_outside_its_range_is_named(beta, wrong):
    with pytest.raises(ValueError, match=f"strictly between 0 and 1, got {wrong}$"):
        schedule_from_beta(np.array(beta))


@pytest.mark.parametrize(("count", "expected"), [(1, [5.0]), (2, [0.1, 5.0]), (3, [0.1, ((0.1**0.5 + 5**0.5) / 2) ** 2, 5.0])])
def test_karras_sigmas_by_hand(count, expected):
    np.testing.assert_allclose(karras_sigmas(count, 0.1, 5.0, rho=2.0), expected, rtol=1e-12)
