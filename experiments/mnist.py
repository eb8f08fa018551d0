"""Train DDPM on MNIST or other images, then draw real ones beside samples on their way from noise to image.

python experiments/mnist.py                         # sized for this machine
python experiments/mnist.py --preset paper          # the published recipe
python experiments/mnist.py --dataset ~/pictures    # a folder of your own, also a .npy, .npz or data set of TFDS
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import os
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import diffusion_jax as dj
from support import model, objective
from support.arrays import checksum
from support.command_line import one_line_errors
from support.config import MAY_DIFFER, Config, described_by, parse_run
from support.data import ImageData, load_dataset, to_model_input
from support.image_folder import check_apart
from support.loop import train_in
from support.machine import prepare_machine, random_key
from support.pictures import grid, save_animation
from support.processes import check_same_everywhere, failing_together, in_turn, is_first_process, join_processes
from support.saved_run import begun
from support.workdir import one_line_if_unwritable, open_workdir


def main() -> None:
    prepare_machine()
    with one_line_errors():
        join_processes(sys.argv[1:])
        with failing_together():
            config = parse_run(__doc__)
            schedule = model.make_schedule(config)
            table = model.default_table(config, schedule, config.sampling_timesteps)
            preview_table = table if config.few_calls else model.default_table(config, schedule, min(50, config.num_timesteps))
        data = in_turn(lambda: load_dataset(config.dataset, config.data_dir, "train", config.image_size, config.channels))
        with failing_together():
            config = described_by(config, data)
            if config.images is not None and Path(config.dataset).is_dir():
                check_apart(Path(config.dataset), Path(config.workdir))
            init_key, train_key, sample_key = jax.random.split(random_key(config.seed), 3)
            state = model.initial_state(config, init_key)
        config, state = begun(config, state)
        check_same_everywhere("options and data", fingerprint(config, data))
        with failing_together():
            more = {name: getattr(config, name) for name in ("num_classes", "images", "teacher")}
            # the same images and the same teacher may be elsewhere now
            moved = {name for name, known in (("dataset", config.images), ("init", config.teacher)) if known is not None}
            workdir = open_workdir(config, MAY_DIFFER | moved, **more) if is_first_process() else Path(config.workdir)
    if is_first_process():
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        print(f"{config.preset} preset on {devices}, {len(data.images):,} images of {data.name}, in {workdir}", file=sys.stderr)

    step = objective.make_step(config, schedule, data, train_key, state.params)
    sampler, labels = model.make_sampler(config, schedule), model.labels_in_turn(config, config.num_samples)

    def preview(state: dj.TrainState) -> np.ndarray:
        return grid(sampler(state.ema_params, preview_table, sample_key, labels))

    state = train_in(workdir, config, state, step, preview)
    path = model.make_sampler(config, schedule, dj.sample_trajectory)(state.ema_params, table, sample_key, labels)
    with one_line_if_unwritable(workdir), failing_together():
        if is_first_process():
            save_figures(workdir, config, data, path)


def save_figures(workdir: Path, config: Config, data: ImageData, path: Float[np.ndarray, "S N H W C"]) -> None:
    """Write figure.png, denoising.gif and training.png."""
    from support.figures import save_noise_figure, save_training_figure  # matplotlib would delay the first step

    real = np.asarray(to_model_input(jnp.asarray(data.images[: config.num_samples]), config.image_size))
    save_noise_figure(workdir / "figure.png", real, path)
    save_animation(workdir / "denoising.gif", path)
    wrote = ["figure.png", "denoising.gif"]
    if os.path.getsize(workdir / "metrics.csv"):  # otherwise all rows were lost, and the loop has warned
        metrics = np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True, ndmin=1)
        decay = dj.cosine_decay(config.learning_rate, config.iterations, config.warmup)
        save_training_figure(workdir / "training.png", metrics, decay)
        wrote.append("training.png")
    print(f"wrote {', '.join(wrote)} in {workdir}")


def fingerprint(config: Config, data: ImageData) -> int:
    """A checksum of the options and the data, which all processes of a run must share."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in {"workdir", "data_dir"}}
    of_data = checksum(np.asarray(data.images), data.labels) if config.images is None else config.images
    return zlib.crc32(repr(options).encode(), of_data) >> 1


if __name__ == "__main__":
    main()
