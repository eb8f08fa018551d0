"""The feature spaces that samples are judged in. The set is fixed, so that no recipe is tuned to one of them."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8
from sklearn.decomposition import PCA

from support.classifier import trained_classifier, untrained_classifier
from support.data import ImageData

COMPONENTS = 64
Described = tuple[dict[str, Float[np.ndarray, "N d"]], Int[np.ndarray, " N"]]


def feature_spaces(train: ImageData, test: ImageData) -> tuple[Callable[[UInt8[np.ndarray, "N 28 28 1"]], Described], float]:
    """describe(images) -> (features by the name of their space, classes by the classifier), and the classifier's accuracy.

    The spaces are the last hidden layer of the classifier, the mean and deviation over the pixels of its third convolution, the
    first 64 principal components of the training images' pixels (from 0 to 1), and the last hidden layer of the untrained
    classifier.
    """
    classify, accuracy = trained_classifier(train, test)
    untrained = untrained_classifier()
    components = PCA(COMPONENTS, svd_solver="covariance_eigh").fit(_pixels(train.images))

    def describe(images: UInt8[np.ndarray, "N 28 28 1"]) -> Described:
        outputs = classify(images)
        spaces = {
            "classifier": outputs.features,
            "statistics": outputs.statistics,
            "pixels": components.transform(_pixels(images)),
            "random network": untrained(images).features,
        }
        return {name: np.asarray(features) for name, features in spaces.items()}, np.asarray(outputs.logits).argmax(-1)

    return describe, accuracy


def _pixels(images: UInt8[np.ndarray, "N 28 28 1"]) -> Float[np.ndarray, "N 784"]:
    return images.reshape(len(images), -1).astype(np.float32) / 255
