"""Each script, run as a person would."""

import csv
import json
import re
import shutil
import struct
import sys

import numpy as np
import pytest
import vectors
from command_line import parse_command_line
from PIL import Image
from runs import TINY, final_state, finish, run, start
from tensorboardX.proto.event_pb2 import Event

from diffusion_jax.data import load_dataset


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


def test_the_same_command_again_finds_it_done(trained):
    before = (trained / "metrics.csv").read_text()
    assert "resuming" in run("mnist.py", *TINY, "--workdir", trained)
    assert (trained / "metrics.csv").read_text() == before


def test_sample_draws_the_same_whatever_the_count_and_the_devices(trained, tmp_path):
    common = ["--workdir", trained, "--sampling_timesteps", "3", "--seed", "5", "--sampler", "ddim", "--eta", "0.5"]
    run("sample.py", *common, "--num-samples", "3", "--out", tmp_path / "a.npy")
    run("sample.py", *common, "--num_samples", "5", "--out", tmp_path / "b.npy", devices=4)
    few, many = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert many.shape == (5, 32, 32, 1)
    assert many.dtype == np.float32
    assert np.abs(many).max() <= 1
    np.testing.assert_allclose(few, many[:3], atol=1e-5)
    assert np.ptp(many, axis=0).max() > 0.01


def test_sample_writes_a_grid(trained, tmp_path):
    args = ["--sampler", "dpm_solver", "--num-samples", "7", "--out", tmp_path / "grid.png"]
    run("sample.py", "--workdir", trained, *args)
    assert Image.open(tmp_path / "grid.png").size == (96, 96)


LEARNED = ["--sigma-type", "learned", "--loss-type", "hybrid", "--target-type", "pred_v"]


@pytest.fixture(scope="session")
def conditional(tmp_path_factory):
    """The folder of a tiny run that learned classes and variances."""
    workdir = tmp_path_factory.mktemp("runs") / "conditional"
    run("mnist.py", *TINY, "--conditional", *LEARNED, "--workdir", workdir)
    return workdir


def test_a_conditional_run_draws_the_classes_that_are_asked_for(conditional, tmp_path):
    args = ["--workdir", conditional, "--labels", "7", "7", "3", "--guidance-scale", "2", "--out", tmp_path / "x.npy"]
    run("sample.py", *args)
    assert np.load(tmp_path / "x.npy").shape == (3, 32, 32, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "columns"), [("inpaint", 6), ("interpolate", 11), ("image-to-image", 5)])
def test_edit_writes_a_row_for_each_image(conditional, tmp_path, what, columns):
    run("edit.py", "--workdir", conditional, "--what", what, "--num-images", "2", "--out", tmp_path / "edit.png")
    assert Image.open(tmp_path / "edit.png").size == (64 * columns, 64 * 2)


@pytest.mark.slow
def test_evaluate_judges_real_images_better_than_those_of_a_run_of_eight_steps(trained, conditional, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    args = ["--workdir", workdir, "--num-samples", "250", "--sampling-timesteps", "4", "--bound-images", "4"]
    said = finish(start("evaluate.py", *args, HOME=str(tmp_path)))  # whose classifier is trained anew
    results = json.loads((workdir / "evaluation.json").read_text())
    assert results["classifier_accuracy"] > 0.95
    assert results["generated"]["frechet_distance"] > 10 * results["test"]["frechet_distance"]
    assert results["generated"]["precision"] < 0.2 < 0.6 < results["test"]["precision"]
    assert results["bits_per_dim"] > 1
    assert "| frechet distance |" in said
    assert Image.open(workdir / "bound.png").size[0] > 500

    shutil.copytree(conditional, tmp_path / "classes")
    args = ["--workdir", tmp_path / "classes", "--num-samples", "100", "--sampling-timesteps", "2", "--bound-images", "1"]
    finish(start("evaluate.py", *args, "--guidance-scale", "3", HOME=str(tmp_path)))
    results = json.loads((tmp_path / "classes" / "evaluation.json").read_text())
    assert results["generated"]["classified_as_asked"] < 0.5 < 0.9 < results["test"]["classified_as_asked"]

    args = ["--workdir", workdir, "--num-samples", "100", "--calls", "2", "4"]
    assert "| DPM-Solver++(2M) | 4 |" in finish(start("compare_samplers.py", *args, HOME=str(tmp_path)))
    distances = json.loads((workdir / "samplers.json").read_text())
    assert all(
        set(curve) == {"2", "4"} and min(curve.values()) > distances["test"] for curve in distances["distances"].values()
    )
    assert Image.open(workdir / "samplers.png").size[0] > 500

    images = load_dataset("digits", split="test").images / 127.5 - 1
    np.save(tmp_path / "real.npy", np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1).astype(np.float32))
    finish(start("judge.py", "--samples", tmp_path / "real.npy", "--dataset", "digits", HOME=str(tmp_path)))
    results = json.loads((tmp_path / "real.json").read_text())
    assert results["generated"] == results["test"]


