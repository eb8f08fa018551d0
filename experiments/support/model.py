"""What the options of a run mean: its schedule, network, training step, denoiser and sampler."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

import diffusion_jax as dj
from diffusion_jax.diffusion import Denoise, Predict
from diffusion_jax.losses import draw_times, time_density
from diffusion_jax.mean_flow import adaptively_weighted, guided_velocity, jumping, mean_flow_loss
from support import batches
from support.config import Config
from support.data import ImageData, to_model_input

SCHEDULES = {
    "linear": dj.linear_schedule,
    "cosine": dj.cosine_schedule,
    "flow": dj.flow_schedule,
    "ve": dj.variance_exploding_schedule,
}
OPTIMIZERS = {"adam": dj.adam_with_cosine_decay, "muon": dj.muon_with_cosine_decay}
INSTANTANEOUS = 0.25  # fraction of examples with s = t while averages are trained
LARGEST_TIME = 10.0  # the value of t = T for a network of two times; small, since the loss has the derivative by t
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_schedule(config: Config) -> dj.NoiseSchedule:
    return SCHEDULES[config.noise_schedule_type](config.num_timesteps)


def image_shape(config: Config) -> tuple[int, int, int]:
    return config.image_size, config.image_size, config.channels


def make_network(config: Config) -> dj.UNet | dj.DiT:
    classes, learned = config.num_classes if config.conditional else 0, config.sigma_type == "learned"
    common: dict[str, Any] = {
        "dtype": DTYPES[config.precision],
        "num_classes": classes,
        "learned_variance": learned,
        "patch_size": config.patch_size,
    }
    if config.network == "dit":
        return dj.DiT(config.channels, config.embed_dim, config.depth, **common)
    return dj.UNet(config.channels, config.embed_dim, config.dim_scales, **common)


def initial_state(config: Config, key: Key[Array, ""]) -> dj.TrainState:
    network, second_time = make_network(config), {"s": jnp.zeros(1)} if config.loss_type == "mean_flow" else {}
    x_t, t = jnp.zeros((1, *image_shape(config)), jnp.float32), jnp.ones(1, jnp.int32)
    params = jax.jit(network.init)(key, x_t, t, **second_time)["params"]
    return dj.create_train_state(network.apply, params, make_optimizer(config))


def make_optimizer(config: Config, averages: bool = False) -> optax.GradientTransformation:
    """The run's optimizer. Each half of a mean_flow run has its own decay, the second from half the learning rate."""
    rate = config.learning_rate / 2 if averages else config.learning_rate
    return OPTIMIZERS[config.optimizer](rate, config.iterations - first_average(config), config.warmup)


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step."""
    first = first_average(config)
    decay = dj.cosine_decay(config.learning_rate, config.iterations - first, config.warmup)
    return float(np.asarray(decay(step) if step < first or not first else decay(step - first) / 2))


def make_loss(config: Config, schedule: dj.NoiseSchedule) -> Callable:
    """loss_fn(params, ((images, labels), u), keys) -> the loss of each example. u determines t if the run is stratified."""
    weight = dj.min_snr_weight(schedule, config.target_type) if config.loss_weighting == "min_snr" else None
    losses = {
        "hybrid": partial(dj.hybrid_loss, weight=weight),
        **{name: partial(dj.diffusion_loss, loss_type=name, weight=weight) for name in ("l2", "l1")},
    }
    # the bound within the hybrid loss is right for uniform t only
    drawn_by_keys = config.loss_type == "hybrid" or (config.time_density == "uniform" and not config.stratified)
    probabilities = time_density(schedule, config.time_density)

    def loss_fn(params, batch, keys):
        (images, labels), u = batch
        x_0 = to_model_input(images, config.image_size)
        predict = apply_to(config, schedule, params, with_dropout(config, labels, keys))
        if config.loss_type == "bound":
            return dj.bound_loss(schedule, predict, x_0, keys, config.target_type)
        if not config.stratified:
            u = uniform(keys, 3)
        t = None if drawn_by_keys else draw_times(probabilities, u)
        return losses[config.loss_type](schedule, predict, x_0, keys, config.target_type, t=t)

    return loss_fn


def make_mean_flow_loss(config: Config, schedule: dj.NoiseSchedule, averages: bool) -> Callable:
    """As `make_loss`. Of two times, t is the larger; s is t, or with `averages`, for most examples, the smaller one.

    The times have the run's density, or with `averages` are uniform, since one call has to go all the way.
    """
    probabilities = time_density(schedule, "uniform" if averages else config.time_density)

    def loss_fn(params, batch, keys):
        (images, labels), u = batch
        x_0 = to_model_input(images, config.image_size)
        network = two_times(config, params, with_dropout(config, labels, keys))
        first, second = (draw_times(probabilities, v) for v in (u if config.stratified else uniform(keys, 3), uniform(keys, 4)))
        t = jnp.maximum(first, second)
        eps = jax.vmap(lambda key: jax.random.normal(key, image_shape(config), jnp.float32))(keys)
        if not averages:
            return adaptively_weighted(2 * dj.loss_at(schedule, lambda x_t, t: network(x_t, t, t), x_0, t, eps, "pred_u"))
        s = jnp.where(uniform(keys, 5) < INSTANTANEOUS, t, jnp.minimum(first, second) - 1)
        velocity = None
        if config.training_guidance != 1:
            velocity = guided_velocity(two_times(config, params, None), config.training_guidance)
        return mean_flow_loss(config.num_timesteps, network, x_0, t, s, eps, velocity)

    return loss_fn


def uniform(keys: Key[Array, " B"], number: int) -> Float[Array, " B"]:
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number), (), jnp.float32))(keys)


def with_dropout(config: Config, labels: Int[Array, " B"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """The labels, or with the probability `config.label_dropout` `config.num_classes`, which means no class."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 2), jnp.float32(config.label_dropout)))(keys)
    return jnp.where(dropped, config.num_classes, labels)


