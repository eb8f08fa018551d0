import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SCRIPT = """
import resource, jax, numpy as np
from machine import prepare_machine
prepare_machine()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    np.ones(50_000_000, np.uint8)
print(jax.config.jax_compilation_cache_dir, faults() - before)
"""


def said(**environment: str) -> list[str]:
    hidden = {"JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=EXPERIMENTS, env=inherited | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_freed_memory_is_kept_and_the_cache_is_in_the_home_folder(tmp_path):
    folder, faults = said(HOME=str(tmp_path))
    assert Path(folder).parent == tmp_path / ".cache" / "diffusion_jax"
    assert int(faults) < 1000  # 12,207 pages of 4 kB where each array's memory goes back to the system


def test_a_cache_that_the_user_chose_is_left_alone(tmp_path):
    assert said(JAX_COMPILATION_CACHE_DIR=str(tmp_path))[0] == str(tmp_path)
