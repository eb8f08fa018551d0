"""Muon against SVD and against optax's own; and the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import diffusion_jax as dj
from diffusion_jax.optimizers import orthogonalized, scale_by_muon


def matrix(*shape: int, rank: int | None = None) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=shape)
    if rank is not None:
        u, s, v = np.linalg.svd(values, full_matrices=False)
        values = (u[:, :rank] * s[:rank]) @ v[:rank]
    return np.asarray(values, np.float32)


@pytest.mark.parametrize("shape", [(72, 8), (8, 72), (48, 24), (300, 64)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape, scale):
    g = matrix(*shape)
    u, _, v = np.linalg.svd(g, full_matrices=False)
    rotated = u.T @ np.asarray(orthogonalized(jnp.asarray(scale * g))) @ v.T
    assert np.all((np.diag(rotated) > 0.65) & (np.diag(rotated) < 1.25))
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=2e-4)


def test_directions_without_a_gradient_stay_without_one(variant):
    found = np.linalg.svd(variant(orthogonalized)(jnp.asarray(matrix(72, 16, rank=5))))[1]
    assert np.all((found[:5] > 0.65) & (found[:5] < 1.25))
    np.testing.assert_allclose(found[5:], 0, atol=1e-3)
    np.testing.assert_array_equal(orthogonalized(jnp.zeros((6, 4))), np.zeros((6, 4)))


def test_muon_is_optaxs():
    """optax iterates the whole matrix, this project its Gram matrix. Other parameters, and the outer layers, are Adam's."""
    shapes = {
        "stem": {"kernel": (4, 8)},
        "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
        "down": {"kernel": (24, 8)},
        "up": {"kernel": (8, 24)},
        "attention": {"qkv": {"kernel": (16, 3, 4, 4), "bias": (3, 4, 4)}, "out": {"kernel": (16, 16)}},
        "out": {"kernel": (8, 4)},
        "position": (1, 6, 8),
        "label": {"embedding": (11, 8)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda shape: jnp.asarray(matrix(*shape)), shapes, is_leaf=is_shape)
    none = jax.tree.map(lambda _: None, shapes, is_leaf=is_shape)
    dimensions = none | {
        "conv": {"kernel": MuonDimensionNumbers((0, 1, 2), 3), "bias": None},
        "down": {"kernel": MuonDimensionNumbers()},
        "up": {"kernel": MuonDimensionNumbers()},
        "attention": {
            "qkv": {"kernel": MuonDimensionNumbers(0, (1, 2, 3)), "bias": None},
            "out": {"kernel": MuonDimensionNumbers()},
        },
    }
    theirs = optax.contrib.muon(dj.cosine_decay(0.1, 8), consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)
    adam = optax.adam(dj.cosine_decay(0.1, 8))
    grads = jax.tree.map(jnp.sin, params)
    expected, of_adam = (jax.jit(rule.update)(grads, rule.init(params), params)[0] for rule in (theirs, adam))
    is_one = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    expected = jax.tree.map(lambda d, x, y: y if d is None else x, dimensions, expected, of_adam, is_leaf=is_one)
    for tree in (lambda x: x, lambda x: {"params": x}):  # what network.init returns
        rule = dj.muon_with_cosine_decay(0.1, 8)
        mine = jax.jit(rule.update)(tree(grads), rule.init(tree(params)), tree(params))[0]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), mine, tree(expected))
    assert all(float(jnp.abs(x).max()) > 1e-3 for x in jax.tree.leaves(mine))


def test_momentum_is_nesterovs():
    """After gradients 1 and x it is 0.05 (0.95^2 + 1.95 x), which changes its sign at x = -0.4628."""
    optimizer, params = scale_by_muon(), {"kernel": jnp.zeros((2, 2))}
    _, state = optimizer.update({"kernel": jnp.eye(2)}, optimizer.init(params))
    update, _ = optimizer.update({"kernel": jnp.diag(jnp.array([-0.461, -0.465]))}, state)
    assert np.array_equal(np.sign(update["kernel"]), np.diag([1, -1]))


@pytest.mark.parametrize(("warmup", "peak"), [(4, 4), (100, 6)])
def test_the_warmup_is_linear_and_at_most_half_of_the_iterations(warmup, peak):
    rates = np.array([dj.cosine_decay(0.1, 12, warmup)(step) for step in range(13)])
    np.testing.assert_allclose(rates[: peak + 1], 0.1 * np.arange(peak + 1) / peak, atol=1e-7)
    np.testing.assert_allclose(rates[peak:], 0.05 * (1 + np.cos(np.pi * np.linspace(0, 1, 13 - peak))), atol=1e-7)


def test_adam_decays_along_a_half_cosine():
    optimizer = dj.adam_with_cosine_decay(0.1, 4)
    params = jnp.zeros(1)
    state, moves = optimizer.init(params), []
    for _ in range(5):
        update, state = optimizer.update(jnp.ones(1), state, params)
        moves.append(float(update[0]))
    np.testing.assert_allclose(moves, -0.05 * (1 + np.cos(np.pi * np.arange(5) / 4)), atol=1e-6)


@pytest.mark.parametrize("params", [[jnp.ones((2, 2))], jnp.ones((2, 2)), {"w": jnp.ones((2, 2))}, {"kernel": jnp.ones(3)}])
def test_parameters_that_are_not_a_networks_are_trained_by_adam(params):
    mine, adam = (make(0.1, 8) for make in (dj.muon_with_cosine_decay, dj.adam_with_cosine_decay))
    updates = [rule.update(params, rule.init(params), params)[0] for rule in (mine, adam)]
    jax.tree.map(np.testing.assert_array_equal, *updates)
