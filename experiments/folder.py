"""Train on your own images: a folder of them, in colour, cut to squares of one size.

python experiments/folder.py --folder ~/pictures --size 32

Follows links. Skips hidden files, thumbnails and trash, and up to 5% of unreadable files with a warning.
"""

import terminal  # isort: skip  # noqa: F401

import dataclasses
import os
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from command_line import check_values, one_line_errors, parse_command_line, require
from figures import grid, save_picture
from jaxtyping import UInt8
from loop import train_in
from machine import prepare_machine, random_key
from PIL import ExifTags, Image, ImageFile, ImageOps
from workdir import is_hidden, one_line_if_unwritable, open_workdir

import diffusion_jax as dj
from diffusion_jax.data import batch_indices
from diffusion_jax.training import check_divisible, replicate
from diffusion_jax.unet import check_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
MOST_UNREADABLE = 0.05
SCALED_TO_8_BITS: dict[Any, float] = {
    "L;2": 85,
    "L;4": 17,
    "RGB;16B": 1 / 256,
}  # Pillow scales these pixels to 8 bits but not the transparent colour
TARGET_TYPE = "pred_x_0"
SAMPLING_TIMESTEPS = 50


@dataclasses.dataclass(frozen=True)
class Config:
    folder: str
    """Where the images are, in it or in folders below it."""
    size: int = 32
    """Height and width to which they are cut and scaled."""
    iterations: int = 2000
    """Training steps."""
    batch_size: int = 32
    """Images a step, over all devices."""
    embed_dim: int = 16
    """Channels of the first and the last layers; with a GPU, 64 or more."""
    dim_scales: tuple[int, ...] = (1, 2, 4, 8)
    """Channels after each level, as multiples of embed_dim; the image is halved between levels."""
    num_timesteps: int = 500
    """T, the steps of the forward process."""
    learning_rate: float = 2e-3
    """Adam's, at the start of its cosine decay."""
    seed: int = 0
    """Of all that is random."""
    workdir: str = "runs/folder"
    """Where the run is kept. The same command continues it."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    sample_every: int = 500
    """Steps between pictures of samples; 0 for none."""
    num_samples: int = 16
    """Samples in each picture."""


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

    def loss_fn(params, x_0, keys):
        predict = partial(network.apply, {"params": params})
        return dj.diffusion_loss(schedule, predict, x_0, keys, TARGET_TYPE, weight=weight)

    def step(state, images, indices, examples, mean_over_devices):
        keys = dj.example_keys(jax.random.fold_in(train_key, state.step), examples)
        x_0 = images[indices].astype(jnp.float32) / 127.5 - 1
        return dj.train_step(state, x_0, keys, loss_fn=loss_fn, ema_decay=0.99, mean_over_devices=mean_over_devices)

    def draw(params, keys):
        denoise = dj.make_denoiser(schedule, partial(network.apply, {"params": params}), TARGET_TYPE, clip=1.0)
        return dj.sample(denoise, table, keys, shape)

    compiled = dj.over_devices(step, (None, None, 0, 0), None, jax.devices(), donate_argnums=(0,))
    on_device, examples, draw = replicate(images, jax.devices()), jnp.arange(config.batch_size), jax.jit(draw)

    def next_step(state: dj.TrainState, number: int):
        return compiled(state, on_device, batch_indices(config.seed, number, config.batch_size, len(images)), examples)

    def samples(state: dj.TrainState) -> np.ndarray:
        return grid(np.asarray(draw(state.ema_params, dj.example_keys(sample_key, jnp.arange(config.num_samples)))))

    state = train_in(workdir, config, state, next_step, samples)
    with one_line_if_unwritable(workdir):
        save_picture(workdir / "samples.png", samples(state))
    print(f"wrote {workdir / 'samples.png'}")


def folders_below(folder: Path) -> list[Path]:
    """`folder` and each folder in it, links followed, each real folder once. Raises OSError where one cannot be listed."""

    def stop(problem: OSError) -> None:
        raise problem

    found: dict[Path, Path] = {}
    for place, below, _ in os.walk(folder, onerror=stop, followlinks=True):
        if Path(place).resolve() in found:
            below.clear()
            continue
        found[Path(place).resolve()] = Path(place)
        below[:] = sorted(name for name in below if not is_hidden(name))
    return list(found.values())


def read_images(folder: Path, size: int) -> UInt8[np.ndarray, "N size size 3"]:
    """The middle square of each image in `folder` and below. Files that cannot be read are left out, with a warning.

    Raises ValueError if there is no image, or if more than MOST_UNREADABLE of them cannot be read.
    """
    entries = sorted(entry for place in folders_below(folder) for entry in place.iterdir() if not is_hidden(entry.name))
    files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
    require(bool(files), "folder", folder, f"a folder with images ({', '.join(sorted(SUFFIXES))})")
    images, unreadable = [], []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(as_square(image, size))
        except MemoryError:
            raise
        except Exception as problem:  # Pillow has many kinds
            unreadable.append(f"{file} ({(str(problem) or type(problem).__name__).splitlines()[0]})")
    if unreadable:
        named = ", ".join(unreadable[:3]) + (", ..." if unreadable[3:] else "")
        counted = f"{len(unreadable)} of {len(files)} images cannot be read"
        if len(unreadable) > MOST_UNREADABLE * len(files):
            raise ValueError(f"{counted}, and at most {MOST_UNREADABLE:.0%} may be left out: {named}")
        warnings.warn(f"{counted} and are left out: {named}", stacklevel=2)
    return np.stack(images)


def as_square(file: ImageFile.ImageFile, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Upright, on white where it is transparent, and 16 bits of grey as 8."""
    scale = SCALED_TO_8_BITS.get(file.tile[0].args) if file.format == "PNG" else None
    file.load()
    turn, clear = orientation(file), file.info.get("transparency")
    image: Image.Image = file
    if scale and clear is not None:
        image.info["transparency"] = tuple(int(c * scale) for c in clear) if isinstance(clear, tuple) else clear * scale
    if image.mode.startswith("I"):
        values = np.asarray(image)
        image = Image.fromarray(np.where(values == clear, 255, values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.info.clear()  # the rest of the EXIF data may be odd, and exif_transpose would write it again
    image.getexif()[ExifTags.Base.Orientation] = turn
    return np.asarray(ImageOps.fit(ImageOps.exif_transpose(image), (size, size)))


def orientation(image: Image.Image) -> object:
    """As the EXIF data has it; None where it has none or is damaged, which picture viewers take for upright."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow has many kinds
        return None


if __name__ == "__main__":
    main()
