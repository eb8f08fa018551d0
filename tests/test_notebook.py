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
