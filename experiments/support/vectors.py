"""Train a small MLP on vectors that a function draws; what mixture.py and coins.py have in common."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

import diffusion_jax as dj
from diffusion_jax.diffusion import Target
from support.batches import uniform
from support.loop import train_in
from support.machine import random_key
from support.workdir import open_workdir


@dataclasses.dataclass(frozen=True)
class Config:
    iterations: int = 2000
    """Number of training steps."""
    batch_size: int = 512
    """Vectors in a training step."""
    embed_dim: int = 32
    """Width of the network's layers."""
    learning_rate: float = 2e-3
    """Learning rate at the start of its cosine decay."""
    ema_decay: float = 0.99
    """Decay of the parameters' moving average, which is used for sampling; 0 uses the last parameters."""
    seed: int = 0
    """Random seed."""
    workdir: str = "runs/vectors"
    """Folder of the run. Repeat the command to continue it."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""


def set_up(
    config: Config,
    draw: Callable[[Key[Array, ""]], Float[Array, " d"]],
    schedule: dj.NoiseSchedule,
    target_type: Target,
    time: str = "t",
) -> tuple[Path, Callable[[], Callable[[Array, Array], Array]]]:
    """The run's folder, and train() -> the network with the averaged parameters; `draw(key)` is one vector of the data.

    A network that is told the log-SNR is trained at real times, between the rows of the schedule too.
    """
    dim = draw(random_key(0)).shape[0]
    network = dj.MLP(dim, config.embed_dim)
    init_key, train_key = jax.random.split(random_key(config.seed), 4)[:2]
    params = jax.jit(network.init)(init_key, jnp.zeros((1, dim), jnp.float32), jnp.ones(1, jnp.int32))["params"]
    optimizer = dj.adam_with_cosine_decay(config.learning_rate, config.iterations)
    state = dj.create_train_state(network.apply, params, optimizer)
    workdir = open_workdir(config, may_differ={"workdir", "checkpoint_every"}, data=draw.__name__, time_input=time)

    def loss_fn(params, x_0, keys):
        predict = dj.normalized(schedule, partial(network.apply, {"params": params}), time)
        t = schedule.num_timesteps * uniform(keys, 2) if time == "log_snr" else None
        return dj.diffusion_loss(schedule, predict, x_0, keys, target_type, t=t)

    @partial(jax.jit, donate_argnums=0)
    def step(state: dj.TrainState):
        keys = dj.example_keys(jax.random.fold_in(train_key, state.step), jnp.arange(config.batch_size))
        data_keys, loss_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        return dj.train_step(state, jax.vmap(draw)(data_keys), loss_keys, loss_fn=loss_fn, ema_decay=config.ema_decay)

    def train() -> Callable[[Array, Array], Array]:
        trained = train_in(workdir, config, state, lambda state, _: step(state))
        return partial(network.apply, {"params": trained.ema_params})  # pyright: ignore[reportReturnType]

    return workdir, train


def examples(config: Config, draw: Callable, count: int) -> tuple[Float[Array, "count d"], Key[Array, " count"]]:
    """Vectors of the data that no step has seen, and a key for each sample."""
    sample_key, data_key = jax.random.split(random_key(config.seed), 4)[2:]
    return jax.vmap(draw)(dj.example_keys(data_key, jnp.arange(count))), dj.example_keys(sample_key, jnp.arange(count))
