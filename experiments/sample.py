"""Draw samples from a run of experiments/mnist.py.

python experiments/sample.py --sampling-timesteps 50 --out samples.png
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import sys

import numpy as np

from support import model
from support.command_line import one_line_errors, output_file, parse_command_line, require
from support.machine import prepare_machine, random_key
from support.pictures import grid, save_picture
from support.saved_run import Sampling, check_guidance, open_run, sampler_table


@dataclasses.dataclass(frozen=True)
class Config(Sampling):
    num_samples: int | None = None
    """Number of samples; by default 64, or one for each label."""
    labels: tuple[int, ...] = ()
    """Classes to cycle through, for conditional runs; by default all."""
    out: str = "samples.png"
    """Output file: .png for a grid, .npy for float32 [N, H, W, C] in [-1, 1]."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        count = (len(config.labels) or 64) if config.num_samples is None else config.num_samples
        out = output_file(config.out, ".png", ".npy")
        run = open_run(config.workdir)
        for label in config.labels if run.config.num_classes else ():
            require(0 <= label < run.config.num_classes, "labels", label, f"between 0 and {run.config.num_classes - 1}")
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
