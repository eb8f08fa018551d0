"""Generated images beside real ones, in every feature space."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from support import distances
from support.data import ImageData
from support.feature_spaces import Described
from support.pictures import to_pixels

DRAWS = 3


def judge(
    samples: Float[np.ndarray, "N 32 32 1"],
    train: ImageData,
    test: ImageData,
    describe: Callable[[np.ndarray], Described],
    seed: int,
    asked: Int[np.ndarray, " N"] | None = None,
) -> dict[str, Any]:
    """Compare the samples, and as many test images, with DRAWS sets of as many training images.

    `asked` are the requested classes of the samples. Values for the sets are a list.
    """
    count = min(len(samples), len(test.images), len(train.images))
    rng = np.random.default_rng(seed)
    draws = [describe(train.images[rng.permutation(len(train.images))[:count]]) for _ in range(DRAWS)]
    results: dict[str, Any] = {"images": count}
    sets = {"generated": (to_bytes(samples[:count]), asked), "test": (test.images[:count], test.labels)}
    for name, (images, labels) in tqdm(sets.items(), "distances", unit="set"):
        spaces, found = describe(images)
        results[name] = {
            space: in_each([compared(real[space], features) for real, _ in draws]) for space, features in spaces.items()
        }
        shares = np.bincount(found, minlength=10) / count
        real_shares = [np.bincount(real, minlength=10) / count for _, real in draws]
        results[name]["class_shares"] = shares.tolist()
        results[name]["class_distance"] = [float(np.abs(shares - real).sum() / 2) for real in real_shares]
        results[name] |= memorisation(images, train.images)
        if asked is not None:
            results[name]["classified_as_asked"] = float((found == labels[:count]).mean())
    return results


def compared(real: Float[np.ndarray, "N d"], features: Float[np.ndarray, "N d"]) -> dict[str, float]:
    precision, recall = distances.precision_and_recall(real, features)
    density, coverage = distances.density_and_coverage(real, features)
    return {
        "frechet_distance": distances.frechet_distance(real, features),
        "kernel_distance": distances.kernel_distance(real, features),
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
    nearest = np.sqrt(distances.nearest_squared_distances(pixels, training_pixels, 1)[:, 0])
    return {
        "nearest_training_image_median": float(np.median(nearest)),
        "nearest_training_image_5_percent": float(np.quantile(nearest, 0.05)),
    }


def to_bytes(samples: Float[np.ndarray, "N 32 32 1"]) -> UInt8[np.ndarray, "N 28 28 1"]:
    """Rounded to the 256 levels of real images, without the padding."""
    return to_pixels(samples[:, 2:30, 2:30])


def as_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, with the mean and deviation over the draws of training images."""
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
