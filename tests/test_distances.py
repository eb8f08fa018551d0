import numpy as np
import scipy.linalg
import scipy.spatial
import scipy.stats

from support import distances

RNG = np.random.default_rng(0)
REAL, GENERATED = RNG.normal(size=(300, 5)), RNG.normal(size=(200, 5)) @ RNG.normal(size=(5, 5)) + 0.3


def test_the_frechet_distance_is_the_formula_by_scipy():
    c_1, c_2 = np.cov(REAL.T), np.cov(GENERATED.T)
    expected = np.sum((REAL.mean(0) - GENERATED.mean(0)) ** 2) + np.trace(c_1 + c_2 - 2 * scipy.linalg.sqrtm(c_1 @ c_2).real)
    np.testing.assert_allclose(distances.frechet_distance(REAL, GENERATED), expected, rtol=1e-8)


def test_features_that_are_constant_are_no_trouble():
    real, generated = (np.concatenate([x, np.ones((len(x), 2))], axis=1) for x in (REAL, GENERATED))
    expected = distances.frechet_distance(REAL, GENERATED)
    np.testing.assert_allclose(distances.frechet_distance(real, generated), expected, rtol=1e-6)


def test_the_kernel_distance_is_its_definition(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 64)
    kernel = lambda x, y: (np.dot(x, y) / 5 + 1) ** 3  # noqa: E731
    mean = lambda values: np.mean(list(values))  # noqa: E731
    x, y = REAL[:70], GENERATED[:40]
    expected = (
        mean(kernel(x[i], x[j]) for i in range(70) for j in range(70) if i != j)
        + mean(kernel(y[i], y[j]) for i in range(40) for j in range(40) if i != j)
        - 2 * mean(kernel(a, b) for a in x for b in y)
    )
    np.testing.assert_allclose(distances.kernel_distance(x, y), expected, rtol=1e-9)


def test_precision_and_recall_are_their_definition(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 64)

    def share(centres, points):
        tree = scipy.spatial.cKDTree(centres)
        radii = tree.query(centres, 4)[0][:, -1]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    expected = share(REAL, GENERATED), share(GENERATED, REAL)
    np.testing.assert_allclose(distances.precision_and_recall(REAL, GENERATED), expected)
    assert distances.precision_and_recall(REAL, REAL) == (1.0, 1.0)
    assert distances.precision_and_recall(REAL, REAL + 100) == (0.0, 0.0)


def test_density_and_coverage_are_their_definition(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 64)
    radii = scipy.spatial.cKDTree(REAL).query(REAL, 6)[0][:, -1]
    within = scipy.spatial.distance.cdist(GENERATED, REAL) <= radii
    density, coverage = distances.density_and_coverage(REAL, GENERATED)
    np.testing.assert_allclose(density, within.sum() / (5 * len(GENERATED)))
    np.testing.assert_allclose(coverage, within.any(0).mean())
    assert distances.density_and_coverage(REAL, REAL + 100) == (0, 0)
    assert distances.density_and_coverage(REAL, np.repeat(REAL[:1], 50, 0))[1] < 0.1  # samples that are all alike


def test_the_nearest_are_those_of_a_tree(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 64)
    expected = scipy.spatial.cKDTree(GENERATED).query(REAL, 3)[0] ** 2
    np.testing.assert_allclose(distances.nearest_squared_distances(REAL, GENERATED, 3), expected, rtol=1e-9)
