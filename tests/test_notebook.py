import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from runs import COMPILED_ONCE, EXPERIMENTS, TINY


@pytest.mark.slow
def test_the_whole_notebook_runs(tmp_path, monkeypatch):
    settings = {
        "MNIST_OPTIONS": " ".join(TINY),
        "MNIST_WORKDIR": str(tmp_path / "mnist"),
        "MNIST_CALLS": "4",
        "JAX_PLATFORMS": "cpu",
    }
    for name, value in {**settings, **COMPILED_ONCE}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXPERIMENTS / "mnist_colab.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXPERIMENTS)}}).execute()
    shown = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/" in str(output.get("data", {}).keys())
    ]
    assert len(shown) >= 6  # the loss, a preview, the figure, the curves, the animation, samples
    for name in ("figure.png", "training.png", "denoising.gif", "samples.png"):
        Image.open(tmp_path / "mnist" / name).verify()


STOPPED = """
import os, signal, sys, time

def save(*_):
    time.sleep(1)
    open("saved", "w").write(str(os.getsid(0) == os.getpid()))
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
open("ready", "w").close()
time.sleep(60)
"""


def test_what_the_stop_button_stops_saves_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "long.py").write_text(STOPPED)
    cells = nbformat.read(EXPERIMENTS / "mnist_colab.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if "def run(" in cell.source]
    names = {"ROOT": tmp_path, "WORKDIR": tmp_path / "mnist", "subprocess": subprocess, "sys": sys}
    exec(source.split('run("mnist.py"')[0], names)

    def watch():
        if os.path.exists("ready"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        names["run"]("long.py", watch=watch)
    assert (tmp_path / "saved").read_text() == "True"


def test_the_address_is_asked_for_once_and_kept_once_it_was_cloned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = nbformat.read(EXPERIMENTS / "mnist_colab.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if "git" in cell.source and "clone" in cell.source]
    answers, commands = iter(["https://wrong\n", " https://right "]), []

    def run(command, **_):
        commands.append(command)
        if "https://wrong" in command:
            raise subprocess.CalledProcessError(128, command)

    def install():
        exec(source, {"os": os, "KEEP_IN_DRIVE": True, "input": lambda _: next(answers)})

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError):
        install()
    install()
    shutil.rmtree("diffusion_jax")  # as on a new machine
    install()
    addresses = [command[-2] for command in commands if command[:2] == ["git", "clone"]]
    assert addresses == ["https://wrong", "https://right", "https://right"]
