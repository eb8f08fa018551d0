"""Judge images, whoever drew them, beside real images of the test split.

python experiments/judge.py --samples samples.npy
"""

import terminal  # isort: skip  # noqa: F401

import dataclasses
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from classifier import Classify, trained_classifier
from command_line import check_values, one_line_errors, parse_command_line, require
from figures import to_pixels
from jaxtyping import Float, Int, UInt8
from machine import prepare_machine
from tqdm import tqdm

from diffusion_jax import evaluation
from diffusion_jax.data import DatasetName, ImageData, load_dataset


@dataclasses.dataclass(frozen=True)
class Config:
    samples: str
    """A .npy of float32 [N, 32, 32, 1] in [-1, 1], as sample.py writes it; beside x.npy goes x.judged.json."""
    dataset: DatasetName = "auto"
    """What they should look like."""
    data_dir: str | None = None
    """A TFDS directory; by default TFDS's own."""
    seed: int = 0
    """Of the training images that they are compared with, as many as they are."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(tyro.MISSING), __doc__)
        check_values(config)
        samples = read_samples(config.samples)
        train, test = (load_dataset(config.dataset, config.data_dir, split) for split in ("train", "test"))
        classify, accuracy = trained_classifier(train, test)
    results = {"classifier_accuracy": accuracy, "seed": config.seed, **judge(samples, train, test, classify, config.seed)}
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
    classify: Classify,
    seed: int,
    asked: Int[np.ndarray, " N"] | None = None,
) -> dict[str, Any]:
    """The samples, and as many test images, each compared with as many training images; `asked` are the samples' classes."""
    count = min(len(samples), len(test.images), len(train.images))
    chosen = np.random.default_rng(seed).permutation(len(train.images))[:count]
    real = classify(train.images[chosen])
    results: dict[str, Any] = {"images": count}
    sets = {"generated": (to_bytes(samples[:count]), asked), "test": (test.images[:count], test.labels)}
    for name, (images, labels) in tqdm(sets.items(), "distances", unit="set"):
        found = classify(images)
        results[name] = compare(found, real, images, train.images)
        if asked is not None:
            results[name]["classified_as_asked"] = float((found[1] == labels[:count]).mean())
    return results


def to_bytes(samples: Float[np.ndarray, "N 32 32 1"]) -> UInt8[np.ndarray, "N 28 28 1"]:
    """Rounded to the 256 levels of real images, without the padding."""
    return to_pixels(samples[:, 2:30, 2:30])


def compare(ours: tuple, real: tuple, images: np.ndarray, training_images: np.ndarray) -> dict[str, float]:
    """Distances of one set of images from a set of training images, by the classifier's features, labels and pixels."""
    (features, labels), (real_features, real_labels) = ours, real
    precision, recall = evaluation.precision_and_recall(real_features, features)
    histogram, real_histogram = (np.bincount(x, minlength=10) / len(x) for x in (labels, real_labels))
    pixels, training_pixels = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (images[:1000], training_images))
    nearest = evaluation.nearest_squared_distances(pixels, training_pixels, 1)[:, 0]
    return {
        "frechet_distance": evaluation.frechet_distance(real_features, features),
        "kernel_distance": evaluation.kernel_distance(real_features, features),
        "precision": precision,
        "recall": recall,
        "class_distance": float(np.abs(histogram - real_histogram).sum() / 2),
        "nearest_training_image_median": float(np.median(np.sqrt(nearest))),
        "nearest_training_image_5_percent": float(np.quantile(np.sqrt(nearest), 0.05)),
    }


def as_table(results: dict) -> str:
    names = list(results["test"])
    lines = ["| | generated | test images |", "|---|---|---|"]
    lines += [
        f"| {name.replace('_', ' ')} | {results['generated'][name]:.4g} | {results['test'][name]:.4g} |" for name in names
    ]
    if "bits_per_dim" in results:
        lines.append(f"| bits per dimension, at most | | {results['bits_per_dim']:.3g} ± {results['bits_per_dim_error']:.2g} |")
    if results.get("flow_bits_per_dim") is not None:
        lines.append(f"| bits per dimension, by the probability flow | | {results['flow_bits_per_dim']:.3g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
