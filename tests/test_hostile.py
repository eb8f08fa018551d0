"""Wrong, odd and empty input, as it reaches a user's program, where jaxtyping's checks are off: an error that says what is
wrong, or the right result."""

import json
import warnings

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from runs import TINY
from test_command_line import fails

import diffusion_jax as dj
from diffusion_jax.sampling import strided_timesteps
from support import batches, data, image_run, model
from support.config import MAY_DIFFER, Config
from support.workdir import open_workdir

SCHEDULE = dj.cosine_schedule(10)
X = jnp.ones((4, 2))
T = jnp.array([1, 3, 5, 10])
KEYS = jax.random.split(jax.random.key(0), 4)
same = lambda x_t, t: x_t  # noqa: E731


@pytest.fixture(autouse=True)
def as_users_have_it():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


WRONG = {
    "noise that would be broadcast": (lambda: dj.q_sample(SCHEDULE, X, T, X[:, :1]), r"eps must have the shape of .* \(4, 2\)"),
    "a point that would be broadcast": (
        lambda: dj.jump_target(SCHEDULE, X, T, X[:, :1], T),
        r"x_s must have the shape of .* \(4, 2\)",
    ),
    "a network of too few channels": (
        lambda: dj.diffusion_loss(SCHEDULE, lambda x, t: x[:, :1], X, KEYS),
        r"prediction must have the shape of the data, \(4, 2\), got \(4, 1\)",
    ),
    "a network that loses the batch": (lambda: dj.loss_at(SCHEDULE, lambda x, t: x[0], X, T, X), r"got \(2,\)"),
    "a prediction of another rank": (
        lambda: dj.convert(SCHEDULE, X[:, 0], X, T, "pred_eps", "pred_v"),
        r"prediction must have the shape",
    ),
    "a denoiser of too few channels": (
        lambda: dj.sample(dj.make_denoiser(SCHEDULE, lambda x, t: x[:, :1]), dj.ddim_table(SCHEDULE), KEYS, (2,)),
        r"prediction must have the shape",
    ),
    "timesteps for another batch": (lambda: dj.q_sample(SCHEDULE, X, T[:3], X), r"t must have the shape \(4,\), .*got \(3,\)"),
    "timesteps of many for one": (lambda: dj.bound_bits(SCHEDULE, same, X[:1], T, X[:1]), r"t must have the shape \(1,\)"),
    "whole numbers to start with": (
        lambda: dj.sample(same, dj.ddim_table(SCHEDULE), KEYS, (2,), jnp.ones((4, 2), int)),
        r"start must be of floating point, got int32",
    ),
    "half a round": (
        lambda: dj.resampled(SCHEDULE, dj.ddim_table(SCHEDULE), 1.5),
        r"whole number of at least 1, got 1.5",
    ),
    "a posterior of two batches": (lambda: dj.posterior(SCHEDULE, X[:1], X, T), r"x_0 must have the shape .* got \(1, 2\)"),
    "an unknown split": (lambda: data.load_dataset("digits", split="validation"), r"split must be one of train, test"),
    "a warm-up that ends before it begins": (lambda: dj.cosine_decay(1.0, 100, -20), r"warmup must be at least 0, got -20"),
    "one label for all": (
        lambda: dj.UNet(1, 4, (1,), num_classes=3).init(KEYS[0], jnp.zeros((4, 4, 4, 1)), T, T[:1]),
        r"shape \(4,\), got 3 and \(1,\)",
    ),
    "times that are not real": (lambda: dj.q_sample(SCHEDULE, X, T + 0.5j, X), r"[Rr]eal|complex"),
    "bytes instead of numbers": (lambda: dj.diffusion_loss(SCHEDULE, same, X.astype(jnp.uint8), KEYS), r"uint8"),
    "one key instead of one for each": (lambda: dj.sample(same, dj.ddim_table(SCHEDULE), KEYS[0], (2,)), r"rank|0-d|scalar"),
    "a clip that is not positive": (lambda: dj.make_denoiser(SCHEDULE, same, clip=-1.0), r"clip must be positive .* got -1"),
    "a clip that is no number": (lambda: dj.make_denoiser(SCHEDULE, same, clip=np.nan), r"clip must be positive .* got nan"),
    "an unknown variance": (lambda: dj.ancestral_table(SCHEDULE, "tiny"), r"sigma_type must be one of .*'tiny'"),
    "half a step": (lambda: dj.cosine_schedule(10.5), r"num_timesteps must be a whole number of at least 1, got 10.5"),
    "no number of steps": (lambda: dj.cosine_schedule(np.nan), r"num_timesteps must be a whole number .* got nan"),
    "a beta that is no number": (lambda: dj.schedule_from_beta([0.1, np.nan]), r"strictly between 0 and 1, got nan"),
    "no betas": (lambda: dj.schedule_from_beta([]), r"beta must be a vector of at least one"),
    "a table of betas": (lambda: dj.schedule_from_beta([[0.1]]), r"beta must be a vector"),
    "no sampling steps": (lambda: dj.ddim_table(SCHEDULE, sampling_timesteps=0), r"between 1 and num_timesteps = 10, got 0"),
    "too many of them": (lambda: dj.dpm_solver_table(SCHEDULE, 0.0, 11), r"between 1 and num_timesteps = 10, got 11"),
    "half of one": (lambda: strided_timesteps(10, 2.5), r"between 1 and num_timesteps = 10, got 2.5"),
    "a table cut short": (lambda: dj.padded(dj.ddim_table(SCHEDULE), 3), r"num_steps must be at least the table's 10"),
    "no devices": (lambda: dj.over_devices(same, (0, 0), 0, []), r"at least one device"),
    "no examples": (lambda: batches.batch_indices(0, 0, 4, 0), r"at least 1 example to choose from, got 0"),
    "a step before the first": (lambda: batches.batch_indices(0, -1, 4, 10), r"non-negative|negative"),
    "images that are scaled already": (lambda: data.to_model_input(jnp.zeros((1, 28, 28, 1))), r"uint8, .* got float32"),
    "no optimizer steps": (lambda: dj.adam_with_cosine_decay(1e-3, 0), r"positive"),
    "a patch without pixels": (
        lambda: dj.UNet(1, 4, (1,), patch_size=0).init(KEYS[0], jnp.zeros((1, 4, 4, 1)), T[:1]),
        r"patch_size must be at least 1, got 0",
    ),
    "an odd embedding": (lambda: dj.MLP(2, 5).init(KEYS[0], X, T), r"even embed_dim of at least 4, got 5"),
    "an image without channels": (
        lambda: dj.UNet(1, 4, (1,)).init(KEYS[0], jnp.zeros((1, 4, 4)), T[:1]),
        r"\[B, H, W, C\], got \(1, 4, 4\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case):
    call, said = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=said):
        call()


@pytest.mark.parametrize("t", [-1, 11, 2**31 - 1])
def test_a_timestep_outside_the_schedule_is_not_taken_for_another(t):
    t = jnp.full(4, t)
    assert np.isnan(dj.q_sample(SCHEDULE, X, t, X)).all()
    assert np.isnan(dj.convert(SCHEDULE, X, X, t, "pred_v", "pred_x_0")).all()
    mean, variance = dj.posterior(SCHEDULE, X, X, t)
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()
    assert np.isnan(dj.posterior(SCHEDULE, X, X, jnp.zeros(4, int))[1]).all()


def test_data_that_is_no_number_is_seen_in_the_loss():
    loss = dj.diffusion_loss(SCHEDULE, same, X.at[1].set(jnp.nan), KEYS)
    assert list(np.isnan(loss).all(axis=1)) == [False, True, False, False]


def test_one_timestep_is_enough():
    schedule = dj.cosine_schedule(1)
    for table in (dj.ancestral_table(schedule), dj.ddim_table(schedule, 1.0), dj.dpm_solver_table(schedule)):
        x = dj.sample(lambda x_t, t: jnp.full_like(x_t, 3.0), table, KEYS, (2,))
        np.testing.assert_allclose(x, 3.0, rtol=1e-6)
    assert np.isfinite(dj.diffusion_loss(schedule, same, X, KEYS)).all()


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 0, 1)])
def test_data_of_any_shape_and_empty_batches(shape):
    for keys in (KEYS, KEYS[:0]):
        x = jnp.ones((len(keys), *shape))
        assert dj.diffusion_loss(SCHEDULE, same, x, keys).shape == x.shape
        assert dj.sample(same, dj.dpm_solver_table(SCHEDULE, 0.0, 3), keys, shape).shape == x.shape
        assert dj.sample_trajectory(same, dj.ddim_table(SCHEDULE, 1.0, 3), keys, shape).shape == (4, *x.shape)


