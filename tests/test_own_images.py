"""Runs of the scripts on images of a person's own: a folder, an array in a file, a data set of TFDS."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from runs import EXPERIMENTS, TINY, assert_same_run, best_step, final_state, finish, kill_and_repeat, run, start

from support.data import load_dataset
from support.exported import write_model
from support.saved_run import open_run, solver_table

pytestmark = pytest.mark.slow
SMALL = [arg for arg in TINY[2:] if arg != "--no-conditional"] + ["--patch-size", "4"]  # without --dataset digits
LEARNING = ["--embed-dim", "16", "--learning-rate", "0.01", "--warmup", "5", "--image-size", "12"]
LEARNING += ["--iterations", "100", "--checkpoint-every", "50", "--sample-every", "50"]
COLOURS = {"a red": (230, 30, 30), "b blue": (30, 30, 230)}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Sixty images in one colour each, of two colours in turn, with some noise."""
    colours = np.resize(list(COLOURS.values()), (60, 3))
    noise = np.random.default_rng(0).integers(-25, 25, (60, 8, 8, 3))
    return np.uint8(colours[:, None, None] + noise)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, images) -> Path:
    folder = tmp_path_factory.mktemp("images") / "photos"
    for number, image in enumerate(images):
        (folder / list(COLOURS)[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((24, 20)).save(folder / list(COLOURS)[number % 2] / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def coloured(tmp_path_factory, photos) -> Path:
    """A conditional run on the folder."""
    workdir = tmp_path_factory.mktemp("runs") / "coloured"
    said = run("mnist.py", *SMALL, *LEARNING, "--dataset", photos, "--workdir", workdir)
    assert f"54 images of {photos} in 2 classes" in said
    return workdir


def test_a_run_says_in_its_config_what_its_images_are(coloured, photos):
    config = json.loads((coloured / "config.json").read_text())
    found = {name: config[name] for name in ("dataset", "image_size", "channels", "num_classes")}
    assert found == {"dataset": str(photos), "image_size": 12, "channels": 3, "num_classes": 2}
    assert final_state(coloured).params["label"]["embedding"].shape[0] == 3
    assert (coloured / "figure.png").exists()
    assert Image.open(coloured / "samples_000050.png").size == (36, 24)


def drawn(place: Path, labels: list[int], guidance_scale: float = 1.0) -> np.ndarray:
    saved = open_run(str(place))
    table, params = solver_table("ddim", saved.schedule, 2), saved.restore("newest").ema_params
    return saved.draw(params, table, jax.random.key(3), np.array(labels), guidance_scale)


def test_each_class_has_the_colour_of_its_folder(coloured):
    means = drawn(coloured, [0, 1] * 20, guidance_scale=3.0).mean((1, 2))
    redder = means[:, 0] - means[:, 2]
    assert np.median(redder[::2]) > 0.5
    assert np.median(redder[1::2]) < -0.5


def test_a_file_of_its_network_draws_the_same_of_each_class(coloured, tmp_path):
    saved = open_run(str(coloured))
    write_model(tmp_path / "net.safetensors", saved.config, saved.restore("newest").ema_params, 100, np.float32)
    reds, mixed = drawn(coloured, [0, 0]), drawn(tmp_path / "net.safetensors", [0, 1])
    assert reds.shape == (2, 12, 12, 3)
    np.testing.assert_array_equal(reds[0], mixed[0])
    assert np.abs(reds[1] - mixed[1]).max() > 1e-3


def test_a_run_goes_on_where_its_images_are_moved_and_not_with_others(coloured, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "moved")
    shutil.copytree(coloured, tmp_path / "run")
    args = [*SMALL, *LEARNING, "--dataset", tmp_path / "moved", "--workdir", tmp_path / "run"]
    assert "step 100 of 100" in run("mnist.py", *args, devices=2)
    saved = open_run(str(tmp_path / "run"))
    for split in ("train", "test"):
        there, moved = (saved.load(split, data_dir) for data_dir in (None, str(tmp_path / "moved")))
        np.testing.assert_array_equal(there.images, moved.images)
    assert (len(moved.images), moved.num_classes) == (6, 2)
    shutil.copy(photos / "a red" / "00.png", tmp_path / "moved" / "a red" / "more.png")
    said = run("mnist.py", *args, status=2)
    assert "holds a run with images" in said
    assert "--images" not in said
    with pytest.raises(ValueError, match=r"--workdir must be a run on the images now in .*moved; they have changed, got .*run"):
        saved.load("test", str(tmp_path / "moved"))


def test_classes_are_asked_for_only_where_there_are_some(coloured, photos, tmp_path):
    args = ["--workdir", coloured, "--out", tmp_path / "x.png", "--labels", "2"]
    assert "--labels must be between 0 and 1, got 2" in run("sample.py", *args, status=2)
    args = [*SMALL, "--dataset", photos / "a red", "--conditional", "--workdir", tmp_path / "run"]
    assert "--conditional must be left out for images without classes" in run("mnist.py", *args, status=2)


def test_held_out_images_are_edited_in_colour(coloured, tmp_path):
    args = ["--what", "interpolate", "--num-images", "2", "--out", tmp_path / "edit.png"]
    run("edit.py", "--workdir", coloured, *args)
    picture = Image.open(tmp_path / "edit.png")
    assert (picture.size, picture.mode) == ((24 * 11, 48), "RGB")


@pytest.fixture(scope="module")
def mapped(tmp_path_factory, images) -> Path:
    """A run on images in a .npy, with the best of the checkpoints known, and beside it the images."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "images.npy", images)
    said = run("mnist.py", *SMALL, "--dataset", folder / "images.npy", "--workdir", folder / "whole")
    assert "images.npy without classes" in said
    assert not json.loads((folder / "whole" / "config.json").read_text())["conditional"]
    return folder


def test_images_that_stay_in_their_file_give_the_bits_of_those_in_memory(mapped, images, tmp_path):
    np.savez(tmp_path / "images.npz", images=images)
    run("mnist.py", *SMALL, "--dataset", tmp_path / "images.npz", "--workdir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", mapped / "whole")
    assert best_step(mapped / "whole") is not None


def test_images_in_a_file_are_shuffled_alike_after_a_kill(mapped, tmp_path):
    kill_and_repeat(tmp_path / "killed", *SMALL, "--dataset", mapped / "images.npy")
    assert_same_run(tmp_path / "killed", mapped / "whole")


def test_images_in_a_file_are_shared_by_devices_and_learned_in_bfloat16(mapped, tmp_path):
    def losses(workdir: Path, *args: object, devices: int = 1) -> np.ndarray:
        if not workdir.exists():
            run("mnist.py", *SMALL, "--dataset", mapped / "images.npy", "--workdir", workdir, *args, devices=devices)
        return np.genfromtxt(workdir / "metrics.csv", delimiter=",", names=True)["loss"]

    whole = losses(mapped / "whole")
    np.testing.assert_allclose(losses(tmp_path / "shared", devices=4), whole, rtol=1e-4)
    np.testing.assert_allclose(losses(tmp_path / "half", "--precision", "bfloat16"), whole, rtol=0.05)
    args = ["--workdir", tmp_path / "half", "--checkpoint", "best", "--num-samples", "2", "--out", tmp_path / "x.npy"]
    assert f"step {best_step(tmp_path / 'half')} of 8" in run("sample.py", *args)
    assert np.load(tmp_path / "x.npy").shape == (2, 8, 8, 3)


def test_images_without_classes_are_judged_without_the_classifier(mapped, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(mapped / "whole", workdir)
    said = run("evaluate.py", "--workdir", workdir, "--num-samples", "100", "--sampling-timesteps", "2", "--bound-images", "2")
    assert "has no labels: the feature spaces of the classifier are left out" in said
    results = json.loads((workdir / "evaluation.json").read_text())
    assert (results["images"], results["classifier_accuracy"]) == (6, None)  # as many as are held out
    generated, real = results["generated"], results["test"]
    assert {name for name, value in real.items() if isinstance(value, dict)} == {"pixels", "random network"}
    assert generated["nearest_training_image_median"] > 3 * real["nearest_training_image_median"]
    assert results["bits_per_dim"] > 1
    said = run("compare_samplers.py", "--workdir", workdir, "--num-samples", "100", "--calls", "2")
    assert "| sampler | calls | seconds | pixels | random network |" in said
    assert Image.open(workdir / "samplers.png").size[0] > 500


def test_images_with_classes_are_judged_by_a_classifier_of_their_own(coloured, photos, tmp_path):
    shutil.copytree(coloured, tmp_path / "run")
    args = ["--workdir", tmp_path / "run", "--num-samples", "100", "--sampling-timesteps", "2", "--bound-images", "0"]
    finish(start("evaluate.py", *args, HOME=str(tmp_path)))
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results["classifier_accuracy"] == 1  # one is red, the other blue
    assert len(results["test"]["class_shares"]) == 2
    held_out = load_dataset(str(photos), split="test", image_size=12).images / np.float32(127.5) - 1
    np.save(tmp_path / "real.npy", np.resize(held_out, (100, 12, 12, 3)))
    finish(start("judge.py", "--samples", tmp_path / "real.npy", "--dataset", photos, HOME=str(tmp_path)))
    results = json.loads((tmp_path / "real.judged.json").read_text())
    assert results["generated"] == results["test"]


def test_the_recipe_for_cifar10_runs_on_made_images(tmp_path):
    """As in docs/commands.md, but for the width, and the number of steps, of images in a step and of samples."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "made.npz", images=rng.integers(0, 256, (40, 32, 32, 3), np.uint8), labels=np.arange(40) % 10)
    recipe = (EXPERIMENTS.parent / "docs" / "commands.md").read_text().split("mnist.py --dataset cifar10 ")[1].split("\n")[0]
    args = [*recipe.split(), "--dataset", tmp_path / "made.npz", "--workdir", tmp_path / "run", "--batch-size", "2"]
    args += ["--iterations", "2", "--sampling-timesteps", "2", "--num-samples", "2", "--embed-dim", "16"]
    assert "36 images" in run("mnist.py", *args)
    assert drawn(tmp_path / "run", [9]).shape == (1, 32, 32, 3)
