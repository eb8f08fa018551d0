"""Training steps on batches of a data set that stays on the devices, or in a file."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

import diffusion_jax as dj
from diffusion_jax.training import replicate
from support.arrays import RowsOnDisk


def make_step(
    loss_fn: Callable, data: PyTree, key: Key[Array, ""], seed: int, batch_size: int, ema_decay: float
) -> Callable[[dj.TrainState, int], tuple[dj.TrainState, dict[str, Array]]]:
    """step(state, number) -> (state, metrics), on all devices. A batch is rows of the arrays `data`, shuffled by `seed`.

    The devices keep the arrays. If some are in a file, the host reads the rows of each batch, and passes only these.
    """
    in_a_file = any(isinstance(x, RowsOnDisk) for x in jax.tree.leaves(data))
    data = data if in_a_file else replicate(data, jax.devices())
    step = training_step(loss_fn, key, batch_size, ema_decay)
    compiled = dj.over_devices(step, (None, None, 0, 0), None, jax.devices(), donate_argnums=(0,))
    count, examples = len(jax.tree.leaves(data)[0]), jnp.arange(batch_size, dtype=jnp.int32)

    def numbered_step(state, number):
        indices = batch_indices(seed, number, batch_size, count)
        if in_a_file:
            return compiled(state, jax.tree.map(lambda x: x[indices], data), examples, examples)
        return compiled(state, data, indices, examples)

    return numbered_step


def training_step(loss_fn: Callable, key: Key[Array, ""], batch_size: int, ema_decay: float) -> Callable:
    """step(state, data, indices, examples, mean_over_devices) -> (state, metrics).

    `loss_fn(params, (rows, u), keys)` gets the rows of `data` at `indices`, a key for each row, and numbers u in [0, 1), evenly
    spaced over the batch.
    """

    def step(state, data, indices, examples, mean_over_devices):
        step_key = jax.random.fold_in(key, state.step)
        keys = dj.example_keys(step_key, examples)
        first = jax.random.uniform(jax.random.fold_in(step_key, 3), (), jnp.float32)
        u = (first + examples / jnp.float32(batch_size)) % 1
        rows = jax.tree.map(lambda x: x[indices], data)
        return dj.train_step(state, (rows, u), keys, loss_fn=loss_fn, ema_decay=ema_decay, mean_over_devices=mean_over_devices)

    return step


def uniform(keys: Key[Array, " B"], number: int) -> Float[Array, " B"]:
    """A uniform number in [0, 1) for each key. Each `number` gives an independent one."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number), (), jnp.float32))(keys)


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> Int[np.ndarray, " batch_size"]:
    """Indices of the batch of `step`. Each epoch is a permutation that depends on (seed, epoch) alone.

    Raises ValueError where there are no examples.
    """
    if num_examples < 1:
        raise ValueError(f"a batch needs at least 1 example to choose from, got {num_examples}")
    epochs, offsets = np.divmod(step * batch_size + np.arange(batch_size), num_examples)
    indices = np.empty(batch_size, np.int32)
    for epoch in np.unique(epochs):
        indices[epochs == epoch] = _permutation(seed, int(epoch), num_examples)[offsets[epochs == epoch]]
    return indices


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
