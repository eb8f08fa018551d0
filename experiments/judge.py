"""Judge images, whoever drew them, beside real images of the test split.

python experiments/judge.py --samples samples.npy
"""

import terminal  # isort: skip  # noqa: F401

import dataclasses
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from command_line import check_values, one_line_errors, parse_command_line, require
from feature_spaces import Described, feature_spaces
from figures import to_pixels
from jaxtyping import Float, Int, UInt8
from machine import prepare_machine
from tqdm import tqdm

from diffusion_jax import evaluation
from diffusion_jax.data import DatasetName, ImageData, load_dataset

DRAWS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    samples: str
    """A .npy of float32 [N, 32, 32, 1] in [-1, 1], as sample.py writes it; beside x.npy goes x.judged.json."""
    dataset: DatasetName = "auto"
    """What they should look like."""
    data_dir: str | None = None
    """A TFDS directory; by default TFDS's own."""
    seed: int = 0
    """Seed of the draws of training images that they are compared with."""


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


def judge(
    samples: Float[np.ndarray, "N 32 32 1"],
    train: ImageData,
    test: ImageData,
    describe: Callable[[np.ndarray], Described],
    seed: int,
    asked: Int[np.ndarray, " N"] | None = None,
) -> dict[str, Any]:
    """The samples, and as many test images, each compared with DRAWS times as many training images; `asked` are the samples'
    classes. Where there are several draws, their values are a list."""
    count = min(len(samples), len(test.images), len(train.images))
    rng = np.random.default_rng(seed)
    draws = [describe(train.images[rng.permutation(len(train.images))[:count]]) for _ in range(DRAWS)]
    results: dict[str, Any] = {"images": count}
    sets = {"generated": (to_bytes(samples[:count]), asked), "test": (test.images[:count], test.labels)}
    for name, (images, labels) in tqdm(sets.items(), "distances", unit="set"):
        spaces, found = describe(images)
        results[name] = {
            space: in_each([distances(real[space], features) for real, _ in draws]) for space, features in spaces.items()
        }
        shares = np.bincount(found, minlength=10) / count
        real_shares = [np.bincount(real, minlength=10) / count for _, real in draws]
        results[name]["class_shares"] = shares.tolist()
        results[name]["class_distance"] = [float(np.abs(shares - real).sum() / 2) for real in real_shares]
        results[name] |= memorisation(images, train.images)
        if asked is not None:
            results[name]["classified_as_asked"] = float((found == labels[:count]).mean())
    return results


def distances(real: Float[np.ndarray, "N d"], features: Float[np.ndarray, "N d"]) -> dict[str, float]:
    precision, recall = evaluation.precision_and_recall(real, features)
    density, coverage = evaluation.density_and_coverage(real, features)
    return {
        "frechet_distance": evaluation.frechet_distance(real, features),
        "kernel_distance": evaluation.kernel_distance(real, features),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def in_each(results: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [result[name] for result in results] for name in results[0]}


def memorisation(images: UInt8[np.ndarray, "N 28 28 1"], training_images: UInt8[np.ndarray, "M 28 28 1"]) -> dict[str, float]:
    """The distance of the first 1,000 images to the nearest training image each, in pixels from 0 to 1."""
    pixels, training_pixels = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (images[:1000], training_images))
    nearest = np.sqrt(evaluation.nearest_squared_distances(pixels, training_pixels, 1)[:, 0])
    return {
        "nearest_training_image_median": float(np.median(nearest)),
        "nearest_training_image_5_percent": float(np.quantile(nearest, 0.05)),
    }


def to_bytes(samples: Float[np.ndarray, "N 32 32 1"]) -> UInt8[np.ndarray, "N 28 28 1"]:
    """Rounded to the 256 levels of real images, without the padding."""
    return to_pixels(samples[:, 2:30, 2:30])


def as_table(results: dict[str, Any]) -> str:
    """Markdown; for what has several draws of training images, the mean and deviation over them."""
    rows = [("", "generated", "test images"), ("---", "---", "---")]
    for name in results["test"]:
        pair = [results[key][name] for key in ("generated", "test")]
        words = name.replace("_", " ")
        if isinstance(pair[0], dict):
            for measure in pair[0]:
                rows += [(f"{words}: {measure.replace('_', ' ')}", cell(pair[0][measure]), cell(pair[1][measure]))]
        elif name == "class_shares":
            ranges = [f"{100 * min(x):.1f}, {100 * max(x):.1f}" for x in pair]
            rows += [("smallest and largest class, percent", ranges[0], ranges[1])]
        else:
            rows += [(words, cell(pair[0]), cell(pair[1]))]
    if "bits_per_dim" in results:
        rows.append(("bits per dimension, at most", "", f"{results['bits_per_dim']:.3g} ± {results['bits_per_dim_error']:.2g}"))
    if results.get("flow_bits_per_dim") is not None:
        rows.append(("bits per dimension, by the probability flow", "", f"{results['flow_bits_per_dim']:.3g}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: float | list[float]) -> str:
    return f"{np.mean(value):.4g} ± {np.std(value, ddof=1):.2g}" if isinstance(value, list) else f"{value:.4g}"


if __name__ == "__main__":
    main()