def test_mixture_draws_its_figures_and_resumes(tmp_path):
    args = ["--workdir", tmp_path, "--iterations", "30", "--checkpoint-every", "10"]
    assert "%|" in run("mixture.py", *args)
    for name in ("figure.png", "score.png"):
        assert Image.open(tmp_path / name).size[0] > 500
    said = finish(start("mixture.py", *args, TQDM_DISABLE="1"))
    assert "step 30 of 30" in said
    assert "%|" not in said


@pytest.mark.parametrize("no_color", ["1", ""])
def test_help_is_plain_where_no_color_is_asked_for(capsys, monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(SystemExit):
        parse_command_line(vectors.Config(), "What it does.\n\npython first.py\npython second.py", ["--help"])
    said = capsys.readouterr().out
    assert ("\033[" in said) == (not no_color)
    assert "\npython second.py" in said


def test_coins_counts_heads_and_resumes(tmp_path):
    args = ["--workdir", tmp_path, "--iterations", "30", "--checkpoint-every", "10"]
    assert re.search(r"^fair coins 2[34]\.\d+ ± [34]\.\d+, exactly 36 in 0%$", run("coins.py", *args), re.MULTILINE)
    assert "step 30 of 30" in run("coins.py", *args)
    assert Image.open(tmp_path / "figure.png").size[0] > 500


@pytest.mark.slow
def test_folder_trains_on_images_of_any_size_and_mode(tmp_path):
    for number, (size, mode) in enumerate([((40, 30), "RGB"), ((16, 64), "L"), ((20, 20), "RGBA"), ((9, 9), "P")]):
        (tmp_path / "photos" / "more").mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, 200).save(tmp_path / "photos" / ("more" if number % 2 else ".") / f"{number}.png")
    args = ["--folder", tmp_path / "photos", "--size", "8", "--embed-dim", "4", "--dim-scales", "1", "2", "--batch-size", "8"]
    args += ["--iterations", "6", "--sample-every", "4", "--num-samples", "5", "--workdir", tmp_path / "run"]
    assert "4 images" in run("folder.py", *args, devices=2)
    for name in ("samples_000004.png", "samples.png"):
        picture = Image.open(tmp_path / "run" / name)
        assert (picture.size, picture.mode) == ((24, 16), "RGB")


@pytest.mark.parametrize("what", ["nothing", "text"])
def test_folder_refuses_in_one_line(capsys, monkeypatch, tmp_path, what):
    if what == "text":
        (tmp_path / "x.png").write_text("not an image")
    line = fails(capsys, monkeypatch, "folder", "--folder", tmp_path, "--workdir", tmp_path / "new", "--embed-dim", "4")
    assert str(tmp_path) in line
    assert not (tmp_path / "new").exists()


def test_schedules_draws_its_figure(capsys, monkeypatch, tmp_path):
    import schedules

    monkeypatch.setattr(sys, "argv", ["schedules", "--num-timesteps", "1", "--out", str(tmp_path / "x.png")])
    schedules.main()
    capsys.readouterr()
    assert Image.open(tmp_path / "x.png").size[0] > 500
    assert "--num-timesteps" in fails(capsys, monkeypatch, "schedules", "--num-timesteps", "0")


