"""Train DDPM on MNIST or other images, then draw real ones beside samples on their way from noise to image.

python experiments/mnist.py                         # sized for this machine
python experiments/mnist.py --preset paper          # the published recipe
python experiments/mnist.py --dataset ~/pictures    # a folder of your own, also a .npy, .npz or data set of TFDS
"""

import support.terminal  # isort: skip  # noqa: F401

import os

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import diffusion_jax as dj
from support import model, objective
from support.data import to_model_input
from support.image_run import ImageRun, set_up
from support.loop import train_in, write_once
from support.pictures import grid, save_animation


def main() -> None:
    run = set_up(__doc__)
    config, schedule = run.config, run.schedule
    step = objective.make_step(config, schedule, run.data, run.train_key, run.state.params)
    sampler, labels = model.make_sampler(config, schedule), model.labels_in_turn(config, config.num_samples)
    table = model.default_table(config, schedule, config.sampling_timesteps)
    preview_table = table if config.few_calls else model.default_table(config, schedule, min(50, config.num_timesteps))

    def preview(state: dj.TrainState) -> np.ndarray:
        return grid(sampler(state.ema_params, preview_table, run.sample_key, labels))

    state = train_in(run.workdir, config, run.state, step, preview)
    path = model.make_sampler(config, schedule, dj.sample_trajectory)(state.ema_params, table, run.sample_key, labels)
    write_once(run.workdir, lambda: save_figures(run, path))


def save_figures(run: ImageRun, path: Float[np.ndarray, "S N H W C"]) -> None:
    """Write figure.png, denoising.gif and training.png."""
    from support.figures import save_noise_figure, save_training_figure  # matplotlib would delay the first step

    workdir, config = run.workdir, run.config
    real = np.asarray(to_model_input(jnp.asarray(run.data.images[: config.num_samples]), config.image_size))
    save_noise_figure(workdir / "figure.png", real, path)
    save_animation(workdir / "denoising.gif", path)
    wrote = ["figure.png", "denoising.gif"]
    if os.path.getsize(workdir / "metrics.csv"):  # otherwise all rows were lost, and the loop has warned
        metrics = np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True, ndmin=1)
        decay = dj.cosine_decay(config.learning_rate, config.iterations, config.warmup)
        save_training_figure(workdir / "training.png", metrics, decay)
        wrote.append("training.png")
    print(f"wrote {', '.join(wrote)} in {workdir}")


if __name__ == "__main__":
    main()
