"""Measure everything on one GPU: training, sampling, the published recipe, exactness, and the PyTorch original beside them.

python benchmarks/accelerator.py --out accelerator --data-dir DIR --reference ../diffusion

The parts run in the order of their importance. A part that the remaining time does not allow, or that fails, is left out and
named; what is done is always in accelerator.json, accelerator.md and accelerator.png. A machine without a network takes what
benchmarks/travel.py packs.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from accelerator_report import write_report
from workers import Worker

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
OURS, TF32, FLOAT32 = "ours, bfloat16", "ours, TF32", "ours, float32"
COMPILED = ("original, tuned, torch.compile, bfloat16", "original, tuned, CUDA graphs, bfloat16")
EAGER = ("original, as it is", "original, tuned, bfloat16")


@dataclasses.dataclass(frozen=True)
class Options:
    out: str
    """A folder for the results."""
    reference: str | None = None
    """A clone of the original, with its src/ folder; without it only this project is measured."""
    dataset: Literal["mnist", "digits"] = "mnist"
    data_dir: str | None = None
    """A TFDS directory with MNIST; by default TFDS's own."""
    budget: float = 480.0
    """Seconds for everything."""
    embed_dim: int = 128
    dim_scales: tuple[int, ...] = (1, 2, 4, 8)
    """Channels of each level, as multiples of embed_dim."""
    batch_size: int = 512
    iterations: int = 2000
    """Training steps of the published recipe."""
    num_samples: int = 2000
    """Samples of its network, with 50 calls."""
    drawn: tuple[int, int] = (64, 1000)
    """Images in a timed sampling, of few and of many."""
    steps: int = 10
    """Training steps in one timing."""
    matmul_sizes: tuple[int, ...] = (4096, 8192, 16384)
    bandwidth_bytes: int = 2**32


class Bench:
    """The results so far, and the time that is left."""

    def __init__(self, options: Options):
        self.options, self.deadline, self.out = options, time.monotonic() + options.budget, Path(options.out)
        self.results: dict[str, Any] = {"options": dataclasses.asdict(options), "left out": {}, "training": {}, "exactness": {}}
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "log.txt").open("w")
        self.scratch = Path(tempfile.mkdtemp())
        self.environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the device
            "TQDM_DISABLE": "1",
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def part(self, name: str, seconds: float, work: Callable[[], Any]) -> Any:
        """What `work()` returns; None, and the reason in the results, if it fails or less than `seconds` are left."""
        begin = time.monotonic()
        try:
            if self.left() < seconds:
                raise TimeoutError(f"needs about {seconds:.0f} s, and {max(self.left(), 0):.0f} were left")
            return work()
        except Exception as problem:
            self.results["left out"][name] = (str(problem) or type(problem).__name__).splitlines()[0]
        finally:
            self.results.setdefault("seconds", {})[name] = time.monotonic() - begin
            print(f"{self.left():4.0f} s left after {name}", file=sys.stderr, flush=True)
            write_report(self.out, self.results)

    def worker(self, name: str, environment: dict[str, str] | None = None, **changes: Any) -> Worker:
        options = dataclasses.asdict(self.options) | changes
        options["reference"] = options["reference"] and str(Path(options["reference"]).resolve())
        return Worker(name, options, self.environment | (environment or {}), max(self.left(), 1), self.log)

    def script(self, *command: Any, environment: dict[str, str] | None = None) -> subprocess.Popen:
        command = [sys.executable, str(EXPERIMENTS / command[0]), *map(str, command[1:])]
        return subprocess.Popen(
            command, env=os.environ | self.environment | (environment or {}), stdout=self.log, stderr=self.log
        )

    def common(self) -> list[str]:
        """The options of mnist.py for its data and figure, which is small in a rehearsal."""
        options = ["--dataset", self.options.dataset, "--num-samples", str(min(20, self.options.drawn[0]))]
        return [*options, *(["--data-dir", self.options.data_dir] if self.options.data_dir else [])]

    def run(self, *command: Any) -> float:
        """The seconds that a script takes."""
        begin, process = time.monotonic(), self.script(*command)
        try:
            status = process.wait(max(self.left(), 1))
        finally:
            process.kill()
        if status:
            raise RuntimeError(f"{command[0]} ended with status {status}")
        return time.monotonic() - begin


