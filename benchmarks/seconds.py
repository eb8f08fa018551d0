"""Plot Frechet distance against seconds: runs after experiments/compare_samplers.py, and judged samples of the original.

python benchmarks/seconds.py --runs small runs/small/samplers.json few runs/few/samplers.json --original original.json 3.2

The number is the seconds that the original takes for 64 samples.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

from support.figures import save_curves

SHOWN = ("ancestral, upper bound", "SDE-DPM-Solver++(2M)", "UniPC", "jumps along the flow")


@dataclasses.dataclass(frozen=True)
class Options:
    runs: dict[str, Path]
    """A name for each run, and its samplers.json."""
    original: dict[Path, float]
    """Files of experiments/judge.py, and the seconds that the samples took."""
    out: str = "seconds.png"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs = {name: json.loads(file.read_text()) for name, file in options.runs.items()}
    floors = next(iter(runs.values()))["test"]
    curves: dict[str, dict[str, dict[float, float]]] = {space: {} for space in floors}
    for space in floors:
        for name, run in runs.items():
            for sampler in [sampler for sampler in SHOWN if sampler in run["seconds"]]:
                distances, seconds = run["distances"][space][sampler], run["seconds"][sampler]
                curves[space][f"{name}: {sampler}"] = {seconds[calls]: distances[calls] for calls in distances}
        original = {s: json.loads(file.read_text())["generated"][space] for file, s in options.original.items()}
        curves[space]["original"] = {s: float(np.mean(original[s]["frechet_distance"])) for s in sorted(original)}
    save_curves(Path(options.out), curves, floors, "seconds for 64 samples")


if __name__ == "__main__":
    main()
