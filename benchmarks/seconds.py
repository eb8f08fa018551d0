"""Plot Frechet distance against seconds: runs after experiments/compare_samplers.py, and judged samples of the original.

python benchmarks/seconds.py --runs small runs/small/samplers.json few runs/few/samplers.json --original original.json 3.2

The number is the seconds that the original takes for 64 samples.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

from support.figures import save_curves

SHOWN = ("ancestral, upper bound", "SDE-DPM-Solver++(2M)", "UniPC", "jumps along the flow")


@dataclasses.dataclass(frozen=True)
class Options:
    runs: dict[str, Path]
    """A name for each run, and its samplers.json."""
    original: dict[Path, float]
    """Files of experiments/judge.py, and the seconds that 64 such samples take."""
    out: str = "seconds.png"
    """Output .png."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs = {name: json.loads(file.read_text()) for name, file in options.runs.items()}
    judged = {seconds: json.loads(file.read_text()) for file, seconds in options.original.items()}
    if len({of["images"] for of in (*runs.values(), *judged.values())}) != 1:
        sys.exit("name one or more runs, and judged samples with as many images as they have")
    floors = next(iter(runs.values()))["test"]
    curves: dict[str, dict[str, dict[float, Any]]] = {space: {} for space in floors}
    for space in floors:
        for name, run in runs.items():
            for sampler in [sampler for sampler in SHOWN if sampler in run["seconds"]]:
                distances, seconds = run["distances"][space][sampler], run["seconds"][sampler]
                curves[space][f"{name}: {sampler}"] = {seconds[calls]: distances[calls] for calls in distances}
        curves[space]["original"] = {s: of["generated"][space]["frechet_distance"] for s, of in judged.items()}
    save_curves(Path(options.out), curves, floors, "seconds for 64 samples")


if __name__ == "__main__":
    main()
