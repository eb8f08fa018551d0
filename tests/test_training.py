from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffusion_jax as dj

SCHEDULE = dj.cosine_schedule(10)
NETWORKS = {"mlp": (dj.MLP(2, 8), (2,)), "dit": (dj.DiT(1, 4, 1, 2), (4, 4, 1))}


def setup(name, optimizer=None):
    """A fresh state and step(state, x_0, examples), as an experiment would write it."""
    network, shape = NETWORKS[name]
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.ones(1, jnp.int32))["params"]
    state = dj.create_train_state(network.apply, params, optimizer or dj.adam_with_cosine_decay(1e-3, 20))

    def loss_fn(params, x_0, keys):
        return dj.diffusion_loss(SCHEDULE, partial(network.apply, {"params": params}), x_0, keys, "pred_v")

    def step(state, x_0, examples, mean_over_devices):
        keys = dj.example_keys(jax.random.fold_in(jax.random.key(1), state.step), examples)
        return dj.train_step(state, x_0, keys, loss_fn=loss_fn, ema_decay=0.9, mean_over_devices=mean_over_devices)

    return state, step, jax.random.normal(jax.random.key(2), (8, *shape))


def compile_step(step, num_devices, **options):
    return dj.over_devices(step, (None, 0, 0), None, jax.devices()[:num_devices], **options)


def run(step, state, x_0, count):
    losses = []
    for _ in range(count):
        state, metrics = step(state, x_0, jnp.arange(8))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("numbers", [(2,), (1, 3)])
def test_a_compiled_function_runs_on_the_devices_that_it_is_given(numbers):
    devices = [jax.devices()[number] for number in numbers]
    double = dj.over_devices(lambda x: 2 * x, (0,), 0, devices)
    np.testing.assert_array_equal(double(jnp.ones(4)), 2)
    total = dj.over_devices(lambda x, mean_over_devices: mean_over_devices(x.sum()), (0,), None, devices)
    assert total(jnp.ones(4)).devices() == set(devices)


def test_four_devices_are_there():
    assert jax.local_device_count() == 4


@pytest.mark.parametrize("devices", [1, 4])
def test_the_step_is_compiled_once(devices):
    state, step, x_0 = setup("mlp")
    step = compile_step(step, devices)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append(event))
    is_compile = lambda event: event.endswith("backend_compile_duration")  # noqa: E731
    state, _ = run(step, state, x_0, 1)
    assert any(map(is_compile, compiled))
    compiled.clear()
    run(step, state, x_0, 2)
    assert not any(map(is_compile, compiled))


def test_one_and_four_devices_train_alike():
    """With plain gradient descent, so that the scale of the gradient shows."""
    state, step, x_0 = setup("mlp", optax.sgd(1.0))
    one, one_losses = run(compile_step(step, 1), state, x_0, 5)
    four, four_losses = run(compile_step(step, 4), state, x_0, 5)
    np.testing.assert_allclose(one_losses, four_losses, rtol=1e-5)
    assert four.step == 5
    assert optax.tree.norm(jax.tree.map(jnp.subtract, one.params, state.params)) > 0.01
    for tree in ("params", "ema_params"):
        chex.assert_trees_all_equal_shapes_and_dtypes(getattr(one, tree), getattr(four, tree))
        chex.assert_trees_all_close(getattr(one, tree), getattr(four, tree), atol=1e-5, rtol=0)


def test_training_lowers_the_loss():
    state, step, x_0 = setup("mlp", optax.adam(1e-2))
    _, losses = run(compile_step(step, 1), state, 0.1 * x_0, 300)
    assert np.mean(losses[-50:]) < 0.7 * np.mean(losses[:50])


def test_the_average_follows_the_parameters_by_its_recursion():
    state, step, x_0 = setup("mlp")
    step, ema = compile_step(step, 1), state.params
    for number in range(1, 5):
        state, _ = step(state, x_0, jnp.arange(8))
        decay = min(0.9, (1 + number) / (10 + number))
        ema = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, ema, state.params)
        chex.assert_trees_all_close(state.ema_params, ema, rtol=1e-5, atol=1e-7)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, ema, state.params)) > 0


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("weak", "weak")]
)
def test_a_state_keeps_its_types(dtypes):
    """So a second step traces nothing, and lax.scan takes it."""
    params = {"w": jnp.asarray(0.5)}  # weakly typed, as Python numbers make it
    state = dj.create_train_state(lambda: None, params, optax.adam(0.1))
    if dtypes[0] != "weak":
        params, ema_params = ({"w": jnp.full(3, 0.5, dtype)} for dtype in dtypes)
        state = dj.create_train_state(lambda: None, params, optax.adam(0.1)).replace(ema_params=ema_params)

    def step(state, x_0):
        loss_fn = lambda params, x_0, keys: (params["w"] * x_0 - 1) ** 2  # noqa: E731
        return dj.train_step(state, x_0, jax.random.split(jax.random.key(0), 3), loss_fn=loss_fn, ema_decay=0.9)[0], None

    trained, _ = jax.lax.scan(step, state, jnp.ones((4, 3)))
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, state)
    assert not any(x.weak_type for x in jax.tree.leaves(state))  # or the second step would be traced again
    assert (trained.ema_params["w"] > 0.6).all()


@pytest.mark.parametrize("devices", [1, 4])
def test_donating_the_state_is_safe(devices):
    state, step, x_0 = setup("mlp")
    expected, _ = run(compile_step(step, devices), state, x_0, 3)
    donated, _ = run(compile_step(step, devices, donate_argnums=(0,)), setup("mlp")[0], x_0, 3)
    chex.assert_trees_all_equal(donated.params, expected.params)


def test_a_batch_that_devices_cannot_share_is_named():
    state, step, x_0 = setup("mlp")
    with pytest.raises(ValueError, match="multiple of the number of devices, 4, got 6"):
        compile_step(step, 4)(state, x_0[:6], jnp.arange(6))


@pytest.mark.parametrize("sample_fn", [dj.sample, dj.sample_trajectory])
def test_samples_do_not_depend_on_the_devices(sample_fn):
    network, shape = NETWORKS["dit"]
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *shape)), jnp.ones(1, jnp.int32))["params"]
    params = jax.tree.map(lambda x: x + 0.05, params)
    table = dj.ancestral_table(SCHEDULE, sampling_timesteps=4)

    def draw(params, table, examples):
        denoise = dj.make_denoiser(SCHEDULE, partial(network.apply, {"params": params}), "pred_v", clip=1.0)
        return sample_fn(denoise, table, dj.example_keys(jax.random.key(7), examples), shape)

    axis = 1 if sample_fn is dj.sample_trajectory else 0
    one, four = (dj.over_devices(draw, (None, None, 0), axis, jax.devices()[:n])(params, table, jnp.arange(8)) for n in (1, 4))
    part = dj.over_devices(draw, (None, None, 0), axis, jax.devices()[:1])(params, table, jnp.arange(2, 5))
    assert one.shape[axis:] == (8, *shape)
    np.testing.assert_allclose(one, four, atol=1e-5)
    np.testing.assert_allclose(jnp.take(one, jnp.arange(2, 5), axis), part, atol=1e-5)
    if axis:
        np.testing.assert_array_equal(one[-1], four[-1])
