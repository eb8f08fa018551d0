"""Data sets of small grey images as arrays in memory.

Reading and preparing go through TFDS without TensorFlow.
"""

import contextlib
import gzip
import io
import os
import struct
import threading
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import google_crc32c
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

DatasetName = Literal["auto", "mnist", "fashion_mnist", "digits"]
Split = Literal["train", "test"]
SECONDS_TO_REACH = 8.0


class ImageData(NamedTuple):
    """One split of a data set; `name` says which this is, never "auto"."""

    name: str
    images: UInt8[np.ndarray, "N 28 28 1"]
    labels: Int[np.ndarray, " N"]


class DataUnavailable(Exception):
    """The data set is not prepared here and cannot be downloaded; the message says why."""


def load_dataset(name: DatasetName = "auto", data_dir: str | os.PathLike | None = None, split: Split = "train") -> ImageData:
    """A split of "mnist", "fashion_mnist" or "digits" (scikit-learn's, embedded, enlarged to 28x28; its last 297 are the test).

    The first two are read from the TFDS directory `data_dir` (default: TFDS's own) and prepared there first if need be. "auto"
    is "mnist", or with one warning "digits" where MNIST is neither prepared nor within reach; any other name means exactly
    that data set, or DataUnavailable. Raises ValueError on an unknown name or split, and where what is prepared is damaged.
    """
    if name not in get_args(DatasetName):
        raise ValueError(f"the data set must be one of {', '.join(get_args(DatasetName))}; got {name!r}")
    if split not in get_args(Split):
        raise ValueError(f"the split must be one of {', '.join(get_args(Split))}; got {split!r}")
    if name == "digits":
        return _embedded_digits(split)
    try:
        return _load_tfds("mnist" if name == "auto" else name, data_dir, split)
    except DataUnavailable as reason:
        if name != "auto":
            raise
        warnings.warn(f"using scikit-learn's digits instead of MNIST: {reason}", stacklevel=2)
        return _embedded_digits(split)


def to_model_input(images: UInt8[Array, "B 28 28 1"]) -> Float[Array, "B 32 32 1"]:
    """Pad to 32x32, which halves five times, and scale 0..255 to [-1, 1]. Raises ValueError on values that are not bytes."""
    if images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255, got {images.dtype}")
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return padded.astype(jnp.float32) / 127.5 - 1


def _embedded_digits(split: Split) -> ImageData:
    from PIL import Image
    from sklearn.datasets import load_digits

    small_images, labels = load_digits(return_X_y=True)
    images = np.zeros((len(labels), 28, 28, 1), np.uint8)
    for image, small in zip(images, small_images.reshape(-1, 8, 8), strict=True):
        large = Image.fromarray((small * 255 / 16).astype(np.uint8)).resize((20, 20), Image.Resampling.BICUBIC)
        image[4:24, 4:24, 0] = np.asarray(large)
    part = slice(0, 1500) if split == "train" else slice(1500, None)
    return ImageData("digits", images[part], labels[part].astype(np.int32))


def _load_tfds(name: str, data_dir: str | os.PathLike | None, split: Split) -> ImageData:
    from absl import logging
    from tensorflow_datasets.core import constants

    logging.get_absl_logger().addFilter(_is_not_about_speed)
    data_dir = os.path.expanduser(data_dir or constants.DATA_DIR)
    with _damage_is_named(name, data_dir):
        prepared = _tensorflow_free_builder(name)(data_dir=data_dir)
    if not Path(prepared.data_path).exists():
        if problem := _why_unreachable(prepared.URL):
            raise DataUnavailable(f"{name} is not prepared in {data_dir} and cannot be downloaded ({problem})")
        try:
            prepared = _tensorflow_free_builder(name)(data_dir=data_dir, file_format="array_record")
            prepared.download_and_prepare()
        except Exception as problem:
            raise DataUnavailable(f"{name} could not be prepared in {data_dir} ({problem})") from problem
    with _damage_is_named(name, data_dir):
        return ImageData(name, *_read_once(prepared, split))


