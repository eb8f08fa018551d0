from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.layers import BLOCK, GroupNorm, conv3x3, matmul, silu

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(actual, expected, dtype="float32"):
    """Equal to within a small part of the largest value expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max(initial=0))


def test_convolution_by_hand():
    x, kernel = normal(0, 2, 3, 5, 2), normal(1, 3, 3, 2, 4)
    expected = np.zeros((2, 3, 5, 4))
    for h, w, i, j in np.ndindex(3, 5, 3, 3):
        if 0 <= h + i - 1 < 3 and 0 <= w + j - 1 < 5:
            expected[:, h, w] += np.asarray(x)[:, h + i - 1, w + j - 1] @ np.asarray(kernel)[i, j]
    assert_close(conv3x3(x, kernel), expected)


OPTIMIZED = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})  # as users run it, not as conftest does
VARIANTS = pytest.mark.parametrize("variant", [OPTIMIZED, lambda fn: fn], ids=["optimized", "nojit"])


def value_and_gradients(fn):
    def both(x, kernel, g):
        y, backward = jax.vjp(fn, x, kernel)
        return y, *backward(g)

    return both


@VARIANTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (3, 2, 5), (0, 2, 2), (2, 4, 4), (5, 8, 4), (1, 33, 35), (256, 4, 4), (101, 4, 4)]
)
def test_convolution_and_its_gradients_are_those_of_xla_in_float32(shape, dtype, variant):
    x, kernel, g = normal(0, *shape, 5, dtype=dtype), normal(1, 3, 3, 5, 7, dtype=dtype), normal(2, *shape, 7, dtype=dtype)
    dimensions = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    reference = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)  # noqa: E731
    actual = variant(value_and_gradients(conv3x3))(x, kernel, g)
    expected = value_and_gradients(reference)(*map(jnp.float32, (x, kernel, g)))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, dtype)


@VARIANTS
@pytest.mark.parametrize("pixels", [(), (1,), (7,), (3, BLOCK), (2, 32, 48), (2003,)])
def test_gradients_of_a_product(pixels, variant):
    x, kernel, g = normal(0, *pixels, 5), normal(1, 5, 7), normal(2, *pixels, 7)
    y, dx, dkernel = variant(value_and_gradients(matmul))(x, kernel, g)
    assert_close(y, np.asarray(x) @ np.asarray(kernel))
    assert_close(dx, np.asarray(g) @ np.asarray(kernel).T)
    assert_close(dkernel, np.asarray(x, np.float64).reshape(-1, 5).T @ np.asarray(g, np.float64).reshape(-1, 7))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, kernel, g = (
            normal(seed, *shape, dtype="float64") for seed, shape in enumerate([(3, 1024, 5), (5, 7), (3, 1024, 7)])
        )
        dkernel = jax.vjp(matmul, x, kernel)[1](g)[1]
        np.testing.assert_allclose(dkernel, np.einsum("bnc,bnd->cd", x, g), rtol=1e-10, atol=1e-10)


def test_gradients_are_the_same_on_four_devices():
    x, kernel = normal(0, 8, 6, 6, 3), normal(1, 3, 3, 3, 4)
    loss = lambda kernel, x: (silu(conv3x3(x, kernel)) ** 2).sum()  # noqa: E731
    gradient = lambda kernel, x: jax.lax.psum(jax.grad(loss)(kernel, x), "devices")  # noqa: E731
    together = jax.pmap(gradient, "devices", in_axes=(None, 0), out_axes=None)(kernel, x.reshape(4, 2, 6, 6, 3))
    assert_close(together, jax.grad(loss)(kernel, x))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 1), (8, 2), (16, 4), (32, 8), (48, 8)])
def test_group_norm_and_its_gradients_are_those_of_flax(channels, groups, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, shift, g = 2 + 3 * normal(0, 2, 4, 6, channels), normal(3, 2, channels), normal(4, 2, 4, 6, channels)
    params = {"scale": normal(1, channels), "bias": normal(2, channels)}
    flax_norm = lambda params, x: nn.GroupNorm(groups, use_fast_variance=False).apply({"params": params}, x)  # noqa: E731
    assert_close(GroupNorm().apply({"params": params}, x), flax_norm(params, x))
    actual = jax.vjp(lambda params, x, shift: GroupNorm().apply({"params": params}, x, shift), params, x, shift)
    expected = jax.vjp(lambda params, x, shift: flax_norm(params, x) + shift[:, None, None], params, x, shift)
    jax.tree.map(assert_close, (actual[0], actual[1](g)), (expected[0], expected[1](g)))


def test_the_gradient_of_group_norm_survives_a_large_mean():
    x, g = 1000 + 3 * normal(0, 4, 8, 8, 8), normal(1, 4, 8, 8, 8)
    params = {"scale": normal(2, 8), "bias": normal(3, 8)}
    actual = jax.vjp(lambda params, x: GroupNorm().apply({"params": params}, x), params, x)[1](g)
    with jax.enable_x64(True):
        wide = nn.GroupNorm(2, use_fast_variance=False, dtype=jnp.float64)
        params, x, g = jax.tree.map(lambda value: jnp.asarray(np.asarray(value), jnp.float64), (params, x, g))
        expected = jax.vjp(lambda params, x: wide.apply({"params": params}, x), params, x)[1](g)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * np.abs(other).max())


def test_group_norm_has_float32_statistics_of_bfloat16_images():
    x = 4 + normal(0, 2, 32, 32, 8, dtype="bfloat16")
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    y = GroupNorm().apply({"params": params}, x)
    assert y.dtype == jnp.float32
    assert_close(y, nn.GroupNorm(2, use_fast_variance=False).apply({"params": params}, jnp.float32(x)))


def test_silu_and_its_gradient():
    x = jnp.array([-1e4, -100.0, -20.0, -3.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 1e4])
    wide = np.asarray(x, np.float64)
    sigmoid = np.exp(-np.logaddexp(0, -wide))
    np.testing.assert_allclose(silu(x), wide * sigmoid, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(silu(x.astype("bfloat16")).astype(float), silu(x), rtol=0.02, atol=1e-5)
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    np.testing.assert_allclose(jax.vmap(jax.grad(silu))(x), slope, rtol=1e-5, atol=1e-5)
