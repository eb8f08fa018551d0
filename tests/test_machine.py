import os
import platform
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from support import machine

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SCRIPT = """
import resource, jax, numpy as np
from support.machine import prepare_machine
prepare_machine()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    np.ones(50_000_000, np.uint8)
print(jax.config.jax_compilation_cache_dir, faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_freed_memory_is_kept_and_the_cache_is_in_the_home_folder(tmp_path):
    hidden = {"JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"HOME": str(tmp_path)}
    said = subprocess.check_output([sys.executable, "-c", SCRIPT], cwd=EXPERIMENTS, env=environment, text=True)
    folder, faults = said.split()
    assert Path(folder).parent == tmp_path / ".cache" / "diffusion_jax"
    assert int(faults) < 1000  # 12,207 pages of 4 kB where each array's memory goes back to the system


def test_a_kept_program_is_loaded_without_a_word_and_a_warning_of_jax_is_heard(tmp_path):
    script = "import logging, jax; from support import machine; machine.prepare_machine()"
    script += "; jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64)))"
    script += "; logging.getLogger('jax._src.xla_bridge').warning('a warning')"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], cwd=EXPERIMENTS, env=environment, capture_output=True, text=True)
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.endswith("a warning\n")
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("platform", "capability", "flags", "told"),
    [
        ("cpu", None, "flags : sse2 avx2 avx512f", True),
        ("cpu", None, "flags : avx512f avx512_bf16", False),
        ("cpu", None, "flags : amx_bf16 amx_tile", False),
        ("cpu", None, "Features : fp asimd bf16", False),
        ("gpu", "7.5", "", True),
        ("gpu", "8.0", "", False),
        ("gpu", "12.0", "", False),
        ("gpu", "gfx90a", "", False),
        ("tpu", None, "", False),
    ],
)
def test_bfloat16_where_it_is_emulated_is_told(monkeypatch, platform, capability, flags, told):
    device = types.SimpleNamespace(platform=platform, device_kind="this device", compute_capability=capability)
    monkeypatch.setattr(machine.jax, "devices", lambda: [device])
    monkeypatch.setattr(machine, "processor_flags", lambda: flags)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        machine.warn_of_emulated("float32")
        assert not warned
        machine.warn_of_emulated("bfloat16")
    assert [str(w.message) for w in warned] == [
        "this device has no bfloat16 arithmetic: --precision float32 is faster here"
    ] * told
