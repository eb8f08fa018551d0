"""Train on your own images: a folder of them, in colour, cut to squares of one size.

python experiments/folder.py --folder ~/pictures --size 32

Follows links. Skips hidden files, thumbnails and trash, and up to 5% of unreadable files with a warning.
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import sys
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import diffusion_jax as dj
from diffusion_jax.training import check_divisible
from diffusion_jax.unet import check_image
from support.batches import make_step
from support.command_line import check_values, one_line_errors, parse_command_line, require
from support.image_folder import folders_below, read_images
from support.loop import train_in
from support.machine import prepare_machine, random_key
from support.pictures import grid, save_picture
from support.workdir import one_line_if_unwritable, open_workdir

TARGET_TYPE = "pred_x_0"
SAMPLING_TIMESTEPS = 50


@dataclasses.dataclass(frozen=True)
class Config:
    folder: str
    """Folder that is searched for images, with its subfolders."""
    size: int = 32
    """Height and width to which images are cropped and scaled."""
    iterations: int = 2000
    """Number of training steps."""
    batch_size: int = 32
    """Images in a training step, over all devices."""
    embed_dim: int = 16
    """Channels of the first and last layers. With a GPU, use 64 or more."""
    dim_scales: tuple[int, ...] = (1, 2, 4, 8)
    """Channels after each level, as multiples of embed_dim; the image is halved between levels."""
    num_timesteps: int = 500
    """Number T of steps of the forward process."""
    learning_rate: float = 2e-3
    """Adam's learning rate at the start of its cosine decay."""
    seed: int = 0
    """Random seed."""
    workdir: str = "runs/folder"
    """Folder of the run. Repeat the command to continue it."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    sample_every: int = 500
    """Steps between sample grids; 0 for none."""
    num_samples: int = 16
    """Samples in each grid."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(tyro.MISSING), __doc__)
        check_values(config)
        folder, workdir = Path(config.folder).resolve(), Path(config.workdir).resolve()
        require(folder.is_dir(), "folder", config.folder, "a folder with images")
        apart = {place.resolve() for place in folders_below(folder)}.isdisjoint({workdir, *workdir.parents})
        require(
            apart, "workdir", config.workdir, f"outside of --folder {config.folder}, or the run would learn its own samples"
        )
        check_divisible(config.batch_size, jax.device_count())
        shape = (config.size, config.size, 3)
        check_image((1, *shape), 2 ** (len(config.dim_scales) - 1))
        schedule = dj.cosine_schedule(config.num_timesteps)
        table = dj.dpm_solver_table(schedule, 1.0, min(SAMPLING_TIMESTEPS, config.num_timesteps))
        images = read_images(folder, config.size)
        init_key, train_key, sample_key = jax.random.split(random_key(config.seed), 3)
        network = dj.UNet(3, config.embed_dim, config.dim_scales)
        params = jax.jit(network.init)(init_key, jnp.zeros((1, *shape), jnp.float32), jnp.ones(1, jnp.int32))["params"]
        optimizer = dj.adam_with_cosine_decay(config.learning_rate, config.iterations, config.iterations // 20)
        state = dj.create_train_state(network.apply, params, optimizer)
        may_differ = {"workdir", "folder", "checkpoint_every", "sample_every", "num_samples"}
        workdir = open_workdir(config, may_differ, images=zlib.crc32(images.tobytes()))
    print(f"{len(images):,} images of {config.folder}, in {workdir}", file=sys.stderr)

    weight = dj.min_snr_weight(schedule, TARGET_TYPE)

    def loss_fn(params, batch, keys):
        (images, _), predict = batch, partial(network.apply, {"params": params})
        x_0 = images.astype(jnp.float32) / 127.5 - 1
        return dj.diffusion_loss(schedule, predict, x_0, keys, TARGET_TYPE, weight=weight)

    def draw(params, keys):
        denoise = dj.make_denoiser(schedule, partial(network.apply, {"params": params}), TARGET_TYPE, clip=1.0)
        return dj.sample(denoise, table, keys, shape)

    step, draw = make_step(loss_fn, images, train_key, config.seed, config.batch_size, ema_decay=0.99), jax.jit(draw)

    def samples(state: dj.TrainState) -> np.ndarray:
        return grid(np.asarray(draw(state.ema_params, dj.example_keys(sample_key, jnp.arange(config.num_samples)))))

    state = train_in(workdir, config, state, step, samples)
    with one_line_if_unwritable(workdir):
        save_picture(workdir / "samples.png", samples(state))
    print(f"wrote {workdir / 'samples.png'}")


if __name__ == "__main__":
    main()
