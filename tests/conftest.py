import os
import signal
import tempfile

if "COMPILED_BY_TESTS" not in os.environ:  # for scripts that tests start; pytest-xdist's workers inherit it
    compiled = tempfile.TemporaryDirectory()
    os.environ["COMPILED_BY_TESTS"] = compiled.name
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; scripts would ignore Ctrl-C as well
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Compiles twice as fast without optimization, and a tenth faster again in one piece. runs.py has the same flags.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)

from pathlib import Path

import chex
import hypothesis
import jax
import pytest

chex.set_n_cpu_devices(4)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


@pytest.fixture(params=[jax.jit, lambda fn: fn], ids=["jit", "nojit"])
def variant(request):
    """Compile the function under test, or leave it as it is."""
    return request.param


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a tiny run of experiments/mnist.py that nothing disturbed."""
    from runs import TINY, run

    workdir = tmp_path_factory.mktemp("runs") / "mnist"
    said = run("mnist.py", *TINY, "--workdir", workdir)
    assert "small preset" in said
    assert "1,500 images of digits" in said
    return workdir


@pytest.fixture
def keys():
    return jax.random.split(jax.random.key(0), 8)
