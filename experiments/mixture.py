"""Diffuse a mixture of two Gaussians in the plane: T = 10 steps, a small MLP, under a minute on a CPU.

python experiments/mixture.py
"""

import dataclasses
import math
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command_line import one_line_errors, parse_command_line, require
from figures import save_mixture_figure, save_score_figure
from jaxtyping import Array, Float, Key
from loop import train_in
from machine import prepare_machine
from workdir import one_line_if_unwritable, open_workdir

import diffusion_jax as dj
from diffusion_jax.sampling import strided_timesteps

NUM_TIMESTEPS = 10
FAST_TIMESTEPS = 3
TARGET_TYPE = "pred_v"  # pred_eps would divide by sqrt(alpha_bar_T) = 0.005
NUM_SHOWN = 2000


@dataclasses.dataclass(frozen=True)
class Config:
    iterations: int = 2000
    batch_size: int = 512
    embed_dim: int = 32
    learning_rate: float = 2e-3
    ema_decay: float = 0.99
    seed: int = 0
    workdir: str = "runs/mixture"
    """Where the run is kept. The same command continues it."""
    checkpoint_every: int = 1000


def draw_mixture(key: Key[Array, ""]) -> Float[Array, " 2"]:
    """A point of 1/2 N((-5, 0), I) + 1/2 N((5, 0), I), divided by its standard deviations sqrt(26) and 1."""
    side_key, normal_key = jax.random.split(key)
    centre = jnp.array([5.0, 0.0]) * jax.random.rademacher(side_key, (1,), float)
    return (centre + jax.random.normal(normal_key, (2,))) / jnp.array([26**0.5, 1.0])


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        for name in ("iterations", "batch_size", "checkpoint_every"):
            require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
        require(0 < config.learning_rate < math.inf, "learning_rate", config.learning_rate, "positive and finite")
        require(0 <= config.ema_decay < 1, "ema_decay", config.ema_decay, "at least 0 and less than 1")
        require(0 <= config.seed < 2**31, "seed", config.seed, "between 0 and 2^31 - 1")
        schedule = dj.cosine_schedule(NUM_TIMESTEPS)
        table = dj.ancestral_table(schedule)
        fast_table = dj.ancestral_table(schedule, sampling_timesteps=FAST_TIMESTEPS)
        network = dj.MLP(in_dim=2, embed_dim=config.embed_dim)
        init_key, train_key, sample_key, data_key = jax.random.split(jax.random.key(config.seed), 4)
        params = jax.jit(network.init)(init_key, jnp.zeros((1, 2)), jnp.ones(1, jnp.int32))["params"]
        optimizer = dj.adam_with_cosine_decay(config.learning_rate, config.iterations)
        state = dj.create_train_state(network.apply, params, optimizer)
        workdir = open_workdir(config, may_differ={"workdir", "checkpoint_every"})

    def loss_fn(params, x_0, keys):
        return dj.diffusion_loss(schedule, partial(network.apply, {"params": params}), x_0, keys, TARGET_TYPE)

    @partial(jax.jit, donate_argnums=0)
    def step(state: dj.TrainState):
        keys = dj.example_keys(jax.random.fold_in(train_key, state.step), jnp.arange(config.batch_size))
        data_keys, loss_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        return dj.train_step(state, jax.vmap(draw_mixture)(data_keys), loss_keys, loss_fn=loss_fn, ema_decay=config.ema_decay)

    state = train_in(workdir, config, state, lambda state, _: step(state))

    def predict(x_t: Array, t: Array) -> Any:
        return network.apply({"params": state.ema_params}, x_t, t)

    denoise = dj.make_denoiser(schedule, predict, TARGET_TYPE)
    numbers = jnp.arange(NUM_SHOWN)
    data = jax.vmap(draw_mixture)(dj.example_keys(data_key, numbers))
    keys = dj.example_keys(sample_key, numbers)
    path = dj.sample_trajectory(denoise, table, keys, (2,))
    fast_path = dj.sample_trajectory(denoise, fast_table, keys, (2,))

    grid = jnp.stack(jnp.meshgrid(jnp.linspace(-2.8, 2.8, 15), jnp.linspace(-2.8, 2.8, 15)), axis=-1).reshape(-1, 2)
    scores = []
    for t in range(1, NUM_TIMESTEPS + 1):  # score = -eps_hat / sqrt(1 - alpha_bar_t)  [Song et al. 2021]
        times = jnp.full(len(grid), t)
        eps_hat = dj.convert(schedule, predict(grid, times), grid, times, TARGET_TYPE, "pred_eps")
        scores.append(-eps_hat / schedule.sqrt_one_minus_alpha_bar[t])
    with one_line_if_unwritable(workdir):
        fast_times = strided_timesteps(NUM_TIMESTEPS, FAST_TIMESTEPS)[::-1]
        save_mixture_figure(workdir / "figure.png", np.asarray(data), np.asarray(path), np.asarray(fast_path), fast_times)
        save_score_figure(workdir / "score.png", np.asarray(grid), np.asarray(scores), np.asarray(path[1:]))
    print(f"wrote {workdir / 'figure.png'} and {workdir / 'score.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
