"""Judge the samples of a run of experiments/mnist.py, beside real images that it has not seen.

python experiments/evaluate.py --workdir runs/mnist
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import mnist
import numpy as np
from classifier import trained_classifier
from command_line import one_line_errors, parse_command_line, require
from figures import save_bound_figure
from jaxtyping import Array, Float, UInt8
from machine import prepare_machine
from sample import draw_all, restored, run_config, sampler_table
from tqdm import tqdm
from workdir import one_line_if_unwritable

import diffusion_jax as dj
from diffusion_jax import evaluation
from diffusion_jax.data import load_dataset, to_model_input


@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = "runs/mnist"
    """The folder of the run; evaluation.json and bound.png are written there."""
    checkpoint: Literal["newest", "best"] = "newest"
    data_dir: str | None = None
    num_samples: int = 10_000
    """N, of generated images, of training images and of test images alike (fewer where there are fewer)."""
    sampling_timesteps: int | None = None
    """Network calls for each sample; by default 50, or all T of the run if they are fewer."""
    sampler: Literal["ancestral", "ddim", "dpm_solver"] = "ancestral"
    eta: float = 0.0
    """For ddim: 0 is deterministic, 1 has the noise of lower_bound ancestral sampling."""
    bound_images: int = 20
    """Test images at each t, for the variational bound, and ten times as many at t <= 10; 0 leaves it out."""
    seed: int = 0


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        require(config.num_samples >= 100, "num_samples", config.num_samples, "at least 100")
        require(config.bound_images >= 0, "bound_images", config.bound_images, "at least 0")
        require(0 <= config.seed < 2**31, "seed", config.seed, "between 0 and 2^31 - 1")
        run = run_config(config.workdir)
        schedule = mnist.SCHEDULES[run.noise_schedule_type](run.num_timesteps)
        if config.sampling_timesteps is None:
            config = dataclasses.replace(config, sampling_timesteps=min(50, run.num_timesteps))
        table = sampler_table(config, run, schedule)
        train, test = (load_dataset(run.dataset, config.data_dir, split) for split in ("train", "test"))
        state = restored(run, config.workdir, config.checkpoint)
        count = min(config.num_samples, len(test.images), len(train.images))
        classify, accuracy = trained_classifier(train, test)

    chosen = np.random.default_rng(config.seed).permutation(len(train.images))[:count]
    samples = draw_all(run, schedule, state, table, jax.random.key(config.seed), count)
    sets = {"generated": to_bytes(samples), "test": test.images[:count]}
    results = {
        "step": int(state.step), "images": count, "calls": len(table.t), "sampler": config.sampler, "seed": config.seed,
        "classifier_accuracy": accuracy,
    }  # fmt: skip
    features, labels = classify(train.images[chosen])
    for name, images in tqdm(sets.items(), "distances", unit="set"):
        results[name] = compare(classify(images), (features, labels), images, train.images)
    bits = None
    if config.bound_images:
        bits, results["bits_per_dim_error"] = bound(config, run, schedule, state, test.images)
        results["bits_per_dim"] = float(bits.sum())
    with one_line_if_unwritable(Path(config.workdir)):
        (Path(config.workdir) / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
        if bits is not None:
            save_bound_figure(Path(config.workdir) / "bound.png", bits)
    print(as_table(results))
    print(f"wrote {config.workdir}/evaluation.json", file=sys.stderr)


def to_bytes(samples: Float[np.ndarray, "N 32 32 1"]) -> UInt8[np.ndarray, "N 28 28 1"]:
    """Rounded to the 256 levels of real images, without the padding."""
    return np.rint(np.clip((samples[:, 2:30, 2:30] + 1) * 127.5, 0, 255)).astype(np.uint8)


def compare(ours: tuple, real: tuple, images: np.ndarray, training_images: np.ndarray) -> dict[str, float]:
    """Distances of one set of images from a set of training images, by the classifier's features, labels and pixels."""
    (features, labels), (real_features, real_labels) = ours, real
    precision, recall = evaluation.precision_and_recall(real_features, features)
    histogram, real_histogram = (np.bincount(x, minlength=10) / len(x) for x in (labels, real_labels))
    pixels, training_pixels = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (images[:1000], training_images))
    nearest = evaluation.nearest_squared_distances(pixels, training_pixels, 1)[:, 0]
    return {
        "frechet_distance": evaluation.frechet_distance(real_features, features),
        "kernel_distance": evaluation.kernel_distance(real_features, features),
        "precision": precision,
        "recall": recall,
        "class_distance": float(np.abs(histogram - real_histogram).sum() / 2),
        "nearest_training_image_median": float(np.median(np.sqrt(nearest))),
        "nearest_training_image_5_percent": float(np.quantile(np.sqrt(nearest), 0.05)),
    }


def bound(
    config: Config, run: mnist.Config, schedule: dj.NoiseSchedule, state: dj.TrainState, images: UInt8[np.ndarray, "N 28 28 1"]
) -> tuple[Float[np.ndarray, " T+1"], float]:
    """The terms of the variational bound, L_0, ..., L_{T-1} and L_T, and the standard error of their sum, by images drawn at
    random for each of them; in bits per dimension of a 28x28 image."""
    sigma_type = "lower_bound" if run.sigma_type == "zero" else run.sigma_type
    network = mnist.make_network(run)
    key = jax.random.key(config.seed)

    @jax.jit
    def term(params, x_0, t, key):
        denoise = dj.make_denoiser(schedule, lambda x, t: network.apply({"params": params}, x, t), run.target_type, clip=1.0)
        eps = jax.random.normal(key, x_0.shape)
        return evaluation.bound_bits(schedule, denoise, x_0, jnp.full(len(x_0), t), eps, sigma_type)

    rng, terms = np.random.default_rng(config.seed), []
    for t in tqdm(range(1, run.num_timesteps + 1), "bound", unit="t"):
        chosen = images[rng.integers(len(images), size=config.bound_images * (10 if t <= 10 else 1))]
        terms.append(term(state.ema_params, to_model_input(jnp.asarray(chosen)), t, jax.random.fold_in(key, t)))
    terms = [np.asarray(bits, np.float64) / images[0].size for bits in (*terms, prior_bits(schedule, images))]
    return np.array([bits.mean() for bits in terms]), float(np.sqrt(sum(bits.var() / len(bits) for bits in terms)))


def prior_bits(schedule: dj.NoiseSchedule, images: UInt8[np.ndarray, "N 28 28 1"]) -> Array:
    return evaluation.prior_bits(schedule, to_model_input(jnp.asarray(images[:1000])))


def as_table(results: dict) -> str:
    names = list(results["test"])
    lines = ["| | generated | test images |", "|---|---|---|"]
    lines += [
        f"| {name.replace('_', ' ')} | {results['generated'][name]:.4g} | {results['test'][name]:.4g} |" for name in names
    ]
    if "bits_per_dim" in results:
        lines.append(f"| bits per dimension, at most | | {results['bits_per_dim']:.3g} ± {results['bits_per_dim_error']:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
