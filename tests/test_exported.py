"""A network in a .safetensors file: every bit comes back, other readers find the same numbers, and wrong files are refused."""

import dataclasses
import json
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from support import model
from support.config import Config
from support.exported import read_params, write_model
from support.image_run import started_from
from support.saved_run import TRAINED, open_run, solver_table

CONFIG = Config(workdir="", network="dit", embed_dim=4, depth=1, patch_size=8, num_timesteps=12)


@pytest.fixture(scope="module")
def params():
    return jax.device_get(model.initial_state(CONFIG, jax.random.key(3)).params)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert {x.dtype for x in jax.tree.leaves(one)} == {np.dtype(np.float32)}


def test_every_bit_of_float32_comes_back_with_the_options(tmp_path, params):
    file = tmp_path / "net.safetensors"
    write_model(file, CONFIG, params, 7, np.float32)
    run = open_run(str(file))
    state = run.restore("newest")
    assert (run.config, int(state.step), run.schedule.num_timesteps) == (CONFIG, 7, 12)
    equal(state.ema_params, params)
    plain = safetensors.numpy.load_file(file)
    assert plain["block_1/mlp_1/kernel"].shape == (4, 16)
    np.testing.assert_array_equal(plain["time_1/kernel"], params["time_1"]["kernel"])
    assert list(tmp_path.iterdir()) == [file]


def test_the_file_does_not_say_where_the_run_was(tmp_path, params):
    file, home = tmp_path / "net.safetensors", "/home/me"
    places = {"workdir": f"{home}/runs/a", "data_dir": f"{home}/data", "init": f"{home}/runs/teacher"}
    write_model(file, dataclasses.replace(CONFIG, **places), params, 7, np.float32)
    assert home.encode() not in file.read_bytes()
    assert open_run(str(file)).config == dataclasses.replace(CONFIG, init="teacher")


def test_the_ways_to_read_it_that_the_docs_show(tmp_path, monkeypatch):
    config = Config(workdir="", embed_dim=4, dim_scales=(1,))
    params = jax.device_get(model.initial_state(config, jax.random.key(3)).params)
    write_model(tmp_path / "mnist.safetensors", config, params, 7, np.float32)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    with_numpy, _, with_jax = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(with_numpy, names)
    np.testing.assert_array_equal(names["kernel"], params["down_0_block_1"]["conv_1"]["kernel"])
    exec(with_jax, names)
    x_t, t = jax.numpy.zeros((1, 32, 32, 1)), jax.numpy.ones(1)
    expected = model.make_network(config).apply({"params": jax.device_put(params)}, x_t, t)
    np.testing.assert_array_equal(names["prediction"], expected)


def test_bfloat16_keeps_the_upper_half_of_each_number(tmp_path, params):
    file = tmp_path / "net.safetensors"
    write_model(file, CONFIG, params, 7, jax.numpy.bfloat16)
    upper = jax.tree.map(lambda x: (x.view(np.uint32) + 0x7FFF + (x.view(np.uint32) >> 16 & 1)) & np.uint32(0xFFFF0000), params)
    equal(read_params(file, params)[0], jax.tree.map(lambda x: x.view(np.float32), upper))


def test_a_run_may_start_from_a_file(tmp_path, params):
    file = tmp_path / "net.safetensors"
    write_model(file, CONFIG, params, 7, np.float32)
    state = started_from(str(file), CONFIG, model.initial_state(CONFIG, jax.random.key(0)))
    equal(state.params, params)
    equal(state.ema_params, params)
    assert int(state.step) == 0
    shared = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.params)}
    assert not shared & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.ema_params)}  # both are donated


MEAN_FLOW = {"loss_type": "mean_flow", "noise_schedule_type": "flow", "target_type": "pred_u"}


@pytest.mark.parametrize(
    ("theirs", "own", "wanted"),
    [
        (MEAN_FLOW, {}, "a run that is not itself distilled"),
        ({"dataset": "fashion_mnist"}, {}, "a network with this run's dataset auto, not fashion_mnist"),
        ({}, {"embed_dim": 8}, "a network with this run's embed_dim 8, not 4"),
        ({}, {"target_type": "pred_v", "loss_type": "l2"}, "a network with this run's target_type pred_v, not pred_x_0"),
    ],
    ids=["few calls", "other data", "another size", "another target"],
)
def test_a_run_starts_from_its_like_only(tmp_path, theirs, own, wanted):
    file, config = tmp_path / "net.safetensors", dataclasses.replace(CONFIG, **theirs)
    write_model(file, config, {}, 7, np.float32)  # refused before the parameters are read
    student = dataclasses.replace(config, **{"dataset": "auto", "loss_type": "distilled", "init": "x", **own})
    with pytest.raises(ValueError, match=f"--init must be {wanted}.*, got .*net.safetensors"):
        started_from(str(file), student, None)


