"""Runs of the scripts on images of a person's own: a folder, an array in a file, a data set of TFDS."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import TINY, assert_same_run, best_step, final_state, finish, run, start, wait_for

from support.data import load_dataset

SMALL = [*TINY[2:], "--patch-size", "4"]  # without --dataset digits
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
    said = run("mnist.py", *SMALL, "--dataset", photos, "--image-size", "12", "--conditional", "--workdir", workdir)
    assert f"54 images of {photos}" in said
    return workdir


def test_a_run_says_in_its_config_what_its_images_are(coloured, photos):
    config = json.loads((coloured / "config.json").read_text())
    found = {name: config[name] for name in ("dataset", "image_size", "channels", "num_classes")}
    assert found == {"dataset": str(photos), "image_size": 12, "channels": 3, "num_classes": 2}
    assert final_state(coloured).params["label"]["embedding"].shape[0] == 3
    assert (coloured / "figure.png").exists()
    assert Image.open(coloured / "samples_000004.png").size == (36, 24)