def test_numpy_arrays_and_legacy_keys_are_as_good():
    legacy = jax.vmap(jax.random.key_data)(KEYS)
    expected = dj.diffusion_loss(SCHEDULE, same, X, KEYS)
    for keys, x in ((legacy, X), (KEYS, np.asarray(X))):
        chex.assert_trees_all_close(dj.diffusion_loss(SCHEDULE, same, x, keys), expected)
    table = dj.ancestral_table(SCHEDULE)
    chex.assert_trees_all_close(dj.sample(same, table, legacy, (2,)), dj.sample(same, table, KEYS, (2,)))


def test_float64_data_from_numpy_is_silent_without_64_bits():
    x, t, half = np.ones((4, 2)), np.arange(4) + 1, lambda x_t, t: 0.5 * x_t
    denoise = dj.make_denoiser(SCHEDULE, half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = dj.diffusion_loss(SCHEDULE, half, x, KEYS), dj.q_sample(SCHEDULE, x, t, x), dj.posterior(SCHEDULE, x, x, t)[0]
        results += dj.bound_bits(SCHEDULE, denoise, x, t, x), dj.sample(denoise, dj.ddim_table(SCHEDULE), KEYS, (2,))
    assert {str(value.dtype) for value in results} == {"float32"}


FLAGS = [
    "batch-size", "iterations", "embed-dim", "dim-scales", "num-timesteps", "sampling-timesteps", "learning-rate", "ema-decay",
    "seed", "target-type", "precision", "num-samples", "checkpoint-every", "sample-every", "dataset", "preset", "nonsense",
]  # fmt: skip
VALUES = [
    "0", "1", "-1", "3", "4", "6", "1e9", "1e400", "nan", "", " ", "True", "None", "ä", "--", "-", "[1]", "0x10", "9" * 30,
    "1 2", "pred_v", "bfloat16", "digits", "small", "../x", "'", "\0",
]  # fmt: skip
IMAGES = data.ImageData("digits", np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, np.int32))


