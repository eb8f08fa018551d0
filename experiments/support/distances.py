"""How good samples are: distances between two sets of features.

Features are the rows of an array [N, d], of real and of generated data under the same network.
"""

import numpy as np
from jaxtyping import Float
from sklearn.metrics.pairwise import polynomial_kernel

BLOCK = 250


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
        return sum(float(polynomial_kernel(x[i : i + BLOCK], y).sum()) for i in range(0, len(x), BLOCK))

    def within(x: np.ndarray) -> float:
        diagonal = (((x**2).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    x, y = real.astype(np.float64), generated.astype(np.float64)
    return within(x) + within(y) - 2 * kernel_sum(x, y) / (len(x) * len(y))


def precision_and_recall(
    real: Float[np.ndarray, "N d"], generated: Float[np.ndarray, "M d"], neighbours: int = 3
) -> tuple[float, float]:
    """The share of generated features inside the real ones' balls, and the reverse [Kynkaanniemi et al. 2019, sec. 3].

    The ball around a feature reaches to the `neighbours`-th nearest of the others of its set.
    """

    def covered(centres: np.ndarray, points: np.ndarray) -> float:
        radii = nearest_squared_distances(centres, centres, neighbours + 1)[:, -1]  # the nearest of all is the feature itself
        inside = [
            (_squared_distances(points[i : i + BLOCK], centres) <= radii).any(axis=1) for i in range(0, len(points), BLOCK)
        ]
        return float(np.concatenate(inside).mean())

    return covered(real, generated), covered(generated, real)


def density_and_coverage(
    real: Float[np.ndarray, "N d"], generated: Float[np.ndarray, "M d"], neighbours: int = 5
) -> tuple[float, float]:
    """(density, coverage): mean number of real balls around a generated feature, over `neighbours`; share of balls with one.

    [Naeem et al. 2020, eq. 2 and 3]. The density may be above 1.
    """
    radii = nearest_squared_distances(real, real, neighbours + 1)[:, -1]
    inside, covered = 0, np.zeros(len(real), bool)
    for i in range(0, len(generated), BLOCK):
        within = _squared_distances(generated[i : i + BLOCK], real) <= radii
        inside += int(within.sum())
        covered |= within.any(axis=0)
    return inside / (neighbours * len(generated)), float(covered.mean())


def nearest_squared_distances(x: Float[np.ndarray, "N d"], y: Float[np.ndarray, "M d"], count: int) -> Float[np.ndarray, "N c"]:
    """|x_i - y_j|^2 for the `count` nearest y_j of each x_i, nearest first."""
    blocks = (_squared_distances(x[i : i + BLOCK], y) for i in range(0, len(x), BLOCK))
    return np.concatenate([np.sort(np.partition(block, count - 1, axis=1)[:, :count], axis=1) for block in blocks])


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)
