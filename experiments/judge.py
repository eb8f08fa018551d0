"""Judge images, whoever drew them, beside real images of the test split.

python experiments/judge.py --samples samples.npy
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float

from support.command_line import check_values, one_line_errors, parse_command_line, require
from support.data import DatasetName, load_dataset
from support.feature_spaces import feature_spaces
from support.judging import as_table, judge
from support.machine import prepare_machine


@dataclasses.dataclass(frozen=True)
class Config:
    samples: str
    """A .npy of float32 [N, 32, 32, 1] in [-1, 1], such as sample.py writes. Results go to x.judged.json beside x.npy."""
    dataset: DatasetName = "auto"
    """Data set to compare with."""
    data_dir: str | None = None
    """TFDS data directory; by default TFDS's own."""
    seed: int = 0
    """Random seed of the draws of training images."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(tyro.MISSING), __doc__)
        check_values(config)
        samples = read_samples(config.samples)
        train, test = (load_dataset(config.dataset, config.data_dir, split) for split in ("train", "test"))
        describe, accuracy = feature_spaces(train, test)
    results = {"classifier_accuracy": accuracy, "seed": config.seed, **judge(samples, train, test, describe, config.seed)}
    with one_line_errors():
        file = Path(config.samples).with_suffix(".judged.json")
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(as_table(results))
    print(f"wrote {file}", file=sys.stderr)


def read_samples(file: str) -> Float[np.ndarray, "N 32 32 1"]:
    try:
        samples = np.asarray(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        samples = np.zeros(0)
    right = samples.shape[1:] == (32, 32, 1) and samples.dtype.kind == "f" and len(samples) >= 100
    require(right, "samples", file, "a .npy of at least 100 float images [N, 32, 32, 1]")
    require(bool(np.isfinite(samples).all()), "samples", file, "finite everywhere")
    low, high = float(samples.min()), float(samples.max())
    require(-3 < low < -0.3 and high < 3, "samples", file, f"in [-1, 1], where -1 is black, and these are from {low} to {high}")
    return samples


if __name__ == "__main__":
    main()
