"""For every sampler, on a run of experiments/mnist.py: Frechet distances at several numbers of network calls, and seconds.

python experiments/compare_samplers.py --workdir runs/mnist --calls 5 10 20 50

Distances are means and deviations over three draws of training images. samplers.json and samplers.png are written in the run's
folder, or in the current one for a network in a file.
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import json
import sys
import time
from functools import partial

import numpy as np

import diffusion_jax as dj
from diffusion_jax.sampling import Spacing
from support import model
from support.command_line import one_line_errors, parse_command_line, require
from support.distances import frechet_distance
from support.feature_spaces import feature_spaces
from support.figures import save_curves
from support.judging import cell, comparable, real_images, to_bytes
from support.machine import prepare_machine, random_key
from support.saved_run import Source, open_run, solver_table
from support.workdir import one_line_if_unwritable

SAMPLERS = {
    "ancestral, upper bound": partial(solver_table, "ancestral"),
    "ancestral, lower bound": partial(solver_table, "ancestral", sigma_type="lower_bound"),
    "DDIM": partial(solver_table, "ddim"),
    "DPM-Solver++(2M)": partial(solver_table, "dpm_solver"),
    "DPM-Solver++(3M)": partial(solver_table, "dpm_solver_3m"),
    "SDE-DPM-Solver++(2M)": partial(solver_table, "dpm_solver", eta=1.0),
    "Heun": partial(solver_table, "heun"),
    "UniPC": partial(solver_table, "unipc"),
    "DEIS": partial(solver_table, "deis"),
}

JUMPS = {"jumps along the flow": partial(solver_table, "ddim"), "consistency": partial(solver_table, "consistency")}
TIMED = 64  # samples


@dataclasses.dataclass(frozen=True)
class Config(Source):
    data_dir: str | None = None
    """TFDS data directory, by default TFDS's own; for a run on a folder or file, where that is now."""
    num_samples: int = 2000
    """Number of generated, training and test images to compare, at least 100 (fewer if the data set has fewer)."""
    calls: tuple[int, ...] = (5, 10, 20, 50)
    """Numbers of network calls to measure each sampler at. Heun's method takes up to two fewer."""
    spacing: Spacing | None = None
    """Spacing of the steps, as in sample.py; by default flow for UniPC and for runs of few calls, otherwise time."""
    all_steps: bool = False
    """Also measure ancestral sampling (upper bound) with all T steps."""
    seed: int = 0
    """Random seed."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        require(config.num_samples >= 100, "num_samples", config.num_samples, "at least 100")
        require(bool(config.calls) or config.all_steps, "calls", "none", "one or more numbers, or --all-steps")
        run = open_run(config.workdir)
        num_timesteps, few_calls = run.config.num_timesteps, run.config.few_calls
        require(not (few_calls and config.all_steps), "all_steps", True, "left out for a distilled or mean_flow run")
        for calls in config.calls:
            require(1 <= calls <= num_timesteps, "calls", calls, f"between 1 and the run's {num_timesteps} timesteps")
        samplers = JUMPS if few_calls else SAMPLERS
        tables = {}
        for calls in config.calls:
            for name, make in samplers.items():
                table = make(run.schedule, calls=calls, spacing=config.spacing or run.default_spacing)
                tables[name, len(table.t)] = table  # Heun's method has the same for 3 and 4
        if config.all_steps:
            tables["ancestral, upper bound", num_timesteps] = dj.ancestral_table(run.schedule)
        train, test = comparable(run.load("train", config.data_dir)), run.load("test", config.data_dir)
        state = run.restore(config.checkpoint)
        judged = comparable(test)
        describe, _ = feature_spaces(train, judged)

    count = min(config.num_samples, len(train.images), len(judged.images))
    real = [describe(images)[0] for images in real_images(train, count, config.seed)]
    params, key = state.ema_params, random_key(config.seed)
    labels, draw = model.random_labels(run.config, train, count, config.seed), model.make_sampler(run.config, run.schedule)

    def compared(images: np.ndarray) -> dict[str, list[float]]:
        features = describe(images)[0]
        return {space: [frechet_distance(x[space], features[space]) for x in real] for space in features}

    def seconds(table: dj.SamplerTable) -> float:
        """The median of at least three times, and of more if they are short."""
        draw(params, table, key, np.resize(labels, TIMED))
        times = [time.perf_counter()]
        while len(times) <= 3 or times[-1] - times[0] < 0.3:
            draw(params, table, key, np.resize(labels, TIMED))
            times.append(time.perf_counter())
        return float(np.median(np.diff(times)))

    floors = compared(judged.images[:count])
    curves: dict[str, dict[str, dict[int, list[float]]]] = {space: {} for space in floors}
    durations: dict[str, dict[int, float]] = {}
    print(f"{run.workdir}: {count} images, Frechet distances, and seconds for {TIMED} samples, once compiled\n")
    print(f"| sampler | calls | seconds | {' | '.join(floors)} |\n{'|---' * (3 + len(floors))}|")
    print(as_row("test images", "", "", floors))
    for (name, calls), table in tables.items():
        distances = compared(to_bytes(run.draw(params, table, key, labels), test))
        durations.setdefault(name, {})[calls] = seconds(table)
        for space, distance in distances.items():
            curves[space].setdefault(name, {})[calls] = distance
        print(as_row(name, calls, f"{durations[name][calls]:.2g}", distances), flush=True)
    with one_line_if_unwritable(run.results):
        results = {
            "workdir": run.workdir,
            "step": int(state.step),
            "images": count,
            "seed": config.seed,
            "spacing": config.spacing,
            "test": floors,
            "distances": curves,
            "seconds": durations,
        }
        (run.results / "samplers.json").write_text(json.dumps(results, indent=2) + "\n")
        save_curves(run.results / "samplers.png", curves, floors, "network calls")
    print(f"wrote {run.results / 'samplers.json'} and samplers.png", file=sys.stderr)


def as_row(name: str, calls: int | str, seconds: str, distances: dict[str, list[float]]) -> str:
    return f"| {name} | {calls} | {seconds} | {' | '.join(map(cell, distances.values()))} |"


if __name__ == "__main__":
    main()
