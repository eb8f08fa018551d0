"""What each part of the small recipe is worth: Frechet distances in every feature space. Continues where it stopped.

python benchmarks/ablation.py --out ablation.jsonl
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import jax
import numpy as np
from tqdm import tqdm

from support import model, objective
from support.config import PRESETS
from support.data import ImageData, load_dataset
from support.distances import frechet_distance
from support.feature_spaces import feature_spaces
from support.judging import to_bytes
from support.machine import prepare_machine, random_key
from support.saved_run import solver_table

SAMPLER, CALLS, BATCH = "unipc", 20, 250
ROWS = {
    "small": {},
    "with Adam at half the learning rate": {"optimizer": "adam", "learning_rate": 2e-3},
    "with half the learning rate": {"learning_rate": 2e-3},
    "with times uniform": {"time_density": "uniform", "stratified": False},
    "with min-SNR weights": {"loss_weighting": "min_snr"},
    "predicting x_0": {"target_type": "pred_x_0"},
    "predicting x_0, with min-SNR weights": {"target_type": "pred_x_0", "loss_weighting": "min_snr"},
    "without classes": {"conditional": False},
    "without patches, width 16": {"patch_size": 1, "embed_dim": 16, "dim_scales": (1, 2, 4, 8)},
    "published, width 16": {"patch_size": 1, "embed_dim": 16, "dim_scales": (1, 2, 4, 8), "optimizer": "adam"}
    | {"learning_rate": 1e-3, "warmup": 0, "time_density": "uniform", "stratified": False, "conditional": False}
    | {"target_type": "pred_x_0"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="a .jsonl, a line a run")
    parser.add_argument("--data-dir")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--recipes", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="of the table's rows")
    args = parser.parse_args()
    prepare_machine()
    train, test = (load_dataset("mnist", args.data_dir, split) for split in ("train", "test"))
    describe, _ = feature_spaces(train, test)
    real, _ = describe(train.images[np.random.default_rng(0).permutation(len(train.images))[: args.num_samples]])

    out = Path(args.out)
    runs = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = []
    for seed in range(args.seeds):
        for name in args.recipes:
            config = dataclasses.replace(
                PRESETS["small"], precision="bfloat16", iterations=args.iterations, seed=seed, **ROWS[name]
            )
            run = {
                "num_samples": args.num_samples,
                "sampler": SAMPLER,
                "calls": CALLS,
                "config": json.loads(json.dumps(dataclasses.asdict(config))),
            }
            known = next((known for known in runs if run.items() <= known.items()), None)
            if known is None:
                samples, seconds = trained_samples(config, train, args.num_samples)
                features, _ = describe(to_bytes(samples, test))
                distances = {space: frechet_distance(real[space], features[space]) for space in features}
                known = {"name": name, **run, "seconds": seconds, "distances": distances}
                with out.open("a") as file:
                    print(json.dumps(known), file=file)
            done.append(known | {"name": name})
    print(as_table(done))


def trained_samples(config, train: ImageData, count: int) -> tuple[np.ndarray, float]:
    """Samples after the whole training, and the seconds of its steps but the first."""
    schedule = model.make_schedule(config)
    init_key, train_key, sample_key = jax.random.split(random_key(config.seed), 3)
    state, step = model.initial_state(config, init_key), objective.make_step(config, schedule, train, train_key)
    for number in tqdm(range(config.iterations)):
        state, metrics = step(state, number)
        if number == 0:
            jax.block_until_ready(metrics)
            start = time.perf_counter()
    jax.block_until_ready(metrics)
    seconds = time.perf_counter() - start
    sampler, table = model.make_sampler(config, schedule), solver_table(SAMPLER, schedule, CALLS)
    labels = np.resize(model.random_labels(config, train, count, config.seed), -(-count // BATCH) * BATCH)
    samples = [
        sampler(state.ema_params, table, sample_key, labels[first : first + BATCH], first) for first in range(0, count, BATCH)
    ]
    return np.concatenate(samples)[:count], seconds


def as_table(runs: list[dict]) -> str:
    """Mean and deviation over the seeds."""
    spaces = list(runs[0]["distances"])
    lines = [f"| recipe | seeds | s | {' | '.join(spaces)} |", "|---" * (3 + len(spaces)) + "|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        those = [run for run in runs if run["name"] == name]
        columns = [[run["distances"][space] for run in those] for space in spaces]
        spread = [f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "" for values in columns]
        cells = [f"{statistics.mean(values):.3g}{error}" for values, error in zip(columns, spread, strict=True)]
        seconds = statistics.mean(run["seconds"] for run in those)
        lines.append(f"| {name} | {len(those)} | {seconds:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
