"""Diffuse a mixture of two Gaussians in the plane: T = 10 steps, a small MLP, under a minute on a CPU.

The network is told the log-SNR and not t, so it samples along rectified flow as well, which it was not trained on.

python experiments/mixture.py
"""

import support.terminal  # isort: skip  # noqa: F401

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

import diffusion_jax as dj
from diffusion_jax.diffusion import edm_target
from diffusion_jax.sampling import strided_timesteps
from support import vectors
from support.command_line import one_line_errors, parse_command_line
from support.figures import save_mixture_figure, save_paths_figure, save_score_figure
from support.machine import prepare_machine
from support.workdir import one_line_if_unwritable

NUM_TIMESTEPS = 10
FAST_TIMESTEPS = 3
TARGET_TYPE = partial(edm_target, sigma_data=1.0)  # minus v; pred_eps would divide by a signal of 0.005 at t = T
NUM_SHOWN = 2000


def draw_mixture(key: Key[Array, ""]) -> Float[Array, " 2"]:
    """A point of 1/2 N((-5, 0), I) + 1/2 N((5, 0), I), divided by its standard deviations sqrt(26) and 1."""
    side_key, normal_key = jax.random.split(key)
    right = jax.random.bernoulli(side_key, jnp.float32(0.5), (1,))
    centre = jnp.array([5, 0], jnp.float32) * jnp.where(right, 1, -1)
    return (centre + jax.random.normal(normal_key, (2,), jnp.float32)) / jnp.array([26**0.5, 1], jnp.float32)


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(vectors.Config(workdir="runs/mixture"), __doc__)
        schedule = dj.cosine_schedule(NUM_TIMESTEPS)
        table = dj.ancestral_table(schedule)
        fast_table = dj.ancestral_table(schedule, sampling_timesteps=FAST_TIMESTEPS)
        workdir, train = vectors.set_up(config, draw_mixture, schedule, TARGET_TYPE, time="log_snr")

    network = train()
    predict = dj.normalized(schedule, network, "log_snr")
    denoise = dj.make_denoiser(schedule, predict, TARGET_TYPE)
    data, keys = vectors.examples(config, draw_mixture, NUM_SHOWN)
    path = dj.sample_trajectory(denoise, table, keys, (2,))
    fast_path = dj.sample_trajectory(denoise, fast_table, keys, (2,))

    flow = dj.flow_schedule(NUM_TIMESTEPS)
    flow_denoise = dj.make_denoiser(flow, dj.normalized(flow, network, "log_snr"), TARGET_TYPE)
    flow_path = dj.sample_trajectory(flow_denoise, dj.ancestral_table(flow), keys, (2,))

    side = jnp.linspace(-2.8, 2.8, 15, dtype=jnp.float32)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    scores = []
    for t in range(1, NUM_TIMESTEPS + 1):  # score = -eps_hat / noise_t  [Song et al. 2021]
        times = jnp.full(len(grid), t)
        eps_hat = dj.convert(schedule, predict(grid, times), grid, times, TARGET_TYPE, "pred_eps")
        scores.append(-eps_hat / schedule.noise[t])
    with one_line_if_unwritable(workdir):
        fast_times = strided_timesteps(NUM_TIMESTEPS, FAST_TIMESTEPS)[::-1]
        save_mixture_figure(workdir / "figure.png", np.asarray(data), np.asarray(path), np.asarray(fast_path), fast_times)
        save_score_figure(workdir / "score.png", np.asarray(grid), np.asarray(scores), np.asarray(path[1:]))
        save_paths_figure(workdir / "paths.png", {"cosine": np.asarray(path), "rectified flow": np.asarray(flow_path)})
    print(f"wrote figure.png, score.png and paths.png in {workdir}", file=sys.stderr)


if __name__ == "__main__":
    main()
