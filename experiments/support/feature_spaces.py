"""The feature spaces that samples are judged in. The set is fixed, so that no recipe is tuned to one of them."""

import sys
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8
from sklearn.decomposition import PCA

from support.classifier import trained_classifier, untrained_classifier
from support.command_line import require
from support.data import ImageData

COMPONENTS, FEWEST, SMALLEST = 64, 6, 8
Described = tuple[dict[str, Float[np.ndarray, "N d"]], Int[np.ndarray, " N"] | None]


def feature_spaces(
    train: ImageData, test: ImageData
) -> tuple[Callable[[UInt8[np.ndarray, "N H W C"]], Described], float | None]:
    """describe(images) -> (features by the name of their space, classes by the classifier), and the classifier's accuracy.

    The spaces are the last hidden layer of the classifier, the mean and deviation over the pixels of its third convolution, the
    first 64 principal components of the training images' pixels (from 0 to 1), and the last hidden layer of the untrained
    classifier. Without labels there is no classifier, and a line on stderr says so. Raises ValueError if there are too few
    images, or too small ones.
    """
    few, shape = min(len(train.images), len(test.images)), train.images.shape[1:]
    require(few >= FEWEST, "dataset", train.name, f"a data set with at least {FEWEST} test or held-out images, not {few}")
    require(shape[0] >= SMALLEST, "dataset", train.name, f"a data set of images of at least {SMALLEST}x{SMALLEST}")
    classify, accuracy = trained_classifier(train, test) if train.num_classes else (None, None)
    if classify is None:
        print(f"{train.name} has no labels: the feature spaces of the classifier are left out", file=sys.stderr)
    untrained = untrained_classifier(shape)
    components = PCA(min(COMPONENTS, *_pixels(train.images).shape), svd_solver="covariance_eigh").fit(_pixels(train.images))

    def describe(images: UInt8[np.ndarray, "N H W C"]) -> Described:
        outputs = classify(images) if classify else None
        spaces = {"classifier": outputs.features, "statistics": outputs.statistics} if outputs else {}
        spaces |= {"pixels": components.transform(_pixels(images)), "random network": untrained(images).features}
        classes = np.asarray(outputs.logits).argmax(-1) if outputs else None
        return {name: np.asarray(features) for name, features in spaces.items()}, classes

    return describe, accuracy


def _pixels(images: UInt8[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N d"]:
    return images.reshape(len(images), -1).astype(np.float32) / 255
