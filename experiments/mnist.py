"""Train DDPM on MNIST, then draw real digits beside samples on their way from noise to digit.

python experiments/mnist.py                   # sized for this machine
python experiments/mnist.py --preset paper    # the published recipe
"""

import argparse
import dataclasses
import math
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from command_line import one_line_errors, parse_command_line, require
from figures import grid, save_animation, save_noise_figure, save_training_figure
from jaxtyping import Array, Float, Key, PyTree
from loop import train_in
from machine import prepare_machine, warn_of_emulated
from processes import check_same_everywhere, failing_together, in_turn, is_first_process, join_processes
from workdir import one_line_if_unwritable, open_workdir

import diffusion_jax as dj
from diffusion_jax.data import DatasetName, ImageData, batch_indices, load_dataset, to_model_input
from diffusion_jax.diffusion import TargetType
from diffusion_jax.sampling import SigmaType
from diffusion_jax.training import check_divisible, replicate

IMAGE_SHAPE = (32, 32, 1)
NUM_CLASSES = 10
SCHEDULES = {"linear": dj.linear_schedule, "cosine": dj.cosine_schedule}
LOSSES = {"hybrid": dj.hybrid_loss, "bound": dj.bound_loss}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Config:
    preset: Literal["auto", "paper", "small"] = "paper"
    """"paper" is the published recipe, "small" fits two CPU cores; "auto" is small where there is only a CPU, else paper."""
    dataset: DatasetName = "auto"
    """"auto" is MNIST, or scikit-learn's digits where MNIST is neither prepared nor within reach."""
    data_dir: str | None = None
    """A TFDS directory; by default TFDS's own."""
    iterations: int = 2000
    batch_size: int = 512
    embed_dim: int = 128
    """Channels at the full resolution."""
    dim_scales: tuple[int, ...] = (1, 2, 4, 8)
    """Channels of each level, as multiples of embed_dim; the image is halved between levels."""
    num_timesteps: int = 500
    """T, the steps of the forward process."""
    target_type: TargetType = "pred_x_0"
    """What the network predicts."""
    sigma_type: SigmaType = "upper_bound"
    """The variance of ancestral sampling; learned goes with the losses hybrid and bound."""
    noise_schedule_type: Literal["linear", "cosine"] = "cosine"
    loss_type: Literal["l2", "l1", "hybrid", "bound"] = "l2"
    """hybrid is l2 and the variational bound of the variances, bound is the variational bound (Nichol & Dhariwal 2021)."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """Of the timesteps, in the losses l2 and l1; min_snr is that of Hang et al. (2023)."""
    conditional: bool = False
    """Learn the classes, for samples of a class that is asked for."""
    label_dropout: float = 0.1
    """The share of examples that a conditional run sees without their class, for guidance."""
    learning_rate: float = 1e-3
    """Adam's, at the start of its cosine decay."""
    warmup: int = 0
    """Steps in which the learning rate rises to that."""
    ema_decay: float = 0.0
    """Of the average of the parameters that samples are drawn with; 0 is the parameters themselves."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters are float32."""
    seed: int = 0
    workdir: str = "runs/mnist"
    """Where the run is kept. The same command continues it."""
    checkpoint_every: int = 100
    sample_every: int = 500
    """Steps between sample grids written during training; 0 for none."""
    sampling_timesteps: int | None = None
    """Steps of the final figure's samples; by default all T."""
    num_samples: int = 20
    distributed: bool = False
    """One process of several that train together."""


MAY_DIFFER = {"workdir", "data_dir", "checkpoint_every", "sample_every", "sampling_timesteps", "num_samples", "distributed"}
PRESETS = {
    "paper": Config(),
    "small": Config(
        preset="small",
        iterations=1200,
        batch_size=32,
        embed_dim=8,
        dim_scales=(1, 4, 8, 16),
        learning_rate=2e-3,
        ema_decay=0.99,
        checkpoint_every=200,
    ),
}


def choose_preset(args: list[str]) -> str:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="auto")
    preset = parser.parse_known_args(args)[0].preset
    return preset if preset in PRESETS else "small" if jax.default_backend() == "cpu" else "paper"


