"""Images in a .npy or .npz file, which may be larger than memory."""

import dataclasses
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

WANTED = "a file of square uint8 images [N, S, S], [N, S, S, 1] or [N, S, S, 3] (in a .npz: `images`, and perhaps `labels` [N])"


@dataclasses.dataclass(frozen=True)
class RowsOnDisk:
    """Some rows of an array in a file. They are read when they are asked for."""

    array: np.ndarray
    rows: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.array[self.rows[index]])

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.array.shape[1:]


def read_arrays(file: Path) -> tuple[UInt8[np.ndarray, "N S S C"], Int[np.ndarray, " N"] | None]:
    """The images, which stay on disk if it is a .npy, and the labels if there are any. Raises ValueError if not as WANTED."""
    try:
        found: Any = np.load(file, mmap_mode="r", allow_pickle=False)
        found = {"images": found} if isinstance(found, np.ndarray) else dict(found)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
        raise ValueError(f"--dataset must be {WANTED}; {file} cannot be read ({str(problem).splitlines()[0]})") from None
    images, labels = np.asanyarray(found.get("images", 0)), found.get("labels")
    images = images[..., None] if images.ndim == 3 else images
    right = images.dtype == np.uint8 and images.ndim == 4 and len(images) > 0
    if not right or images.shape[1] != images.shape[2] or images.shape[3] not in (1, 3):
        has = ", ".join(f"{name}: {array.dtype} {list(array.shape)}" for name, array in found.items()) or "nothing"
        raise ValueError(f"--dataset must be {WANTED}; {file} has {has}")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0):
        raise ValueError(f"--dataset must have labels that are whole numbers from 0, one for each image; {file} has others")
    return images, labels


def checksum(images: np.ndarray, labels: np.ndarray) -> int:
    """The CRC-32 of the images, labels, shapes and dtypes."""
    shapes = repr((images.shape, images.dtype, labels.shape, labels.dtype))
    total = zlib.crc32(shapes.encode())
    for first in range(0, len(images), 1000):  # they may not fit into memory
        total = zlib.crc32(images[first : first + 1000].tobytes(), total)
    return zlib.crc32(labels.tobytes(), total)
