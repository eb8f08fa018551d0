"""Change images of the test split with a run of experiments/mnist.py: one row for each image, its columns as below.

python experiments/edit.py --what inpaint          # the image, what is given of it, and four ways to go on
python experiments/edit.py --what interpolate      # from one image to another, through the noise that each comes from
python experiments/edit.py --what image-to-image   # the image, and what becomes of it after more and more noise
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

import diffusion_jax as dj
from diffusion_jax.sampling import Spacing
from support import model
from support.command_line import one_line_errors, output_file, parse_command_line, require
from support.data import to_model_input
from support.machine import prepare_machine, random_key
from support.pictures import save_rows
from support.saved_run import Sampler, SavedRun, Source, check_denoises, open_run, solver_table

ROUNDS, WAYS = 4, 4
SHARES = np.linspace(0, 1, 9)
NOISE = (0.2, 0.4, 0.6, 0.8)
SAMPLERS_FOR = {  # inpainting resamples, so no multistep table; interpolation encodes, so no noise
    "inpaint": ("ancestral", "ddim"),
    "interpolate": ("ddim", "dpm_solver", "dpm_solver_3m", "heun", "unipc", "deis"),
}


@dataclasses.dataclass(frozen=True)
class Config(Source):
    what: Literal["inpaint", "interpolate", "image-to-image"] = "inpaint"
    """Kind of edit."""
    data_dir: str | None = None
    """TFDS data directory, by default TFDS's own; for a run on a folder or file, where that is now."""
    num_images: int = 6
    """Number of test images to edit."""
    sampling_timesteps: int | None = None
    """Sampling steps; by default min(100, T). inpaint takes all but the last four times."""
    sampler: Sampler | None = None
    """Solver; by default ddim to interpolate, otherwise ancestral."""
    spacing: Spacing | None = None
    """Spacing of the steps, as in sample.py; by default flow for unipc, otherwise time."""
    seed: int = 0
    """Random seed."""
    out: str | None = None
    """Output .png; by default named after the edit."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        out = output_file(config.out or f"{config.what}.png", ".png")
        run = open_run(config.workdir)
        check_denoises(run)
        schedule, num_timesteps = run.schedule, run.config.num_timesteps
        steps = min(100, num_timesteps) if config.sampling_timesteps is None else config.sampling_timesteps
        sampler = config.sampler or ("ddim" if config.what == "interpolate" else "ancestral")
        allowed = SAMPLERS_FOR.get(config.what, get_args(Sampler))
        require(sampler in allowed, "sampler", sampler, f"{' or '.join(allowed)} with --what {config.what}")
        table = solver_table(sampler, schedule, steps, config.spacing)
        enough = config.what != "image-to-image" or table.t.min() <= round(NOISE[0] * num_timesteps)
        require(enough, "sampling_timesteps", steps, "large enough for a step from t <= 0.2 T (image-to-image)")
        images = run.load("test", config.data_dir).images[: config.num_images + 1]
        params = run.restore(config.checkpoint).ema_params

    x_0, key = to_model_input(jnp.asarray(images), run.config.image_size), random_key(config.seed)
    edit = {"inpaint": inpaint, "interpolate": interpolate, "image-to-image": image_to_image}[config.what]
    columns = edit(make_draw(run, params, key), schedule, table, x_0, key)
    with one_line_errors():
        save_rows(out, [np.asarray(column)[: config.num_images] for column in columns])
    print(f"wrote {out}", file=sys.stderr)


def make_draw(run: SavedRun, params: PyTree, key: Array) -> Callable:
    """draw(table, count, start=None, known=0, given=False) -> images, from noise or `start`, with `known` where `given`."""

    @jax.jit
    def compiled(params, table, keys, start, known, given):
        denoise = dj.inpainting(model.make_denoiser(run.config, run.schedule, params), known, given)
        return dj.sample(denoise, table, keys, model.image_shape(run.config), start)

    def draw(table: dj.SamplerTable, count: int, start: Array | None = None, known: Any = 0.0, given: Any = False) -> Array:
        table = dj.padded(table, ROUNDS * run.config.num_timesteps)
        return compiled(params, table, dj.example_keys(key, jnp.arange(count)), start, known, given)

    return draw


def inpaint(
    draw: Callable, schedule: dj.NoiseSchedule, table: dj.SamplerTable, x_0: Float[Array, "B H W C"], key: Array
) -> list[Array]:
    """Complete the left half of each image, in several ways."""
    given = (jnp.arange(x_0.shape[2]) < x_0.shape[2] // 2)[None, None, :, None]
    table, ways = dj.resampled(schedule, table, ROUNDS), jnp.tile(x_0, (WAYS, 1, 1, 1))
    return [x_0, jnp.where(given, x_0, -0.5), *jnp.split(draw(table, len(ways), None, ways, given), WAYS)]


def interpolate(
    draw: Callable, schedule: dj.NoiseSchedule, table: dj.SamplerTable, x_0: Float[Array, "B H W C"], key: Array
) -> list[Array]:
    """Encode each image and the next as noise, interpolate on the sphere, and decode."""
    times = np.append(np.unique(table.t)[::-1], 0.0)  # Heun's are there twice
    noise = draw(dj.encoding_table(schedule, times), len(x_0), x_0)
    pairs = list(zip(noise, jnp.roll(noise, -1, 0), strict=True))
    between = jnp.concatenate([jnp.stack([dj.spherical(x, y, share) for x, y in pairs]) for share in SHARES])
    return [x_0, *jnp.split(draw(table, len(between), between), len(SHARES)), jnp.roll(x_0, -1, 0)]


def image_to_image(
    draw: Callable, schedule: dj.NoiseSchedule, table: dj.SamplerTable, x_0: Float[Array, "B H W C"], key: Array
) -> list[Array]:
    """Noise each image to a fraction of the timesteps, and denoise it from there."""
    columns, eps = [x_0], jax.random.normal(key, x_0.shape, x_0.dtype)
    for share in NOISE:
        rest = dj.part_way(table, round(share * schedule.num_timesteps))
        x_t = dj.q_sample(schedule, x_0, jnp.full(len(x_0), rest.t[0]), eps)
        columns.append(draw(rest, len(x_0), x_t))
    return columns


if __name__ == "__main__":
    main()
