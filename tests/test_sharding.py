"""The functions on four devices: under `jax.shard_map`, and under `jax.jit` on a mesh with explicit or automatic axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import diffusion_jax as dj

SCHEDULE = dj.cosine_schedule(8)
NETWORK = dj.UNet(1, 4, (1,), num_classes=3, learned_variance=True)
SHAPE = (4, 4, 1)


@pytest.fixture(scope="module")
def params():
    leaves, structure = jax.tree.flatten(jax.eval_shape(NETWORK.init, jax.random.key(0), *inputs()[:2]))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype) for x in leaves])


@pytest.fixture(scope="module")
def on_one_device(params):
    return jax.jit(results)(params, *inputs())


def inputs():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, *SHAPE)), jnp.float32)
    return x, jnp.arange(4) % 8 + 1, jax.random.split(jax.random.key(0), 4)


def results(params, x, t, keys):
    """A bit of everything, and the gradient of a loss."""

    def predict(x_t, t):
        return NETWORK.apply(params, x_t, t, t.astype(int) % 3)

    def loss(params):
        predict = lambda x_t, t: NETWORK.apply(params, x_t, t)  # noqa: E731
        return dj.hybrid_loss(SCHEDULE, predict, x, keys, weight=dj.min_snr_weight(SCHEDULE)).mean()

    denoise = dj.make_denoiser(SCHEDULE, predict, clip=1.0)
    simple = dj.make_denoiser(SCHEDULE, lambda x_t, t: (0.3 * x_t, 0.5 + 0.1 * x_t), clip=1.0)
    table = dj.ancestral_table(SCHEDULE, "learned", 3)
    return {
        "noised": dj.q_sample(SCHEDULE, x, t, x),
        "posterior": dj.posterior(SCHEDULE, x, x, t)[0],
        "bits": dj.bound_bits(SCHEDULE, simple, x, t, x) + dj.prior_bits(SCHEDULE, x),
        "samples": dj.sample(denoise, table, keys, SHAPE),
        "trajectory": dj.sample_trajectory(simple, table, keys, SHAPE)[1],
    }, jax.grad(loss)(params)


def assert_same(actual, expected):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5), actual, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)])
def test_jit_on_a_mesh(params, on_one_device, axis_type):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(axis_type,))
    sharded = jax.device_put(inputs(), NamedSharding(mesh, P("batch")))
    made = jax.eval_shape(NETWORK.init, jax.random.key(0), *sharded[:2], sharded[1] % 3)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    actual = jax.jit(results)(params, *sharded)
    assert actual[0]["samples"].sharding.spec == P("batch", None, None, None) or axis_type == AxisType.Auto
    assert_same(actual, on_one_device)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(params, on_one_device, check_vma):
    def shard(params, x, t, keys):
        if check_vma:  # else the gradient of unsharded parameters is summed over the shards already
            params = jax.lax.pcast(params, "batch", to="varying")
        values, gradient = results(params, x, t, keys)
        return values, jax.lax.pmean(gradient, "batch")

    mesh, batch = jax.make_mesh((4,), ("batch",)), P("batch")
    in_specs, out_specs = (P(), batch, batch, batch), (batch, P())
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    sharded = jax.device_put(inputs(), NamedSharding(mesh, batch))
    assert_same(jax.jit(mapped)(params, *sharded), on_one_device)


def test_a_transformer_on_an_explicit_mesh():
    network, (x, t, _) = dj.DiT(1, 4, 1, 2), inputs()
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    sharded = jax.device_put((x, t), NamedSharding(mesh, P("batch")))
    params = jax.jit(network.init)(jax.random.key(0), *sharded)
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.1), params)
    energy = jax.jit(jax.value_and_grad(lambda params, x, t: (network.apply(params, x, t) ** 2).sum()))
    assert_same(energy(params, *sharded), energy(params, x, t))
