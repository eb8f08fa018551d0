import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import MLP, DiT, UNet
from diffusion_jax.dit import Block
from diffusion_jax.mlp import timestep_embedding
from diffusion_jax.unet import SelfAttention, pixel_shuffle, to_patches


def randomized(network, *inputs, scale=0.3):
    """Variables of `network` with nothing at zero, so that every layer shows in the output."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0), *inputs))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(scale / 3, scale, x.shape), x.dtype) for x in leaves])


IMAGES = (jax.random.normal(jax.random.key(2), (2, 8, 16, 3)), jnp.array([1, 7]))
VECTORS = (jax.random.normal(jax.random.key(2), (2, 3)), jnp.array([1, 7]))
NETWORKS = {
    "mlp": (MLP(3, 8), VECTORS),
    "unet2": (UNet(3, 4, (1, 2)), IMAGES),
    "unet1": (UNet(3, 6, (2,)), IMAGES),
    "unet of patches": (UNet(3, 4, (1, 2), patch_size=2), IMAGES),
    "dit": (DiT(3, 8, 2, 2), IMAGES),
}
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("unet1", "unet2") else []) for name in NETWORKS]
)
DEEPER = pytest.param(UNet(3, 4, (1, 2)), id="deeper unet", marks=pytest.mark.slow)
OF_IMAGES = pytest.mark.parametrize(
    "network", [pytest.param(UNet(3, 4, (1,)), id="unet"), DEEPER, pytest.param(DiT(3, 4, 1, 2), id="dit")]
)


@EACH
def test_every_parameter_and_input_matters_and_examples_do_not_mix(name):
    network, (x_t, t) = NETWORKS[name]
    variables = randomized(network, x_t, t)

    @jax.jit
    def gradients_and_output(variables, x_t, t):
        def energy(variables, x_t):
            output = network.apply(variables, x_t, t)
            return (output**2).sum(), output

        return jax.grad(energy, (0, 1), has_aux=True)(variables, x_t)

    gradients, output = gradients_and_output(variables, x_t, t)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.abs(gradient).max() > 0, jax.tree_util.keystr(path)
    chex.assert_equal_shape([output, x_t])
    chex.assert_type(output, jnp.float32)
    chex.assert_tree_all_finite(output)
    assert jnp.abs(gradients_and_output(variables, x_t, t[::-1])[1] - output).max() > 1e-3
    alone = jax.jit(network.apply)(variables, x_t[:1], t[:1])
    np.testing.assert_allclose(alone, output[:1], rtol=1e-4, atol=1e-5)


def test_the_published_size():
    """At embed_dim 128 and dim_scales 1 2 4 8 the bottleneck is 1024 wide; blocks: 2 a level each way, 2 mid, 1 out."""
    network = UNet(1, 128, (1, 2, 4, 8))
    inputs = jax.ShapeDtypeStruct((4, 32, 32, 1), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    variables = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    assert jax.eval_shape(network.apply, variables, *inputs).shape == (4, 32, 32, 1)
    params = variables["params"]
    assert len([name for name in params if "block" in name]) == 4 * 2 + 4 * 2 + 2 + 1
    assert params["mid_block_1"]["conv_1"]["kernel"].shape == (3, 3, 1024, 1024)
    assert params["up_3_block_1"]["conv_1"]["kernel"].shape == (3, 3, 1024 + 512, 1024)
    assert params["down_0_block_1"]["conv_1"]["kernel"].shape == (3, 3, 128, 128)


@OF_IMAGES
def test_bfloat16_computes_with_float32_parameters_and_output(network):
    x_t, t = IMAGES
    variables = randomized(network, x_t, t)
    chex.assert_trees_all_equal_dtypes(variables, jax.tree.map(jnp.float32, variables))
    half = jax.jit(network.clone(dtype=jnp.bfloat16).apply)(variables, x_t, t)
    full = jax.jit(network.apply)(variables, x_t, t)
    chex.assert_type(half, jnp.float32)
    assert 1e-5 < float(jnp.linalg.norm(half - full) / jnp.linalg.norm(full)) < 0.05


@OF_IMAGES
def test_a_network_of_classes_tells_them_apart_and_knows_images_of_none(network):
    plain, network = network, network.clone(num_classes=5)
    variables = randomized(network, *IMAGES)
    apply = jax.jit(network.apply)
    of_class = [apply(variables, *IMAGES, jnp.full(2, label)) for label in range(6)]
    for one in range(6):
        for other in range(one):
            assert jnp.abs(of_class[one] - of_class[other]).max() > 1e-3
    np.testing.assert_array_equal(apply(variables, *IMAGES), of_class[5])
    for label in (-1, 6):
        assert np.isnan(apply(variables, *IMAGES, jnp.full(2, label))).all()
    np.testing.assert_allclose(apply(variables, *IMAGES, jnp.array([2, 4]))[1], of_class[4][1], rtol=1e-4, atol=1e-5)
    variables = randomized(plain, *IMAGES)
    with pytest.raises(ValueError, match=r"labels need num_classes and the shape \(2,\), got 0 and \(2,\)"):
        plain.apply(variables, *IMAGES, jnp.array([2, 4]))


@OF_IMAGES
def test_a_learned_variance_begins_half_way_and_has_its_own_outputs(network):
    plain, network = network, network.clone(learned_variance=True)
    apply = jax.jit(network.apply)
    prediction, fraction = apply(jax.jit(network.init)(jax.random.key(0), *IMAGES), *IMAGES)
    chex.assert_equal_shape([prediction, fraction, IMAGES[0]])
    np.testing.assert_array_equal(fraction, 0.5)
    variables = randomized(network, *IMAGES)
    widths = [randomized(each, *IMAGES)["params"]["out"]["kernel"].shape[1] for each in (plain, network)]
    assert widths[1] == 2 * widths[0]
    prediction, fraction = apply(variables, *IMAGES)
    assert jnp.abs(2 * fraction - 1 - prediction).max() > 1e-2


@pytest.mark.parametrize(
    ("network", "size"), [(UNet(1, 4, (1, 2, 4)), (8, 6)), (UNet(1, 4, (1, 2, 4)), (9, 8)), (DiT(1, 4, 1, 4), (8, 6))]
)
def test_an_image_that_cannot_be_divided_is_named(network, size):
    with pytest.raises(ValueError, match=f"multiples of 4, got {size[0]}x{size[1]}"):
        network.init(jax.random.key(0), jnp.zeros((1, *size, 1)), jnp.ones(1, int))


def test_timestep_embedding_by_hand(variant):
    embedding = variant(lambda t: timestep_embedding(t, 4))(jnp.array([0, 3]))
    angles = [3.0, 3.0 / 10_000]
    np.testing.assert_allclose(embedding, [[0, 0, 1, 1], [*np.sin(angles), *np.cos(angles)]], rtol=1e-5)


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_an_embedding_too_narrow_is_named(dim):
    with pytest.raises(ValueError, match=f"even embed_dim of at least 4, got {dim}"):
        timestep_embedding(jnp.array([1]), dim)


def test_pixel_shuffle_by_hand():
    x = jnp.array([[[[0.0, 1, 2, 3], [4, 5, 6, 7]]]])  # one row of two pixels, each a 2x2 patch
    np.testing.assert_array_equal(pixel_shuffle(x)[0, :, :, 0], [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_patches_are_the_inverse_of_pixel_shuffle():
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    patches = to_patches(x, 4)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(4, 4, 3), x[1, 4:8, 8:12])
    np.testing.assert_array_equal(pixel_shuffle(patches, 4), x)


def test_attention_is_softmax_of_q_k_over_the_root_of_head_dim():
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 16))
    layer = SelfAttention(jnp.float32)
    variables = randomized(layer, x)
    p = jax.tree.map(np.asarray, variables["params"])
    groups = np.asarray(x).reshape(2, 6, 4, 4)
    centred = groups - groups.mean((1, 3), keepdims=True)
    normed = (centred / np.sqrt(centred.var((1, 3), keepdims=True) + 1e-6)).reshape(2, 6, 16)
    normed = normed * p["norm"]["scale"] + p["norm"]["bias"]
    q, k, v = np.moveaxis(np.einsum("bnc,cthd->bnthd", normed, p["qkv"]["kernel"]) + p["qkv"]["bias"], 2, 0)
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(2)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    heads = np.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 6, 16)
    expected = np.asarray(x) + (heads @ p["out"]["kernel"] + p["out"]["bias"]).reshape(2, 2, 3, 16)
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-3, atol=1e-4)


def test_a_transformer_block_in_numpy():
    x, condition = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in [(0, (2, 5, 128)), (1, (2, 4))])
    layer = Block(jnp.float32)
    np.testing.assert_allclose(layer.apply(layer.init(jax.random.key(0), x, condition), x, condition), x)  # the identity
    variables = randomized(layer, x, condition, scale=0.1)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    linear = lambda x, name: x @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
    unit = lambda x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = np.split(linear(np.asarray(condition), "modulation")[:, None], 6, -1)
    x = np.asarray(x, np.float64)
    h = linear(unit(x - x.mean(-1, keepdims=True)) * (1 + scale_1) + shift_1, "qkv")
    q, k, v = np.moveaxis(h.reshape(2, 5, 3, 2, 64), 2, 0)
    q, k = unit(q) * p["q_norm"]["scale"], unit(k) * p["k_norm"]["scale"]
    weights = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(64))
    heads = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v).reshape(2, 5, 128)
    expected = x + gate_1 * linear(heads, "out")
    h = linear(unit(expected - expected.mean(-1, keepdims=True)) * (1 + scale_2) + shift_2, "mlp_1")
    gelu = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))  # Hendrycks & Gimpel 2016, eq. 2
    expected = expected + gate_2 * linear(gelu, "mlp_2")
    np.testing.assert_allclose(layer.apply(variables, jnp.asarray(x, jnp.float32), condition), expected, rtol=1e-3, atol=1e-3)
