"""A run of mnist.py, as the scripts that use one find it: its config, its state, and samples of it."""

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import numpy as np
from beartype.door import is_bearable
from jaxtyping import Array, Float, Int, Key, PyTree
from tqdm import tqdm

import diffusion_jax as dj
from diffusion_jax.checkpoints import open_checkpoints, restore, restore_latest
from diffusion_jax.sampling import Spacing
from support import model
from support.command_line import require
from support.config import Config, check, check_calls
from support.data import ImageData, Split, load_dataset
from support.exported import SUFFIX, read_options, read_params
from support.machine import random_key
from support.workdir import read_config, with_added

BATCH = 256
DEFAULT_WORKDIR, TRAINED = "runs/mnist", Path(__file__).parents[1] / "mnist.safetensors"
Sampler = Literal["ancestral", "ddim", "dpm_solver", "dpm_solver_3m", "heun", "unipc", "deis", "consistency"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Options of scripts that use a run."""

    workdir: str | None = None
    """Folder of the run, or a file of export.py. By default runs/mnist, or else the network that comes with the project."""
    checkpoint: Literal["newest", "best"] = "newest"
    """newest, or best: the one with the lowest mean training loss since the checkpoint before it."""


@dataclasses.dataclass(frozen=True)
class Sampling(Source):
    """Options of scripts that sample by any solver."""

    guidance_scale: float = 1.0
    """Classifier-free guidance scale, for conditional runs. 1 is no guidance; more gives clearer, less varied samples."""
    sampling_timesteps: int | None = None
    """Network calls for each sample; by default 20, or 4 for a distilled or mean_flow run, or T with --sampler ancestral."""
    sampler: Sampler | None = None
    """Solver; by default unipc, or ddim for a distilled or mean_flow run. dpm_solver is DPM-Solver++(2M)."""
    spacing: Spacing | None = None
    """Spacing of steps: even in t or log-SNR, by Karras et al. (2022), or flow, the default of unipc and few calls."""
    eta: float = 0.0
    """Noise of ddim, dpm_solver, dpm_solver_3m, from 0 (none) to 1 (as ancestral sampling, lower bound)."""
    seed: int = 0
    """Random seed."""


class SavedRun(NamedTuple):
    """A run of mnist.py: its folder or the file of its network, its options, and the schedule that they describe."""

    workdir: str
    config: Config
    schedule: dj.NoiseSchedule

    @property
    def results(self) -> Path:
        """Where scripts write about the run: its folder, or the current one for a network in a file."""
        return Path() if is_file(self.workdir) else Path(self.workdir)

    @property
    def default_sampler(self) -> Sampler:
        return "ddim" if self.config.few_calls else "unipc"

    def default_calls(self, sampler: Sampler) -> int:
        most = self.config.num_timesteps
        return most if sampler == "ancestral" else min(model.FEW if self.config.few_calls else 20, most)

    @property
    def default_spacing(self) -> str | None:
        return model.SPACING if self.config.few_calls else None

    def restore(self, checkpoint: str) -> dj.TrainState:
        """The state at the "newest" or "best" checkpoint. A file holds one state. Raises ValueError if there is none."""
        if is_file(self.workdir):
            require(checkpoint == "newest", "checkpoint", checkpoint, "newest for a file, which holds one")
            state = model.initial_state(self.config, random_key(0))
            params, step = read_params(Path(self.workdir), state.params)
            return state.replace(params=params, ema_params=params, step=step)
        with open_checkpoints(Path(self.workdir) / "checkpoints") as checkpoints:
            if checkpoints.latest_step() is None:
                raise ValueError(f"--workdir must hold a run with a checkpoint, and {self.workdir} has none yet")
            state = model.initial_state(self.config, random_key(0))
            if checkpoint == "newest":
                return restore_latest(checkpoints, state)
            best = checkpoints.best_step()
            require(best is not None, "checkpoint", checkpoint, f"newest: in {self.workdir} no loss is saved")
            return restore(checkpoints, best, state)

    def load(self, split: Split, data_dir: str | None = None) -> ImageData:
        """A split of the run's data. `data_dir` is TFDS's directory, or where the images of a folder or file are now.

        Raises ValueError if they are others than the run's, or so few that the split has none.
        """
        config = self.config
        name = config.dataset if config.images is None else data_dir or config.dataset
        data = load_dataset(name, data_dir, split, config.image_size, config.channels)
        same = (data.checksum, data.num_classes, data.image_size) == (config.images, config.num_classes, config.image_size)
        require(same, "workdir", self.workdir, f"a run on the images now in {data.name}; they have changed")
        require(len(data.images) > 0, "workdir", self.workdir, "a run on at least 10 images, since a tenth of them is held out")
        return data

    def draw(
        self,
        params: PyTree,
        table: dj.SamplerTable,
        key: Key[Array, ""],
        labels: Int[np.ndarray, " count"],
        guidance_scale: float = 1.0,
    ) -> Float[np.ndarray, "count H W C"]:
        """A sample for each label, in batches."""
        draw, count = model.make_sampler(self.config, self.schedule, guidance_scale=guidance_scale), len(labels)
        batch = min(BATCH, count)
        labels = np.resize(labels, math.ceil(count / batch) * batch)
        firsts = tqdm(range(0, count, batch), "samples", unit="batch")
        samples = [draw(params, table, key, labels[first : first + batch], first) for first in firsts]
        return np.concatenate(samples)[:count]


def open_run(workdir: str | None, option: str = "workdir") -> SavedRun:
    """The run of mnist.py in `workdir`, or the network in that file. Raises ValueError if it holds another run, or none.

    None means DEFAULT_WORKDIR, or if that does not exist, the network that comes with the project.
    """
    if workdir is None:
        workdir = DEFAULT_WORKDIR if Path(DEFAULT_WORKDIR).exists() else str(TRAINED)
        print(f"using the network in {workdir}", file=sys.stderr)
    names = {field.name for field in dataclasses.fields(Config)}
    saved = with_added(read_options(Path(workdir)), names) if is_file(workdir) else read_config(workdir, names, option)
    source = workdir if is_file(workdir) else f"{workdir}/config.json"
    if set(saved) != names:
        odd = ", ".join(sorted(set(saved) ^ names))
        raise ValueError(f"--{option} must hold a run of experiments/mnist.py; {source} differs in {odd}")
    saved: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    for name, hint in get_type_hints(Config).items():
        if not is_bearable(saved[name], hint) or (name in ("image_size", "channels") and saved[name] == 0):
            raise ValueError(f"--{option} must hold a run of experiments/mnist.py; {source} has {name} {saved[name]}")
    config = Config(**saved)
    try:
        check(config)
    except ValueError as problem:
        raise ValueError(f"--{option} must hold a run of experiments/mnist.py; in {source} {problem}") from None
    return SavedRun(workdir, config, model.make_schedule(config))


def is_file(workdir: str) -> bool:
    return str(workdir).lower().endswith(SUFFIX)


def solver_table(
    sampler: Sampler,
    schedule: dj.NoiseSchedule,
    calls: int,
    spacing: str | None = None,
    sigma_type: str = "upper_bound",
    eta: float = 0.0,
) -> dj.SamplerTable:
    """The table of a `Sampler` with `calls` network calls, or up to two fewer for Heun's method.

    Steps are even in t by default, but UniPC's are spaced as in flow, with a polynomial in the signal, which suits that.
    """
    spacing = spacing or ("flow" if sampler == "unipc" else "time")
    tables = {
        "ancestral": partial(dj.ancestral_table, sigma_type=sigma_type),
        "ddim": partial(dj.ddim_table, eta=eta),
        "dpm_solver": partial(dj.dpm_solver_table, eta=eta),
        "dpm_solver_3m": partial(dj.dpm_solver_table, eta=eta, order=3),
        "heun": dj.heun_table,
        "unipc": partial(dj.unipc_table, order=3, variable="signal" if spacing == "flow" else "log_snr"),
        "deis": dj.deis_table,
        "consistency": dj.consistency_table,
    }
    check_calls(calls, schedule.num_timesteps)
    steps = (calls + 1) // 2 if sampler == "heun" else calls
    return tables[sampler](schedule, sampling_timesteps=dj.sampling_times(schedule, steps, spacing))


def sampler_table(config: Sampling, run: SavedRun) -> dj.SamplerTable:
    """The table for the options sampler, spacing, eta and sampling_timesteps."""
    few_calls, sampler = run.config.few_calls, config.sampler or run.default_sampler
    jumps = sampler in ("ddim", "consistency")
    require(jumps or not few_calls, "sampler", sampler, "ddim or consistency for a distilled or mean_flow run")
    require(not few_calls or config.eta == 0, "eta", config.eta, "0 for a distilled or mean_flow run")
    require(0 <= config.eta <= 1, "eta", config.eta, "between 0 and 1")
    takes_eta = sampler in ("ddim", "dpm_solver", "dpm_solver_3m")
    require(takes_eta or config.eta == 0, "eta", config.eta, "0 unless --sampler is ddim, dpm_solver or dpm_solver_3m")
    calls = run.default_calls(sampler) if config.sampling_timesteps is None else config.sampling_timesteps
    return solver_table(sampler, run.schedule, calls, config.spacing or run.default_spacing, run.config.sigma_type, config.eta)


def check_denoises(run: SavedRun) -> None:
    allowed = "a run that is not distilled: this needs the denoised image at every t"
    require(not run.config.distilled, "workdir", run.workdir, allowed)


def check_guidance(run: SavedRun, scale: float) -> None:
    require(0 <= scale < math.inf, "guidance_scale", scale, "at least 0 and finite")
    require(run.config.conditional or scale == 1, "guidance_scale", scale, "1 unless the run is --conditional")
    allowed = "1 for a distilled run, which has its --training-guidance"
    require(not run.config.distilled or scale == 1, "guidance_scale", scale, allowed)
