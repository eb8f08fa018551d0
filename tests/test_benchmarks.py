"""The GPU benchmark, rehearsed whole on a CPU at the smallest size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import ENVIRONMENT

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALLEST = {
    "embed-dim": 8, "dim-scales": (1, 1), "batch-size": 8, "iterations": 4, "num-samples": 6, "drawn": (2, 3), "steps": 1,
    "matmul-sizes": 64, "bandwidth-bytes": 4096, "dataset": "digits",
}  # fmt: skip
PARTS = {
    "rates", "training", "sampling", "recipe", "recipe, samples", "repeated", "sampling, many", "sampling, original",
    "eager and TF32", "float32", "killed and resumed", "deterministic", "other batches",
}  # fmt: skip


def accelerator(out: Path, budget: float) -> dict:
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--out", str(out), "--budget", str(budget)]
    for name, value in SMALLEST.items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=budget + 60)
    return json.loads((out / "accelerator.json").read_text())


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Without the original, which is not among the requirements: those parts measure this project alone."""
    results = accelerator(tmp_path, 900)
    assert results["left out"] == {}
    assert set(results["seconds"]) == PARTS
    assert {"ours, bfloat16", "ours, TF32", "ours, float32", "ours, bfloat16, batch 4"} <= set(results["training"])
    assert all(min(row["seconds"]) > 0 and row["flops"] > 0 and row["memory"] > 0 for row in results["training"].values())
    assert [(row["count"], row["calls"]) for row in results["sampling"]] == [(2, 500), (2, 50), (2, 20), (2, 10), (3, 20)]
    assert results["exactness"]["twice in one process"] == results["exactness"]["killed and resumed, losses"] == 0
    assert np.load(tmp_path / "samples.npy").shape == (6, 32, 32, 1)
    report = (tmp_path / "accelerator.md").read_text()
    assert "Left out: nothing." in report
    assert all((tmp_path / name).stat().st_size > 0 for name in ("accelerator.png", "figure.png", "training.png"))


@pytest.mark.slow
def test_what_the_budget_does_not_allow_is_named(tmp_path):
    results = accelerator(tmp_path, 25)
    assert set(results["seconds"]) == PARTS
    assert "other batches" in results["left out"]
    assert "Left out: " in (tmp_path / "accelerator.md").read_text()
