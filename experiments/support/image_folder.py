"""Images of a folder, as squares of one size, grey or in colour."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import ExifTags, Image, ImageFile, ImageOps

from support.command_line import require
from support.workdir import is_hidden

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
MOST_UNREADABLE = 0.05
SCALED_TO_8_BITS: dict[Any, float] = {
    "L;2": 85,
    "L;4": 17,
    "RGB;16B": 1 / 256,
}  # Pillow scales these pixels to 8 bits but not the transparent colour


def folders_below(folder: Path) -> list[Path]:
    """`folder` and each folder in it, links followed, each real folder once. Raises OSError where one cannot be listed."""

    def stop(problem: OSError) -> None:
        raise problem

    found: dict[Path, Path] = {}
    for place, below, _ in os.walk(folder, onerror=stop, followlinks=True):
        if Path(place).resolve() in found:
            below.clear()
            continue
        found[Path(place).resolve()] = Path(place)
        below[:] = sorted(name for name in below if not is_hidden(name))
    return list(found.values())


def check_apart(folder: Path, workdir: Path) -> None:
    """Raise ValueError if the run's folder is among the folders of the images."""
    above = {workdir.resolve(), *workdir.resolve().parents}
    apart = above.isdisjoint(place.resolve() for place in folders_below(folder))
    require(apart, "workdir", workdir, f"outside of the images of {folder}, or the run would learn its own samples")


def read_images(folder: Path, size: int, channels: int) -> tuple[UInt8[np.ndarray, "N size size channels"], list[Path]]:
    """The middle square of each image in `folder` and below, and its file. Files that cannot be read are left out, with a
    warning.

    Raises ValueError if there is no image, or if more than MOST_UNREADABLE of them cannot be read.
    """
    entries = sorted(entry for place in folders_below(folder) for entry in place.iterdir() if not is_hidden(entry.name))
    files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
    require(bool(files), "dataset", folder, f"a folder with images ({', '.join(sorted(SUFFIXES))})")
    images, unreadable = {}, []
    for file in files:
        try:
            with Image.open(file) as image:
                images[file] = as_square(image, size, channels)
        except MemoryError:
            raise
        except Exception as problem:  # Pillow has many kinds
            unreadable.append(f"{file} ({(str(problem) or type(problem).__name__).splitlines()[0]})")
    if unreadable:
        named = ", ".join(unreadable[:3]) + (", ..." if unreadable[3:] else "")
        counted = f"{len(unreadable)} of {len(files)} images cannot be read"
        if len(unreadable) > MOST_UNREADABLE * len(files):
            raise ValueError(f"{counted}, and at most {MOST_UNREADABLE:.0%} may be left out: {named}")
        warnings.warn(f"{counted} and are left out: {named}", stacklevel=2)
    return np.stack(list(images.values())), list(images)


def classes_of(folder: Path, files: list[Path]) -> tuple[Int[np.ndarray, " N"], int]:
    """The class of each file, and their number: one for each folder in `folder`, in the order of their names.

    There are none (0) unless all files are in these folders or below, and there are at least two of them.
    """
    places = [file.relative_to(folder).parts for file in files]
    names = sorted({place[0] for place in places})
    if len(names) < 2 or min(map(len, places)) == 1:
        return np.zeros(len(files), np.int32), 0
    return np.array([names.index(place[0]) for place in places], np.int32), len(names)


def as_square(file: ImageFile.ImageFile, size: int, channels: int) -> UInt8[np.ndarray, "size size channels"]:
    """Rotate the image upright, composite it on white, reduce 16-bit grey to 8 bits, and fit it."""
    scale = SCALED_TO_8_BITS.get(file.tile[0].args) if file.format == "PNG" else None
    file.load()
    turn, clear = orientation(file), file.info.get("transparency")
    image: Image.Image = file
    if scale and clear is not None:
        image.info["transparency"] = tuple(int(c * scale) for c in clear) if isinstance(clear, tuple) else clear * scale
    if image.mode.startswith("I"):
        values = np.asarray(image)
        image = Image.fromarray(np.where(values == clear, 255, values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.info.clear()  # the rest of the EXIF data may be odd, and exif_transpose would write it again
    image.getexif()[ExifTags.Base.Orientation] = turn
    return fitted(ImageOps.exif_transpose(image), size, channels)


def fitted(image: Image.Image, size: int, channels: int) -> UInt8[np.ndarray, "size size channels"]:
    """The middle square, scaled."""
    square = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
    return np.asarray(square).reshape(size, size, channels)


def orientation(image: Image.Image) -> object:
    """The EXIF orientation, or None if it is absent or damaged. Viewers then show the image as it is stored."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow has many kinds
        return None
