"""The scripts' options for paths, targets, times and samplers, in one process: a step of training, and samples."""

import dataclasses
import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj
import mixture
from diffusion_jax.diffusion import look_up
from edit import SAMPLERS_FOR, interpolate
from support import model, objective, vectors
from support.batches import training_step
from support.config import Config, check
from support.data import ImageData
from support.saved_run import Sampler, open_run, solver_table
from support.workdir import ADDED

CONFIG = Config(network="dit", embed_dim=4, depth=1, patch_size=8, batch_size=8, num_timesteps=12, iterations=8)
IMAGES, EXAMPLES = jnp.full((8, 28, 28, 1), 200, jnp.uint8), jnp.arange(8, dtype=jnp.int32)


def make_step(config, schedule, make_loss):
    """step(state) -> (state, metrics) on IMAGES, each of the class of its number."""
    step = training_step(make_loss(config, schedule), jax.random.key(1), 8, 0.0)
    return jax.jit(lambda state: step(state, (IMAGES, EXAMPLES), EXAMPLES, EXAMPLES, lambda tree: tree))


COMBINATIONS = [
    ("flow", "pred_u", "t", "logit_normal", True, "dit"),
    ("ve", "edm", "log_snr", "log_normal", False, "dit"),
    pytest.param("linear", "pred_eps", "t", "uniform", False, "unet", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("path", "target_type", "time_input", "density", "stratified", "network"), COMBINATIONS)
def test_a_step_and_samples_by_every_solver(path, target_type, time_input, density, stratified, network):
    config = dataclasses.replace(
        CONFIG,
        noise_schedule_type=path,
        target_type=target_type,
        time_input=time_input,
        time_density=density,
        stratified=stratified,
        network=network,
        dim_scales=(1,),
    )
    check(config)
    schedule, state = model.make_schedule(config), model.initial_state(config, jax.random.key(0))
    trained, metrics = make_step(config, schedule, objective.make_loss)(state)
    assert np.isfinite(metrics["loss"])
    assert 0.1 < metrics["loss"] < 10  # the network begins at 0, and every target has about unit variance

    @jax.jit
    def draw(params, table):
        denoise = model.make_denoiser(config, schedule, params)
        return dj.sample(denoise, table, jax.random.split(jax.random.key(2)), model.image_shape(config))

    for sampler in get_args(Sampler):
        for spacing in ("time", "log_snr"):
            table = solver_table(sampler, schedule, 5, spacing)
            assert len(table.t) == 5 or (sampler == "heun" and len(table.t) >= 3)  # not every step is corrected
            assert np.abs(draw(trained.params, dj.padded(table, 5))).max() <= 1.0001


def test_a_mean_flow_run_trains_and_samples_by_jumps():
    options = {"noise_schedule_type": "flow", "target_type": "pred_u", "loss_type": "mean_flow", "training_guidance": 2.0}
    config = dataclasses.replace(CONFIG, conditional=True, learning_rate=0.03, **options)
    check(config)
    schedule, state = model.make_schedule(config), model.initial_state(config, jax.random.key(0))
    step = make_step(config, schedule, objective.make_mean_flow_loss)
    for _ in range(8):  # the layers begin at zero, so the first steps move the last ones only
        state, metrics = step(state)
        assert 0.1 < metrics["loss"] < np.inf
    network = jax.jit(model.two_times(config, schedule, state.ema_params, EXAMPLES))
    x_t, t = jax.random.normal(jax.random.key(2), (8, *model.image_shape(config))), jnp.full(8, 9.0)
    assert np.abs(network(x_t, t, 0 * t) - network(x_t, t, t)).max() > 1e-5
    draw, key = model.make_sampler(config, schedule), jax.random.key(3)
    for sampler, s in (("ddim", 6.0), ("consistency", 0.0)):
        table = solver_table(sampler, schedule, 2)
        predict = model.apply_to(config, schedule, state.ema_params, EXAMPLES, table)
        np.testing.assert_allclose(predict(x_t, 2 * table.t[1] + 0 * t), network(x_t, 12.0 + 0 * t, s + 0 * t), atol=1e-6)
        assert np.isfinite(draw(state.ema_params, table, key, np.arange(4))).all()


@pytest.mark.parametrize("target_type", ["pred_x_0", "pred_v"])
def test_a_distilled_run_learns_jumps_between_the_points_of_a_trajectory(monkeypatch, target_type):
    """All x_t = noise_t eps belong to the data 0, so v = signal_t eps."""
    config = dataclasses.replace(CONFIG, loss_type="distilled", init="a run", num_timesteps=500, target_type=target_type)
    check(config)
    schedule, seen = model.make_schedule(config), []

    def two_times(config, schedule, params, labels):
        np.testing.assert_array_equal(labels, np.arange(999))

        def network(x_t, t, s):
            seen.append((np.asarray(t), np.asarray(s)))
            signal, noise = (jnp.asarray(column, jnp.float32)[:, None, None, None] for column in schedule.at(t))
            np.testing.assert_allclose(x_t.std((1, 2, 3)), noise[:, 0, 0, 0], rtol=1e-3)
            return 0 * x_t if target_type == "pred_x_0" else signal / noise * x_t

        return network

    monkeypatch.setattr(model, "two_times", two_times)
    times = np.append(0, objective.teacher_table(schedule).t[::-1])
    image = np.random.default_rng(0).normal(size=(1, 1, 8, 8, 1))
    paths = np.repeat((schedule.at(times)[1][None, :, None, None, None] * image / image.std()).astype(np.float16), 999, 0)
    keys, u = jax.random.split(jax.random.key(0), 999), (np.arange(999, dtype=np.float32) + 0.5) / 999
    loss = objective.make_distilled_loss(config, schedule)({}, ((jnp.asarray(paths), jnp.arange(999)), u), keys)
    assert loss.shape == (999, 8, 8, 1)
    assert loss.max() < 1e-3
    t, s = seen[0]
    assert (s < t).all()
    assert set(np.float32(times)) == {*t, *s}
    assert (t == 500).sum() == pytest.approx(333 + 666 / 12, abs=1)  # a third, and a twelfth of the others
    assert 0.4 < (s == 0).mean() < 0.65


@pytest.mark.parametrize("target_type", ["pred_x_0", "pred_v"])
def test_the_gradient_of_a_distilled_run_is_weighted_by_each_examples_error(monkeypatch, target_type):
    """All points are 0, and so are the targets: the x_0_hat of a prediction w is w, or -noise w where w is v."""
    config = dataclasses.replace(CONFIG, loss_type="distilled", init="a run", num_timesteps=500, target_type=target_type)
    monkeypatch.setattr(model, "two_times", lambda config, schedule, params, labels: lambda x_t, t, s: params + x_t)
    schedule = model.make_schedule(config)
    loss = objective.make_distilled_loss(config, schedule)
    batch = (jnp.zeros((1, 13, 8, 8, 1), jnp.float16), jnp.zeros(1, int)), jnp.array([0.5])
    value, gradient = jax.value_and_grad(lambda w: loss(w, batch, jax.random.split(jax.random.key(0), 1)).mean())(0.1)
    start = objective.teacher_table(schedule).t[::-1][8]  # u = 0.5 is spread to 0.25: three of the twelve points below T
    square = 1 if target_type == "pred_x_0" else float(schedule.at(np.array([start]))[1][0]) ** 2
    np.testing.assert_allclose([value, gradient], [0.01 * square, 0.2 * square / (0.01 * square + 1e-3)], rtol=1e-5)


def test_runs_are_judged_with_the_classes_of_random_images():
    digits = ImageData("digits", np.zeros((100, 8, 8, 1), np.uint8), np.repeat([3, 5], [90, 10]).astype(np.int32))
    labels = model.random_labels(dataclasses.replace(CONFIG, conditional=True), digits, 10_000, 0)
    assert set(labels) == {3, 5}
    assert np.mean(labels == 3) == pytest.approx(0.9, abs=0.015)
    np.testing.assert_array_equal(model.random_labels(CONFIG, digits, 4, 0), [10] * 4)


def test_trajectories_are_the_samples_of_the_teacher_and_the_way_to_them():
    config = dataclasses.replace(CONFIG, loss_type="distilled", init="a run", conditional=True)
    teacher = dataclasses.replace(config, loss_type="l2")
    schedule, params = model.make_schedule(config), model.initial_state(teacher, jax.random.key(0)).params
    paths, labels = objective.trajectories(config, schedule, params, jax.random.key(1))
    assert paths.shape == (64, 13, 32, 32, 1)
    np.testing.assert_array_equal(labels[:13], [*range(11), 0, 1])
    draw, table = model.make_sampler(teacher, schedule), objective.teacher_table(schedule)
    samples = draw(params, table, jax.random.key(1), labels)
    np.testing.assert_allclose(np.clip(paths[:, 0], -1, 1), samples, atol=2e-3)
    assert 0.98 < paths[:, -1].astype(np.float32).std() < 1.02


@pytest.mark.parametrize(
    ("path", "target_type", "network"),
    [pytest.param("cosine", "pred_v", "unet", marks=pytest.mark.slow), ("flow", "pred_u", "dit"), ("ve", "edm", "dit")],
)
def test_a_distilled_network_begins_as_its_teacher(path, target_type, network):
    teacher = dataclasses.replace(CONFIG, noise_schedule_type=path, target_type=target_type, network=network, dim_scales=(1,))
    config = dataclasses.replace(teacher, loss_type="distilled", init="a run")
    schedule, keys = model.make_schedule(config), iter(jax.random.split(jax.random.key(0), 99))
    learned = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), model.initial_state(teacher, next(keys)).params
    )
    params = {**model.initial_state(config, next(keys)).params, **learned}
    x_t, t = 5 * jax.random.normal(next(keys), (3, 32, 32, 1)), jnp.array([1.0, 6.0, 12.0])
    expected = jax.jit(model.apply_to(teacher, schedule, learned, None))(x_t, t)
    assert jnp.abs(expected).min() > 1e-6
    network = jax.jit(model.two_times(config, schedule, params, None))
    for s in (0 * t, t - 1):
        np.testing.assert_allclose(network(x_t, t, s), expected, rtol=1e-5, atol=1e-6)


