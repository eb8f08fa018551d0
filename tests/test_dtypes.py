"""Results have the data's dtype, and parameters are float32, whether JAX has 64 bits enabled or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj

SCHEDULE = dj.cosine_schedule(6)
T = np.array([1, 3, 6], np.int32)


def results(dtype):
    """Of every function that takes data, from data of `dtype`; the network is a product with a half."""
    x = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 1)).astype(dtype)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)
    half = lambda x_t, t: x_t * 0.5  # noqa: E731
    pair = lambda x_t, t: (x_t * 0.5, x_t * 0 + 0.5)  # noqa: E731
    denoise, table = dj.make_denoiser(SCHEDULE, half, clip=1.0), dj.dpm_solver_table(SCHEDULE, 1.0, 4)
    x, t = jnp.asarray(x), jnp.asarray(T)
    return {
        "q_sample": dj.q_sample(SCHEDULE, x, t, x),
        "convert": dj.convert(SCHEDULE, x, x, t, "pred_v", "pred_x_0"),
        "posterior": dj.posterior(SCHEDULE, x, x, t)[0],
        "loss": dj.diffusion_loss(SCHEDULE, half, x, keys, weight=dj.min_snr_weight(SCHEDULE)),
        "hybrid": dj.hybrid_loss(SCHEDULE, pair, x, keys),
        "bound": dj.bound_loss(SCHEDULE, pair, x, keys),
        "bits": dj.bound_bits(SCHEDULE, denoise, x, t, x),
        "prior": dj.prior_bits(SCHEDULE, x),
        "samples": dj.sample(denoise, table, keys, x.shape[1:], start=x),
        "trajectory": dj.sample_trajectory(denoise, table, keys, x.shape[1:], start=x),
        "inpainting": dj.inpainting(denoise, np.zeros((2, 2, 1)), np.eye(2, dtype=bool)[..., None])(x, t),
        "spherical": dj.spherical(x[0], x[1], 0.3),
    }


def dtypes(dtype) -> dict[str, str]:
    return {name: str(shape.dtype) for name, shape in jax.eval_shape(lambda: results(dtype)).items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_have_the_dtype_of_the_data(dtype):
    with jax.enable_x64(True):
        found = dtypes(dtype)
        assert found == dict.fromkeys(found, dtype)


def test_16_bit_data_has_results_of_its_dtype_and_losses_of_float32():
    of_data = {"q_sample", "convert", "posterior", "samples", "trajectory", "inpainting", "spherical"}
    found = dtypes("bfloat16")
    assert found == {name: "bfloat16" if name in of_data else "float32" for name in found}


def test_64_bits_enabled_change_no_result_of_float32_data():
    plain = jax.jit(lambda: results("float32"))()
    with jax.enable_x64(True):
        for name, value in jax.jit(lambda: results("float32"))().items():
            np.testing.assert_allclose(value, plain[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_samples_are_float32_where_nothing_says_otherwise():
    denoise, keys = dj.make_denoiser(SCHEDULE, lambda x_t, t: x_t), jax.random.split(jax.random.key(0), 3)
    with jax.enable_x64(True):
        assert dj.sample(denoise, dj.ddim_table(SCHEDULE), keys, (2,)).dtype == jnp.float32


@pytest.mark.parametrize("network", [dj.UNet(1, 4, (1,), num_classes=2), dj.MLP(4, 4)])
def test_parameters_are_float32(network):
    shape = (1, 4) if isinstance(network, dj.MLP) else (1, 4, 4, 1)
    with jax.enable_x64(True):
        x_t, t = jnp.zeros(shape, jnp.float32), jnp.ones(1, jnp.int32)
        params = jax.eval_shape(network.init, jax.random.key(0), x_t, t)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
        assert jax.eval_shape(network.apply, params, x_t, t).dtype == jnp.float32