def rates(bench: Bench, machine: Worker) -> None:
    bench.results["rates"] = machine.ask("rates")


def training(bench: Bench, workers: list[Worker], rounds: int = 3) -> None:
    """Training steps of all workers, in turn; the first steps, which compile, at the same time."""
    fresh = [worker for worker in workers if worker.name not in bench.results["training"]]
    firsts = {}
    for worker in fresh:
        worker.tell("train")
    for worker in fresh:
        try:
            firsts[worker.name] = worker.answer()
        except RuntimeError as problem:  # the others go on
            bench.results["left out"][worker.name] = str(problem)
    workers = [worker for worker in workers if worker.name in firsts or worker.name in bench.results["training"]]
    steps = bench.options.steps
    for worker in workers:
        worker.ask(f"train {steps}")
    times = {worker.name: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            times[worker.name].append(worker.ask(f"train {steps}") / steps)
    for worker in workers:
        row = bench.results["training"].setdefault(worker.name, {"seconds": [], "batch": bench.options.batch_size})
        row["seconds"] += times[worker.name]
        if worker.name in firsts:
            row |= {"first step": firsts[worker.name], "memory": worker.ask("memory"), "flops": worker.ask("flops")}


def sampling(bench: Bench, workers: list[Worker], tasks: list[tuple[int, int]]) -> None:
    """Seconds of drawing `count` images with `calls` network calls each, and of the first time, which compiles."""
    rows = bench.results.setdefault("sampling", [])
    for count, calls in tasks:
        for worker in workers:
            first = worker.ask(f"sample {count} {calls}")
            rows.append({"name": worker.name, "count": count, "calls": calls, "first": first,
                         "seconds": worker.ask(f"sample {count} {calls}")})  # fmt: skip


def recipe(bench: Bench) -> None:
    """experiments/mnist.py --preset paper, from its start to its figure; the training step is compiled by then."""
    options, workdir = bench.options, bench.scratch / "recipe"
    size = ["--embed-dim", options.embed_dim, "--dim-scales", *options.dim_scales, "--batch-size", options.batch_size]
    command = ["--preset", "paper", "--precision", "bfloat16", "--iterations", options.iterations, *size, *bench.common()]
    seconds = bench.run("mnist.py", *command, "--workdir", workdir)
    loss = np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True)["loss"]
    bench.results["recipe"] = {"seconds": seconds, "loss of the last 100 steps": float(loss[-100:].mean())}
    for name in ("figure.png", "training.png"):
        shutil.copy(workdir / name, bench.out / name)


def samples(bench: Bench) -> None:
    """Samples of the recipe's network, with 50 calls."""
    if "recipe" not in bench.results:
        raise RuntimeError("there is no recipe to draw from")
    count = ["--sampler", "ancestral", "--sampling-timesteps", 50, "--num-samples", bench.options.num_samples]
    seconds = bench.run("sample.py", "--workdir", bench.scratch / "recipe", *count, "--out", bench.out / "samples.npy")
    bench.results["recipe"] |= {"samples": bench.options.num_samples, "seconds of sampling": seconds}


def repeated(bench: Bench, ours: Worker) -> None:
    """The largest difference between two runs of the same steps in one process."""
    bench.results["exactness"]["twice in one process"] = ours.ask("difference 20")


def deterministic(bench: Bench) -> None:
    """The same with XLA's deterministic operations, and what they cost."""
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}"}
    worker, steps = bench.worker(OURS, flags), bench.options.steps
    with contextlib.closing(worker):
        difference = worker.ask("difference 20")
        bench.results["exactness"] |= {
            "twice, deterministic": difference, "seconds a step, deterministic": worker.ask(f"train {steps}") / steps
        }  # fmt: skip


