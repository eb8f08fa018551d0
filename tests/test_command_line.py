"""What a person may type: a wrong value gets one line that names it, and nothing is touched."""

import dataclasses
import re
import socket
import sys
import types

import numpy as np
import pytest
from PIL import Image
from runs import TINY

import edit
import judge
import sample
import schedules
from support import image_run, vectors
from support.command_line import parse_command_line
from support.config import PRESETS, Config, described_by
from support.data import ImageData


def fails(capsys, monkeypatch, script, *args) -> str:
    """Run a script in this process (four devices); it must stop with status 2 and one line on stderr, which is returned."""
    module = __import__(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
    # It would change the process of the other tests too.
    for caller in (module, image_run):
        monkeypatch.setattr(caller, "prepare_machine", lambda: None, raising=caller is image_run)
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
    "--dataset no_such_data": ("no_such_data", "mnist", "fashion_mnist", "digits"),
    "--preset large": ("large", "paper", "small"),
    "--precision float8": ("float8", "float32", "bfloat16"),
    "--batch-size many": ("batch-size", "many"),
    "--no-such-flag 3": ("--no-such-flag",),
    "--batch-size 0": ("--batch-size", "at least 1", "got 0"),
    "--batch-size 6": ("multiple of the number of devices, 4", "got 6"),
    "--iterations -5": ("--iterations", "at least 1", "got -5"),
    "--num-timesteps 0": ("--num-timesteps", "at least 1", "got 0"),
    "--sampling-timesteps 501": ("--sampling-timesteps", "between 1 and num_timesteps = 500", "got 501"),
    "--sampling_timesteps 0": ("--sampling-timesteps", "between 1 and num_timesteps = 500", "got 0"),
    "--loss-type distilled --init x --sampling-timesteps 0": ("--sampling-timesteps", "between 1 and num_timesteps", "got 0"),
    "--dim-scales 1 2 4 8 8 8 8": ("multiples of 128", "got 32x32"),
    "--dim-scales 1 0": ("--dim-scales", "at least 1", "(1, 0)"),
    "--embed-dim 5": ("--embed-dim", "even", "got 5"),
    "--learning-rate nan": ("--learning-rate", "positive", "got nan"),
    "--ema-decay 1": ("--ema-decay", "less than 1", "got 1"),
    "--seed -1": ("--seed", "between 0", "got -1"),
    "--label-dropout 0": ("--label-dropout", "strictly between 0 and 1", "got 0"),
    "--preset": ("--preset",),
    "--dim-scales": ("--dim-scales", "one or more numbers", "got ()"),
    "--sigma-type learned --target-type pred_v": ("--loss-type", "hybrid or bound", "got l2"),
    "--sigma-type learned --loss-type hybrid --target-type pred_x_0": ("--target-type", "other than pred_x_0", "got pred_x_0"),
    "--loss-weighting min_snr --loss-type bound --sigma-type learned --target-type pred_v": ("--loss-weighting", "none"),
    "--loss-type hybrid": ("--loss-type", "l2 or l1", "got hybrid"),
    "--noise-schedule-type ve": ("--target-type", "other than pred_v with ve", "edm", "got pred_v"),
    "--noise-schedule-type flow --target-type pred_eps": ("--target-type", "other than pred_eps with flow", "got pred_eps"),
}


@pytest.mark.parametrize("args", BAD_MNIST)
def test_mnist_refuses_in_one_line(capsys, monkeypatch, tmp_path, args):
    line = fails(capsys, monkeypatch, "mnist", "--dataset", "digits", "--workdir", tmp_path / "new", *args.split())
    assert all(part in line for part in BAD_MNIST[args]), line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "value"), [("embed-dim", "8"), ("seed", "1"), ("target-type", "pred_eps")])
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
    "--eta 0.5": ("--eta", "0 unless --sampler is ddim, dpm_solver or dpm_solver_3m", "got 0.5"),
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


BAD = {
    "evaluate": ["--num-samples 99", "--bound-images 1", "--eta 0.5", "--sampling-timesteps 13", "--workdir no/run"],
    "edit": ["--workdir no/run", "--num-images 0", "--out x.jpg", "--out no/x.png", "--sampling-timesteps 13", "--what paint"],
    "compare_samplers": ["--workdir no/run", "--num-samples 99", "--calls 13", "--seed -1"],
    "mixture": ["--batch-size 0", "--ema-decay 2", "--iterations x", "--embed-dim -2"],
    "demo": ["--workdir no/run", "--port 0", "--port 65536"],
    "schedules": ["--num-timesteps 0", "--out x.jpg", "--out no/x.png"],
}


@pytest.mark.parametrize(("script", "args"), [(script, args) for script in BAD for args in BAD[script]])
def test_other_scripts_name_the_option_and_what_they_got(capsys, monkeypatch, trained, tmp_path, script, args):
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    workdir, (option, value) = tmp_path / "new" if script == "mixture" else trained, args.split()
    more = [] if "--workdir" in args or script == "schedules" else ["--workdir", workdir]
    line = fails(capsys, monkeypatch, script, *more, option, value)
    assert option in line or option[2:].replace("-", "_") in line, line
    assert re.search(rf"(got|choice|int\(\) with base 10:) '?{re.escape(value)}\b", line), line
    assert not (tmp_path / "new").exists()


BAD_SAMPLES = {
    "pickled": np.array([{}], object),
    "bytes": np.zeros((200, 28, 28, 1), np.uint8),
    "from 0 to 1": np.zeros((200, 32, 32, 1), np.float32),
    "from 0 to 255": np.full((200, 32, 32, 1), 255, np.float32),
    "not finite": np.full((200, 32, 32, 1), np.nan, np.float32),
}


