"""What the options of a run mean: its schedule, network, optimizer, denoiser and sampler."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

import diffusion_jax as dj
from diffusion_jax.diffusion import Denoise, Predict
from diffusion_jax.flow_map import Network, jumping
from support.config import Config
from support.data import ImageData

SCHEDULES = {
    "linear": dj.linear_schedule,
    "cosine": dj.cosine_schedule,
    "flow": dj.flow_schedule,
    "ve": dj.variance_exploding_schedule,
}
OPTIMIZERS = {"adam": dj.adam_with_cosine_decay, "muon": dj.muon_with_cosine_decay}
LARGEST_TIME = 10.0  # the value of t = T for a mean_flow network; small, since its loss has the derivative by t
FEW, SPACING = 4, "flow"  # the calls and steps of a network of two times; a distilled one has learned steps of that spacing
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
    network = make_network(config)
    second_time: dict[str, Any] = {"s": jnp.zeros(1)} if config.few_calls else {}
    x_t, t = jnp.zeros((1, *image_shape(config)), jnp.float32), jnp.ones(1, jnp.int32)
    optimizer = OPTIMIZERS[config.optimizer](config.learning_rate, config.iterations, config.warmup)

    # One program: eagerly, each shape of the optimizer's zeros is one. On CPUs, level 1 compiles in half the time.
    faster: Any = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

    @partial(jax.jit, compiler_options=faster)
    def state(key: Key[Array, ""]) -> dj.TrainState:
        return dj.create_train_state(network.apply, network.init(key, x_t, t, **second_time)["params"], optimizer)

    return state(key)


def apply_to(
    config: Config, schedule: dj.NoiseSchedule, params: PyTree, labels: Array | None, table: dj.SamplerTable | None = None
) -> Predict:
    """predict(x_t, t) of the run's network for these labels. `config.num_classes` or None means no class.

    With a `table`, a network of two times predicts where its steps lead; without one, mean_flow's predicts the velocity at t.
    """
    if config.few_calls:
        network = two_times(config, schedule, params, labels)
        return (lambda x_t, t: network(x_t, t, t)) if table is None else jumping(network, table)
    return dj.normalized(schedule, lambda x_t, t: of_run(config, params, labels, x_t, t), config.time_input)


def two_times(config: Config, schedule: dj.NoiseSchedule, params: PyTree, labels: Array | None) -> Network:
    """network(x_t, t, s) for these labels. A mean_flow network is told the times in units of T / LARGEST_TIME."""
    if config.loss_type == "mean_flow":
        unit = config.num_timesteps / LARGEST_TIME
        return lambda x_t, t, s: of_run(config, params, labels, x_t, t / unit, s / unit)
    return lambda x_t, t, s: dj.normalized(schedule, lambda x, t: of_run(config, params, labels, x, t, s), "t")(x_t, t)


def of_run(config: Config, params: PyTree, labels: Array | None, x_t: Array, t: Array, s: Array | None = None) -> Any:
    return make_network(config).apply({"params": params}, x_t, t, labels if config.conditional else None, s)


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
    return dj.make_denoiser(schedule, predict, config.target_type, None if config.few_calls else 1.0)


def default_table(config: Config, schedule: dj.NoiseSchedule, sampling_timesteps: int | None) -> dj.SamplerTable:
    """Ancestral sampling, by default with T calls, or the steps that a network of two times predicts, by default FEW."""
    if config.few_calls:
        calls = min(FEW, config.num_timesteps) if sampling_timesteps is None else sampling_timesteps
        return dj.ddim_table(schedule, 0.0, dj.sampling_times(schedule, calls, SPACING))
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
        jumps = table if config.few_calls else None
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


def random_labels(config: Config, data: ImageData, count: int, seed: int) -> np.ndarray:
    """The classes of random images of `data` for a conditional run; otherwise as `labels_in_turn`."""
    return np.random.default_rng((seed, 1)).choice(data.labels, count) if config.conditional else labels_in_turn(config, count)


def labels_in_turn(config: Config, count: int) -> np.ndarray:
    """Labels 0, 1, ... in turn for a conditional run, or `config.num_classes` for an unconditional one."""
    return np.arange(count) % config.num_classes if config.conditional else np.full(count, config.num_classes)
