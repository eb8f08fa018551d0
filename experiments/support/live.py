"""Samples on their way from noise, one step at a time, so that a page can show each step while the next is computed."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8
from PIL import Image

import diffusion_jax as dj
from diffusion_jax.sampling import first_state, take_step
from support import model
from support.command_line import check_values, require
from support.data import to_model_input
from support.machine import random_key
from support.saved_run import Sampler, Sampling, SavedRun, check_denoises, check_guidance, sampler_table, solver_table

COUNT, WAYS = 20, 4
STEPS, ROUNDS = 16, 4  # of a completion: 61 network calls
SHARES = np.linspace(0, 1, 9, dtype=np.float32)
PARTS = ("left half", "upper half", "only the ink")

Frames = Iterator[tuple[int, int, np.ndarray]]
"""For each step: how many have been taken, how many there are, and x_t after it, [B, 32, 32, 1]."""


class Wish(NamedTuple):
    """What to sample: these labels, with guidance of this scale from `others` (None: without), and `known` where `given`."""

    labels: Int[np.ndarray, " B"]
    scale: Float[np.ndarray, "..."] | None = None
    others: Int[np.ndarray, " B"] | None = None
    known: Float[np.ndarray, "1 32 32 1"] | float = 0.0
    given: Bool[np.ndarray, "1 32 32 1"] | bool = False


def make_walk(run: SavedRun, params: PyTree) -> Callable:
    """walk(table, seed, wish, start=None) -> Frames, from the noise that sample.py starts from, or from `start`.

    A step is one compiled program for all tables. A mean_flow network predicts average velocities, but to inpaint the velocity
    at t. Raises ValueError unless the run's images are grey and 32x32.
    """
    require(model.image_shape(run.config) == (32, 32, 1), "workdir", run.workdir, "a run on grey images of 32x32")
    params, few_calls = jax.device_put(params), run.config.few_calls

    @jax.jit
    def step(params, row, jumps, state, keys, number, wish):
        scale = 1.0 if wish.scale is None else wish.scale
        denoise = model.make_denoiser(run.config, run.schedule, params, wish.labels, scale, jumps, wish.others)
        return take_step(dj.inpainting(denoise, wish.known, wish.given), row, state, keys, number)

    def walk(table: dj.SamplerTable, seed: int, wish: Wish, start: Array | None = None) -> Frames:
        keys = dj.example_keys(random_key(seed), jnp.arange(len(wish.labels)))
        state = first_state(table, keys, model.image_shape(run.config), start)
        jumps = dj.padded(table, run.config.num_timesteps) if few_calls and wish.given is False else None
        for number in range(len(table.t)):
            row = jax.tree.map(lambda column, number=number: column[number].astype(np.float32), table)
            state = step(params, row, jumps, state, keys, number, wish)
            yield number + 1, len(table.t), np.asarray(state[0])

    return walk


def draw_digits(
    run: SavedRun, walk: Callable, labels: Sequence[int], sampler: Sampler, calls: int, guidance: float, seed: int
) -> Frames:
    """The samples that sample.py draws with these options. Raises ValueError on a missing or invalid number."""
    check_numbers(sampling_timesteps=calls, guidance_scale=guidance, seed=seed)
    check_guidance(run, guidance)
    table = sampler_table(Sampling(sampler=sampler, sampling_timesteps=calls), run)
    wanted = np.resize(sorted(labels), COUNT) if labels else model.labels_in_turn(run.config, COUNT)
    return walk(table, seed, Wish(wanted, None if guidance == 1 else np.asarray(guidance, np.float32)))


def complete(run: SavedRun, walk: Callable, drawing: UInt8[np.ndarray, "H W"] | None, part: str, seed: int) -> Frames:
    """The given part of a drawing, dark on white, then WAYS completions. Raises ValueError if that part has no ink."""
    check_numbers(seed=seed)
    check_denoises(run)
    blank = np.full((28, 28), 255, np.uint8)
    ink = 255 - np.asarray(Image.fromarray(blank if drawing is None else drawing).resize((28, 28), Image.Resampling.BOX))
    x_0 = np.asarray(to_model_input(jnp.asarray(ink)[None, :, :, None]))
    down, across = np.indices(x_0.shape)[1:3]
    given = {"left half": across < 16, "upper half": down < 16, "only the ink": x_0 > 0}[part]
    require(bool(np.any(given & (x_0 > 0))), "drawing", "no ink there", f"a part of a digit (given: {part})")
    table = dj.resampled(run.schedule, solver_table("ancestral", run.schedule, min(STEPS, run.config.num_timesteps)), ROUNDS)
    path = walk(table, seed, Wish(np.full(WAYS, run.config.num_classes), known=x_0, given=given))
    shown = np.where(given, x_0, -0.5)
    return ((number, steps, np.concatenate([shown, x_t])) for number, steps, x_t in path)


def go_between(run: SavedRun, walk: Callable, first: int, first_seed: int, last: int, last_seed: int) -> Frames:
    """Interpolate between the noise of two digits, and between their classes."""
    check_numbers(seed=first_seed)
    check_numbers(seed=last_seed)
    require(not (run.config.conditional and None in (first, last)), "labels", "none", "a class for each end")
    table = sampler_table(Sampling(), run)
    keys = [dj.example_keys(random_key(seed), jnp.arange(1)) for seed in (first_seed, last_seed)]
    ends = [first_state(table, key, model.image_shape(run.config))[0][0] for key in keys]
    x_t = jnp.stack([dj.spherical(ends[0], ends[1], share) for share in SHARES])
    if not run.config.conditional:
        return walk(table, 0, Wish(np.full(len(SHARES), run.config.num_classes)), x_t)
    firsts, lasts = (np.full(len(SHARES), label) for label in (first, last))
    return walk(table, 0, Wish(lasts, SHARES[:, None, None, None], firsts), x_t)


def check_numbers(**values: float | None) -> None:
    for name, value in values.items():
        require(value is not None, name, "nothing", "a number")
    check_values(SimpleNamespace(**values))
