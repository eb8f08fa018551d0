"""Parity with the original PyTorch code, by numbers that it computed (tests/reference/README.md)."""

from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ho import alpha_bar_of

import diffusion_jax as dj
from diffusion_jax import sampling

with np.load(Path(__file__).parent / "reference" / "reference.npz") as file:
    REFERENCE = dict(file)
LOSSES = [name for name in REFERENCE if "/loss/" in name]
PATHS = [name for name in REFERENCE if "/path/" in name]
WITHOUT_DIVISION = [name for name in LOSSES + PATHS if "pred_eps" not in name]


def schedule_of(commit: str, name: str, T: int) -> dj.NoiseSchedule:
    """Our cosine schedule; the original's linear one, which differs on purpose, from its own alpha_bar."""
    if name == "cosine":
        return dj.cosine_schedule(T)
    alpha_bar = REFERENCE[f"{commit}/alpha_bar/linear/{T}/float64"]
    return dj.NoiseSchedule(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def arrays(*names: str) -> list[jax.Array]:
    return [jnp.asarray(REFERENCE[name]) for name in names]


def predict(T, W1, b, W2, x_t, t):
    return jnp.tanh(x_t @ W1 + t.astype(b.dtype)[:, None] / T * b[None]) @ W2


def our_loss(name: str):
    commit, _, schedule, *types = name.split("/")
    network = partial(predict, 10, *arrays("W1", "b", "W2"))
    return dj.loss_at(schedule_of(commit, schedule, 10), network, *arrays("x_0", "t", "eps"), *types)


@partial(jax.jit, static_argnames=("T", "target_type"))
def trajectory(schedule, table, noise, weights, T, target_type):
    denoise = dj.make_denoiser(schedule, partial(predict, T, *weights), target_type)
    with mock.patch.object(sampling, "_normal", lambda keys, number, shape, dtype: noise[number]):
        return dj.sample_trajectory(denoise, table, jax.random.split(jax.random.key(0), 3), (2,))


def our_path(name: str):
    commit, _, schedule, target_type, variance, steps = name.split("/")
    T, S = map(int, steps.split("-"))
    schedule = schedule_of(commit, schedule, T)
    if commit == "new":
        table = dj.ddim_table(schedule, {"ddim": 0.0, "ddpm": 1.0}[variance], S)
    else:
        table = dj.ancestral_table(schedule, variance, S)
    return trajectory(schedule, table, *arrays(f"noise/{steps}"), arrays("W1", "b", "W2"), T, target_type)


@pytest.mark.parametrize("T", [10, 500])
@pytest.mark.parametrize("commit", ["old", "new"])
def test_the_cosine_table(commit, T):
    expected = REFERENCE[f"{commit}/alpha_bar/cosine/{T}/float64"]
    np.testing.assert_allclose(alpha_bar_of(dj.cosine_schedule(T)), expected, rtol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_float64(name):
    with jax.enable_x64(True):
        np.testing.assert_allclose(our_loss(name), REFERENCE[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_trajectories_in_float64(name):
    with jax.enable_x64(True):
        path = our_path(name)
    scale = np.abs(REFERENCE[name]).max()
    assert path.dtype == jnp.float64
    np.testing.assert_allclose(path, REFERENCE[name], rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("name", WITHOUT_DIVISION)
def test_losses_and_trajectories_in_float32(name):
    ours = our_loss(name) if "/loss/" in name else our_path(name)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, REFERENCE[name], rtol=1e-5, atol=1e-5)


def test_where_the_original_differs():
    """The reasons for the differences that docs/differences.md lists, as the original's own numbers."""
    linear = REFERENCE["old/alpha_bar/linear/10/float64"]
    assert linear[0] == 1 - 1e-4  # not the data
    assert linear[-1] > 0.89  # not noise, where ours is
    assert alpha_bar_of(dj.linear_schedule(10))[0] == 1
    assert alpha_bar_of(dj.linear_schedule(10))[-1] < 1e-4
    noise = [np.sqrt(1 - np.float64(REFERENCE[f"old/alpha_bar/cosine/500/{kind}"][1])) for kind in ("float32", "float64")]
    assert abs(noise[0] / noise[1] - 1) > 2e-4  # its float32 table
    assert abs(np.float32(dj.cosine_schedule(500).noise[1]) / noise[1] - 1) < 1e-7