def test_few_calls_take_only_steps_of_the_grid_that_they_were_learned_on():
    schedule = dj.cosine_schedule(500)
    grid = np.append(objective.teacher_table(schedule).t, 0)
    for calls in (1, 2, 3, 4, 6):
        table = model.default_table(dataclasses.replace(CONFIG, loss_type="distilled"), schedule, calls)
        assert len(table.t) == calls
        assert all(np.abs(grid - t).min() < 1e-6 for t in table.t)


def test_a_step_gives_the_loss_numbers_that_are_spread_evenly():
    seen = []

    def loss_fn(params, batch, keys):
        seen.append(np.sort(batch[1]))
        return params["w"] * batch[0]

    state = dj.create_train_state(lambda: None, {"w": jnp.ones(())}, dj.adam_with_cosine_decay(1e-3, 8))
    examples = jnp.arange(400)
    for seed in range(3):
        training_step(loss_fn, jax.random.key(seed), 400, 0.0)(state, jnp.ones(400), examples, examples, lambda tree: tree)
    for u in seen:
        assert (u.min() >= 0, u.max() < 1) == (True, True)
        np.testing.assert_allclose(np.diff(u), 1 / 400, atol=1e-6)
    assert len({float(u[0]) for u in seen}) == 3


@pytest.mark.parametrize("stratified", [True, False])
def test_times_depend_on_these_numbers_only_if_stratified(stratified):
    config = dataclasses.replace(CONFIG, stratified=stratified, target_type="pred_v")  # a target that depends on t
    loss_fn = objective.make_loss(config, model.make_schedule(config))
    params = model.initial_state(config, jax.random.key(0)).params
    keys = jax.random.split(jax.random.key(1), 8)
    early, late = (loss_fn(params, ((IMAGES, EXAMPLES), jnp.full(8, u)), keys) for u in (0.1, 0.9))
    assert np.array_equal(early, late) != stratified


