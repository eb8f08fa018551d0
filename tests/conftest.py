import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"  # compiles twice as fast

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


@pytest.fixture
def keys():
    return jax.random.split(jax.random.key(0), 8)
