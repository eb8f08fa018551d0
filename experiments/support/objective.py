"""What a run trains on: the loss of each loss_type, and the step that takes its gradient."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Key, PyTree
from tqdm import tqdm

import diffusion_jax as dj
from diffusion_jax.flow_map import adaptively_weighted, guided_velocity, jump_target, mean_flow_loss
from diffusion_jax.losses import draw_times, time_density
from support import batches, model
from support.batches import uniform
from support.config import Config
from support.data import ImageData, to_model_input
from support.saved_run import solver_table

INSTANTANEOUS = 0.5  # fraction of the examples of a mean_flow run with s = t
TRAJECTORIES, CALLS, BATCH = 8192, 12, 256  # of a distilled run's teacher; 12 has the times of 1, 2, 3, 4 and 6 calls


def make_step(
    config: Config, schedule: dj.NoiseSchedule, data: ImageData, key: Key[Array, ""], initial: PyTree = None
) -> Callable:
    """step(state, number) -> (state, metrics), on all devices; see `batches.make_step`.

    A distilled run does not train on `data` but on trajectories, computed at its first step, of the network with its `initial`
    parameters.
    """

    @cache
    def compiled() -> Callable:
        if config.distilled:
            loss = make_distilled_loss(config, schedule)
            arrays = trajectories(config, schedule, initial, jax.random.fold_in(key, config.iterations))  # no step has this key
        else:
            make = make_mean_flow_loss if config.loss_type == "mean_flow" else make_loss
            loss, arrays = make(config, schedule), (data.images, data.labels.astype(np.int32))
        return batches.make_step(loss, arrays, key, config.seed, config.batch_size, config.ema_decay)

    return lambda state, number: compiled()(state, number)


def make_loss(config: Config, schedule: dj.NoiseSchedule) -> Callable:
    """loss_fn(params, ((images, labels), u), keys) -> the loss of each example. u determines t if the run is stratified."""
    weight = dj.min_snr_weight(schedule, config.target_type) if config.loss_weighting == "min_snr" else None
    hybrid = config.loss_type == "hybrid"  # the bound within this loss is right for uniform t only
    loss = dj.hybrid_loss if hybrid else partial(dj.diffusion_loss, loss_type=config.loss_type)
    drawn_by_keys = hybrid or (config.time_density == "uniform" and not config.stratified)
    probabilities = time_density(schedule, config.time_density)

    def loss_fn(params, batch, keys):
        (images, labels), u = batch
        x_0 = to_model_input(images, config.image_size)
        predict = model.apply_to(config, schedule, params, with_dropout(config, labels, keys))
        if config.loss_type == "bound":
            return dj.bound_loss(schedule, predict, x_0, keys, config.target_type)
        if not config.stratified:
            u = uniform(keys, 3)
        t = None if drawn_by_keys else draw_times(probabilities, u)
        return loss(schedule, predict, x_0, keys, config.target_type, weight=weight, t=t)

    return loss_fn


def make_mean_flow_loss(config: Config, schedule: dj.NoiseSchedule) -> Callable:
    """As `make_loss`. t is the larger of two times; s = t for half of the examples, otherwise one below the smaller time."""
    probabilities = time_density(schedule, config.time_density)

    def loss_fn(params, batch, keys):
        (images, labels), u = batch
        x_0 = to_model_input(images, config.image_size)
        network = model.two_times(config, schedule, params, with_dropout(config, labels, keys))
        first, second = (draw_times(probabilities, v) for v in (u if config.stratified else uniform(keys, 3), uniform(keys, 4)))
        t = jnp.maximum(first, second)
        s = jnp.where(uniform(keys, 5) < INSTANTANEOUS, t, jnp.minimum(first, second) - 1)
        eps = jax.vmap(lambda key: jax.random.normal(key, model.image_shape(config), jnp.float32))(keys)
        velocity = None
        if config.training_guidance != 1:
            velocity = guided_velocity(model.two_times(config, schedule, params, None), config.training_guidance)
        return mean_flow_loss(config.num_timesteps, network, x_0, t, s, eps, velocity)

    return loss_fn


def make_distilled_loss(config: Config, schedule: dj.NoiseSchedule) -> Callable:
    """loss_fn(params, ((paths, labels), u), keys) -> the loss of each example, for two points of each of the `trajectories`.

    The loss is the squared error of x_0_hat for any target, and the gradient of each example is weighted as in MeanFlow. For at
    least a third of the examples the first point is the noise, and for at least a third the second is the sample.
    """
    times = jnp.asarray(np.append(0.0, teacher_table(schedule).t[::-1]), jnp.float32)
    last = len(times) - 1

    def loss_fn(params, batch, keys):
        (paths, labels), u = batch
        start = last - (zero_for_a_third(u) * last).astype(jnp.int32)
        stop = (zero_for_a_third(uniform(keys, 4)) * start).astype(jnp.int32)
        x_t, x_s = (paths[jnp.arange(len(paths)), row].astype(jnp.float32) for row in (start, stop))
        target = jump_target(schedule, x_t, times[start], x_s, times[stop])
        prediction = model.two_times(config, schedule, params, labels)(x_t, times[start], times[stop])
        x_0_hat = dj.convert(schedule, prediction, x_t, times[start], config.target_type, "pred_x_0")
        return adaptively_weighted((x_0_hat - target) ** 2)

    return loss_fn


def trajectories(
    config: Config, schedule: dj.NoiseSchedule, params: PyTree, key: Key[Array, ""]
) -> tuple[Float16[np.ndarray, "N K H W C"], Int[np.ndarray, " N"]]:
    """Paths of the teacher's probability flow, from x_0 to noise, and their labels. The teacher is the network of one time."""
    count = min(TRAJECTORIES, config.iterations * config.batch_size)
    teacher, table = dataclasses.replace(config, loss_type="l2"), teacher_table(schedule)
    draw = model.make_sampler(teacher, schedule, dj.sample_trajectory, config.training_guidance)
    classes = np.arange(count) % (config.num_classes + 1) if config.conditional else np.full(count, config.num_classes)
    firsts = tqdm(range(0, count, BATCH), "trajectories", unit="batch")
    parts = [draw(params, table, key, classes[i : i + BATCH], i).swapaxes(0, 1).astype(np.float16) for i in firsts]
    return np.concatenate(parts), classes.astype(np.int32)


def teacher_table(schedule: dj.NoiseSchedule) -> dj.SamplerTable:
    return solver_table("unipc", schedule, min(CALLS, schedule.num_timesteps))


def zero_for_a_third(u: Float[Array, " B"]) -> Float[Array, " B"]:
    """Map a uniform u to 0 if u < 1/3, otherwise to uniform on [0, 1)."""
    return jnp.maximum(0.0, (3 * u - 1) / 2)


def with_dropout(config: Config, labels: Int[Array, " B"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """The labels, or with the probability `config.label_dropout` `config.num_classes`, which means no class."""
    return jnp.where(uniform(keys, 2) < config.label_dropout, config.num_classes, labels)