def _read_once(builder, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, decoded by TFDS once and then kept as arrays beside its files.

    They are decoded again if the kept arrays are damaged or TFDS's files have changed.
    """
    files = [Path(file) for file in builder.info.splits[split].filepaths]
    source = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    kept = files[0].parent / f"diffusion_jax_{split}.npz"
    with contextlib.suppress(Exception), np.load(kept) as arrays:  # whatever is wrong with it, it is made again
        images, labels = arrays["images"], arrays["labels"]
        if arrays["source"] == source and arrays["checksum"] == _checksum(images, labels):
            return images, labels
    examples = _read_examples(builder, split)
    images = np.stack([example["image"] for example in examples]).reshape(-1, 28, 28, 1)
    labels = np.array([example["label"] for example in examples], np.int32)
    with contextlib.suppress(OSError):  # the folder may be read-only
        new = kept.with_suffix(".new.npz")
        np.savez(new, source=source, checksum=_checksum(images, labels), images=images, labels=labels)
        os.replace(new, kept)
    return images, labels


def _checksum(images: np.ndarray, labels: np.ndarray) -> int:
    shapes = repr((images.shape, images.dtype, labels.shape, labels.dtype))
    return zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes(), zlib.crc32(shapes.encode())))


def _is_not_about_speed(record: Any) -> bool:
    return not record.getMessage().startswith("OpenCV is not installed")


@contextlib.contextmanager
def _damage_is_named(name: str, data_dir: str) -> Iterator[None]:
    try:
        yield
    except (PermissionError, MemoryError, ImportError):
        raise
    except Exception as problem:  # Riegeli, Pillow, protobuf and TFDS have many kinds
        reason = (str(problem) or type(problem).__name__).splitlines()[0][:200]
        folder = Path(data_dir) / name
        raise ValueError(f"{name} in {data_dir} is damaged: remove {folder}, and it is prepared again ({reason})") from problem


def _read_examples(builder, split: Split) -> list[dict]:
    """From array_record, or from TFDS's default, TFRecord, which its data_source cannot read."""
    info = builder.info.splits[split]
    if builder.info.file_format.value != "tfrecord":
        return builder.as_data_source(split).__getitems__(range(info.num_examples))
    records = [record for path in info.filepaths for record in _read_tfrecords(path)]
    if len(records) != info.num_examples:
        raise ValueError(f"{len(records)} records of {info.num_examples}")
    return [builder.info.features.deserialize_example_np(record) for record in records]


def _read_tfrecords(path: str | os.PathLike) -> list[bytes]:
    """The records of a TFRecord file: the length as a little-endian uint64, its checksum, the record, its checksum."""
    content, start, records = Path(path).read_bytes(), 0, []
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        record = content[start + 12 : start + 12 + length]
        (expected,) = struct.unpack_from("<I", content, start + 12 + length)
        crc = google_crc32c.value(record)
        if ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32 != expected:
            raise ValueError(f"a checksum in {path} differs")
        records.append(record)
        start += 12 + length + 4
    return records


def _tensorflow_free_builder(name: str):
    """TFDS's own builder, except that it unpacks the four files with NumPy: TFDS's way imports TensorFlow."""
    from PIL import Image
    from tensorflow_datasets.core import registered
    from tensorflow_datasets.image_classification import mnist

    def png(image: np.ndarray) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        file.seek(0)
        return file

    def split_generators(self, downloads):
        files = {
            split: [f"{self.URL}{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
            for split, prefix in (("train", "train"), ("test", "t10k"))
        }
        return {split: self._generate_examples(*paths) for split, paths in downloads.download(files).items()}

    def generate_examples(self, images_path, labels_path):
        for number, (image, label) in enumerate(zip(_read_idx(images_path), _read_idx(labels_path), strict=True)):
            yield number, {"image": png(image), "label": int(label)}

    original = {"mnist": mnist.MNIST, "fashion_mnist": mnist.FashionMNIST}[name]
    with registered.skip_registration():
        return type(
            original.__name__,
            (original,),
            {
                "name": name,
                "_split_generators": split_generators,
                "_generate_examples": generate_examples,
            },
        )


def _read_idx(path: str | os.PathLike) -> UInt8[np.ndarray, "..."]:
    """An array in the IDX format: two zero bytes, 8 for uint8, the rank, the big-endian sizes, the values."""
    content = gzip.decompress(Path(path).read_bytes())
    rank = content[3]
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _why_unreachable(url: str) -> str | None:
    """None if `url`'s host answers within seconds; TFDS alone would retry for minutes."""
    problem: list[str | None] = ["no answer"]

    def probe():
        try:
            request = urllib.request.Request(f"{url}train-labels-idx1-ubyte.gz", method="HEAD")
            urllib.request.urlopen(request, timeout=SECONDS_TO_REACH)
            problem[0] = None
        except OSError as error:
            problem[0] = str(error)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_REACH)
    return problem[0]
