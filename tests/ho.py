"""The tables of Ho et al. (2020) of a variance-preserving schedule, over t = 0..T."""

import numpy as np

import diffusion_jax as dj


def alpha_bar_of(schedule: dj.NoiseSchedule) -> np.ndarray:
    return schedule.signal**2


def beta_of(schedule: dj.NoiseSchedule) -> np.ndarray:
    return np.append(0.0, 1 - (schedule.signal[1:] / schedule.signal[:-1]) ** 2)
