"""The two archives of a release, and the library in an environment with only its own dependencies."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import diffusion_jax

ROOT = Path(diffusion_jax.__file__).parent.parent
SOURCES = {f"diffusion_jax/{file.name}" for file in (ROOT / "diffusion_jax").iterdir() if file.is_file()}
IMPORTED_AS = {"google-crc32c": "google_crc32c", "pillow": "PIL", "scikit-learn": "sklearn"}
USE_IT = """
import sys
for name in {forbidden}:
    sys.modules[name] = None  # its import raises ImportError
import jax, jax.numpy as jnp, diffusion_jax as dj
assert {wheel!r} in dj.__file__, dj.__file__
schedule, keys = dj.cosine_schedule(10), jax.random.split(jax.random.key(0), 2)
denoise = dj.make_denoiser(schedule, lambda x_t, t: jnp.zeros_like(x_t), "pred_x_0")
print(dj.sample(denoise, dj.unipc_table(schedule), keys, (3,)).shape)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """Built from a copy: pytest's workers may build at the same time, and setuptools writes beside the sources."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("archives")
    shutil.copytree(ROOT / "diffusion_jax", copy / "diffusion_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    return out


def test_the_wheel_holds_the_library_alone(archives):
    (wheel,) = archives.glob("*.whl")
    assert wheel.name == f"diffusion_jax-{diffusion_jax.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == SOURCES
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_archive_holds_all_that_the_wheel_needs(archives):
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert names >= SOURCES | {"LICENSE", "README.md", "pyproject.toml"}


def test_the_wheel_works_without_the_packages_of_the_experiments(archives, tmp_path):
    (wheel,) = archives.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = [re.split(r"[<>=! ]", requirement)[0] for requirement in extras["experiments"]]
    forbidden = [IMPORTED_AS.get(package, package.replace("-", "_")) for package in packages]
    command = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + USE_IT.format(forbidden=forbidden, wheel=str(tmp_path))
    said = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert said.stdout == "(2, 3)\n"
