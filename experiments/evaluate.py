"""Compare the samples of a run of experiments/mnist.py, and test images, with training images in several feature spaces.

python experiments/evaluate.py --workdir runs/mnist

A conditional run draws the classes of random training images. evaluation.json and bound.png are written in the run's folder, or
in the current one for a network in a file.
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree
from tqdm import tqdm

import diffusion_jax as dj
from support import model
from support.command_line import one_line_errors, parse_command_line, require
from support.data import ImageData, to_model_input
from support.feature_spaces import feature_spaces
from support.figures import save_bound_figure
from support.judging import as_table, comparable, judge, to_bytes
from support.machine import prepare_machine, random_key
from support.saved_run import Sampling, SavedRun, check_denoises, check_guidance, open_run, sampler_table
from support.workdir import one_line_if_unwritable

FLOW_STEPS, FLOW_BATCH, CONVERGED = (32, 64, 128, 256, 512), 50, 0.01  # bits per dimension


@dataclasses.dataclass(frozen=True)
class Config(Sampling):
    data_dir: str | None = None
    """TFDS data directory, by default TFDS's own; for a run on a folder or file, where that is now."""
    num_samples: int = 10_000
    """Number of generated, training and test images to compare, at least 100 (fewer if the data set has fewer)."""
    bound_images: int = 20
    """Test images, 2 or more, for each t of the variational bound (ten times as many at t <= 10); 0 skips it."""
    likelihood_images: int = 0
    """Test images for the likelihood by the probability flow; 0 skips it."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        require(config.num_samples >= 100, "num_samples", config.num_samples, "at least 100")
        run = open_run(config.workdir)
        check_guidance(run, config.guidance_scale)
        if config.likelihood_images:
            check_denoises(run)
        table = sampler_table(config, run)
        train, test = comparable(run.load("train", config.data_dir)), run.load("test", config.data_dir)
        state = run.restore(config.checkpoint)
        judged = comparable(test)
        count = min(config.num_samples, len(judged.images), len(train.images))
        describe, accuracy = feature_spaces(train, judged)

    labels = model.random_labels(run.config, train, count, config.seed)
    samples = run.draw(state.ema_params, table, random_key(config.seed), labels, config.guidance_scale)
    results = {
        "workdir": run.workdir, "step": int(state.step), "calls": len(table.t),
        "sampler": config.sampler or run.default_sampler, "eta": config.eta,
        "seed": config.seed, "guidance_scale": config.guidance_scale, "classifier_accuracy": accuracy,
        **judge(to_bytes(samples, test), train, judged, describe, config.seed, labels if run.config.conditional else None),
    }  # fmt: skip
    bits = None
    if config.bound_images and not run.config.distilled:
        bits, results["bits_per_dim_error"] = bound(config, run, state.ema_params, test)
        results["bits_per_dim"] = float(bits.sum())
    with one_line_if_unwritable(run.results):
        (run.results / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
        if bits is not None:
            save_bound_figure(run.results / "bound.png", bits)
    if config.likelihood_images:
        results |= exact_likelihood(config, run, state.ema_params, test)
        with one_line_if_unwritable(run.results):
            (run.results / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    print(as_table(results))
    print(f"wrote {run.results / 'evaluation.json'}", file=sys.stderr)


def bound(config: Config, run: SavedRun, params: PyTree, data: ImageData) -> tuple[Float[np.ndarray, " T+1"], float]:
    """The terms L_0, ..., L_T of the variational bound and the standard error of their sum, in bits per dimension.

    Padding is not counted. Each term is estimated on test images drawn for it; conditional runs are given the class.
    """
    options, schedule = run.config, run.schedule
    # The bound of "zero" is infinite.
    sigma_type = "lower_bound" if options.sigma_type == "zero" else options.sigma_type
    key = random_key(config.seed)

    @jax.jit
    def term(params, images, labels, t, key):
        x_0, denoise = to_model_input(images, options.image_size), model.make_denoiser(options, schedule, params, labels)
        eps = jax.random.normal(key, x_0.shape, x_0.dtype)
        return dj.bound_bits(schedule, denoise, x_0, jnp.full(len(x_0), t), eps, sigma_type)

    rng, terms = np.random.default_rng(config.seed), []
    for t in tqdm(range(1, schedule.num_timesteps + 1), "bound", unit="t"):
        chosen = rng.integers(len(data.images), size=config.bound_images * (10 if t <= 10 else 1))
        terms.append(term(params, data.images[chosen], data.labels[chosen], t, jax.random.fold_in(key, t)))
    prior = dj.prior_bits(schedule, to_model_input(jnp.asarray(data.images[:1000]), options.image_size))
    terms = [np.asarray(bits, np.float64) / data.images[0].size for bits in (*terms, prior)]
    return np.array([bits.mean() for bits in terms]), float(np.sqrt(sum(bits.var(ddof=1) / len(bits) for bits in terms)))


def exact_likelihood(config: Config, run: SavedRun, params: PyTree, data: ImageData) -> dict[str, Any]:
    """Bits per dimension (without padding) by the probability flow, given the class in a conditional run.

    Doubles the number of steps until two results agree to within CONVERGED. Otherwise flow_bits_per_dim is None, with a message
    on stderr.
    """
    images, labels = data.images[: config.likelihood_images], data.labels[: config.likelihood_images]
    keys = dj.example_keys(random_key(config.seed), jnp.arange(len(images)))

    @partial(jax.jit, static_argnames="num_steps")
    def bits(params, images, labels, keys, num_steps):
        predict = model.apply_to(run.config, run.schedule, params, labels)
        denoise = dj.make_denoiser(run.schedule, predict, run.config.target_type)  # a clipped x_0_hat has no density
        return dj.flow_bits(run.schedule, denoise, to_model_input(images, run.config.image_size), keys, num_steps, probes=1)

    curve: dict[int, float] = {}
    for num_steps in tqdm(FLOW_STEPS, "likelihood", unit="curve point"):
        batches = [slice(first, first + FLOW_BATCH) for first in range(0, len(images), FLOW_BATCH)]
        each = [bits(params, images[b], labels[b], keys[b], num_steps) for b in batches]
        curve[num_steps] = float(np.concatenate(each).mean() / images[0].size)
        if num_steps > FLOW_STEPS[0] and abs(curve[num_steps] - curve[num_steps // 2]) < CONVERGED:
            return {"flow_bits_curve": curve, "flow_bits_per_dim": curve[num_steps]}
    print(f"flow_bits_per_dim has not converged to within {CONVERGED}: {curve}", file=sys.stderr)
    return {"flow_bits_curve": curve, "flow_bits_per_dim": None}


if __name__ == "__main__":
    main()
