"""A run of mnist.py, as the scripts that use one find it: its config, its state, and samples of it."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import mnist
import numpy as np
from beartype.door import is_bearable
from command_line import require
from jaxtyping import Array, Float, Int, Key
from machine import random_key
from tqdm import tqdm
from workdir import read_config

import diffusion_jax as dj
from diffusion_jax.checkpoints import open_checkpoints, restore, restore_latest

BATCH = 256
Sampler = Literal["ancestral", "ddim", "dpm_solver", "dpm_solver_3m", "heun", "unipc", "deis"]


def solver_table(
    sampler: str,
    schedule: dj.NoiseSchedule,
    calls: int | None = None,
    spacing: str | None = None,
    sigma_type: str = "upper_bound",
    eta: float = 0.0,
) -> dj.SamplerTable:
    """The table of a `Sampler` of so many network calls, by default T, or T / 2 steps of Heun's method.

    Steps are evenly spaced in t by default, and UniPC's as in flow, with a polynomial in the signal, which goes with that.
    """
    spacing = spacing or ("flow" if sampler == "unipc" else "time")
    unipc = partial(dj.unipc_table, order=3, variable="signal" if spacing == "flow" else "log_snr")
    tables = {
        "ancestral": partial(dj.ancestral_table, sigma_type=sigma_type),
        "ddim": partial(dj.ddim_table, eta=eta),
        "dpm_solver": partial(dj.dpm_solver_table, eta=eta),
        "dpm_solver_3m": partial(dj.dpm_solver_table, eta=eta, order=3),
        "heun": dj.heun_table,
        "unipc": unipc,
        "deis": dj.deis_table,
    }
    calls = schedule.num_timesteps if calls is None else calls
    most = schedule.num_timesteps
    require(1 <= calls <= most, "sampling_timesteps", calls, f"between 1 and num_timesteps = {most}")
    steps = (calls + 1) // 2 if sampler == "heun" else calls
    return tables[sampler](schedule, sampling_timesteps=dj.sampling_times(schedule, steps, spacing))


def sampler_table(config: Any, run: mnist.Config, schedule: dj.NoiseSchedule) -> dj.SamplerTable:
    """The table that the options sampler, spacing, eta and sampling_timesteps ask for, of a run."""
    require(0 <= config.eta <= 1, "eta", config.eta, "between 0 and 1")
    takes_eta = config.sampler in ("ddim", "dpm_solver", "dpm_solver_3m")
    require(takes_eta or config.eta == 0, "eta", config.eta, "0 unless --sampler is ddim, dpm_solver or dpm_solver_3m")
    return solver_table(config.sampler, schedule, config.sampling_timesteps, config.spacing, run.sigma_type, config.eta)


def check_guidance(run: mnist.Config, scale: float) -> None:
    require(0 <= scale < math.inf, "guidance_scale", scale, "at least 0 and finite")
    require(run.conditional or scale == 1, "guidance_scale", scale, "1 unless the run is --conditional")


def draw_all(
    run: mnist.Config,
    schedule: dj.NoiseSchedule,
    state: dj.TrainState,
    table: dj.SamplerTable,
    key: Key[Array, ""],
    labels: Int[np.ndarray, " count"],
    guidance_scale: float = 1.0,
) -> Float[np.ndarray, "count 32 32 1"]:
    """A sample for each label, a batch at a time."""
    draw, count = mnist.make_sampler(run, schedule, guidance_scale=guidance_scale), len(labels)
    batch = min(BATCH, count)
    labels = np.resize(labels, math.ceil(count / batch) * batch)
    firsts = tqdm(range(0, count, batch), "samples", unit="batch")
    samples = [draw(state.ema_params, table, key, labels[first : first + batch], first) for first in firsts]
    return np.concatenate(samples)[:count]


def run_config(workdir: str) -> mnist.Config:
    """The config of the run in `workdir`. Raises ValueError where it is not one of experiments/mnist.py."""
    names = {field.name for field in dataclasses.fields(mnist.Config)}
    saved = read_config(workdir, names)
    if set(saved) != names:
        odd = ", ".join(sorted(set(saved) ^ names))
        raise ValueError(f"--workdir must hold a run of experiments/mnist.py; {workdir}/config.json differs in {odd}")
    saved: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for name, hint in get_type_hints(mnist.Config).items():
        if not is_bearable(saved[name], hint):
            raise ValueError(
                f"--workdir must hold a run of experiments/mnist.py; {workdir}/config.json has {name} {saved[name]}"
            )
    run = mnist.Config(**saved)
    try:
        mnist.check(run)
    except ValueError as problem:
        raise ValueError(f"--workdir must hold a run of experiments/mnist.py; in {workdir}/config.json {problem}") from None
    return run


def restored(run: mnist.Config, workdir: str, which: str) -> dj.TrainState:
    with open_checkpoints(Path(workdir) / "checkpoints") as checkpoints:
        if checkpoints.latest_step() is None:
            raise ValueError(f"--workdir must hold a run with a checkpoint, and {workdir} has none yet")
        state = mnist.initial_state(run, random_key(0))
        if which == "newest":
            return restore_latest(checkpoints, state)
        best = checkpoints.best_step()
        require(best is not None, "checkpoint", which, f"newest: in {workdir} no loss is saved")
        return restore(checkpoints, best, state)