def main(monkeypatch, capsys, script, *args) -> str:
    """Run the script's set-up up to its first state, with IMAGES for MNIST; its one line on stderr is returned."""

    def load(name, *args):
        return IMAGES if name in ("auto", "digits") else data.load_dataset(name, *args)

    def stop_here(*_):
        raise OSError("well-formed")

    monkeypatch.setattr(image_run, "load_dataset", load)
    monkeypatch.setattr(model, "initial_state", stop_here)
    return fails(capsys, monkeypatch, script, *args)


options = st.lists(st.tuples(st.sampled_from(FLAGS), st.sampled_from(VALUES)), max_size=3, unique_by=lambda pair: pair[0])


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(options)
def test_any_command_line_is_one_line_or_a_run(monkeypatch, capsys, tmp_path, pairs):
    args = [word for flag, value in pairs for word in (f"--{flag}", *value.split(" "))]
    main(monkeypatch, capsys, "mnist", "--workdir", tmp_path / "new", *args)
    assert not (tmp_path / "new").exists()


def test_a_command_line_without_fault_gets_past_the_options(monkeypatch, capsys, tmp_path):
    assert "well-formed" in main(monkeypatch, capsys, "mnist", *TINY, "--workdir", tmp_path / "new")


CONFIGS = {
    "an unknown field": lambda config: {**config, "colour": "red"},
    "a missing field": lambda config: {name: value for name, value in config.items() if name != "seed"},
    "a word for a number": lambda config: {**config, "embed_dim": "many"},
    "a list of words": lambda config: {**config, "dim_scales": ["a", "b"]},
    "an unknown choice": lambda config: {**config, "noise_schedule_type": "sigmoid"},
    "a value out of range": lambda config: {**config, "num_timesteps": 0},
    "images of no size": lambda config: {**config, "image_size": 0},
    "images of no colour": lambda config: {**config, "channels": 0},
    "a list": lambda config: [config],
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_run_of_another_kind_is_refused(monkeypatch, capsys, trained, tmp_path, case):
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[case](config)))
    line = main(monkeypatch, capsys, "sample", "--out", tmp_path / "x.png", "--workdir", tmp_path)
    assert str(tmp_path) in line
    assert "well-formed" not in line
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_workdir(Config(**{**config, "workdir": str(tmp_path)}), MAY_DIFFER)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_a_config_that_is_no_json_is_refused(monkeypatch, capsys, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in main(monkeypatch, capsys, "sample", "--workdir", tmp_path, "--out", tmp_path / "x.png")
