"""Pack what benchmarks/accelerator.py needs on a machine with a GPU, Python, JAX and PyTorch, but no network.

python benchmarks/travel.py --data-dir DIR --reference ../diffusion

fills travel/ (ignored by git, under 60 MiB): wheels of the small packages, the prepared MNIST and the original's source. Copy
the project there with it, and run:

    python3 -m pip install --no-index --no-deps --upgrade --target /tmp/site travel/wheels/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/accelerator.py --out results --data-dir travel/data --reference travel/reference
"""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import tyro

PACKAGES = (  # what a GPU image with JAX, Flax and PyTorch may lack, and what those depend on
    "array_record", "beartype", "dm-tree", "docstring-parser", "einops", "etils", "google-crc32c", "googleapis-common-protos",
    "immutabledict", "importlib_resources", "jaxtyping", "promise", "safetensors", "simple-parsing", "six",
    "tensorboardX", "tensorflow-datasets", "tensorflow-metadata", "termcolor", "toml", "typeguard", "tyro",
)  # fmt: skip
PURE = ("promise",)
"""Without a wheel on the index."""
MEGABYTES = 60


@dataclasses.dataclass(frozen=True)
class Options:
    data_dir: str
    """A TFDS directory with the prepared MNIST."""
    reference: str
    """A clone of the original, with its src/ folder."""
    out: str = "travel"
    python_version: str = "3.12"
    """Of the machine with the GPU."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    out = Path(options.out)
    data, source = Path(options.data_dir) / "mnist", Path(options.reference) / "src"
    for folder in (data, source):
        if not folder.is_dir():
            sys.exit(f"error: {folder} must be a folder")
    if out.exists():
        sys.exit(f"error: --out must be a new folder, got {out}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (35, 34, 31, 28, 27, 24, 17)] + [
        "--platform=manylinux2014_x86_64"
    ]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={options.python_version}", *platforms]
    names = [name for name in PACKAGES if name not in PURE]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", *target, "--dest", out / "wheels", *names], check=True)
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", out / "wheels", *PURE], check=True)
    shutil.copytree(data, out / "data" / "mnist")
    shutil.copytree(source, out / "reference" / "src")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**20
    print(f"{out}: {size:.1f} MiB")
    if size > MEGABYTES:
        sys.exit(f"error: {out} must be at most {MEGABYTES} MiB, got {size:.1f}")


if __name__ == "__main__":
    main()
