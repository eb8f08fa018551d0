"""Each script, run as a person would."""

import csv
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from runs import TINY, assert_same_run, final_state, finish, kill_and_repeat, run, start
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tensorboardX.proto.event_pb2 import Event

from support import model
from support.config import Config
from support.data import load_dataset
from support.saved_run import open_run


def test_mnist_leaves_a_whole_run(trained):
    assert json.loads((trained / "config.json").read_text())["dataset"] == "digits"
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert final_state(trained).step == 8
    assert Image.open(trained / "figure.png").size[0] > 500
    assert Image.open(trained / "samples_000004.png").size == (96, 64)
    assert Image.open(trained / "denoising.gif").n_frames == 13
    assert Image.open(trained / "training.png").size[0] > 500


def test_tensorboard_finds_every_step_once_and_the_pictures(trained):
    """Its event files are records of a length, a checksum, a message and a checksum."""
    numbers, pictures = {}, {}
    for file in sorted((trained / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
            for value in event.summary.value:
                (pictures if value.HasField("image") else numbers).setdefault(value.tag, []).append(event.step)
    assert numbers == {"loss": list(range(1, 9)), "grad_norm": list(range(1, 9))}
    assert pictures == {"samples": [4]}


def test_sample_draws_the_same_whatever_the_count_and_the_devices(trained, tmp_path):
    common = ["--workdir", trained, "--sampling_timesteps", "3", "--seed", "5", "--sampler", "ddim", "--eta", "0.5"]
    run("sample.py", *common, "--num-samples", "3", "--out", tmp_path / "a.npy")
    run("sample.py", *common, "--num_samples", "5", "--out", tmp_path / "b.NPY", devices=4)
    few, many = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.NPY")
    assert many.shape == (5, 32, 32, 1)
    assert many.dtype == np.float32
    assert np.abs(many).max() <= 1
    np.testing.assert_allclose(few, many[:3], atol=1e-5)
    assert np.ptp(many, axis=0).max() > 0.01


@pytest.mark.slow
def test_sample_writes_a_grid(trained, tmp_path):
    args = ["--sampler", "dpm_solver", "--num-samples", "7", "--out", tmp_path / "grid.PNG"]
    run("sample.py", "--workdir", trained, *args)
    assert Image.open(tmp_path / "grid.PNG").size == (96, 96)


@pytest.mark.slow
def test_a_network_goes_to_a_file_and_into_another_run(trained, tmp_path):
    file, tuned = tmp_path / "net.safetensors", tmp_path / "tuned"
    assert "step 8 of 8" in run("export.py", "--workdir", trained, "--out", file)
    for number, place in enumerate((trained, file)):
        run("sample.py", "--workdir", place, "--num-samples", "3", "--out", tmp_path / f"{number}.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    command = ["mnist.py", *TINY, "--init", file, "--learning-rate", "1e-12", "--workdir", tuned]
    run(*command)
    file.unlink()
    before = (tuned / "metrics.csv").read_bytes()
    assert "resuming" in run(*command)
    assert (tuned / "metrics.csv").read_bytes() == before
    run("sample.py", "--workdir", tuned, "--num-samples", "3", "--out", tmp_path / "2.npy")
    np.testing.assert_allclose(np.load(tmp_path / "2.npy"), np.load(tmp_path / "1.npy"), atol=1e-4)


@pytest.mark.slow
def test_a_run_is_distilled_to_few_calls_and_continued(trained, tmp_path):
    few = tmp_path / "few"
    command = ["mnist.py", *TINY, "--loss-type", "distilled", "--init", trained, "--learning-rate", "0.01"]
    run(*command, "--workdir", few)
    assert "resuming" in kill_and_repeat(tmp_path / "again", *command[1:])
    assert_same_run(few, tmp_path / "again")
    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    run("export.py", "--workdir", trained, "--out", same)
    with safe_open(same, "numpy") as opened:
        save_file({name: x + 1 for name, x in load_file(same).items()}, other, opened.metadata())
    command[command.index(trained)] = same
    assert "resuming" in run(*command, "--workdir", few)
    command[command.index(same)] = other
    assert "holds a run with teacher" in run(*command, "--workdir", few, status=2)
    for calls in "12":
        args = ["--workdir", few, "--sampling-timesteps", calls, "--num-samples", "3", "--out", tmp_path / "x.npy"]
        assert "3 samples at step 8 of 8" in run("sample.py", *args)
        assert np.isfinite(np.load(tmp_path / "x.npy")).all()
    said = run("edit.py", "--workdir", few, status=2)
    assert "--workdir must be a run that is not distilled: this needs the denoised image at every t" in said


LEARNED = ["--sigma-type", "learned", "--loss-type", "hybrid", "--target-type", "pred_v"]


@pytest.fixture(scope="session")
def conditional(tmp_path_factory):
    """The folder of a tiny run that learned classes and variances, at a rate that makes them visible."""
    workdir = tmp_path_factory.mktemp("runs") / "conditional"
    run("mnist.py", *TINY, "--conditional", *LEARNED, "--learning-rate", "0.03", "--workdir", workdir)
    return workdir


@pytest.mark.slow
def test_a_conditional_run_draws_the_classes_that_are_asked_for(conditional, tmp_path):
    def drawn(labels: str, scale: str = "2"):
        args = ["--labels", *labels, "--guidance-scale", scale, "--out", tmp_path / "x.npy"]
        run("sample.py", "--workdir", conditional, *args)
        return np.load(tmp_path / "x.npy")

    asked, others, less = drawn("773"), drawn("774"), drawn("773", "1")
    assert asked.shape == (3, 32, 32, 1)
    np.testing.assert_array_equal(asked[:2], others[:2])
    assert np.abs(asked[2] - others[2]).max() > 1e-3
    assert np.abs(asked - less).max(axis=(1, 2, 3)).min() > 1e-3


@pytest.mark.slow
def test_a_conditional_run_learns_of_no_class_too(conditional):
    config = Config(**json.loads((conditional / "config.json").read_text()))
    first = model.initial_state(config, jax.random.split(jax.random.key(config.seed), 3)[0]).params
    learned = np.abs(final_state(conditional).params["label"]["embedding"] - first["label"]["embedding"]).max(1)
    assert learned.shape == (11,)
    assert learned[10] > 0  # 64 images, of which a tenth is seen without its class
    assert (learned[:10] > 0).sum() > 5


@pytest.mark.slow
def test_a_sampler_of_the_best_checkpoint_takes_that(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "8" / "metrics" / "metrics").write_text('{"loss": 9.0}')  # so that 6 is the best
    args = ["--checkpoint", "best", "--num-samples", "2", "--out", tmp_path / "x.npy"]
    assert "at step 6 of 8" in run("sample.py", "--workdir", tmp_path / "run", *args)
    assert int(open_run(str(tmp_path / "run")).restore("newest").step) == 8


@pytest.mark.slow
@pytest.mark.parametrize(("what", "columns"), [("inpaint", 6), ("interpolate", 11), ("image-to-image", 5)])
def test_edit_writes_a_row_for_each_image_of_a_learned_variance(conditional, tmp_path, what, columns):
    run("edit.py", "--workdir", conditional, "--what", what, "--num-images", "2", "--out", tmp_path / "edit.png")
    assert Image.open(tmp_path / "edit.png").size == (64 * columns, 64 * 2)


@pytest.mark.slow
def test_evaluate_judges_real_images_better_than_those_of_a_run_of_eight_steps(trained, conditional, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    args = ["--workdir", workdir, "--num-samples", "250", "--sampling-timesteps", "4", "--bound-images", "4"]
    args += ["--likelihood-images", "3"]
    own_home = {"HOME": str(tmp_path), "XLA_FLAGS": ""}  # trains its own classifier, which optimized programs do faster
    said = finish(start("evaluate.py", *args, **own_home))
    results = json.loads((workdir / "evaluation.json").read_text())
    assert results["classifier_accuracy"] > 0.95
    for space in ("classifier", "statistics", "pixels", "random network"):
        generated, real = results["generated"][space], results["test"][space]
        assert len(generated["frechet_distance"]) == 3
        for distance in ("frechet_distance", "kernel_distance"):
            assert min(generated[distance]) > 5 * max(0, *real[distance])
        for share in ("precision", "density", "coverage"):
            assert max(generated[share]) < 0.3 < 0.5 < min(real[share])
    assert np.sum(results["test"]["class_shares"]) == pytest.approx(1)
    assert results["bits_per_dim"] > 1
    curve, value = results["flow_bits_curve"], results["flow_bits_per_dim"]
    converged = len(curve) > 1 and abs(np.diff(list(curve.values()))[-1]) < 0.01
    assert value == (list(curve.values())[-1] if converged else None)
    assert converged != ("flow_bits_per_dim has not converged" in said)
    assert "| classifier: frechet distance |" in said
    assert Image.open(workdir / "bound.png").size[0] > 500

    shutil.copytree(conditional, tmp_path / "classes")
    args = ["--workdir", tmp_path / "classes", "--num-samples", "100", "--sampling-timesteps", "2", "--bound-images", "2"]
    finish(start("evaluate.py", *args, "--guidance-scale", "3", **own_home))
    guided = json.loads((tmp_path / "classes" / "evaluation.json").read_text())
    assert guided["generated"]["classified_as_asked"] < 0.5 < 0.9 < guided["test"]["classified_as_asked"]

    args = ["--workdir", workdir, "--num-samples", "250", "--calls", "2", "4"]
    assert "| DPM-Solver++(2M) | 4 |" in finish(start("compare_samplers.py", *args, **own_home))
    compared = json.loads((workdir / "samplers.json").read_text())
    of_evaluate = [results[of]["pixels"]["frechet_distance"] for of in ("generated", "test")]
    np.testing.assert_allclose([compared["distances"]["pixels"]["UniPC"]["4"], compared["test"]["pixels"]], of_evaluate)
    command = [sys.executable, Path(__file__).parents[1] / "benchmarks/seconds.py", "--runs", "tiny", workdir / "samplers.json"]
    subprocess.run([*command, "--original", workdir / "evaluation.json", "3", "--out", tmp_path / "seconds.png"], check=True)
    assert Image.open(tmp_path / "seconds.png").size[0] > 500
    for space, curves in compared["distances"].items():
        for name, curve in curves.items():
            assert set(curve) == ({"1", "2"} if name == "Heun" else {"2", "4"})  # one call where sigma falls to a tenth
            assert set(curve) == set(compared["seconds"][name])
            assert np.min(list(curve.values())) > np.max(compared["test"][space])
    assert Image.open(workdir / "samplers.png").size[0] > 500

    images = load_dataset("digits", split="test").images / 127.5 - 1
    np.save(tmp_path / "real.npy", np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1).astype(np.float32))
    finish(start("judge.py", "--samples", tmp_path / "real.npy", "--dataset", "digits", **own_home))
    results = json.loads((tmp_path / "real.judged.json").read_text())
    assert results["generated"] == results["test"]


@pytest.mark.slow
def test_mixture_draws_its_figures_and_resumes_in_a_folder_whose_name_is_a_pattern(tmp_path):
    workdir = tmp_path / "lr[1e-3] a\\b?"
    args = ["--workdir", workdir, "--iterations", "30", "--checkpoint-every", "10"]
    assert "%|" in run("mixture.py", *args)
    for name in ("figure.png", "score.png", "paths.png"):
        assert Image.open(workdir / name).size[0] > 500
    said = finish(start("mixture.py", *args, TQDM_DISABLE="1"))
    assert "step 30 of 30" in said
    assert "%|" not in said


@pytest.mark.slow
def test_coins_counts_heads_and_resumes(tmp_path):
    args = ["--workdir", tmp_path, "--iterations", "30", "--checkpoint-every", "10"]
    assert re.search(r"^fair coins 2[34]\.\d+ ± [34]\.\d+, exactly 36 in 0%$", run("coins.py", *args), re.MULTILINE)
    assert "step 30 of 30" in run("coins.py", *args)
    assert Image.open(tmp_path / "figure.png").size[0] > 500