def fails(capsys, monkeypatch, script, *args) -> str:
    """Run a script in this process (four devices); it must stop with status 2 and one line on stderr, which is returned."""
    module = __import__(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
    # It would change the process of the other tests too.
    monkeypatch.setattr(module, "prepare_machine", lambda: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


BAD_MNIST = {
    "--target-type pred_noise": ("pred_noise", "pred_x_0", "pred_eps", "pred_v"),
    "--sigma-type tiny": ("tiny", "upper_bound", "lower_bound", "zero"),
    "--noise-schedule-type sigmoid": ("sigmoid", "linear", "cosine"),
    "--loss-type huber": ("huber", "l1", "l2"),
    "--dataset cifar10": ("cifar10", "mnist", "fashion_mnist", "digits"),
    "--preset large": ("large", "paper", "small"),
    "--precision float8": ("float8", "float32", "bfloat16"),
    "--batch-size many": ("batch-size", "many"),
    "--no-such-flag 3": ("--no-such-flag",),
    "--batch-size 0": ("--batch-size", "at least 1", "got 0"),
    "--batch-size 6": ("multiple of the 4 devices", "got 6"),
    "--iterations -5": ("--iterations", "at least 1", "got -5"),
    "--num-timesteps 0": ("--num-timesteps", "at least 1", "got 0"),
    "--sampling-timesteps 501": ("sampling_timesteps", "between 1 and num_timesteps = 500", "got 501"),
    "--sampling_timesteps 0": ("sampling_timesteps", "between 1 and num_timesteps = 500", "got 0"),
    "--dim-scales 1 2 4 8 8 8 8": ("multiples of 64", "got 32x32"),
    "--dim-scales 1 0": ("--dim-scales", "at least 1", "(1, 0)"),
    "--embed-dim 5": ("--embed-dim", "even", "got 5"),
    "--learning-rate nan": ("--learning-rate", "positive", "got nan"),
    "--ema-decay 1": ("--ema-decay", "less than 1", "got 1"),
    "--seed -1": ("--seed", "between 0", "got -1"),
    "--label-dropout 1.5": ("--label-dropout", "between 0 and 1", "got 1.5"),
    "--sigma-type learned --target-type pred_v": ("--loss-type", "hybrid or bound", "got l2"),
    "--sigma-type learned --loss-type hybrid": ("--target-type", "pred_eps or pred_v", "got pred_x_0"),
    "--loss-weighting min_snr --loss-type bound --sigma-type learned --target-type pred_v": ("--loss-weighting", "none"),
    "--loss-type hybrid": ("--loss-type", "l2 or l1", "got hybrid"),
}


@pytest.mark.parametrize("args", BAD_MNIST)
def test_mnist_refuses_in_one_line(capsys, monkeypatch, tmp_path, args):
    line = fails(capsys, monkeypatch, "mnist", "--dataset", "digits", "--workdir", tmp_path / "new", *args.split())
    assert all(part in line for part in BAD_MNIST[args]), line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "value"), [("embed-dim", "8"), ("seed", "1"), ("iterations", "9"), ("target-type", "pred_v")])