@pytest.mark.parametrize("what", ["nothing", *BAD_SAMPLES])
def test_judge_refuses_in_one_line(capsys, monkeypatch, tmp_path, what):
    file = tmp_path / "x.npy"
    if what != "nothing":
        np.save(file, BAD_SAMPLES[what], allow_pickle=True)
    assert str(file) in fails(capsys, monkeypatch, "judge", "--samples", file, "--dataset", "digits")


def test_edit_needs_steps_from_a_fifth_of_the_way_up(capsys, monkeypatch, trained):
    args = ["--workdir", trained, "--what", "image-to-image", "--sampling-timesteps", "4"]
    message = "--sampling-timesteps must be large enough for a step from t <= 0.2 T (image-to-image), got 4"
    assert message in fails(capsys, monkeypatch, "edit", *args)


def test_both_spellings_of_a_flag_are_the_same():
    for flag in ("--batch-size", "--batch_size"):
        small = PRESETS["small"]
        assert parse_command_line(small, "", [flag, "64"]) == dataclasses.replace(small, batch_size=64)


def test_the_paper_preset_is_the_published_recipe():
    paper = PRESETS["paper"]
    published = {
        "embed_dim": 128, "dim_scales": (1, 2, 4, 8), "num_timesteps": 500, "noise_schedule_type": "cosine",
        "target_type": "pred_x_0", "sigma_type": "upper_bound", "loss_type": "l2", "batch_size": 512, "iterations": 2000,
        "learning_rate": 1e-3, "precision": "float32",
    }  # fmt: skip
    assert {name: getattr(paper, name) for name in published} == published
    assert PRESETS["small"].target_type == PRESETS["improved"].target_type == "pred_v"


def test_a_preset_asks_for_classes_only_where_there_are_some():
    digits = ImageData("digits", np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int32))
    small, paper = PRESETS["small"], dataclasses.replace(PRESETS["paper"], conditional=True)
    assert described_by(small, digits, []).conditional
    assert described_by(paper, digits, ["--conditional"]).conditional
    assert not described_by(PRESETS["paper"], digits, []).conditional
    unlabelled = digits._replace(num_classes=0)
    assert not described_by(small, unlabelled, []).conditional
    for config in (small, paper):
        with pytest.raises(ValueError, match="--conditional must be left out for images without classes"):
            described_by(config, unlabelled, ["--conditional"])
    guided = dataclasses.replace(
        small, loss_type="mean_flow", noise_schedule_type="flow", target_type="pred_u", training_guidance=2
    )
    assert described_by(guided, digits, []).training_guidance == 2
    with pytest.raises(ValueError, match="--training-guidance must be 1 for images without classes, got 2"):
        described_by(guided, unlabelled, [])


@pytest.mark.parametrize("what", ["nothing", "text", "too large", "a workdir inside"])
def test_folder_refuses_in_one_line(capsys, monkeypatch, tmp_path, what):
    (tmp_path / "photos").mkdir()
    if what == "text":
        (tmp_path / "photos" / "x.png").write_text("not an image")
    if what == "too large":
        Image.new("1", (20_000, 20_000)).save(tmp_path / "photos" / "x.png")
    workdir = tmp_path / "new"
    if what == "a workdir inside":  # by a link
        Image.new("L", (8, 8)).save(tmp_path / "photos" / "x.png")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
        workdir = tmp_path / "elsewhere" / "new"
    line = fails(capsys, monkeypatch, "mnist", "--dataset", tmp_path / "photos", "--workdir", workdir, "--embed-dim", "4")
    assert str(tmp_path / "photos") in line
    assert ("would learn its own samples" in line) == (what == "a workdir inside")
    assert not workdir.exists()


def test_demo_needs_gradio_and_a_free_port(capsys, monkeypatch, trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert 'the page needs Gradio: pip install "gradio>=6"' in fails(capsys, monkeypatch, "demo", "--port", port)
        monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
        line = fails(capsys, monkeypatch, "demo", "--workdir", trained, "--port", port)
        assert f"--port must be a free one on 127.0.0.1, got {port}" in line


def test_a_run_with_another_number_of_steps_is_told_why_and_what_to_do(capsys, monkeypatch, trained):
    line = fails(capsys, monkeypatch, "mnist", *TINY, "--workdir", trained, "--iterations", "9")
    assert "holds a run with --iterations 8, and this command has 9: its learning rate falls to 0 at that many steps" in line
    assert line.endswith("repeat that run's --iterations, or choose another --workdir for a run from the start")


def test_a_path_may_begin_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    configs = {PRESETS["small"]: ("workdir", "dataset", "data_dir"), vectors.Config(): ("workdir",)}
    configs |= {judge.Config("x"): ("samples", "dataset", "data_dir")}
    configs |= {sample.Config(): ("workdir", "out"), schedules.Config(): ("out",), edit.Config(): ("out",)}
    for config, names in configs.items():
        args = [word for name in names for word in (f"--{name.replace('_', '-')}", "~/a~b")]
        given = parse_command_line(config, "", args)
        assert [getattr(given, name) for name in names] == ["/home/me/a~b"] * len(names)


def test_an_ending_may_be_in_capitals(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["schedules", "--num-timesteps", "1", "--out", str(tmp_path / "x.PNG")])
    schedules.main()
    picture = Image.open(tmp_path / "x.PNG")
    assert (picture.format, picture.size[0] > 500) == ("PNG", True)


def test_help_of_mnist_is_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(Config(), "", ["--help"])
    _, *parts = re.split(r"(\w+) options\b", capsys.readouterr().out)
    groups = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(groups) == ["run", "data", "network", "diffusion", "training", "output"]
    for title, option in (("data", "--data-dir"), ("network", "--embed-dim"), ("training", "--warmup"), ("run", "--seed")):
        assert [group for group in groups if option in groups[group]] == [title]


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