def test_a_run_of_an_older_version_is_read_as_what_it_was(tmp_path):
    config = dataclasses.replace(CONFIG, **{name: ADDED[name] for name in ("network", "depth", "patch_size")})
    saved = dataclasses.asdict(config)
    for name in ADDED:
        del saved[name]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert open_run(tmp_path).config == config
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in saved.items() if name != "seed"}))
    with pytest.raises(ValueError, match=r"config\.json differs in seed"):
        open_run(tmp_path)


def test_images_come_back_from_their_noise_by_every_solver_without_noise():
    """For data N(0, 1/4), whose flow only scales."""
    schedule, x_0 = dj.cosine_schedule(100), 0.5 * jax.random.normal(jax.random.key(1), (2, 4, 4, 1))

    @jax.jit
    def compiled(table, keys, start):
        def denoise(x_t, t):
            signal, noise = (look_up(column, t, x_t)[:, None, None, None] for column in schedule)
            return signal / (signal**2 + 4 * noise**2) * x_t

        return dj.sample(denoise, table, keys, (4, 4, 1), start)

    def draw(table, count, start):
        return compiled(dj.padded(table, 100), jax.random.split(jax.random.key(0), count), start)

    for sampler in SAMPLERS_FOR["interpolate"]:
        columns = interpolate(draw, schedule, solver_table(sampler, schedule, 50), x_0, jax.random.key(0))
        np.testing.assert_allclose(columns[1], x_0, atol=0.1, err_msg=sampler)


def test_more_calls_than_timesteps_are_refused_of_heun_too():
    """It takes half as many times."""
    with pytest.raises(ValueError, match="--sampling-timesteps must be between 1 and num_timesteps = 20, got 30"):
        solver_table("heun", dj.cosine_schedule(20), 30)


def test_a_run_whose_network_was_told_t_is_not_taken_for_one_that_is_told_the_log_snr(tmp_path):
    config = vectors.Config(workdir=str(tmp_path))
    old = dataclasses.asdict(config) | {"data": "draw_mixture"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="time_input t, and this command has log_snr"):
        vectors.set_up(config, mixture.draw_mixture, dj.cosine_schedule(10), mixture.TARGET_TYPE, time="log_snr")
