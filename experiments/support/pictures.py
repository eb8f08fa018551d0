"""Images as pictures: grids, rows and animations."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def to_pixels(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, rounded."""
    return np.rint(np.clip((np.asarray(x, np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """[N, H, W, C] to one picture, filled row by row, with black where images run out; [rows * H, columns * W] if C is 1."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.pad(images, [(0, rows * columns - count), (0, 0), (0, 0), (0, 0)])
    picture = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    picture = picture.reshape(rows * height, columns * width, channels)
    return picture[..., 0] if channels == 1 else picture


def save_picture(file: Path, picture: np.ndarray) -> None:
    """Bytes [H, W] or [H, W, 3]."""
    Image.fromarray(picture).save(file)


def grid(samples: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] as one nearly square picture."""
    return tile(to_pixels(samples), int(np.ceil(np.sqrt(len(samples)))))


def save_rows(file: Path, columns: list[np.ndarray]) -> None:
    """Images in [-1, 1]: row i has the i-th of each column."""
    images = np.stack([to_pixels(column) for column in columns], 1)
    picture = Image.fromarray(tile(images.reshape(-1, *images.shape[2:]), len(columns)))
    ImageOps.scale(picture, 2, Image.Resampling.NEAREST).save(file)


def as_html(picture: np.ndarray, caption: str) -> str:
    """Bytes [H, W] or [H, W, 3], over their caption and as wide as the page allows, in one string without a file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img src="{source}" alt="{caption}" style="width: 100%; image-rendering: pixelated"><p>{caption}</p>'


def save_animation(file: Path, path: np.ndarray) -> None:
    """The samples on their way from noise, `path[-1]`, to x_0, `path[0]`, as a .gif of four seconds that rests at the end."""
    shown = path[np.linspace(len(path) - 1, 0, min(len(path), 50)).round().astype(int)]
    frames = [ImageOps.scale(Image.fromarray(grid(images)), 2, Image.Resampling.NEAREST) for images in shown]
    durations = [60] * (len(frames) - 1) + [1500]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0)
