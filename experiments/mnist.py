"""Train DDPM on MNIST, then draw real digits beside samples on their way from noise to digit.

python experiments/mnist.py                   # sized for this machine
python experiments/mnist.py --preset paper    # the published recipe
"""

import terminal  # isort: skip  # noqa: F401

import dataclasses
import math
import os
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command_line import one_line_errors, parse_command_line
from figures import grid, save_animation, save_noise_figure, save_training_figure
from jaxtyping import Array, Float, Key, PyTree
from loop import train_in
from machine import prepare_machine, random_key, warn_of_emulated
from mnist_config import MAY_DIFFER, PRESETS, Config, check, choose_preset
from processes import check_same_everywhere, failing_together, in_turn, is_first_process, join_processes
from workdir import one_line_if_unwritable, open_workdir

import diffusion_jax as dj
from diffusion_jax.data import ImageData, batch_indices, load_dataset, to_model_input
from diffusion_jax.diffusion import Denoise, Predict
from diffusion_jax.losses import draw_times, time_density
from diffusion_jax.training import check_divisible, replicate

IMAGE_SHAPE = (32, 32, 1)
NUM_CLASSES = 10
SCHEDULES = {
    "linear": dj.linear_schedule,
    "cosine": dj.cosine_schedule,
    "flow": dj.flow_schedule,
    "ve": dj.variance_exploding_schedule,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_schedule(config: Config) -> dj.NoiseSchedule:
    return SCHEDULES[config.noise_schedule_type](config.num_timesteps)


def make_network(config: Config) -> dj.UNet | dj.DiT:
    classes, learned = NUM_CLASSES if config.conditional else 0, config.sigma_type == "learned"
    common: dict[str, Any] = {"dtype": DTYPES[config.precision], "num_classes": classes, "learned_variance": learned}
    if config.network == "dit":
        return dj.DiT(IMAGE_SHAPE[-1], config.embed_dim, config.depth, config.patch_size, **common)
    return dj.UNet(IMAGE_SHAPE[-1], config.embed_dim, config.dim_scales, **common)


def initial_state(config: Config, key: Key[Array, ""]) -> dj.TrainState:
    network = make_network(config)
    params = jax.jit(network.init)(key, jnp.zeros((1, *IMAGE_SHAPE), jnp.float32), jnp.ones(1, jnp.int32))["params"]
    optimizer = dj.adam_with_cosine_decay(config.learning_rate, config.iterations, config.warmup)
    return dj.create_train_state(network.apply, params, optimizer)


def make_step(config: Config, schedule: dj.NoiseSchedule, data: ImageData, key: Key[Array, ""]) -> Callable:
    """step(state, number) -> (state, metrics), on all devices, with the data set kept on them as bytes."""
    step = training_step(config, schedule, key)
    compiled = dj.over_devices(step, (None, None, None, 0, 0), None, jax.devices(), donate_argnums=(0,))
    images, labels = replicate((data.images, data.labels.astype(np.int32)), jax.devices())
    examples = jnp.arange(config.batch_size, dtype=jnp.int32)
    return lambda state, number: compiled(
        state, images, labels, batch_indices(config.seed, number, config.batch_size, len(data.images)), examples
    )


def training_step(config: Config, schedule: dj.NoiseSchedule, key: Key[Array, ""]) -> Callable:
    """step(state, images, labels, indices, examples, mean_over_devices) -> (state, metrics), of the examples at the indices."""
    weight = dj.min_snr_weight(schedule, config.target_type) if config.loss_weighting == "min_snr" else None
    losses = {
        "hybrid": partial(dj.hybrid_loss, weight=weight),
        **{name: partial(dj.diffusion_loss, loss_type=name, weight=weight) for name in ("l2", "l1")},
    }
    drawn_by_keys = config.time_density == "uniform" and not config.stratified
    probabilities = time_density(schedule, config.time_density)

    def loss_fn(params, batch, keys):
        x_0, labels, u = batch
        share = jnp.float32(config.label_dropout)
        dropped = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 2), share))(keys)
        labels = jnp.where(dropped, NUM_CLASSES, labels)
        predict = apply_to(config, schedule, params, labels)
        if config.loss_type == "bound":
            return dj.bound_loss(schedule, predict, x_0, keys, config.target_type)
        t = None if drawn_by_keys else draw_times(probabilities, u)
        return losses[config.loss_type](schedule, predict, x_0, keys, config.target_type, t=t)

    def step(state, images, labels, indices, examples, mean_over_devices):
        step_key = jax.random.fold_in(key, state.step)
        keys = dj.example_keys(step_key, examples)
        u = time_quantiles(step_key, keys, examples, config)
        return dj.train_step(
            state, (to_model_input(images[indices]), labels[indices], u), keys,
            loss_fn=loss_fn, ema_decay=config.ema_decay, mean_over_devices=mean_over_devices,
        )  # fmt: skip

    return step


