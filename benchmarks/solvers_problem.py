"""Data whose best denoiser is known, and how far samples are from them, for solvers.py and solvers_diffusers.py; in NumPy.

Data are a mixture of Gaussians, of mean 0 and of variance 1 (the mean over its coordinates). Component k has the mean m_k and
the covariance Q diag(a_k^2) Q^T, with one rotation Q for all.
"""

from typing import NamedTuple

import numpy as np

T = 500
CALLS = (5, 10, 20)
COUNT = 20_000
SEEDS = (0, 1, 2)
DIRECTIONS = 256


class Mixture(NamedTuple):
    """K Gaussians in d dimensions: weights [K], then means [K, d] and deviations [K, d] in the basis `rotation` [d, d]."""

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    rotation: np.ndarray

    def draw(self, rng: np.random.Generator, count: int = COUNT) -> np.ndarray:
        k = rng.choice(len(self.weights), count, p=self.weights)
        points = self.means[k] + self.deviations[k] * rng.standard_normal((count, self.means.shape[1]))
        return points @ self.rotation.T

    def best_x_0_hat(self, v: np.ndarray, sigma: float) -> np.ndarray:
        """E[x_0 | v] for v = x_0 + sigma eps; the mean of the data where sigma is infinite."""
        if np.isinf(sigma):
            return np.zeros_like(v)
        y, variances = v @ self.rotation, self.deviations**2 + sigma**2
        logits = y @ (self.means / variances).T - y**2 @ (0.5 / variances).T
        logits += np.log(self.weights) - 0.5 * (np.log(variances) + self.means**2 / variances).sum(1)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        x_0_hat = y * (shares @ (self.deviations**2 / variances)) + shares @ (self.means * sigma**2 / variances)
        return x_0_hat @ self.rotation.T


def mixture(weights: np.ndarray, means: np.ndarray, deviations: np.ndarray, rotation: np.ndarray) -> Mixture:
    """Moved and scaled to mean 0 and variance 1."""
    weights, deviations = weights / weights.sum(), np.broadcast_to(deviations, means.shape)
    means = means - weights @ means
    scale = np.sqrt(np.mean(weights @ (means**2 + deviations**2)))
    return Mixture(weights, means / scale, deviations / scale, rotation)


def data_sets() -> dict[str, Mixture]:
    """Three that the spacing "flow" was chosen on, and two that were kept for a check."""
    rng, even = np.random.default_rng(0), np.ones(10)

    def rotation(d):
        return np.linalg.qr(rng.standard_normal((d, d)))[0]

    axes = np.geomspace(1, 0.03, 16)
    return {
        "plane": mixture(even, rng.standard_normal((10, 2)), 0.05, np.eye(2)),
        "16-d": mixture(even, rng.standard_normal((10, 16)), 0.05, np.eye(16)),
        "anisotropic": mixture(even, rng.standard_normal((10, 16)) * axes, 0.3 * axes, rotation(16)),
        "wide": mixture(rng.uniform(0.3, 1, 6), rng.standard_normal((6, 8)), rng.uniform(0.2, 0.8, (6, 8)), rotation(8)),
        "spectrum": mixture(np.ones(1), np.zeros((1, 64)), 1 / np.arange(1, 65), rotation(64)),
    }


def flow(data: Mixture, x: np.ndarray, steps: int = 120) -> np.ndarray:
    """Where the probability flow takes normal draws from sigma = 1000 to 0, by Runge and Kutta's method in log(sigma)."""
    log_sigma = np.log(np.geomspace(1000, 0.001, steps + 1))

    def slope(v, at):
        return v - data.best_x_0_hat(v, np.exp(at))

    v = 1000 * x
    for at, h in zip(log_sigma[:-1], np.diff(log_sigma), strict=True):
        k_1 = slope(v, at)
        k_2 = slope(v + h / 2 * k_1, at + h / 2)
        k_3 = slope(v + h / 2 * k_2, at + h / 2)
        v = v + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + slope(v + h * k_3, at + h))
    return data.best_x_0_hat(v, 0.001)


def projected(x: np.ndarray) -> np.ndarray:
    """x along the directions, each sorted: [DIRECTIONS, count]."""
    directions = np.random.default_rng(1).standard_normal((DIRECTIONS, x.shape[1]))
    return np.sort((directions / np.linalg.norm(directions, axis=1, keepdims=True) @ x.T).astype(np.float32), axis=1)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Sliced Wasserstein-2 of two sets of as many points that went through `projected`."""
    return float(np.sqrt(np.mean((one - other) ** 2, dtype=np.float64)))


def fresh(data: Mixture, seed: int) -> np.ndarray:
    """Data of this seed, through `projected`."""
    return projected(data.draw(np.random.default_rng((seed, 1))))


def problem(data: Mixture, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a walk of this seed begins with at unit deviation, and what it is compared with: data, and the flow's own end."""
    x = np.random.default_rng((seed, 2)).standard_normal((COUNT, data.means.shape[1]))
    return x, fresh(data, seed), projected(flow(data, x))


def distances(samples: np.ndarray, data: np.ndarray, ends: np.ndarray) -> tuple[float, float]:
    """From the data, which is not 0 for the flow itself; and from the ends of the flow from the same starts, which is."""
    samples = projected(samples)
    return distance(samples, data), distance(samples, ends)