def test_another_config_in_the_same_workdir_is_refused(capsys, monkeypatch, trained, name, value):
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    line = fails(capsys, monkeypatch, "mnist", *TINY, "--workdir", trained, f"--{name}", value)
    assert f"--{name}" in line
    assert value in line
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("script", ["mnist", "mixture"])
def test_a_folder_of_other_things_is_not_a_workdir(capsys, monkeypatch, tmp_path, script):
    (tmp_path / "thesis.tex").write_text("mine")
    args = [*TINY] if script == "mnist" else []
    assert str(tmp_path) in fails(capsys, monkeypatch, script, *args, "--workdir", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


BAD_SAMPLE = {
    "--sampler euler": ("euler", "ancestral", "ddim", "dpm_solver"),
    "--sampling-timesteps 13": ("between 1 and num_timesteps = 12", "got 13"),
    "--sampler ddim --eta 1.5": ("eta must be between 0 and 1", "got 1.5"),
    "--eta 0.5": ("--eta", "0 unless --sampler is ddim or dpm_solver", "got 0.5"),
    "--labels 10": ("--labels", "between 0 and 9", "got 10"),
    "--labels 7 7 3": ("--labels", "left out unless the run is --conditional", "(7, 7, 3)"),
    "--guidance-scale 2": ("--guidance-scale", "1 unless the run is --conditional", "got 2"),
    "--guidance-scale -1": ("--guidance-scale", "at least 0", "got -1"),
    "--out x.jpg": ("--out", ".png or .npy", "x.jpg"),
    "--out no/such/folder/x.png": ("--out", "folder that exists"),
    "--num-samples 0": ("--num-samples", "at least 1", "got 0"),
    "--workdir no/such/run": ("--workdir", "no/such/run"),
}


@pytest.mark.parametrize("args", BAD_SAMPLE)
def test_sample_refuses_in_one_line(capsys, monkeypatch, trained, args):
    workdir = [] if "--workdir" in args else ["--workdir", trained]
    line = fails(capsys, monkeypatch, "sample", *workdir, *args.split())
    assert all(part in line for part in BAD_SAMPLE[args]), line


@pytest.mark.parametrize(
    "args", ["--num-samples 99", "--bound-images -1", "--eta 0.5", "--sampling-timesteps 13", "--workdir no/run"]
)
def test_evaluate_refuses_in_one_line(capsys, monkeypatch, trained, args):
    workdir = [] if "--workdir" in args else ["--workdir", trained]
    assert args.split()[1] in fails(capsys, monkeypatch, "evaluate", *workdir, *args.split())


@pytest.mark.parametrize("what", ["nothing", "pickled", "bytes"])
def test_judge_refuses_in_one_line(capsys, monkeypatch, tmp_path, what):
    file = tmp_path / "x.npy"
    if what != "nothing":
        objects = np.array([{}], object) if what == "pickled" else np.zeros((200, 28, 28, 1), np.uint8)
        np.save(file, objects, allow_pickle=True)
    assert str(file) in fails(capsys, monkeypatch, "judge", "--samples", file, "--dataset", "digits")


@pytest.mark.parametrize(
    "args", ["--workdir no/run", "--num-images 0", "--out x.jpg", "--sampling-timesteps 13", "--what paint"]
)
def test_edit_refuses_in_one_line(capsys, monkeypatch, trained, args):
    workdir = [] if "--workdir" in args else ["--workdir", trained]
    assert args.split()[1] in fails(capsys, monkeypatch, "edit", *workdir, *args.split())


@pytest.mark.parametrize("args", ["--workdir no/run", "--num-samples 99", "--calls 13", "--seed -1"])
def test_compare_samplers_refuses_in_one_line(capsys, monkeypatch, trained, args):
    workdir = [] if "--workdir" in args else ["--workdir", trained]
    assert args.split()[1] in fails(capsys, monkeypatch, "compare_samplers", *workdir, *args.split())


@pytest.mark.parametrize("args", ["--batch-size 0", "--ema-decay 2", "--iterations x"])
def test_mixture_refuses_in_one_line(capsys, monkeypatch, tmp_path, args):
    line = fails(capsys, monkeypatch, "mixture", "--workdir", tmp_path / "new", *args.split())
    assert args.split()[1] in line
    assert not (tmp_path / "new").exists()


def test_both_spellings_of_a_flag_are_the_same():
    import mnist
    from command_line import parse_command_line

    for flag in ("--batch-size", "--batch_size"):
        assert parse_command_line(mnist.Config(), "", [flag, "64"]).batch_size == 64


def test_the_paper_preset_is_the_published_recipe():
    import mnist

    paper = mnist.PRESETS["paper"]
    published = {
        "embed_dim": 128, "dim_scales": (1, 2, 4, 8), "num_timesteps": 500, "noise_schedule_type": "cosine",
        "target_type": "pred_x_0", "sigma_type": "upper_bound", "loss_type": "l2", "batch_size": 512, "iterations": 2000,
        "learning_rate": 1e-3, "precision": "float32",
    }  # fmt: skip
    assert {name: getattr(paper, name) for name in published} == published
