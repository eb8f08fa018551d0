"""What the environment of a script may be: JAX's variables, its terminal, its signals."""

import errno
import importlib.util
import signal
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import EXPERIMENTS, TINY, assert_same_run, final_state, finish, run, start, wait_for

import diffusion_jax as dj
from coins import draw_coins
from mixture import draw_mixture
from support import loop
from support.processes import join_processes

SCRIPTS = sorted(file.name for file in EXPERIMENTS.glob("*.py") if "__main__" in file.read_text())

OTHER_RANDOM_NUMBERS = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_RANDOM_SEED_OFFSET": "7"}


@pytest.mark.slow
def test_no_variable_changes_the_random_numbers(trained, tmp_path):
    finish(start("mnist.py", *TINY, "--workdir", tmp_path / "run", **OTHER_RANDOM_NUMBERS))
    assert_same_run(tmp_path / "run", trained)
    common = ["--workdir", trained, "--sampling-timesteps", "3", "--seed", "5"]
    run("sample.py", *common, "--num-samples", "5", "--out", tmp_path / "five.npy")
    finish(start("sample.py", *common, "--num-samples", "3", "--out", tmp_path / "three.npy", **OTHER_RANDOM_NUMBERS))
    np.testing.assert_allclose(np.load(tmp_path / "three.npy"), np.load(tmp_path / "five.npy")[:3], atol=1e-5)


@pytest.mark.slow
def test_64_bits_enabled_change_a_run_by_rounding_alone(trained, tmp_path):
    finish(start("mnist.py", *TINY, "--workdir", tmp_path / "run", JAX_ENABLE_X64="1"))
    for one, other in zip(*(jax.tree.leaves(final_state(folder)) for folder in (tmp_path / "run", trained)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_ends_a_script_at_once_from_its_imports_on(tmp_path, script):
    (tmp_path / "jax.py").write_text("import pathlib, time; pathlib.Path('imported').touch(); time.sleep(60)")
    process = start(script, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    wait_for(process, (tmp_path / "imported").exists)
    process.send_signal(signal.SIGINT)
    assert finish(process, -signal.SIGINT) == ""  # which shells call 130


@pytest.mark.slow
def test_a_run_goes_on_without_a_place_for_its_messages(tmp_path):
    places = ["", "2>&-", "2>/dev/full", "2>&- >&- <&-"]
    for number, place in enumerate(places):
        command = ["coins.py", "--iterations", "3", "--batch-size", "8", "--workdir", str(tmp_path / str(number))]
        finish(start(*command, redirection=place))
    for name in ("metrics.csv", "figure.png"):
        assert len({(tmp_path / str(number) / name).read_bytes() for number in range(len(places))}) == 1


def test_a_signal_is_noted_where_nobody_can_be_told(monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.os, "write", write)
    with loop.stop_requests() as requests:
        signal.raise_signal(signal.SIGTERM)
        assert requests == [signal.SIGTERM]


@pytest.mark.slow
def test_a_stdout_of_ascii_gets_all_results(tmp_path):
    args = ["--iterations", "2", "--batch-size", "8", "--embed-dim", "4", "--workdir", tmp_path / "run"]
    said = finish(start("coins.py", *args, PYTHONIOENCODING="ascii"))
    assert "fair coins" in said
    assert "wrote" in said


HAS_CUDA = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


NO_CUDA = pytest.mark.skipif(HAS_CUDA, reason="JAX's support for CUDA is installed")


@pytest.mark.parametrize("platform", ["foo", pytest.param("cuda", marks=NO_CUDA)])
@pytest.mark.slow
def test_a_platform_that_is_not_here_is_named_in_one_line(tmp_path, platform):
    for script in ("mnist.py", "mixture.py"):
        said = finish(start(script, "--workdir", tmp_path / "run", JAX_PLATFORMS=platform), 2)
        assert said.startswith(f"error: JAX finds no device with JAX_PLATFORMS={platform}: ")
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["", "localhost", "localhost:", "localhost:99999999", ":1234"])
def test_a_coordinator_without_a_port_is_named(monkeypatch, address):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    with pytest.raises(ValueError, match=f"JAX_COORDINATOR_ADDRESS must be HOST:PORT, got '{address}'"):
        join_processes(["--distributed"])


@pytest.mark.parametrize("draw", [draw_mixture, draw_coins])
def test_x64_changes_no_data(draw):
    key = jax.random.key(3)
    expected = draw(key)
    with jax.enable_x64(True):
        drawn = draw(key)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, expected)


def test_x64_leaves_a_state_in_float32():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(3, jnp.float32)}
        state = dj.create_train_state(lambda: None, params, dj.adam_with_cosine_decay(0.1, 10, warmup=2))
        loss_fn = lambda params, x_0, keys: (params["w"] * x_0 - 1) ** 2  # noqa: E731
        step = partial(dj.train_step, loss_fn=loss_fn, ema_decay=0.9)
        new, metrics = jax.jit(step)(state, jnp.zeros(3, jnp.float32), jax.random.split(jax.random.key(0), 3))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert {x.dtype for x in jax.tree.leaves((new, metrics))} == {np.dtype(np.float32), np.dtype(np.int32)}
