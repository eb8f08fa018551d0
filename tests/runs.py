"""Runs of the scripts, as a person would start them, for the tests that look at what they leave."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import diffusion_jax as dj
from diffusion_jax.checkpoints import open_checkpoints, restore_latest

EXPERIMENTS = Path(dj.__file__).parent.parent / "experiments"
COMPILED_ONCE = {
    "JAX_COMPILATION_CACHE_DIR": os.environ["COMPILED_BY_TESTS"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
ENVIRONMENT = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"} | COMPILED_ONCE
TINY = ["--dataset", "digits", "--network", "dit", "--embed-dim", "4", "--depth", "1", "--patch-size", "8"]  # compiles fast
TINY += ["--no-conditional", "--batch-size", "8", "--num-timesteps", "12"]
TINY += ["--iterations", "8", "--checkpoint-every", "2", "--sample-every", "4", "--num-samples", "5", "--ema-decay", "0.9"]


def start(
    script: str, *args: object, devices: int = 1, redirection: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} {FLAGS}"
    environment = ENVIRONMENT | {"XLA_FLAGS": flags} | environment
    command = [sys.executable, str(EXPERIMENTS / script), *map(str, args)]
    output = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up, and the script would wait for ever  # noqa: SIM115
    if redirection:
        command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
    process.output = output
    return process


def finish(process: subprocess.Popen, status: int | None = 0, timeout: float = 1200) -> str:
    """What it said, after it exited with `status` (None: any)."""
    try:
        process.wait(timeout)
    finally:
        process.kill()
    with process.output as output:
        output.seek(0)
        said = output.read()
    assert status is None or process.returncode == status, said
    return said


def run(script: str, *args: object, devices: int = 1, status: int = 0) -> str:
    return finish(start(script, *args, devices=devices), status)


def kill_and_repeat(workdir: Path, *args: object) -> str:
    """Kill a run of mnist.py that has saved its second or fourth step, and repeat the command; what that says."""
    process = start("mnist.py", *args, "--workdir", workdir)
    wait_for(process, lambda: list(workdir.glob("checkpoints/[24]")))
    process.kill()
    finish(process, status=-signal.SIGKILL)
    return run("mnist.py", *args, "--workdir", workdir)


def wait_for(process: subprocess.Popen, condition: Callable[[], object]) -> None:
    """Until `condition()` holds, while the process is alive."""
    while not condition():
        assert process.poll() is None, finish(process)
        time.sleep(0.02)


def final_state(workdir: Path) -> dj.TrainState:
    from support import model
    from support.config import Config

    config = Config(**json.loads((workdir / "config.json").read_text()))
    with open_checkpoints(workdir / "checkpoints") as checkpoints:
        return restore_latest(checkpoints, model.initial_state(config, jax.random.key(0)))


def assert_same_run(one: Path, other: Path) -> None:
    for left, right in zip(jax.tree.leaves(final_state(one)), jax.tree.leaves(final_state(other)), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert best_step(one) == best_step(other)


def best_step(workdir: Path) -> int | None:
    with open_checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.best_step()
