"""What each part of the improved recipe is worth: Frechet distance after short runs, over seeds. Goes on where it stopped.

python benchmarks/ablation.py --out ablation.jsonl
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import jax
import numpy as np
from tqdm import tqdm

import diffusion_jax as dj
from support import model
from support.classifier import trained_classifier
from support.config import IMPROVED, PRESETS, Config
from support.data import load_dataset
from support.distances import frechet_distance
from support.judging import to_bytes
from support.machine import prepare_machine

CALLS, BATCH = 20, 250
ROWS = {
    "published": {},
    "improved": IMPROVED,
    "improved, without min-SNR weights": IMPROVED | {"loss_weighting": "none"},
    "improved, at learning rate 1e-3": IMPROVED | {"learning_rate": 1e-3},
    "improved, without warm-up": IMPROVED | {"warmup": 0},
    "improved, sampled with an average": IMPROVED | {"ema_decay": 0.99},
    "improved, predicting v": IMPROVED | {"target_type": "pred_v"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="a .jsonl, a line a run")
    parser.add_argument("--data-dir")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--recipes", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="of the table's rows")
    args = parser.parse_args()
    prepare_machine()
    train, test = (load_dataset("mnist", args.data_dir, split) for split in ("train", "test"))
    classify, _ = trained_classifier(train, test)
    real = classify(train.images[np.random.default_rng(0).permutation(len(train.images))[: args.num_samples]]).features

    out = Path(args.out)
    budget = {"iterations": args.iterations, "num_samples": args.num_samples}
    runs = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = [run for run in runs if budget.items() <= run.items()]
    for seed in range(args.seeds):
        for name in args.recipes:
            if any((run["name"], run["seed"]) == (name, seed) for run in done):
                continue
            options = ROWS[name] | ({"warmup": args.iterations // 20} if ROWS[name].get("warmup") else {})
            base = {"embed_dim": 16, "batch_size": 64, "precision": "bfloat16", "iterations": args.iterations, "seed": seed}
            config = dataclasses.replace(PRESETS["paper"], **base, **options)
            loss, draw = trained(config, train)
            labels = model.labels_in_turn(config, BATCH)
            samples = np.concatenate([draw(labels, first) for first in range(0, args.num_samples, BATCH)])[: args.num_samples]
            distance = frechet_distance(real, classify(to_bytes(samples)).features)
            run = {"name": name, "seed": seed, **budget, "loss": loss, "distance": distance}
            done.append(run)
            with out.open("a") as file:
                print(json.dumps(run), file=file)
    print(as_table(done))


def trained(config: Config, data):
    """The mean loss of the last hundred iterations, and draw(labels, first)."""
    schedule = model.make_schedule(config)
    init_key, train_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
    state, step = model.initial_state(config, init_key), model.make_step(config, schedule, data, train_key)
    losses = []
    for number in tqdm(range(config.iterations)):
        state, metrics = step(state, number)
        losses.append(metrics["loss"])
    sampler, table = model.make_sampler(config, schedule), dj.dpm_solver_table(schedule, 1.0, CALLS)
    loss = float(np.mean(jax.device_get(losses[-100:])))
    return loss, lambda labels, first: sampler(state.ema_params, table, sample_key, labels, first)


def as_table(runs: list[dict]) -> str:
    lines = ["| recipe | Frechet distance of each seed | mean |", "|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        values = [run["distance"] for run in runs if run["name"] == name]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {each} | {statistics.mean(values):.1f}{spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
