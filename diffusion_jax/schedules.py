"""Noise schedules: how much of the data is left at each timestep, as a table over t = 0..T.

A schedule is T numbers beta_1..beta_T in (0, 1), the variance that each step of the forward process adds:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                       (1)  [Ho et al. 2020, eq. 2]
    alpha_bar_t = prod_{s <= t} (1 - beta_s),  alpha_bar_0 = 1                      (2)
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                   (3)  [Ho et al. 2020, eq. 4]

Tables are made in float64 NumPy and cast when they meet the data: 1 - alpha_bar_t computed in float32 is wrong in the third
digit at small t.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float


class NoiseSchedule(NamedTuple):
    """Every table that eqs. 1-3 need, each of length T + 1 and indexed by t; t = 0 is the data, so beta[0] = 0."""

    beta: Float[np.ndarray, " T+1"]
    alpha_bar: Float[np.ndarray, " T+1"]
    sqrt_alpha_bar: Float[np.ndarray, " T+1"]
    sqrt_one_minus_alpha_bar: Float[np.ndarray, " T+1"]

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps between the data and the noise."""
        return len(self.beta) - 1


def schedule_from_beta(beta: ArrayLike) -> NoiseSchedule:
    """The schedule whose steps add the variances beta_1..beta_T, a vector (eqs. 1-3), in float64.

    Raises ValueError if it is empty, or if one lies outside (0, 1).
    """
    beta = np.asarray(beta, np.float64)
    if beta.ndim != 1 or len(beta) == 0:
        raise ValueError(f"beta must be a vector of at least one value, got shape {beta.shape}")
    if not np.all((beta > 0) & (beta < 1)):
        wrong = beta[~((beta > 0) & (beta < 1))][0]
        raise ValueError(f"every beta must lie strictly between 0 and 1, got {wrong}")
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
    return NoiseSchedule(
        beta=np.concatenate([[0.0], beta]),
        alpha_bar=np.exp(log_alpha_bar),
        sqrt_alpha_bar=np.exp(log_alpha_bar / 2),
        sqrt_one_minus_alpha_bar=np.sqrt(-np.expm1(log_alpha_bar)),
    )


def linear_schedule(num_timesteps: int) -> NoiseSchedule:
    """Ho et al. (2020, sec. 4): beta linear from 1e-4 to 0.02 over 1000 steps, seen at `num_timesteps` evenly spaced times.

    At T = 1000 this is theirs exactly. For any other T the same process is cut into T steps: alpha_bar_t is theirs at time
    1000 t / T, with log alpha_bar linear between their steps. So alpha_bar_T = 4.0e-5 and sampling may start at N(0, I)
    whatever T is, which 1e-4..0.02 spread over few steps does not give (alpha_bar_T = 0.9 at T = 10), and beta stays below 1,
    which scaling it by 1000 / T does not.

    Raises ValueError unless `num_timesteps` is a whole number of at least 1.
    """
    _check_num_timesteps(num_timesteps)
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))])
    times = 1000 * np.arange(num_timesteps + 1) / num_timesteps
    log_alpha_bar = np.interp(times, np.arange(1001), log_alpha_bar)
    return schedule_from_beta(-np.expm1(np.diff(log_alpha_bar)))


def cosine_schedule(num_timesteps: int) -> NoiseSchedule:
    """Nichol & Dhariwal (2021, eq. 17): alpha_bar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + 0.008) / 1.008), beta <= 0.999.

    Raises ValueError unless `num_timesteps` is a whole number of at least 1.
    """
    _check_num_timesteps(num_timesteps)
    times = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos(np.pi / 2 * (times + 0.008) / 1.008) ** 2
    return schedule_from_beta(np.minimum(1 - f[1:] / f[:-1], 0.999))


def _check_num_timesteps(num_timesteps: int) -> None:
    if not (num_timesteps >= 1 and num_timesteps % 1 == 0):
        raise ValueError(f"num_timesteps must be a whole number of at least 1, got {num_timesteps}")
