"""The README's Python, as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_library_is_used_as_the_readme_says():
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["samples"].shape == (8, 32, 32, 1)
    assert np.isfinite(names["loss"])


def test_it_is_changed_as_the_readme_says():
    schedule, sampler, network = BLOCKS[1:]
    names = {"np": np, "jnp": jnp, "jax": jax, "dj": dj}
    for block in (schedule, sampler, network):
        assert len(block.splitlines()) < 15
    exec(schedule + sampler, names)
    schedule, table = names["schedule"], names["churned_table"](names["schedule"], 0.5, 10)
    (signal_t, noise_t), (signal_s, noise_s) = schedule.at(table.t), schedule.at(np.append(table.t[1:], 0))
    np.testing.assert_allclose(table.a * signal_t + table.b, signal_s)
    np.testing.assert_allclose(table.a**2 * noise_t**2 + table.c**2, noise_s**2, atol=1e-12)
    names["params"] = {"w": jnp.zeros((2, 2)), "b": jnp.zeros((1, 2))}
    exec(network, names)
    gradient = names["gradient"](names["params"], jnp.ones((4, 2)), jax.random.split(jax.random.key(0), 4))
    assert jnp.abs(gradient["w"]).max() > 0