def make_step(config: Config, schedule: dj.NoiseSchedule, data: ImageData, key: Key[Array, ""]) -> Callable:
    """step(state, number) -> (state, metrics), on all devices; see `batches.make_step`.

    The first half of the steps of a mean_flow run trains the velocity alone. The averages start from there, with a new
    optimizer state, since their gradients have another scale.
    """
    arrays = batches.placed((data.images, data.labels.astype(np.int32)))

    def step_of(loss):
        return batches.make_step(loss, arrays, key, config.seed, config.batch_size, config.ema_decay)

    if config.loss_type != "mean_flow":
        return step_of(make_loss(config, schedule))
    velocity_step, average_step = (step_of(make_mean_flow_loss(config, schedule, averages)) for averages in (False, True))
    optimizer = make_optimizer(config, averages=True)

    def step(state, number):
        if number < first_average(config):
            return velocity_step(state, number)
        opt_state = optimizer.init(state.params) if number == first_average(config) else state.opt_state
        return average_step(state.replace(tx=optimizer, opt_state=opt_state), number)

    return step


def first_average(config: Config) -> int:
    """The first step that trains averages in a mean_flow run; those before it train the velocity. 0 for other runs."""
    return config.iterations // 2 if config.loss_type == "mean_flow" else 0


def apply_to(
    config: Config, schedule: dj.NoiseSchedule, params: PyTree, labels: Array | None, table: dj.SamplerTable | None = None
) -> Predict:
    """predict(x_t, t) of the run's network for these labels. `config.num_classes` or None means no class.

    A mean_flow network predicts the velocity at t, or its average over the steps of `table`.
    """
    network = two_times(config, params, labels)
    if config.loss_type != "mean_flow":
        return dj.normalized(schedule, network, config.time_input)
    return (lambda x_t, t: network(x_t, t, t)) if table is None else jumping(network, table)


def two_times(config: Config, params: PyTree, labels: Array | None) -> Callable:
    """network(x_t, t, s=None) for these labels; with s, it is told the times in units of T / LARGEST_TIME."""

    def network(x_t, t, s=None):
        unit = 1 if s is None else config.num_timesteps / LARGEST_TIME
        s = None if s is None else s / unit
        return make_network(config).apply({"params": params}, x_t, t / unit, labels if config.conditional else None, s)

    return network


def make_denoiser(
    config: Config,
    schedule: dj.NoiseSchedule,
    params: PyTree,
    labels: Array | None = None,
    guidance_scale: ArrayLike = 1.0,
    table: dj.SamplerTable | None = None,
    others: Array | None = None,
) -> Denoise:
    """denoise(x_t, t) of the run's network for these labels, with x_0_hat clipped to [-1, 1]; for `table`, see `apply_to`.

    Guidance leads from the labels `others`, by default from no class. It costs a second network call unless it is the number 1.
    """
    predict = apply_to(config, schedule, params, labels, table)
    if not (isinstance(guidance_scale, int | float) and guidance_scale == 1):
        predict = dj.guided(predict, apply_to(config, schedule, params, others, table), guidance_scale)
    return dj.make_denoiser(schedule, predict, config.target_type, None if config.loss_type == "mean_flow" else 1.0)


def default_table(config: Config, schedule: dj.NoiseSchedule, sampling_timesteps: int | None) -> dj.SamplerTable:
    """Ancestral sampling, or for a mean_flow run the steps that its network predicts."""
    if config.loss_type == "mean_flow":
        return dj.ddim_table(schedule, 0.0, sampling_timesteps)
    return dj.ancestral_table(schedule, config.sigma_type, sampling_timesteps)


def make_sampler(
    config: Config, schedule: dj.NoiseSchedule, sample_fn: Callable = dj.sample, guidance_scale: float = 1.0
) -> Callable:
    """draw(params, table, key, labels, first=0) -> a sample in [-1, 1] for each label, numbered from `first` on, drawn on this
    process's devices.

    One program draws them whatever the sampler and its number of steps; with `sample_trajectory`, one for each number of steps.
    """
    devices, whole_path = jax.local_devices(), sample_fn is dj.sample_trajectory

    def draw(params, table, key, examples, labels):
        jumps = table if config.loss_type == "mean_flow" else None
        denoise = make_denoiser(config, schedule, params, labels, guidance_scale, jumps)
        samples = sample_fn(denoise, table, dj.example_keys(key, examples), image_shape(config))
        return samples if whole_path else jnp.clip(samples, -1, 1)

    axis = 1 if whole_path else 0
    compiled = dj.over_devices(draw, (None, None, None, 0, 0), axis, devices)

    def draw_samples(
        params: PyTree, table: dj.SamplerTable, key: Array, labels: np.ndarray, first: int = 0
    ) -> Float[np.ndarray, "..."]:
        table = table if whole_path else dj.padded(table, config.num_timesteps)
        count = math.ceil(len(labels) / len(devices)) * len(devices)
        labels_and_more = np.resize(labels, count).astype(np.int32)
        drawn = compiled(params, table, key, jnp.arange(first, first + count), labels_and_more)
        return np.take(drawn, range(len(labels)), axis)

    return draw_samples


def labels_in_turn(config: Config, count: int) -> np.ndarray:
    """Labels 0, 1, ... in turn for a conditional run, or `config.num_classes` for an unconditional one."""
    return np.arange(count) % config.num_classes if config.conditional else np.full(count, config.num_classes)
