"""Every picture that the experiments write."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PERCENTS = (100, 75, 50, 25, 0)


def to_pixels(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0..255, rounded."""
    return np.rint(np.clip((np.asarray(x, np.float32) + 1) * 127.5, 0, 255)).astype(np.uint8)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """[N, H, W, 1] to one [rows * H, columns * W] picture, filled row by row, with black where images run out."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width), images.dtype)
    cells[:count] = images[..., 0]
    return cells.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def save_grid(file: Path, samples: np.ndarray) -> None:
    """Samples in [-1, 1] as a nearly square grid."""
    columns = int(np.ceil(np.sqrt(len(samples))))
    Image.fromarray(tile(to_pixels(samples), columns)).save(file)


def save_rows(file: Path, columns: list[np.ndarray]) -> None:
    """Images in [-1, 1]: row i has the i-th of each column."""
    images = np.stack([to_pixels(column) for column in columns], 1)
    Image.fromarray(tile(images.reshape(-1, *images.shape[2:]), len(columns))).resize(
        (len(columns) * images.shape[3] * 2, len(images) * images.shape[2] * 2), Image.Resampling.NEAREST
    ).save(file)


def save_noise_figure(file: Path, real: np.ndarray, path: np.ndarray) -> None:
    """Real images in [-1, 1], then the same samples at each percentage of the noise; `path[0]` is x_0, `path[-1]` noise."""
    panels = [("data", real)] + [(f"{p}% noise", path[round(p / 100 * (len(path) - 1))]) for p in PERCENTS]
    rasters = [tile(to_pixels(images), 2) for _, images in panels]
    height, width = rasters[0].shape
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 * len(panels), 1.5 * height / width + 0.3))
    for axis, (title, _), raster in zip(axes, panels, rasters, strict=True):
        axis.imshow(raster, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    _save(figure, file)


def save_mixture_figure(file: Path, data: np.ndarray, path: np.ndarray, fast_path: np.ndarray, fast_times: np.ndarray) -> None:
    """Histograms of the data, of the samples at every t, and of the samples of the accelerated walk at its own t."""
    panels = [("data", data)]
    panels += [(f"t = {t}", points) for t, points in enumerate(path)]
    panels += [(f"{len(fast_times) - 1} steps, t = {t}", points) for t, points in zip(fast_times, fast_path, strict=True)]
    figure, axes = plt.subplots(4, 4, figsize=(10, 10))
    for axis, (title, points) in zip(axes.flat, panels, strict=True):
        axis.hist2d(points[:, 0], points[:, 1], bins=80, range=[(-3, 3), (-4, 4)], cmap="magma")
        axis.set_title(title, fontsize=10)
    _hide_all(axes)
    _save(figure, file)


def save_score_figure(file: Path, grid: np.ndarray, scores: np.ndarray, density: np.ndarray) -> None:
    """The learned score at t = 1, 2, ... as arrows (of equal scale in a panel) over a histogram of the samples at that t."""
    columns = 5
    figure, axes = plt.subplots(-(-len(scores) // columns), columns, figsize=(12, 5.6), squeeze=False)
    for t, (axis, score, points) in enumerate(zip(axes.flat, scores, density, strict=False), start=1):
        axis.hist2d(points[:, 0], points[:, 1], bins=60, range=[(-3, 3), (-3, 3)], cmap="Blues")
        axis.quiver(grid[:, 0], grid[:, 1], score[:, 0], score[:, 1], width=0.004)
        axis.set_title(f"t = {t}", fontsize=10)
    _hide_all(axes)
    _save(figure, file)


def save_bound_figure(file: Path, bits: np.ndarray) -> None:
    """The terms of the variational bound, in bits per dimension: L_0 to L_{T-1}, and L_T in the title with the sum."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.loglog(np.arange(1, len(bits)), np.maximum(bits[:-1], 1e-7), ".", markersize=3)
    axis.set_xlabel("t")
    axis.set_ylabel("bits per dimension")
    axis.set_title(
        f"terms of the bound: {bits.sum():.3f} in all, of which L_0 {bits[0]:.3f} and L_T {bits[-1]:.1e}", fontsize=10
    )
    axis.grid(alpha=0.3)
    _save(figure, file)


def save_curves(file: Path, distances: dict[str, dict[int, float]], floor: float) -> None:
    """Distance against the number of network calls, a line a sampler, above that of real images."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, curve in distances.items():
        axis.plot(list(curve), list(curve.values()), "o-", markersize=4, label=name)
    axis.axhline(floor, color="gray", linestyle=":", label="test images")
    axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel="Frechet distance")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    _save(figure, file)


def _hide_all(axes: np.ndarray) -> None:
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])


def _save(figure, file: Path) -> None:
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=120)
    plt.close(figure)