def check(config: Config) -> None:
    """Raise ValueError on the first value that no run can have."""
    for name in ("iterations", "batch_size", "num_timesteps", "checkpoint_every", "num_samples"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    for name in ("seed", "sample_every"):
        require(0 <= getattr(config, name) < 2**31, name, getattr(config, name), "between 0 and 2^31 - 1")
    require(config.embed_dim >= 4 and config.embed_dim % 2 == 0, "embed_dim", config.embed_dim, "even and at least 4")
    require(min(config.dim_scales, default=0) >= 1, "dim_scales", config.dim_scales, "one or more numbers of at least 1")
    require(0 < config.learning_rate < math.inf, "learning_rate", config.learning_rate, "positive and finite")
    require(0 <= config.warmup < config.iterations, "warmup", config.warmup, f"at least 0 and less than {config.iterations}")
    require(0 <= config.ema_decay < 1, "ema_decay", config.ema_decay, "at least 0 and less than 1")
    require(0 <= config.label_dropout <= 1, "label_dropout", config.label_dropout, "between 0 and 1")
    losses = ("hybrid", "bound") if config.sigma_type == "learned" else ("l2", "l1")
    weighted = config.loss_weighting != "none" and config.sigma_type == "learned"
    require(not weighted, "loss_weighting", config.loss_weighting, "none with --sigma-type learned")
    require(config.loss_type in losses, "loss_type", config.loss_type, f"{' or '.join(losses)} with this --sigma-type")


def make_network(config: Config) -> dj.UNet:
    classes, learned = NUM_CLASSES if config.conditional else 0, config.sigma_type == "learned"
    return dj.UNet(IMAGE_SHAPE[-1], config.embed_dim, config.dim_scales, DTYPES[config.precision], classes, learned)


def initial_state(config: Config, key: Key[Array, ""]) -> dj.TrainState:
    network = make_network(config)
    params = jax.jit(network.init)(key, jnp.zeros((1, *IMAGE_SHAPE)), jnp.ones(1, jnp.int32))["params"]
    optimizer = dj.adam_with_cosine_decay(config.learning_rate, config.iterations, config.warmup)
    return dj.create_train_state(network.apply, params, optimizer)


def make_step(config: Config, schedule: dj.NoiseSchedule, data: ImageData, key: Key[Array, ""]) -> Callable:
    """step(state, number) -> (state, metrics), on all devices, with the data set kept on them as bytes."""
    network = make_network(config)
    weight = dj.min_snr_weight(schedule, config.target_type) if config.loss_weighting == "min_snr" else None
    loss = LOSSES.get(config.loss_type, partial(dj.diffusion_loss, loss_type=config.loss_type, weight=weight))

    def loss_fn(params, batch, keys):
        x_0, labels = batch
        dropped = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 2), config.label_dropout))(keys)
        labels = jnp.where(dropped, NUM_CLASSES, labels)
        predict = lambda x_t, t: network.apply({"params": params}, x_t, t, labels)  # noqa: E731
        return loss(schedule, predict, x_0, keys, config.target_type)

    def step(state, images, labels, indices, examples, mean_over_devices):
        keys = dj.example_keys(jax.random.fold_in(key, state.step), examples)
        return dj.train_step(
            state, (to_model_input(images[indices]), labels[indices]), keys,
            loss_fn=loss_fn, ema_decay=config.ema_decay, mean_over_devices=mean_over_devices,
        )  # fmt: skip

    compiled = dj.over_devices(step, (None, None, None, 0, 0), None, jax.devices(), donate_argnums=(0,))
    images, labels = replicate((data.images, data.labels.astype(np.int32)), jax.devices())
    examples = jnp.arange(config.batch_size)
    return lambda state, number: compiled(
        state, images, labels, batch_indices(config.seed, number, config.batch_size, len(data.images)), examples
    )


def make_denoiser(
    config: Config, schedule: dj.NoiseSchedule, params: PyTree, labels: Array | None = None, guidance_scale: float = 1.0
) -> dj.Denoise:
    """The run's network as denoise(x_t, t), for images of these labels; NUM_CLASSES is the label of none in particular."""
    network = make_network(config)
    predict = unconditional = partial(network.apply, {"params": params})
    if labels is not None:
        predict = lambda x_t, t: network.apply({"params": params}, x_t, t, labels)  # noqa: E731
    if guidance_scale != 1:
        predict = dj.guided(predict, unconditional, guidance_scale)
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
    """0, 1, ..., 9, 0, 1, ... for a conditional run, and for another the label of none in particular."""
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
            schedule = SCHEDULES[config.noise_schedule_type](config.num_timesteps)
            table = dj.ancestral_table(schedule, config.sigma_type, config.sampling_timesteps)
            preview_table = dj.ancestral_table(schedule, config.sigma_type, min(50, config.num_timesteps))
            init_key, train_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
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

    def preview(state: dj.TrainState, step: int) -> dict[str, np.ndarray]:
        if not config.sample_every or step % config.sample_every or step == config.iterations:
            return {}
        return {"samples": grid(sampler(state.ema_params, preview_table, sample_key, labels))}

    state = train_in(workdir, config, state, make_step(config, schedule, data, train_key), preview)

    draw_path = make_sampler(config, schedule, dj.sample_trajectory)
    path = draw_path(state.ema_params, table, sample_key, labels)
    real = np.asarray(to_model_input(jnp.asarray(data.images[: config.num_samples])))
    with one_line_if_unwritable(workdir), failing_together():
        if is_first_process():
            save_noise_figure(workdir / "figure.png", real, path)
            save_animation(workdir / "denoising.gif", path)
            metrics = np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True, ndmin=1)
            save_training_figure(
                workdir / "training.png", metrics, dj.cosine_decay(config.learning_rate, config.iterations, config.warmup)
            )
            print(f"wrote figure.png, denoising.gif and training.png in {workdir}")


def fingerprint(config: Config, data: ImageData) -> int:
    """A number that tells whether processes agree on the run that they are of."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in {"workdir", "data_dir"}}
    return zlib.crc32(repr(options).encode() + data.images.tobytes() + data.labels.tobytes()) >> 1


if __name__ == "__main__":
    main()
