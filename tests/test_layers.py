from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffusion_jax import UNet, cpu
from diffusion_jax.layers import GroupNorm, conv3x3, group_norm, matmul, silu
from diffusion_jax.unet import ResidualBlock

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
    def both(g, *operands):
        y, backward = jax.vjp(fn, *operands)
        return y, *backward(g)

    return both


@VARIANTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 2, 5), (0, 2, 2), (5, 8, 4), (1, 33, 35), (256, 4, 4)])
def test_convolution_and_its_gradients_are_those_of_xla_in_float32(shape, dtype, variant):
    x, kernel, g = normal(0, *shape, 5, dtype=dtype), normal(1, 3, 3, 5, 7, dtype=dtype), normal(2, *shape, 7, dtype=dtype)
    dimensions = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    reference = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)  # noqa: E731
    actual = variant(value_and_gradients(conv3x3))(g, x, kernel)
    expected = value_and_gradients(reference)(*map(jnp.float32, (g, x, kernel)))
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, dtype)


@VARIANTS
@pytest.mark.parametrize("pixels", [(), (7,), (2, 32, 48), (2003,)])
def test_gradients_of_a_product(pixels, variant):
    x, kernel, g = normal(0, *pixels, 5), normal(1, 5, 7), normal(2, *pixels, 7)
    y, dx, dkernel = variant(value_and_gradients(matmul))(g, x, kernel)
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


BOTH_PLATFORMS = pytest.mark.parametrize("platform", ["cpu", "default"])


@pytest.fixture
def run_as_on(monkeypatch):
    """run_as_on(platform): the branch of that platform runs from then on. Fails if no branch was traced."""
    traced = []

    def start(platform):
        def run(*operands, **branches):
            traced.append(platform)
            return branches.get(platform, branches["default"])(*operands)

        jax.clear_caches()  # the layers' functions are traced once for each shape
        monkeypatch.setattr(jax.lax, "platform_dependent", run)

    yield start
    monkeypatch.undo()
    jax.clear_caches()
    assert traced


@BOTH_PLATFORMS
@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (8, 2), (16, 4), (48, 8)])
def test_group_norm_and_its_gradients_are_those_of_flax(channels, groups, platform, run_as_on):
    run_as_on(platform)
    x, shift, g = 2 + 3 * normal(0, 2, 4, 6, channels), normal(3, 2, channels), normal(4, 2, 4, 6, channels)
    params = {"scale": normal(1, channels), "bias": normal(2, channels)}
    flax_norm = lambda params, x: nn.GroupNorm(groups, use_fast_variance=False).apply({"params": params}, x)  # noqa: E731
    norm = GroupNorm(jnp.float32)
    ours = lambda params, x, shift: norm.apply({"params": params}, x, shift)  # noqa: E731
    theirs = lambda params, x, shift: flax_norm(params, x) + shift[:, None, None]  # noqa: E731
    actual, expected = (OPTIMIZED(value_and_gradients(fn))(g, params, x, shift) for fn in (ours, theirs))
    jax.tree.map(assert_close, actual, expected)


@BOTH_PLATFORMS
@pytest.mark.parametrize("first_row", [1000.0, 0.0])
def test_the_gradient_of_group_norm_survives_a_large_mean(first_row, platform, run_as_on):
    run_as_on(platform)
    x, g = (1000 + 3 * normal(0, 4, 8, 8, 8)).at[:, 0, :, :].add(first_row - 1000), normal(1, 4, 8, 8, 8)
    params = {"scale": normal(2, 8), "bias": normal(3, 8)}
    gradients = lambda norm: jax.jit(value_and_gradients(lambda params, x: norm.apply({"params": params}, x)))  # noqa: E731
    actual = gradients(GroupNorm(jnp.float32))(g, params, x)[1:]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda value: jnp.asarray(np.asarray(value), jnp.float64), (g, params, x))
        expected = gradients(nn.GroupNorm(2, use_fast_variance=False, dtype=jnp.float64))(*wide)[1:]
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * np.abs(other).max())


def test_group_norm_has_float32_statistics_of_bfloat16_images():
    x = 4 + normal(0, 2, 32, 32, 8, dtype="bfloat16")
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    y = GroupNorm(jnp.float32).apply({"params": params}, x)
    assert y.dtype == jnp.float32
    assert GroupNorm(jnp.bfloat16).apply({"params": params}, x).dtype == jnp.bfloat16
    assert_close(y, nn.GroupNorm(2, use_fast_variance=False).apply({"params": params}, jnp.float32(x)))


def test_silu_and_its_gradient():
    x = jnp.array([-1e4, -100.0, -20.0, -3.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 1e4])
    wide = np.asarray(x, np.float64)
    sigmoid = np.exp(-np.logaddexp(0, -wide))
    np.testing.assert_allclose(silu(x), wide * sigmoid, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(silu(x.astype("bfloat16")).astype(float), silu(x), rtol=0.02, atol=1e-5)
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    np.testing.assert_allclose(jax.vmap(jax.grad(silu))(x), slope, rtol=1e-5, atol=1e-5)


LAYERS = {
    "convolution": (cpu.conv3x3, ((2, 4, 6, 3), (3, 3, 3, 2))),
    "small convolution": (cpu.conv3x3, ((2, 4, 4, 3), (3, 3, 3, 2))),
    "product": (cpu.matmul, ((2, 3, 4), (4, 5))),
    "normalization": (lambda *operands: cpu.group_norm(*operands, 2), ((2, 3, 4, 8), (1, 1, 1, 8), (2, 1, 1, 8))),
    "normalization elsewhere": (lambda *operands: group_norm(*operands, 2), ((2, 3, 4, 8), (1, 1, 1, 8), (2, 1, 1, 8))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_of_second_order_in_both_modes(name):
    layer, shapes = LAYERS[name]
    with jax.enable_x64(True):
        operands = [normal(seed, *shape, dtype="float64") for seed, shape in enumerate(shapes)]
        check_grads(
            jax.jit(lambda *operands: jnp.sin(layer(*map(jnp.asarray, operands)))), operands, order=2, modes=["fwd", "rev"]
        )


@pytest.mark.parametrize("platform", ["default", "cuda"])
@pytest.mark.parametrize(
    ("network", "x_t", "t"),
    [
        pytest.param(UNet(1, 4, (1,)), normal(0, 2, 6, 6, 1), jnp.array([1, 7]), id="unet", marks=pytest.mark.slow),
        pytest.param(ResidualBlock(6, jnp.float32), normal(0, 2, 6, 6, 4), normal(1, 2, 3), id="block"),
    ],
)
def test_a_gradient_penalty_does_not_depend_on_the_platform(network, x_t, t, platform, run_as_on):
    leaves, structure = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0), x_t, t))
    params = jax.tree.unflatten(structure, [0.1 + 0.3 * normal(seed, *x.shape) for seed, x in enumerate(leaves)])

    def derivatives(params, x_t):
        """Of a gradient penalty, and along x_t."""
        predict = lambda x_t: network.apply(params, x_t, t)  # noqa: E731
        penalty = lambda params, x_t: (  # noqa: E731
            jax.grad(lambda x_t: (network.apply(params, x_t, t) ** 2).mean())(x_t) ** 2
        ).sum()
        return jax.grad(penalty, (0, 1))(params, x_t), jax.jvp(predict, (x_t,), (x_t,))[1]

    actual = jax.jit(derivatives)(params, x_t)
    run_as_on(platform)
    expected = jax.jit(lambda *operands: derivatives(*operands))(params, x_t)
    jax.tree.map(assert_close, actual, expected)
