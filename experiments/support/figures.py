"""Every figure that the experiments draw with matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import LogLocator

from diffusion_jax.schedules import NoiseSchedule
from support.pictures import tile, to_pixels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams["axes.titlesize"] = 10
PERCENTS = (100, 75, 50, 25, 0)
BARE: Any = {"xticks": (), "yticks": ()}


def save_noise_figure(file: Path, real: np.ndarray, path: np.ndarray) -> None:
    """Real images in [-1, 1], then the same samples at each percentage of the noise; `path[0]` is x_0, `path[-1]` noise."""
    panels = [("data", real)] + [(f"{p}% noise", path[round(p / 100 * (len(path) - 1))]) for p in PERCENTS]
    rasters = [tile(to_pixels(images), 2) for _, images in panels]
    height, width = rasters[0].shape[:2]
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 * len(panels), 1.5 * height / width + 0.3))
    for axis, (title, _), raster in zip(axes, panels, rasters, strict=True):
        axis.imshow(raster, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
    _save(figure, file)


def save_training_figure(file: Path, metrics: np.ndarray, learning_rate: Callable) -> None:
    """The loss and the gradient's norm at each step, with their running medians, and the learning rate."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.8))
    steps, width = metrics["step"], max(len(metrics["step"]) // 50, 1)
    for axis, name in zip(axes, ("loss", "grad_norm"), strict=False):
        values = metrics[name]
        medians = [np.median(values[max(i - width, 0) : i + width + 1]) for i in range(len(values))]
        axis.semilogy(steps, values, color="tab:blue", alpha=0.25)
        axis.semilogy(steps, medians, color="tab:blue")
    axes[2].plot(steps, [float(learning_rate(step - 1)) for step in steps])
    for axis, title in zip(axes, ("loss", "norm of the gradient", "learning rate"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    _save(figure, file)


def save_schedules_figure(file: Path, schedules: dict[str, NoiseSchedule]) -> None:
    """Each table of each schedule over t / T, and the variance that each step adds."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3))
    for name, schedule in schedules.items():
        times = np.arange(1, schedule.num_timesteps + 1) / schedule.num_timesteps
        signal, noise = schedule
        beta = noise[1:] ** 2 - (signal[1:] / signal[:-1] * noise[:-1]) ** 2
        with np.errstate(divide="ignore"):
            log_snr = -2 * np.log(schedule.sigma[1:])
        for axis, values in zip(axes, (beta, signal[1:], noise[1:], log_snr), strict=True):
            axis.plot(times, values, label=name)
    titles = (r"variance of a step, $\beta_{t|t-1}$", "signal", "noise", "log-SNR")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="t / T")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=8)
    _save(figure, file)


def save_mixture_figure(file: Path, data: np.ndarray, path: np.ndarray, fast_path: np.ndarray, fast_times: np.ndarray) -> None:
    """Histograms of the data, of the samples at every t, and of the samples of the accelerated walk at its own t."""
    panels = [("data", data)]
    panels += [(f"t = {t}", points) for t, points in enumerate(path)]
    panels += [(f"{len(fast_times) - 1} steps, t = {t}", points) for t, points in zip(fast_times, fast_path, strict=True)]
    figure, axes = plt.subplots(4, 4, figsize=(10, 10), subplot_kw=BARE)
    for axis, (title, points) in zip(axes.flat, panels, strict=True):
        axis.hist2d(points[:, 0], points[:, 1], bins=80, range=[(-3, 3), (-4, 4)], cmap="magma")
        axis.set_title(title)
    _save(figure, file)


def save_score_figure(file: Path, grid: np.ndarray, scores: np.ndarray, density: np.ndarray) -> None:
    """The learned score at t = 1, 2, ... as arrows (of equal scale in a panel) over a histogram of the samples at that t."""
    columns = 5
    figure, axes = plt.subplots(-(-len(scores) // columns), columns, figsize=(12, 5.6), squeeze=False, subplot_kw=BARE)
    for t, (axis, score, points) in enumerate(zip(axes.flat, scores, density, strict=False), start=1):
        axis.hist2d(points[:, 0], points[:, 1], bins=60, range=[(-3, 3), (-3, 3)], cmap="Blues")
        axis.quiver(grid[:, 0], grid[:, 1], score[:, 0], score[:, 1], width=0.004)
        axis.set_title(f"t = {t}")
    _save(figure, file)


def save_paths_figure(file: Path, paths: dict[str, np.ndarray]) -> None:
    """Histograms of the samples at every other t from noise to data, a row for each path."""
    steps = range(len(next(iter(paths.values()))) - 1, -1, -2)
    size = (2 * len(steps), 2.2 * len(paths))
    figure, axes = plt.subplots(len(paths), len(steps), figsize=size, squeeze=False, subplot_kw=BARE)
    for row, (name, path) in zip(axes, paths.items(), strict=True):
        for axis, t in zip(row, steps, strict=True):
            axis.hist2d(path[t][:, 0], path[t][:, 1], bins=80, range=[(-3, 3), (-4, 4)], cmap="magma")
            axis.set_title(f"{name}, t = {t}", fontsize=9)
    _save(figure, file)


def save_coins_figure(file: Path, samples: np.ndarray, prior: np.ndarray, heads: int) -> None:
    """Histograms of the number of heads, of samples and of fair coins; the data all have `heads`."""
    figure, axis = plt.subplots(figsize=(6, 3))
    bins = np.arange(min(prior.min(), samples.min()), max(prior.max(), samples.max()) + 2) - 0.5
    axis.hist(prior, bins, alpha=0.6, color="gray", label="fair coins", density=True)
    axis.hist(samples, bins, alpha=0.6, color="tab:blue", label="samples", density=True)
    axis.axvline(heads, color="black", linestyle=":", label="data")
    axis.set(xlabel="heads", ylabel="share")
    axis.legend(fontsize=8)
    _save(figure, file)


def save_bound_figure(file: Path, bits: np.ndarray) -> None:
    """The terms of the variational bound, in bits per dimension: L_0 to L_{T-1}, and L_T in the title with the sum."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.loglog(np.arange(1, len(bits)), np.maximum(bits[:-1], 1e-7), ".", markersize=3)
    title = f"terms of the bound: total {bits.sum():.3f}, L_0 {bits[0]:.3f}, L_T {bits[-1]:.1e}"
    axis.set(title=title, xlabel="t", ylabel="bits per dimension")
    axis.grid(alpha=0.3)
    _save(figure, file)


def save_curves(file: Path, curves: dict[str, dict[str, dict[Any, Any]]], floors: dict[str, Any], xlabel: str) -> None:
    """Distance (the mean of several) against `xlabel`: a panel for each feature space, a line for each sampler."""
    rows = -(-len(floors) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(9.5, 3.25 * rows), squeeze=False)
    for axis, (space, floor) in zip(axes.flat, floors.items(), strict=True):
        for name, curve in curves[space].items():
            x = sorted(curve)
            axis.plot(x, [np.mean(curve[at]) for at in x], "o-", markersize=3, linewidth=1, label=name)
        axis.axhline(float(np.mean(floor)), color="gray", linestyle=":", label="test images")
        axis.set(xscale="log", yscale="log", title=space, xlabel=xlabel, ylabel="Frechet distance")
        for numbers in (axis.xaxis, axis.yaxis):
            numbers.set_major_locator(LogLocator(subs=(1, 2, 5)))
            numbers.set_major_formatter("{x:g}")
            numbers.set_minor_formatter("")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=8)
    _save(figure, file, rect=(0, 0.18 / rows, 1, 1))


def _save(figure, file: Path, rect: tuple[float, float, float, float] = (0, 0, 1, 1)) -> None:
    figure.tight_layout(pad=0.4, rect=rect)
    figure.savefig(file, dpi=120)
    plt.close(figure)