def resumed(bench: Bench) -> None:
    """A small run that is killed and continued, against one that is not: the largest difference of its losses."""
    steps = min(400, 10 * bench.options.iterations)
    small = ["--preset", "paper", "--embed-dim", 8, "--dim-scales", *bench.options.dim_scales]
    small += ["--num-timesteps", 50, "--batch-size", min(64, bench.options.batch_size), *bench.common()]
    small += ["--iterations", steps, "--checkpoint-every", steps // 4, "--sample-every", 0]
    whole, killed = bench.scratch / "whole", bench.scratch / "killed"
    bench.run("mnist.py", *small, "--workdir", whole)
    process = bench.script("mnist.py", *small, "--workdir", killed)
    while process.poll() is None and not list(killed.glob(f"checkpoints/{steps // 4}")) and bench.left() > 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run to be killed ended by itself with status {process.returncode}")
    bench.run("mnist.py", *small, "--workdir", killed)
    one, other = (np.genfromtxt(run / "metrics.csv", delimiter=",", names=True)["loss"] for run in (whole, killed))
    bench.results["exactness"]["killed and resumed, losses"] = float(np.abs(one - other).max())


def other_batches(bench: Bench) -> None:
    batch, steps = bench.options.batch_size, bench.options.steps
    for size in (2 * batch, 4 * batch, batch // 2):
        with contextlib.closing(bench.worker(OURS, batch_size=size)) as worker:
            row = {"batch": size, "first step": worker.ask("train")}
            worker.ask(f"train {steps}")
            row["seconds"] = [worker.ask(f"train {steps}") / steps for _ in range(3)]
            row |= {"memory": worker.ask("memory"), "flops": worker.ask("flops")}
        bench.results["training"][f"{OURS}, batch {size}"] = row


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    bench = Bench(options)
    original = {name: bench.worker(name) for name in (*COMPILED, *EAGER) if options.reference}
    ours = {name: bench.worker(name) for name in ("machine", OURS, TF32, FLOAT32)}
    fastest, eager = [original[name] for name in COMPILED if original], [original[name] for name in EAGER if original]
    try:
        bench.part("rates", 20, lambda: rates(bench, ours["machine"]))
        ours["machine"].close()
        few, many = options.drawn
        bench.part("training", 60, lambda: training(bench, [ours[OURS], *fastest]))
        bench.part("sampling", 30, lambda: sampling(bench, [ours[OURS]], [(few, calls) for calls in (500, 50, 20, 10)]))
        bench.part("recipe", 120, lambda: recipe(bench))
        bench.part("recipe, samples", 20, lambda: samples(bench))
        bench.part("repeated", 10, lambda: repeated(bench, ours[OURS]))
        bench.part("sampling, many", 20, lambda: sampling(bench, [ours[OURS]], [(many, 20)]))
        bench.part("sampling, original", 30, lambda: sampling(bench, fastest, [(few, 50), (few, 500)]))
        for worker in fastest:
            worker.close()
        bench.part("eager and TF32", 60, lambda: training(bench, [ours[OURS], ours[TF32], *eager]))
        for worker in (*eager, ours[OURS], ours[TF32]):
            worker.close()
        bench.part("float32", 40, lambda: training(bench, [ours[FLOAT32]]))
        ours[FLOAT32].close()
        bench.part("killed and resumed", 60, lambda: resumed(bench))
        bench.part("deterministic", 40, lambda: deterministic(bench))
        bench.part("other batches", 40, lambda: other_batches(bench))
    finally:
        for worker in (*original.values(), *ours.values()):
            worker.close()
        shutil.rmtree(bench.scratch, ignore_errors=True)
    print((bench.out / "accelerator.md").read_text())


if __name__ == "__main__":
    main()
