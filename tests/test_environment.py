"""What the environment of a script may be: JAX's variables, its terminal, its signals."""

import numpy as np
from runs import TINY, assert_same_run, finish, run, start

OTHER_RANDOM_NUMBERS = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_RANDOM_SEED_OFFSET": "7"}


def test_no_variable_changes_the_random_numbers(trained, tmp_path):
    finish(start("mnist.py", *TINY, "--workdir", tmp_path / "run", **OTHER_RANDOM_NUMBERS))
    assert_same_run(tmp_path / "run", trained)
    common = ["--workdir", trained, "--sampling-timesteps", "3", "--seed", "5"]
    run("sample.py", *common, "--num-samples", "5", "--out", tmp_path / "five.npy")
    finish(start("sample.py", *common, "--num-samples", "3", "--out", tmp_path / "three.npy", **OTHER_RANDOM_NUMBERS))
    np.testing.assert_allclose(np.load(tmp_path / "three.npy"), np.load(tmp_path / "five.npy")[:3], atol=1e-5)
