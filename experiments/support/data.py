"""Data sets of images by name: MNIST and its like, any other that TFDS has prepared, a folder, or an array in a file."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from support import tfds
from support.arrays import RowsOnDisk, checksum, read_arrays
from support.command_line import require
from support.image_folder import classes_of, read_images
from support.tfds import DataUnavailable

LikeMNIST = Literal["auto", "mnist", "fashion_mnist", "digits"]
Split = Literal["train", "test"]


class ImageData(NamedTuple):
    """One split of a data set; `name` says which this is, never "auto"."""

    name: str
    images: Any
    """Bytes [N, H, W, C]: an array, or RowsOnDisk."""
    labels: Int[np.ndarray, " N"]
    num_classes: int = 10
    """0 for images without labels, whose `labels` are zeros."""
    image_size: int = 32
    """Height and width of the network's images, to which `to_model_input` pads these."""
    checksum: int | None = None
    """Of all images and labels in a folder or file; None for a data set that its name describes."""


def load_dataset(
    name: str = "auto",
    data_dir: str | os.PathLike | None = None,
    split: Split = "train",
    image_size: int = 0,
    channels: int = 0,
) -> ImageData:
    """A split of a data set: its name, a folder of images, or a .npy or .npz file.

    The names are "mnist", "fashion_mnist", "digits" (scikit-learn's, embedded, enlarged to 28x28; its last 297 are the test)
    and those of TFDS, whose data sets are read from its directory `data_dir` (default: TFDS's own); the first two are prepared
    there if need be. "auto" is "mnist", or with one warning "digits" where MNIST is neither prepared nor within reach; any
    other name means exactly that data set, or DataUnavailable. Where there is no test split, a tenth of the images, which a
    fixed seed chooses, is held out for it.

    Images of a folder, and those of TFDS that are not of one square size, are cropped and scaled to `image_size`; others are
    meant to be padded to it. By default it is the size of the images, or 32 for a folder and for images of 28x28. `channels`
    are 1 for grey or 3 for colour, by default as in the data, and 3 for a folder. Raises ValueError on what is unknown, damaged
    or of another kind.
    """
    if split not in get_args(Split):
        raise ValueError(f"the split must be one of {', '.join(get_args(Split))}; got {split!r}")
    if name in get_args(LikeMNIST):
        data = _like_mnist(name, data_dir, split)
    elif name.lower().endswith((".npy", ".npz")):
        data = _from_file(Path(name).resolve(), split)
    elif name and Path(name).is_dir():
        data = _from_folder(Path(name).resolve(), split, image_size or 32, channels or 3)
    else:
        data = _from_tfds(name, data_dir, split, image_size, channels)
    side, own_channels = data.images.shape[2:]
    size = image_size or (32 if side == 28 else side)
    require(size >= side, "image_size", size, f"at least {side}, the size of the images of {name}")
    require(channels in (0, own_channels), "channels", channels, f"{own_channels}, as the images of {name} have")
    return data._replace(image_size=size)


def to_model_input(images: UInt8[Array, "B H W C"], image_size: int = 32) -> Float[Array, "B S S C"]:
    """Pad to `image_size` and scale 0..255 to [-1, 1]. Raises ValueError on values that are not bytes."""
    if images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255, got {images.dtype}")
    margin = image_size - images.shape[1]
    sides = (margin // 2, margin - margin // 2)
    padded = jnp.pad(images, ((0, 0), sides, sides, (0, 0)))
    return padded.astype(jnp.float32) / 127.5 - 1


def _like_mnist(name: str, data_dir: str | os.PathLike | None, split: Split) -> ImageData:
    if name == "digits":
        return _embedded_digits(split)
    found = "mnist" if name == "auto" else name
    try:
        return ImageData(found, *tfds.read_mnist(found, data_dir, split))
    except DataUnavailable as reason:
        if name != "auto":
            raise
        warnings.warn(f"using scikit-learn's digits instead of MNIST: {reason}", stacklevel=3)
        return _embedded_digits(split)


def _embedded_digits(split: Split) -> ImageData:
    from PIL import Image
    from sklearn.datasets import load_digits

    small_images, labels = load_digits(return_X_y=True)
    images = np.zeros((len(labels), 28, 28, 1), np.uint8)
    for image, small in zip(images, small_images.reshape(-1, 8, 8), strict=True):
        large = Image.fromarray((small * 255 / 16).astype(np.uint8)).resize((20, 20), Image.Resampling.BICUBIC)
        image[4:24, 4:24, 0] = np.asarray(large)
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    return ImageData("digits", images[part], np.asarray(labels[part], np.int32))


def _from_file(file: Path, split: Split) -> ImageData:
    images, labels = read_arrays(file)
    num_classes = 0 if labels is None else int(labels.max()) + 1
    labels = np.zeros(len(images), np.int32) if labels is None else labels.astype(np.int32)
    return _part(ImageData(str(file), images, labels, num_classes, checksum=checksum(images, labels)), split)


def _from_folder(folder: Path, split: Split, size: int, channels: int) -> ImageData:
    images, files = read_images(folder, size, channels)
    labels, num_classes = classes_of(folder, files)
    return _part(ImageData(str(folder), images, labels, num_classes, checksum=checksum(images, labels)), split)


def _from_tfds(name: str, data_dir: str | os.PathLike | None, split: Split, image_size: int, channels: int) -> ImageData:
    place = tfds.data_directory(data_dir)
    found = tfds.read_prepared(name, place, split, image_size, channels)
    if found is None:
        raise ValueError(
            f"the data set must be one of {', '.join(get_args(LikeMNIST))}, a folder of images, a .npy or .npz file, or a name "
            f"of TFDS's that is prepared in {place} (with TensorFlow: tfds build NAME --data_dir {place}); got {name!r}"
        )
    images, labels, num_classes, tested = found
    data = ImageData(name, images, labels, num_classes)
    return data if tested else _part(data, split)


def _part(data: ImageData, split: Split) -> ImageData:
    """In an order that a fixed seed chooses: the first tenth, rounded down, is the test split, and the rest for training."""
    order = np.random.default_rng(0).permutation(len(data.images))
    tenth = len(order) // 10
    rows = order[:tenth] if split == "test" else order[tenth:]
    images = RowsOnDisk(data.images, rows) if isinstance(data.images, np.memmap) else data.images[rows]
    return data._replace(images=images, labels=data.labels[rows])
