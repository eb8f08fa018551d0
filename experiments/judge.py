"""Compare images in a file, and test images, with training images in several feature spaces.

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

from support.command_line import one_line_errors, parse_command_line, require
from support.data import load_dataset
from support.feature_spaces import feature_spaces
from support.judging import as_table, comparable, judge, to_bytes
from support.machine import prepare_machine


@dataclasses.dataclass(frozen=True)
class Config:
    samples: str
    """A .npy of at least 100 float images [N, S, S, C] in [-1, 1], as sample.py writes. Writes x.judged.json beside x.npy."""
    dataset: str = "auto"
    """Data set to compare with: a name, a folder or a file, as for mnist.py."""
    data_dir: str | None = None
    """TFDS data directory; by default TFDS's own."""
    seed: int = 0
    """Random seed of the draws of training images."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(tyro.MISSING), __doc__)
        samples = read_samples(config.samples)
        size, channels = samples.shape[2:]
        train, test = (load_dataset(config.dataset, config.data_dir, split, size, channels) for split in ("train", "test"))
        samples, train, test = to_bytes(samples, test), comparable(train), comparable(test)
        describe, accuracy = feature_spaces(train, test)
    found = judge(samples, train, test, describe, config.seed)
    results = {"classifier_accuracy": accuracy, "seed": config.seed, **found}
    with one_line_errors():
        file = Path(config.samples).with_suffix(".judged.json")
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(as_table(results))
    print(f"wrote {file}", file=sys.stderr)


def read_samples(file: str) -> Float[np.ndarray, "N S S C"]:
    try:
        samples: np.ndarray = np.asarray(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        samples = np.zeros(0)
    right = samples.ndim == 4 and samples.shape[1] == samples.shape[2] and samples.shape[3] in (1, 3)
    right = right and samples.dtype.kind == "f" and len(samples) >= 100
    require(right, "samples", file, "a .npy of at least 100 square float images [N, S, S, 1] or [N, S, S, 3]")
    require(bool(np.isfinite(samples).all()), "samples", file, "finite everywhere")
    low, high = float(samples.min()), float(samples.max())
    require(-3 < low < -0.3 and high < 3, "samples", file, f"about in [-1, 1] with black at -1 (these: {low} to {high})")
    return samples


if __name__ == "__main__":
    main()
