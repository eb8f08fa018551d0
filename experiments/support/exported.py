"""A trained network as one file: its parameters by name, and the options of its run in the metadata (docs/export.md)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import DTypeLike, PyTree
from safetensors import SafetensorError, safe_open
from safetensors.flax import load_file, save

SUFFIX = ".safetensors"
NEEDED = "a trained network must be in a file of experiments/export.py"


def write_model(file: Path, config: Any, params: PyTree, step: int, dtype: DTypeLike) -> None:
    """Write the parameters in `dtype`; what the file held before stays until the new one is whole.

    The file leaves out the run's folder and data directory, and keeps only the last part of the path `init`.
    """
    options = dataclasses.asdict(config) | {"workdir": "", "data_dir": None, "init": config.init and Path(config.init).name}
    tensors = {name: jnp.asarray(x, dtype) for name, x in flatten_dict(params, sep="/").items()}
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(save(tensors, {"config": json.dumps(options), "step": str(step)}))
    new.replace(file)


def read_options(file: Path) -> dict[str, Any]:
    """The options of the run, as they were written. Raises ValueError if the file is not one of `write_model`."""
    try:
        options = json.loads(_metadata(file)["config"])
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{NEEDED}; {file} has damaged options ({problem})") from None
    if not isinstance(options, dict):
        raise ValueError(f"{NEEDED}; {file} has no options but {options!r:.50}")
    return options


def read_params(file: Path, like: PyTree) -> tuple[PyTree, int]:
    """The parameters in the dtypes of `like`, and their step. Raises ValueError unless names and shapes are those of `like`."""
    found = {name: np.asarray(x) for name, x in load_file(file).items()}
    wanted = {name: np.asarray(x) for name, x in flatten_dict(like, sep="/").items()}
    for name in {**wanted, **found}:
        theirs, expected = (arrays[name].shape if name in arrays else "no such parameter" for arrays in (found, wanted))
        if theirs != expected:
            raise ValueError(f"{file} has {name} {theirs}, and the options of the run say {expected}")
    params = {name: x.astype(wanted[name].dtype) for name, x in found.items()}
    return unflatten_dict(params, sep="/"), int(_metadata(file)["step"])


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "flax") as tensors:
            metadata = tensors.metadata() or {}
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"{NEEDED}; {file}: {problem}") from None
    if not {"config", "step"} <= set(metadata):
        raise ValueError(f"{NEEDED}; {file} has no options in it")
    return metadata
