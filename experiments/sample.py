"""Draw samples from a run of experiments/mnist.py, with its averaged parameters.

python experiments/sample.py --sampling-timesteps 50 --out samples.png
"""

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax
import mnist
import numpy as np
from beartype.door import is_bearable
from command_line import one_line_errors, parse_command_line, require
from figures import save_grid
from jaxtyping import Array, Float, Int, Key
from machine import prepare_machine
from tqdm import tqdm
from workdir import read_config

import diffusion_jax as dj
from diffusion_jax.checkpoints import open_checkpoints, restore, restore_latest

BATCH = 256


@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = "runs/mnist"
    """The folder of the run."""
    checkpoint: Literal["newest", "best"] = "newest"
    """The best is the one that the lowest training loss led to."""
    num_samples: int | None = None
    """By default 64, or one for each label."""
    labels: tuple[int, ...] = ()
    """The classes to draw, in turn, from a run with --conditional; by default all of them."""
    guidance_scale: float = 1.0
    """How much a sample keeps to its class, where 1 is what the network has learned, and more is truer and less varied."""
    sampling_timesteps: int | None = None
    """Network calls for each sample; by default all T of the run."""
    sampler: Literal["ancestral", "ddim", "dpm_solver"] = "ancestral"
    """Ancestral sampling has the variance that the run was configured with; dpm_solver is DPM-Solver++(2M)."""
    eta: float = 0.0
    """For ddim and dpm_solver: 0 is deterministic, 1 has the noise of lower_bound ancestral sampling."""
    seed: int = 0
    out: str = "samples.png"
    """A .png is a grid, a .npy is float32 [N, 32, 32, 1] in [-1, 1]."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        out = Path(config.out)
        count = (len(config.labels) or 64) if config.num_samples is None else config.num_samples
        require(count >= 1, "num_samples", config.num_samples, "at least 1")
        for label in config.labels:
            require(0 <= label < mnist.NUM_CLASSES, "labels", label, f"between 0 and {mnist.NUM_CLASSES - 1}")
        require(0 <= config.seed < 2**31, "seed", config.seed, "between 0 and 2^31 - 1")
        require(out.suffix in (".png", ".npy"), "out", out, "a file that ends in .png or .npy")
        require(out.parent.is_dir(), "out", out, "in a folder that exists")
        run = run_config(config.workdir)
        check_guidance(run, config.guidance_scale)
        require(run.conditional or not config.labels, "labels", config.labels, "left out unless the run is --conditional")
        schedule = mnist.SCHEDULES[run.noise_schedule_type](run.num_timesteps)
        table = sampler_table(config, run, schedule)
        state = restored(run, config.workdir, config.checkpoint)

    labels = np.resize(config.labels, count) if config.labels else mnist.labels_in_turn(run, count)
    samples = draw_all(run, schedule, state, table, jax.random.key(config.seed), labels, config.guidance_scale)
    with one_line_errors():
        save_grid(out, samples) if out.suffix == ".png" else np.save(out, samples)
    print(f"wrote {out}: {len(samples)} samples at step {int(state.step)} of {run.iterations}", file=sys.stderr)


def sampler_table(config: Any, run: mnist.Config, schedule: dj.NoiseSchedule) -> dj.SamplerTable:
    """The table of `config`'s sampler, eta and sampling_timesteps, for a run."""
    require(config.sampler != "ancestral" or config.eta == 0, "eta", config.eta, "0 unless --sampler is ddim or dpm_solver")
    tables = {
        "ancestral": partial(dj.ancestral_table, sigma_type=run.sigma_type),
        "ddim": partial(dj.ddim_table, eta=config.eta),
        "dpm_solver": partial(dj.dpm_solver_table, eta=config.eta),
    }
    return tables[config.sampler](schedule, sampling_timesteps=config.sampling_timesteps)


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
    """A sample for each label, of the run's averaged parameters, a batch at a time."""
    draw, count = mnist.make_sampler(run, schedule, guidance_scale=guidance_scale), len(labels)
    batch = min(BATCH, count)
    labels = np.resize(labels, math.ceil(count / batch) * batch)
    firsts = tqdm(range(0, count, batch), "samples", unit="batch")
    samples = [draw(state.ema_params, table, key, labels[first : first + batch], first) for first in firsts]
    return np.concatenate(samples)[:count]


def run_config(workdir: str) -> mnist.Config:
    """The config of the run in `workdir`. Raises ValueError where it is not one of experiments/mnist.py."""
    saved = read_config(workdir)
    names = {field.name for field in dataclasses.fields(mnist.Config)}
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
        state = mnist.initial_state(run, jax.random.key(0))
        if which == "newest":
            return restore_latest(checkpoints, state)
        best = checkpoints.best_step()
        require(best is not None, "checkpoint", which, f"newest: in {workdir} no loss is saved")
        return restore(checkpoints, best, state)


if __name__ == "__main__":
    main()
