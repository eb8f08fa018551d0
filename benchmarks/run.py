"""Race this project against the original PyTorch code, diffusers and the machine's own matrix product, side by side on a CPU.

python benchmarks/run.py --reference ../diffusion    # a clone of https://github.com/tonyduan/diffusion
"""

import dataclasses
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import tyro
from contenders import MATMUL, T
from tqdm import tqdm
from workers import Worker

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ENVIRONMENT = {"OMP_NUM_THREADS": str(CORES), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= {"JAX_ENABLE_COMPILATION_CACHE": "0", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
SECONDS = 7200
CONTENDERS = (
    "ours, float32",
    "ours, bfloat16",
    "original, as it is",
    "original, tuned",
    "original, tuned, torch.compile",
    "original, tuned, torch.compile, bfloat16",
    "diffusers UNet2DModel, tuned",
)


@dataclasses.dataclass(frozen=True)
class Options:
    reference: str
    """A clone of the original, with its src/ folder."""
    rounds: int = 3
    embed_dim: int = 32
    batch_size: int = 32
    num_samples: int = 16
    """Drawn together in a timed sampling."""
    out: str = "docs/benchmark"
    """Without its ending: .md gets the table, .png the plot."""


def first_step(worker: Worker) -> tuple[float, float]:
    """The seconds to the end of the first step, and what of them was compilation."""
    begin = time.perf_counter()
    first = worker.ask("train")
    seconds = time.perf_counter() - begin
    return seconds, first - worker.ask("train")


def race(workers: list[Worker], rounds: int, num_samples: int) -> list[dict[str, list[float]]]:
    """Seconds of each contender at each task, one after the other in every round; a first round warms up."""
    tasks = {"train": ("train", 5), "forward": ("forward", 5), "matmul": ("matmul", 5)}
    tasks |= {str(steps): (f"sample {num_samples} {steps}", 1) for steps in (T // 10, T)}
    times = [{task: [] for task in tasks} for _ in workers]
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for task, (line, repeats) in tasks.items():
            for worker, measured in zip(workers, times, strict=True):
                if number == 0 and task == str(T):
                    continue  # the shorter one has warmed it up
                answers = [worker.ask(line) for _ in range(repeats)]
                if number and None not in answers:
                    measured[task].append(statistics.median(answers))
    return times


def table(
    workers: list[Worker], starts: list[tuple[float, float]], times: list[dict[str, list[float]]], baseline: float
) -> list[str]:
    def spread(values: list[float], unit: float = 1) -> str:
        if not values:
            return ""
        low, middle, high = (f"{unit * f(values):.3g}" for f in (min, statistics.median, max))
        return f"{middle} ({low} to {high})"

    lines = [
        "| | training step, ms | speed | TFLOP/s | of its matrix product | forward, ms | "
        f"{T // 10} steps, s | {T} steps, s | compilation, s | start to first step, s | peak memory, GB |",
        "|---|" + "---|" * 10,
    ]
    for worker, (seconds, compilation), measured in zip(workers, starts, times, strict=True):
        step = statistics.median(measured["train"])
        rate, product = 3 * worker.ask("flops") / step, 2 * MATMUL**3 / statistics.median(measured["matmul"])
        cells = [
            worker.name,
            spread(measured["train"], 1e3),
            f"{baseline / step:.2f}" if comparable(worker.name) else "",
            f"{rate / 1e12:.3f}",
            f"{rate / product:.0%}",
            spread(measured["forward"], 1e3),
            spread(measured[str(T // 10)]),
            spread(measured[str(T)]),
            f"{compilation:.1f}",
            f"{seconds:.1f}",
            f"{worker.ask('memory') / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def comparable(name: str) -> bool:
    """Whether a step is of the same network; diffusers' is another, of about twice the work."""
    return not name.startswith("diffusers")


def plot(names: list[str], speeds: list[float], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1), layout="constrained")
    bars = axes.barh(names, speeds, color=["tab:orange" if name.startswith("ours") else "tab:gray" for name in names])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("training steps a second, where the original as it is makes 1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if not (Path(options.reference) / "src" / "simple" / "diffusion.py").exists():
        sys.exit(f"error: --reference must be a clone of the original, with src/simple/diffusion.py; got {options.reference}")
    given = dataclasses.asdict(options) | {"reference": str(Path(options.reference).resolve())}
    workers, starts = [], []
    for name in tqdm(CONTENDERS, desc="first steps"):
        workers.append(Worker(name, given, ENVIRONMENT, SECONDS))
        starts.append(first_step(workers[-1]))
    times = race(workers, options.rounds, options.num_samples)
    steps = {worker.name: statistics.median(measured["train"]) for worker, measured in zip(workers, times, strict=True)}
    baseline = steps["original, as it is"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "diffusers"))
    header = (
        f"{CORES} cores, Python {platform.python_version()}, {versions}; embed_dim {options.embed_dim}, "
        f"batch {options.batch_size}, {options.num_samples} samples; medians (and range) of {options.rounds} rounds."
    )
    lines = [header, "", *table(workers, starts, times, baseline)]
    Path(options.out + ".md").write_text("\n".join(lines) + "\n")
    names = [name for name in steps if comparable(name)]
    plot(names, [baseline / steps[name] for name in names], Path(options.out + ".png"))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