def test_options_that_are_newer_than_the_file_have_the_value_that_describes_it(tmp_path, params):
    file = tmp_path / "net.safetensors"
    older = dataclasses.make_dataclass("Older", [f for f in dataclasses.asdict(CONFIG) if f != "time_density"])
    options = {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "time_density"}
    write_model(file, older(**options), params, 7, np.float32)
    assert open_run(str(file)).config == CONFIG


@pytest.mark.slow
def test_the_network_that_comes_with_the_project_draws_the_digits_that_are_asked_for(tmp_path, monkeypatch):
    """To scikit-learn's digits, which are written in other hands: of MNIST's own, their neighbors recognize 60 percent."""
    monkeypatch.chdir(tmp_path)
    assert TRAINED.stat().st_size <= 3e6
    run, labels = open_run(None), np.arange(100) % 10
    table = solver_table("unipc", run.schedule, 10)
    samples = run.draw(run.restore("newest").ema_params, table, jax.random.key(0), labels, guidance_scale=2.0)
    data = load_digits()
    neighbors = KNeighborsClassifier(metric="cosine").fit(data.data, data.target)
    found = neighbors.predict(np.stack([as_in_scikit_learn(sample[:, :, 0]) for sample in samples]))
    assert np.mean(found == labels) > 0.4


def as_in_scikit_learn(image: np.ndarray) -> np.ndarray:
    """The digit without its margins, as 8 x 8 numbers from 0 to 16."""
    rows, columns = (np.flatnonzero((image > 0).any(axis)) for axis in (1, 0))
    digit = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side, (height, width) = max(digit.shape), digit.shape
    square = np.pad(digit, [((side - n) // 2, (side - n + 1) // 2) for n in (height, width)], constant_values=-1)
    small = Image.fromarray(np.uint8(127.5 * (square.clip(-1, 1) + 1))).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small).ravel() / 255 * 16


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "header"),
        (b"no tensors at all", "header"),
        (struct.pack("<Q", 2) + b"{}", "has no options in it"),
        (safetensors.numpy.save({}, {"config": "[]", "step": "1"}), r"has no options but \[\]"),
        (safetensors.numpy.save({}, {"config": "{", "step": "1"}), "has damaged options"),
    ],
    ids=["missing", "empty", "text", "no options", "options of another type", "damaged options"],
)
def test_another_file_is_refused_in_one_line(tmp_path, content, said):
    file = tmp_path / "net.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a trained network must be in a file of experiments/export.py; .*{said}") as problem:
        open_run(str(file))
    assert "\n" not in str(problem.value)


def test_a_network_that_is_not_that_of_its_options_is_refused(tmp_path, params):
    file = tmp_path / "net.safetensors"
    write_model(file, dataclasses.replace(CONFIG, embed_dim=8), params, 7, np.float32)
    with pytest.raises(ValueError, match=r"net.safetensors has \S+ \(.*\), and the options of the run say \(.*\)"):
        open_run(str(file)).restore("newest")
    write_model(file, CONFIG, {name: x for name, x in params.items() if name != "stem"}, 7, np.float32)
    with pytest.raises(ValueError, match=r"net.safetensors has stem/\S+ no such parameter, and the options of the run say \("):
        open_run(str(file)).restore("newest")


@pytest.mark.parametrize("change", [{"embed_dim": 5}, {"target_type": "mse"}, {"more": 1}])
def test_wrong_options_in_the_file_are_refused(tmp_path, params, change):
    file = tmp_path / "net.safetensors"
    tensors = {"x": np.zeros(1, np.float32)}
    options = json.dumps(dataclasses.asdict(CONFIG) | change)
    file.write_bytes(safetensors.numpy.save(tensors, {"config": options, "step": "1"}))
    with pytest.raises(ValueError, match="--workdir must hold a run"):
        open_run(str(file))
