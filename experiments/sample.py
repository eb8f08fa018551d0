"""Draw samples from a run of experiments/mnist.py.

python experiments/sample.py --sampling-timesteps 50 --out samples.png
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np

from diffusion_jax.sampling import Spacing
from support import model
from support.command_line import check_output, check_values, one_line_errors, parse_command_line, require
from support.machine import prepare_machine, random_key
from support.pictures import grid, save_picture
from support.saved_run import Sampler, check_guidance, open_run, sampler_table


@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = "runs/mnist"
    """The folder of the run."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best is the one after the interval with the lowest mean training loss."""
    num_samples: int | None = None
    """By default 64, or one for each label."""
    labels: tuple[int, ...] = ()
    """The classes to draw, in turn, from a run with --conditional; by default all of them."""
    guidance_scale: float = 1.0
    """How much a sample keeps to its class, where 1 is what the network has learned, and more is truer and less varied."""
    sampling_timesteps: int | None = None
    """Network calls for each sample; by default all T of the run."""
    sampler: Sampler = "ancestral"
    """Ancestral sampling has the variance that the run was configured with; dpm_solver is DPM-Solver++(2M)."""
    spacing: Spacing | None = None
    """Evenly in t, in the log-SNR, by the rule of Karras et al. (2022), or as in flow; by default flow for unipc, or time."""
    eta: float = 0.0
    """For ddim, dpm_solver and dpm_solver_3m: 0 is deterministic, 1 has the noise of lower_bound ancestral sampling."""
    seed: int = 0
    """Of the samples."""
    out: str = "samples.png"
    """A .png is a grid, a .npy is float32 [N, 32, 32, 1] in [-1, 1]."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        out = Path(config.out)
        count = (len(config.labels) or 64) if config.num_samples is None else config.num_samples
        check_values(config)
        for label in config.labels:
            require(0 <= label < model.NUM_CLASSES, "labels", label, f"between 0 and {model.NUM_CLASSES - 1}")
        check_output(out, ".png", ".npy")
        run = open_run(config.workdir)
        check_guidance(run, config.guidance_scale)
        require(
            run.config.conditional or not config.labels, "labels", config.labels, "left out unless the run is --conditional"
        )
        table = sampler_table(config, run)
        state = run.restore(config.checkpoint)

    labels = np.resize(config.labels, count) if config.labels else model.labels_in_turn(run.config, count)
    samples = run.draw(state.ema_params, table, random_key(config.seed), labels, config.guidance_scale)
    with one_line_errors():
        if out.suffix.lower() == ".png":
            save_picture(out, grid(samples))
        else:
            with out.open("wb") as file:  # np.save adds .npy to the name x.NPY
                np.save(file, samples)
    print(f"wrote {out}: {len(samples)} samples at step {int(state.step)} of {run.config.iterations}", file=sys.stderr)


if __name__ == "__main__":
    main()
