"""A mixture of three Gaussians in the plane, whose best denoiser has a closed form, and a walk by eq. 8 in NumPy."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import diffusion_jax as dj

PEERS = json.loads((Path(__file__).parent / "reference" / "peers.json").read_text())
WEIGHTS, MEANS, DEVIATIONS = (np.array(PEERS["problem"][name]) for name in ("weights", "means", "stds"))


def best_x_0_hat(v: np.ndarray, sigma: float) -> np.ndarray:
    """E[x_0 | v] for v = x_0 + sigma eps."""
    variance = DEVIATIONS**2 + sigma**2
    difference = v[:, None, :] - MEANS
    logits = np.log(WEIGHTS) - np.log(variance) - (difference**2).sum(-1) / (2 * variance)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    means = MEANS + (DEVIATIONS**2 / variance)[:, None] * difference
    return ((shares / shares.sum(1, keepdims=True))[:, :, None] * means).sum(1)


def denoiser(schedule: dj.NoiseSchedule) -> Callable[[np.ndarray, float], np.ndarray]:
    """The same for x_t = signal v at time t; the mean of the data where there is no signal."""

    def denoise(x_t, t):
        signal, noise = schedule.at(t)
        return best_x_0_hat(x_t / signal, noise / signal) if signal > 0 else np.broadcast_to(WEIGHTS @ MEANS, x_t.shape)

    return denoise


def walk(table: dj.SamplerTable, denoise: Callable, start: np.ndarray, noises: np.ndarray | None = None) -> list[np.ndarray]:
    """x at the time of each row and after the last."""
    path, kept = [start], [np.zeros_like(start)] * 3
    for i, (t, _, a, b, c, _, d, e, f) in enumerate(zip(*table, strict=True)):
        x_0_hat = denoise(path[-1], t)
        x = a * path[-1] + b * x_0_hat + sum(weight * y for weight, y in zip(d, kept, strict=True))
        x = x if c == 0 else x + c * noises[i]
        kept = [e * path[-1] + f * x_0_hat, *kept[:2]]
        path.append(x)
    return path
