"""How good samples are: distances between two sets of features, and the variational bound of the likelihood.

Features are the rows of an array [N, d], of real and of generated data under the same network.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion import Denoise, _as_column, _look_up, posterior_coefficients, q_sample
from diffusion_jax.schedules import NoiseSchedule

BLOCK = 250
LN2 = float(np.log(2))


def frechet_distance(real: Float[np.ndarray, "N d"], generated: Float[np.ndarray, "M d"]) -> float:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)), of the Gaussians with the features' means m and covariances C.

    [Heusel et al. 2017, eq. 6]. It is biased upwards by an amount that falls with N: compare at equal N only.
    """
    difference = real.mean(0, np.float64) - generated.mean(0, np.float64)
    c_1, c_2 = (np.atleast_2d(np.cov(x.astype(np.float64), rowvar=False)) for x in (real, generated))
    values, vectors = np.linalg.eigh(c_1)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c_2 @ root), 0)).sum()
    return float(difference @ difference + np.trace(c_1) + np.trace(c_2) - 2 * cross)


def kernel_distance(real: Float[np.ndarray, "N d"], generated: Float[np.ndarray, "M d"]) -> float:
    """The squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, without bias [Binkowski et al. 2018, sec. 4].

    It is around 0, and may be below it, where the sets are alike.
    """

    def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
        return sum(float(((x[i : i + BLOCK] @ y.T / x.shape[1] + 1) ** 3).sum()) for i in range(0, len(x), BLOCK))

    def within(x: np.ndarray) -> float:
        diagonal = (((x**2).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    x, y = real.astype(np.float64), generated.astype(np.float64)
    return within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))


def precision_and_recall(
    real: Float[np.ndarray, "N d"], generated: Float[np.ndarray, "M d"], neighbours: int = 3
) -> tuple[float, float]:
    """The share of generated features inside the real ones' balls, and the reverse [Kynkaanniemi et al. 2019, sec. 3].

    The ball around a feature reaches to the nearest but `neighbours` - 1 of the others of its set.
    """

    def covered(centres: np.ndarray, points: np.ndarray) -> float:
        radii = nearest_squared_distances(centres, centres, neighbours + 1)[:, -1]  # the nearest of all is the feature itself
        inside = [
            (_squared_distances(points[i : i + BLOCK], centres) <= radii).any(axis=1) for i in range(0, len(points), BLOCK)
        ]
        return float(np.concatenate(inside).mean())

    return covered(real, generated), covered(generated, real)


def nearest_squared_distances(x: Float[np.ndarray, "N d"], y: Float[np.ndarray, "M d"], count: int) -> Float[np.ndarray, "N c"]:
    """|x_i - y_j|^2 for the `count` nearest y_j of each x_i, nearest first."""
    blocks = (_squared_distances(x[i : i + BLOCK], y) for i in range(0, len(x), BLOCK))
    return np.concatenate([np.sort(np.partition(block, count - 1, axis=1)[:, :count], axis=1) for block in blocks])


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)


def prior_bits(schedule: NoiseSchedule, x_0: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    """L_T = KL(q(x_T | x_0) || N(0, I)), in bits: what is left of the data at t = T [Ho et al. 2020, eq. 5]."""
    a_2, s_2 = schedule.alpha_bar[-1], schedule.sqrt_one_minus_alpha_bar[-1] ** 2
    nats = (a_2 * x_0**2 + float(s_2 - 1 - np.log(s_2))) / 2
    return nats.reshape(len(x_0), -1).sum(1) / LN2


def bound_bits(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_0: Float[Array, "B *shape"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *shape"],
    sigma_type: str = "lower_bound",
) -> Float[Array, " B"]:
    """L_{t-1} of each example, in bits, of which the bound of -log2 p(x_0) is the sum over t = 1..T, and `prior_bits`.

    With x_0 in 256 levels from -1 to 1, k, m and w of eq. 10 at s = t - 1, and x_t from `eps` [Ho et al. 2020, eqs. 5, 13]:

        L_{t-1} = KL(N(k x_t + m x_0, w I) || N(k x_t + m x_0_hat, c^2 I)),  t > 1
        L_0     = -log2 of the mass of N(x_0_hat, c^2 I) in the level of x_0

    where c^2 is beta_t for the `sigma_type` "upper_bound" and w for "lower_bound"; w is 0 at t = 1, and that of t = 2 is taken
    there, as the authors' code does, or beta_1 where T = 1. Raises ValueError on another type.
    """
    if sigma_type not in ("upper_bound", "lower_bound"):
        raise ValueError(f"sigma_type must be upper_bound or lower_bound for a likelihood, got {sigma_type!r}")
    times = np.arange(1, schedule.num_timesteps + 1)
    _, m, w = posterior_coefficients(schedule, times, times - 1)
    w[0] = w[1] if len(w) > 1 else schedule.beta[1]
    c_2 = schedule.beta[1:] if sigma_type == "upper_bound" else w
    m, w, c_2 = (_as_column(_look_up(column, t - 1), x_0.ndim) for column in (m, w, c_2))
    x_0_hat = denoise(q_sample(schedule, x_0, t, eps), t)
    divergence = (jnp.log(c_2 / w) + (w + (m * (x_0 - x_0_hat)) ** 2) / c_2 - 1) / 2
    nats = jnp.where(_as_column(t, x_0.ndim) > 1, divergence, -_log_mass(x_0, x_0_hat, jnp.sqrt(c_2)))
    return nats.reshape(len(x_0), -1).sum(1) / LN2


def _log_mass(x: Array, mean: Array, sigma: Array) -> Array:
    """log of the mass of N(mean, sigma^2) from x - 1/255 to x + 1/255; from -1 it reaches down, and from 1 up, without end."""
    mirror = jnp.where(x > mean, -1.0, 1.0)  # to the lower tail, where the logarithm of the cumulative distribution is exact
    x, mean = mirror * x, mirror * mean
    upper = norm.logcdf(jnp.where(x > 0.999, jnp.inf, (x - mean + 1 / 255) / sigma))
    lower = norm.logcdf(jnp.where(x < -0.999, -jnp.inf, (x - mean - 1 / 255) / sigma))
    return upper + jnp.log1p(-jnp.exp(jnp.minimum(lower - upper, -1e-7)))
