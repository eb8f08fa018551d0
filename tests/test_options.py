"""The scripts' options for paths, targets, times and samplers, in one process: a step of training, and samples."""

import dataclasses
import json
from typing import get_args

import jax
import jax.numpy as jnp
import mixture
import mnist
import numpy as np
import pytest
import vectors
from edit import SAMPLERS_FOR, interpolate
from saved_run import Sampler, run_config, solver_table

import diffusion_jax as dj

CONFIG = mnist.Config(embed_dim=4, dim_scales=(1,), batch_size=8, num_timesteps=12, iterations=8)
COMBINATIONS = [
    ("flow", "pred_u", "t", "logit_normal", True, "dit"),
    ("ve", "edm", "log_snr", "log_normal", False, "unet"),
]


@pytest.mark.parametrize(("path", "target_type", "time_input", "density", "stratified", "network"), COMBINATIONS)
def test_a_step_and_samples_on_every_path(path, target_type, time_input, density, stratified, network):
    config = dataclasses.replace(
        CONFIG,
        noise_schedule_type=path,
        target_type=target_type,
        time_input=time_input,
        time_density=density,
        stratified=stratified,
        network=network,
    )
    mnist.check(config)
    schedule, state = mnist.make_schedule(config), mnist.initial_state(config, jax.random.key(0))
    step = jax.jit(mnist.training_step(config, schedule, jax.random.key(1)), static_argnames="mean_over_devices")
    images, examples = jnp.full((8, 28, 28, 1), 200, jnp.uint8), jnp.arange(8, dtype=jnp.int32)
    trained, metrics = step(state, images, examples, examples, examples, mean_over_devices=same)
    assert np.isfinite(metrics["loss"])
    assert 0.1 < metrics["loss"] < 10  # the network begins at 0, and every target has about unit variance

    @jax.jit
    def draw(params, table):
        denoise = mnist.make_denoiser(config, schedule, params)
        return dj.sample(denoise, table, jax.random.split(jax.random.key(2)), mnist.IMAGE_SHAPE)

    for sampler in get_args(Sampler):
        for spacing in ("time", "log_snr"):
            table = solver_table(sampler, schedule, 5, spacing)
            assert len(table.t) == 5 or (sampler == "heun" and len(table.t) >= 3)  # not every step is corrected
            assert np.abs(draw(trained.params, dj.padded(table, 5))).max() <= 1.0001


def same(tree):
    return tree


def test_stratified_times_are_spread_evenly_and_the_others_are_not():
    keys, examples = jax.random.split(jax.random.key(0), 400), jnp.arange(400)
    spread, drawn = (
        np.sort(
            mnist.time_quantiles(jax.random.key(1), keys, examples, dataclasses.replace(CONFIG, batch_size=400, stratified=way))
        )
        for way in (True, False)
    )
    assert (spread.min() >= 0, spread.max() < 1) == (True, True)
    np.testing.assert_allclose(np.diff(spread), 1 / 400, atol=1e-6)
    assert np.diff(drawn).max() > 4 / 400


def test_a_run_of_an_older_version_is_read_as_what_it_was(tmp_path):
    saved = dataclasses.asdict(CONFIG)
    for name in ("time_input", "time_density", "stratified", "network", "depth", "patch_size"):
        del saved[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert run_config(tmp_path) == CONFIG
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in saved.items() if name != "seed"}))
    with pytest.raises(ValueError, match=r"config\.json differs in seed"):
        run_config(tmp_path)


@pytest.mark.parametrize("sampler", SAMPLERS_FOR["interpolate"])
def test_images_come_back_from_their_noise_by_every_solver_without_noise(sampler):
    """For one point x_0 as the data, encoding and any solver are exact."""
    schedule, x_0 = dj.cosine_schedule(20), jnp.full((2, 4, 4, 1), 0.3)

    def draw(table, count, start):
        answer = lambda x_t, t: jnp.full_like(x_t, 0.3)  # noqa: E731
        return dj.sample(answer, table, jax.random.split(jax.random.key(0), count), (4, 4, 1), start)

    columns = interpolate(draw, schedule, solver_table(sampler, schedule, 9), x_0, jax.random.key(0))
    np.testing.assert_allclose(columns[1], x_0, atol=1e-5)


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_more_calls_than_timesteps_are_refused(sampler):
    with pytest.raises(ValueError, match="--sampling-timesteps must be between 1 and num_timesteps = 20, got 30"):
        solver_table(sampler, dj.cosine_schedule(20), 30)


def test_a_run_whose_network_was_told_t_is_not_taken_for_one_that_is_told_the_log_snr(tmp_path):
    config = mixture.Config(workdir=str(tmp_path))
    old = dataclasses.asdict(config) | {"data": "draw_mixture"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="time_input t, and this command has log_snr"):
        vectors.set_up(config, mixture.draw_mixture, dj.cosine_schedule(10), mixture.TARGET_TYPE, time="log_snr")