def time_quantiles(step_key: Key[Array, ""], keys: Key[Array, " B"], examples: Array, config: Config) -> Float[Array, " B"]:
    """For each example of the batch a number in [0, 1), uniform, which `draw_times` turns into its t."""
    uniform = lambda key: jax.random.uniform(jax.random.fold_in(key, 3), (), jnp.float32)  # noqa: E731
    if config.stratified:
        return (uniform(step_key) + examples / jnp.float32(config.batch_size)) % 1
    return jax.vmap(uniform)(keys)


def apply_to(config: Config, schedule: dj.NoiseSchedule, params: PyTree, labels: Array | None) -> Predict:
    """The run's network as predict(x_t, t), for images of these labels, of which NUM_CLASSES or None is of no class; where the
    run is not conditional they do not matter."""
    labels = labels if config.conditional else None
    network = lambda x_t, t: make_network(config).apply({"params": params}, x_t, t, labels)  # noqa: E731
    return dj.normalized(schedule, network, config.time_input)


def make_denoiser(
    config: Config, schedule: dj.NoiseSchedule, params: PyTree, labels: Array | None = None, guidance_scale: float = 1.0
) -> Denoise:
    """The run's network as denoise(x_t, t), for images of these labels."""
    predict = apply_to(config, schedule, params, labels)
    if guidance_scale != 1:
        predict = dj.guided(predict, apply_to(config, schedule, params, None), guidance_scale)
    return dj.make_denoiser(schedule, predict, config.target_type, clip=1.0)


def make_sampler(
    config: Config, schedule: dj.NoiseSchedule, sample_fn: Callable = dj.sample, guidance_scale: float = 1.0
) -> Callable:
    """draw(params, table, key, labels, first=0) -> a sample in [-1, 1] for each label, numbered from `first` on, drawn on this
    process's devices.

    One program draws them whatever the sampler and its number of steps; with `sample_trajectory`, one for each number of steps.
    """
    devices, whole_path = jax.local_devices(), sample_fn is dj.sample_trajectory

    def draw(params, table, key, examples, labels):
        denoise = make_denoiser(config, schedule, params, labels, guidance_scale)
        return sample_fn(denoise, table, dj.example_keys(key, examples), IMAGE_SHAPE)

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
    """0, 1, ..., 9, 0, 1, ... for a conditional run, and for another the label of no class."""
    return np.arange(count) % NUM_CLASSES if config.conditional else np.full(count, NUM_CLASSES)


def main() -> None:
    prepare_machine()
    with one_line_errors():
        join_processes(sys.argv[1:])
        with failing_together():
            preset = choose_preset(sys.argv[1:])
            config = parse_command_line(PRESETS[preset], __doc__)
            config = dataclasses.replace(config, preset=preset)
            check(config)
            check_divisible(config.batch_size, jax.device_count())
            warn_of_emulated(config.precision)
            schedule = make_schedule(config)
            table = dj.ancestral_table(schedule, config.sigma_type, config.sampling_timesteps)
            preview_table = dj.ancestral_table(schedule, config.sigma_type, min(50, config.num_timesteps))
            init_key, train_key, sample_key = jax.random.split(random_key(config.seed), 3)
            state = initial_state(config, init_key)
        data = in_turn(lambda: load_dataset(config.dataset, config.data_dir))
        config = dataclasses.replace(config, dataset=data.name)
        check_same_everywhere("options and data", fingerprint(config, data))
        with failing_together():
            workdir = open_workdir(config, MAY_DIFFER) if is_first_process() else Path(config.workdir)

    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if is_first_process():
        print(f"{config.preset} preset on {devices}, {len(data.images):,} images of {data.name}, in {workdir}", file=sys.stderr)
    sampler, labels = make_sampler(config, schedule), labels_in_turn(config, config.num_samples)

    def preview(state: dj.TrainState) -> np.ndarray:
        return grid(sampler(state.ema_params, preview_table, sample_key, labels))

    state = train_in(workdir, config, state, make_step(config, schedule, data, train_key), preview)

    draw_path = make_sampler(config, schedule, dj.sample_trajectory)
    path = draw_path(state.ema_params, table, sample_key, labels)
    real = np.asarray(to_model_input(jnp.asarray(data.images[: config.num_samples])))
    wrote = ["figure.png", "denoising.gif"]
    with one_line_if_unwritable(workdir), failing_together():
        if is_first_process():
            save_noise_figure(workdir / "figure.png", real, path)
            save_animation(workdir / "denoising.gif", path)
            if os.path.getsize(workdir / "metrics.csv"):  # else all rows are lost, of which the loop has warned
                metrics = np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True, ndmin=1)
                learning_rate = dj.cosine_decay(config.learning_rate, config.iterations, config.warmup)
                save_training_figure(workdir / "training.png", metrics, learning_rate)
                wrote.append("training.png")
    if is_first_process():
        print(f"wrote {', '.join(wrote)} in {workdir}")


def fingerprint(config: Config, data: ImageData) -> int:
    """A number that tells whether processes agree on the run that they are of."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in {"workdir", "data_dir"}}
    return zlib.crc32(repr(options).encode() + data.images.tobytes() + data.labels.tobytes()) >> 1


if __name__ == "__main__":
    main()
