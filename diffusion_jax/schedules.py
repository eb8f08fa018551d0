"""Noise schedules: two tables over t = 0..T that give the amounts of data and of noise in x_t.

    x_t = signal_t x_0 + noise_t eps,  eps ~ N(0, I)                                (1)

Row 0 is the data: signal 1, noise 0. The only other assumption is that sigma = noise / signal increases with t. So a schedule
may be variance-preserving (signal^2 + noise^2 = 1) [Ho et al. 2020], rectified flow (signal + noise = 1) [Liu et al. 2022],
variance-exploding (signal = 1) [Song et al. 2021b], or any other Gaussian path. Both columns are linear in t between rows.

Tables are float64 NumPy arrays and are cast only where they meet the data: float32 loses digits of 1 - alpha_bar_t at small t.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float


class NoiseSchedule(NamedTuple):
    """The two columns of eq. 1, each of length T + 1 and indexed by t."""

    signal: Float[np.ndarray, " times"]
    noise: Float[np.ndarray, " times"]

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps between the data and the noise."""
        return len(self.signal) - 1

    @property
    def sigma(self) -> Float[np.ndarray, " times"]:
        """noise / signal; infinite where signal is 0. The log-SNR is -2 log(sigma)."""
        with np.errstate(divide="ignore"):
            return self.noise / self.signal

    def at(self, t: Any) -> tuple[Any, Any]:
        """signal and noise in float64 at `t`, a real time from 0 to T or an array of times."""
        rows = np.arange(len(self.signal))
        return np.interp(t, rows, self.signal), np.interp(t, rows, self.noise)

    def time_of(self, sigma: Any) -> Any:
        """The real time at which noise / signal is `sigma`, a number or an array. Clipped to the range 0..T."""
        sigma = np.clip(sigma, 0, self.sigma[-1])
        row = np.clip(np.searchsorted(self.sigma, sigma, side="right") - 1, 0, self.num_timesteps - 1)
        signal, noise = self.signal[row], self.noise[row]
        rise, fall = self.noise[row + 1] - noise, signal - self.signal[row + 1]
        finite = np.where(np.isinf(sigma), 0, sigma)
        return np.where(np.isinf(sigma), self.num_timesteps, row + (finite * signal - noise) / (rise + finite * fall))


def schedule_from_columns(signal: ArrayLike, noise: ArrayLike) -> NoiseSchedule:
    """The schedule of any Gaussian path, from its two columns over t = 0..T (eq. 1).

    Raises ValueError unless both columns are finite vectors of the same length, at least 2, signal starts at 1 and is never
    negative, noise starts at 0, and noise / signal increases.
    """
    schedule = NoiseSchedule(np.asarray(signal, np.float64), np.asarray(noise, np.float64))
    shapes = schedule.signal.shape, schedule.noise.shape
    if len(shapes[0]) != 1 or shapes[0][0] < 2 or shapes[0] != shapes[1]:
        raise ValueError(f"signal and noise must be vectors of one length of at least 2, got the shapes {shapes}")
    if (schedule.signal[0], schedule.noise[0]) != (1, 0):
        raise ValueError(f"row 0 must be the data, signal 1 and noise 0, got {schedule.signal[0]} and {schedule.noise[0]}")
    if not (np.all(np.isfinite(schedule)) and np.all(schedule.signal >= 0)):
        raise ValueError(f"signal and noise must be finite, signal not negative, got {np.min(schedule)} to {np.max(schedule)}")
    with np.errstate(invalid="ignore"):
        increases = np.diff(schedule.sigma) > 0
    if not np.all(increases):
        row = 1 + int(np.argmin(increases))
        raise ValueError(f"noise / signal must increase from row to row, got {schedule.sigma[row]} at t = {row}")
    return schedule


def schedule_from_beta(beta: ArrayLike) -> NoiseSchedule:
    """The variance-preserving schedule with step variances beta_1..beta_T [Ho et al. 2020, eqs. 2, 4].

        q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                    (2)
        alpha_bar_t = prod_{s <= t} (1 - beta_s),  signal_t = sqrt(alpha_bar_t),  noise_t = sqrt(1 - alpha_bar_t)      (3)

    Raises ValueError unless beta is a non-empty vector of values in (0, 1).
    """
    beta = np.asarray(beta, np.float64)
    if beta.ndim != 1 or len(beta) == 0:
        raise ValueError(f"beta must be a vector of at least one value, got shape {beta.shape}")
    if not np.all((beta > 0) & (beta < 1)):
        wrong = beta[~((beta > 0) & (beta < 1))][0]
        raise ValueError(f"every beta must lie strictly between 0 and 1, got {wrong}")
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
    return NoiseSchedule(np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar)))


def linear_schedule(num_timesteps: int) -> NoiseSchedule:
    """Ho et al.'s (2020, sec. 4) schedule, beta linear from 1e-4 to 0.02 over 1000 steps, resampled to `num_timesteps` steps.

    At T = 1000 this is exactly their schedule. For any other T, alpha_bar_t is their value at time 1000 t / T, with log
    alpha_bar linear between their steps. So alpha_bar_T = 4.0e-5 for every T, small enough to start sampling at N(0, I), and
    beta stays below 1. Spreading 1e-4..0.02 over 10 steps would leave alpha_bar_T = 0.9 instead, and scaling beta by 1000 / T
    would make it exceed 1.

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


def flow_schedule(num_timesteps: int) -> NoiseSchedule:
    """Rectified flow: x_t = (1 - t/T) x_0 + (t/T) eps [Liu et al. 2022; Lipman et al. 2023, eq. 20, with time reversed].

    Raises ValueError unless `num_timesteps` is a whole number of at least 1.
    """
    _check_num_timesteps(num_timesteps)
    noise = np.arange(num_timesteps + 1) / num_timesteps
    return NoiseSchedule(1 - noise, noise)


def variance_exploding_schedule(
    num_timesteps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> NoiseSchedule:
    """Variance exploding: x_t = x_0 + sigma_t eps, with sigma^(1/rho) linear from sigma_1 = sigma_min to sigma_T = sigma_max.

    [Song et al. 2021b, sec. 3.4; Karras et al. 2022, eq. 5.]
    Raises ValueError unless `num_timesteps` is a whole number of at least 1 and 0 < sigma_min < sigma_max < infinity.
    """
    _check_num_timesteps(num_timesteps)
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max < infinity, got {sigma_min} and {sigma_max}")
    return NoiseSchedule(np.ones(num_timesteps + 1), np.append(0.0, karras_sigmas(num_timesteps, sigma_min, sigma_max, rho)))


def karras_sigmas(count: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Float[np.ndarray, " count"]:
    """`count` values from sigma_min up to sigma_max with sigma^(1/rho) evenly spaced; only sigma_max if `count` is 1."""
    shares = np.linspace(0, 1, count) if count > 1 else np.ones(1)
    return (sigma_min ** (1 / rho) + shares * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho


def _check_num_timesteps(num_timesteps: int) -> None:
    if not (num_timesteps >= 1 and num_timesteps % 1 == 0):
        raise ValueError(f"num_timesteps must be a whole number of at least 1, got {num_timesteps}")
