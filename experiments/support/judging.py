"""Generated images beside real ones, in every feature space."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from support import distances
from support.data import ImageData
from support.feature_spaces import Described
from support.pictures import to_pixels

DRAWS, MOST, LARGEST = 3, 60_000, 32


def comparable(data: ImageData) -> ImageData:
    """The images as they are judged: at most MOST, which a fixed seed chooses, and scaled to LARGEST if they are larger."""
    rows = np.sort(np.random.default_rng(0).permutation(len(data.images))[:MOST])
    parts = [scaled_down(data.images[rows[first : first + 1000]]) for first in range(0, len(rows), 1000)]
    return data._replace(images=np.concatenate(parts), labels=data.labels[rows])


def to_bytes(samples: Float[np.ndarray, "N S S C"], data: ImageData) -> UInt8[np.ndarray, "N H W C"]:
    """Round to 256 levels, crop the padding, and scale down as `comparable` does."""
    side = data.images.shape[1]
    first = (samples.shape[1] - side) // 2
    return scaled_down(to_pixels(samples[:, first : first + side, first : first + side]))


def scaled_down(images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "N h w C"]:
    if images.shape[1] <= LARGEST:
        return images
    shape = (len(images), LARGEST, LARGEST, images.shape[3])
    return np.asarray(jnp.rint(jax.image.resize(images.astype(np.float32), shape, "linear")).astype(jnp.uint8))


def judge(
    samples: UInt8[np.ndarray, "N H W C"],
    train: ImageData,
    test: ImageData,
    describe: Callable[[np.ndarray], Described],
    seed: int,
    asked: Int[np.ndarray, " N"] | None = None,
) -> dict[str, Any]:
    """Compare the samples, and as many test images, with DRAWS sets of as many training images, all of them `comparable`.

    `asked` are the requested classes of the samples. Values for the sets are a list.
    """
    count = min(len(samples), len(test.images), len(train.images))
    draws = [describe(images) for images in real_images(train, count, seed)]
    results: dict[str, Any] = {"images": count}
    sets = {"generated": (samples[:count], asked), "test": (test.images[:count], test.labels)}
    for name, (images, labels) in tqdm(sets.items(), "distances", unit="set"):
        spaces, found = describe(images)
        results[name] = {
            space: in_each([compared(real[space], features) for real, _ in draws]) for space, features in spaces.items()
        }
        classes = [x for x in (found, *(classes for _, classes in draws)) if x is not None]
        if classes:
            shares, *real_shares = (np.bincount(x, minlength=train.num_classes) / count for x in classes)
            results[name]["class_shares"] = shares.tolist()
            results[name]["class_distance"] = [float(np.abs(shares - real).sum() / 2) for real in real_shares]
        results[name] |= memorisation(images, train.images)
        if found is not None and asked is not None:
            results[name]["classified_as_asked"] = float((found == labels[:count]).mean())
    return results


def real_images(train: ImageData, count: int, seed: int) -> Iterator[UInt8[np.ndarray, "N H W C"]]:
    """DRAWS sets of `count` training images."""
    rng = np.random.default_rng(seed)
    return (train.images[rng.permutation(len(train.images))[:count]] for _ in range(DRAWS))


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


def memorisation(images: UInt8[np.ndarray, "N H W C"], training_images: UInt8[np.ndarray, "M H W C"]) -> dict[str, float]:
    """The distance of the first 1,000 images to the nearest training image each, in pixels from 0 to 1."""
    pixels, training_pixels = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (images[:1000], training_images))
    nearest = np.sqrt(distances.nearest_squared_distances(pixels, training_pixels, 1)[:, 0])
    return {
        "nearest_training_image_median": float(np.median(nearest)),
        "nearest_training_image_5_percent": float(np.quantile(nearest, 0.05)),
    }


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
