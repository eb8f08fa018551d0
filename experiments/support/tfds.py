"""Data sets in TFDS's files: read without TensorFlow, and MNIST and Fashion-MNIST prepared without it too."""

import contextlib
import gzip
import io
import os
import re
import struct
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from support.arrays import checksum
from support.command_line import require
from support.image_folder import fitted

SECONDS_TO_REACH = 8.0


class DataUnavailable(OSError):
    """The data set is not prepared here and cannot be downloaded; the message says why."""


def data_directory(data_dir: str | os.PathLike | None) -> str:
    """The one given, or TFDS's own."""
    from absl import logging
    from tensorflow_datasets.core import constants

    logging.get_absl_logger().addFilter(_is_not_about_speed)
    return os.path.expanduser(data_dir or constants.DATA_DIR)


def read_mnist(
    name: str, data_dir: str | os.PathLike | None, split: str
) -> tuple[UInt8[np.ndarray, "N 28 28 1"], Int[np.ndarray, " N"]]:
    """A split of "mnist" or "fashion_mnist", which is prepared first if need be."""
    data_dir = data_directory(data_dir)
    with _damage_is_named(name, data_dir, "it is prepared again"):
        builder = _tensorflow_free_builder(name)(data_dir=data_dir)
    if not Path(builder.data_path).exists():
        if problem := _why_unreachable(builder.URL):
            raise DataUnavailable(f"{name} is not prepared in {data_dir} and cannot be downloaded ({problem})")
        try:
            builder = _tensorflow_free_builder(name)(data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare()
        except Exception as problem:
            raise DataUnavailable(f"{name} could not be prepared in {data_dir} ({problem})") from problem
    with _damage_is_named(name, data_dir, "it is prepared again"):
        return _read_once(builder, split)


def read_prepared(
    name: str, data_dir: str, split: str, image_size: int, channels: int
) -> tuple[UInt8[np.ndarray, "N S S C"], Int[np.ndarray, " N"], int, bool] | None:
    """(images, labels, number of classes, whether there is a test split) of `name` or `name/config`, or None if that is not
    prepared in TFDS's directory.

    Without a test split, the images are the training split's; without labels, the labels are zeros. Images that are not of one
    square size are cropped and scaled to `image_size`.
    """
    from tensorflow_datasets.core import read_only_builder

    folder = _newest_version(name, data_dir)
    if folder is None:
        return None
    with _damage_is_named(name, data_dir, "prepare it again"):
        builder: Any = read_only_builder.builder_from_directory(folder)
        splits = builder.info.splits
        image: Any = dict(builder.info.features).get("image")
    shape: tuple[Any, ...] = getattr(image, "shape", ())
    usable = len(shape) == 3 and shape[2] in (1, 3) and image.np_dtype == np.uint8 and "train" in splits
    require(usable, "dataset", name, "a data set of grey or colour images (`image`) with a split `train`")
    cropped = shape[0] is None or shape[0] != shape[1]
    require(image_size > 0 or not cropped, "image_size", image_size, f"given: the images of {name} are not of one square size")
    tested, fit_to = "test" in splits, (image_size, channels or shape[2]) if cropped else ()
    with _damage_is_named(name, data_dir, "prepare it again"):
        return *_read_once(builder, split if tested else "train", fit_to), _num_classes(builder), tested


def _newest_version(name: str, data_dir: str) -> Path | None:
    if not re.fullmatch(r"\w+(/[\w.-]+)?", name):
        return None
    folders = [file.parent for file in Path(data_dir, name).glob("*/features.json")]
    versions = [folder for folder in folders if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    return max(versions, key=lambda folder: [int(number) for number in folder.name.split(".")], default=None)


def _num_classes(builder: Any) -> int:
    return getattr(dict(builder.info.features).get("label"), "num_classes", None) or 0


def _read_once(builder, split: str, fit_to: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, decoded by TFDS once and then kept as arrays beside its files. `fit_to` is a size and channels.

    They are decoded again if the kept arrays are damaged or TFDS's files have changed.
    """
    files = [Path(file) for file in builder.info.splits[split].filepaths]
    source = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    kept = files[0].parent / f"{'_'.join(map(str, ('diffusion_jax', split, *fit_to)))}.npz"
    with contextlib.suppress(Exception), np.load(kept) as arrays:  # whatever is wrong with it, it is made again
        images, labels = arrays["images"], arrays["labels"]
        if arrays["source"] == source and arrays["checksum"] == checksum(images, labels):
            return images, labels
    images, labels, labelled = [], [], _num_classes(builder) > 0
    for example in _read_examples(builder, split):
        image = example["image"]
        images.append(fitted(Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), *fit_to) if fit_to else image)
        labels.append(example["label"] if labelled else 0)
    images, labels = np.stack(images), np.array(labels, np.int32)
    with contextlib.suppress(OSError):  # the folder may be read-only
        new = kept.with_suffix(".new.npz")
        np.savez(new, source=source, checksum=checksum(images, labels), images=images, labels=labels)
        os.replace(new, kept)
    return images, labels


def _is_not_about_speed(record: Any) -> bool:
    return not record.getMessage().startswith("OpenCV is not installed")


@contextlib.contextmanager
def _damage_is_named(name: str, data_dir: str, mended: str) -> Iterator[None]:
    try:
        yield
    except (PermissionError, MemoryError, ImportError):
        raise
    except Exception as problem:  # Riegeli, Pillow, protobuf and TFDS have many kinds
        reason = (str(problem) or type(problem).__name__).splitlines()[0][:200]
        folder = Path(data_dir) / name
        raise ValueError(f"{name} in {data_dir} is damaged: remove {folder}, and {mended} ({reason})") from problem


def _read_examples(builder, split: str) -> Iterator[dict]:
    """From array_record, or from TFDS's default, TFRecord, which its data_source cannot read."""
    info = builder.info.splits[split]
    if builder.info.file_format.value != "tfrecord":
        source = builder.as_data_source(split)
        for first in range(0, info.num_examples, 100):
            yield from source.__getitems__(range(first, min(first + 100, info.num_examples)))
        return
    records = [record for path in info.filepaths for record in _read_tfrecords(path)]
    if len(records) != info.num_examples:
        raise ValueError(f"{len(records)} records of {info.num_examples}")
    yield from map(builder.info.features.deserialize_example_np, records)


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
