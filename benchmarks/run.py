"""Race this project against the original PyTorch code, diffusers and the machine's own matrix product, side by side on a CPU.

python benchmarks/run.py --reference ../diffusion    # a clone of https://github.com/tonyduan/diffusion
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro
from contenders import CONTENDERS, MATMUL, T
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
REPEATS = {"train": 5, "forward": 5, "matmul": 5, f"sample {T // 10}": 1, f"sample {T}": 1}


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


class Worker:
    """A contender in a process of its own; ask(line) is its answer."""

    def __init__(self, name: str, options: Options):
        start = time.perf_counter()
        command = [sys.executable, str(HERE / "contenders.py"), name, json.dumps(dataclasses.asdict(options))]
        alike = {"OMP_NUM_THREADS": str(CORES), "JAX_PLATFORMS": "cpu"}
        alike |= {"JAX_ENABLE_COMPILATION_CACHE": "0", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        self.name, pipe = name, subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | alike)
        first = self.answer()
        self.start = time.perf_counter() - start
        self.compilation = first - self.ask("train")

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"error: the contender {self.name!r} stopped")

    def ask(self, line: str) -> Any:
        print(line, file=self.process.stdin, flush=True)
        return self.answer()


def race(workers: list[Worker], rounds: int) -> list[dict[str, list[float]]]:
    """Seconds of each contender at each task, one after the other in every round; a first round warms up."""
    times = [{task: [] for task in REPEATS} for _ in workers]
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for task, repeats in REPEATS.items():
            for worker, measured in zip(workers, times, strict=True):
                if number == 0 and task == f"sample {T}":
                    continue  # the shorter one has warmed it up
                answers = [worker.ask(task) for _ in range(repeats)]
                if number and None not in answers:
                    measured[task].append(statistics.median(answers))
    return times


def table(workers: list[Worker], times: list[dict[str, list[float]]], baseline: float) -> list[str]:
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
    for worker, measured in zip(workers, times, strict=True):
        step = statistics.median(measured["train"])
        rate, product = 3 * worker.ask("flops") / step, 2 * MATMUL**3 / statistics.median(measured["matmul"])
        cells = [
            worker.name,
            spread(measured["train"], 1e3),
            f"{baseline / step:.2f}" if comparable(worker.name) else "",
            f"{rate / 1e12:.3f}",
            f"{rate / product:.0%}",
            spread(measured["forward"], 1e3),
            spread(measured[f"sample {T // 10}"]),
            spread(measured[f"sample {T}"]),
            f"{worker.compilation:.1f}",
            f"{worker.start:.1f}",
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
    options = dataclasses.replace(options, reference=str(Path(options.reference).resolve()))
    workers = [Worker(name, options) for name in tqdm(CONTENDERS, desc="first steps")]
    times = race(workers, options.rounds)
    steps = {worker.name: statistics.median(measured["train"]) for worker, measured in zip(workers, times, strict=True)}
    baseline = steps["original, as it is"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "diffusers"))
    header = (
        f"{CORES} cores, Python {platform.python_version()}, {versions}; embed_dim {options.embed_dim}, "
        f"batch {options.batch_size}, {options.num_samples} samples; medians (and range) of {options.rounds} rounds."
    )
    lines = [header, "", *table(workers, times, baseline)]
    Path(options.out + ".md").write_text("\n".join(lines) + "\n")
    names = [name for name in steps if comparable(name)]
    plot(names, [baseline / steps[name] for name in names], Path(options.out + ".png"))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
