"""Set up a run of mnist.py: its options, data, first state and folder."""

import dataclasses
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

import diffusion_jax as dj
from support import model
from support.arrays import checksum
from support.command_line import one_line_errors, require
from support.config import MAY_DIFFER, Config, described_by, parse_run
from support.data import ImageData, load_dataset
from support.image_folder import check_apart
from support.machine import prepare_machine, random_key
from support.processes import (
    check_same_everywhere,
    failing_together,
    from_first_process,
    in_turn,
    is_first_process,
    join_processes,
)
from support.saved_run import open_run
from support.workdir import open_workdir

INIT_MUST_SHARE = ("target_type", "noise_schedule_type", "num_timesteps", "time_input", "image_size", "channels", "conditional")
INIT_MUST_SHARE += ("network", "embed_dim", "dim_scales", "depth", "patch_size", "sigma_type")


class ImageRun(NamedTuple):
    config: Config
    """The options, with what `described_by` adds from the data."""
    data: ImageData
    """The training split."""
    schedule: dj.NoiseSchedule
    state: dj.TrainState
    """The state before the first step."""
    workdir: Path
    train_key: Key[Array, ""]
    sample_key: Key[Array, ""]


def set_up(description: str | None) -> ImageRun:
    """The run that the command line describes. On a wrong option, wrong data or another run's folder, exits with one line."""
    prepare_machine()
    with one_line_errors():
        join_processes(sys.argv[1:])
        with failing_together():
            config = parse_run(description)
            schedule = model.make_schedule(config)
            model.default_table(config, schedule, config.sampling_timesteps)  # fails before a folder is made, if at all
        data = in_turn(lambda: load_dataset(config.dataset, config.data_dir, "train", config.image_size, config.channels))
        with failing_together():
            config = described_by(config, data, sys.argv)
            if config.images is not None and Path(config.dataset).is_dir():
                check_apart(Path(config.dataset), Path(config.workdir))
            init_key, train_key, sample_key = jax.random.split(random_key(config.seed), 3)
            state = model.initial_state(config, init_key)
        config, state = with_init(config, state)
        check_same_everywhere("options and data", fingerprint(config, data))
        with failing_together():
            more = {name: getattr(config, name) for name in ("num_classes", "images", "teacher")}
            # the same images and the same teacher may be elsewhere now
            moved = {name for name, known in (("dataset", config.images), ("init", config.teacher)) if known is not None}
            workdir = open_workdir(config, MAY_DIFFER | moved, **more) if is_first_process() else Path(config.workdir)
    if is_first_process():
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        classes = f" in {data.num_classes} classes" if config.conditional else "" if data.num_classes else " without classes"
        images = f"{len(data.images):,} images of {data.name}{classes}"
        print(f"{config.preset} preset on {devices}, {images}, in {workdir}", file=sys.stderr)
    return ImageRun(config, data, schedule, state, workdir, train_key, sample_key)


def fingerprint(config: Config, data: ImageData) -> int:
    """A checksum of the options and the data, which all processes of a run must share."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in {"workdir", "data_dir"}}
    of_data = checksum(np.asarray(data.images), data.labels) if config.images is None else config.images
    return zlib.crc32(repr(options).encode(), of_data) >> 1


def with_init(config: Config, state: dj.TrainState) -> tuple[Config, dj.TrainState]:
    """The config and the state before the first step, with the network that --init names, if any.

    The first process reads the network, if there is no checkpoint yet or the run is distilled. The config of a distilled run
    gets the network's checksum.
    """
    with failing_together():
        unsaved = not any((Path(config.workdir) / "checkpoints").glob("[0-9]*"))
        if config.init and is_first_process() and (config.distilled or unsaved):
            state = started_from(config.init, config, state)
    state = from_first_process(state)
    if config.distilled:
        leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(state.params)]
        config = dataclasses.replace(config, teacher=zlib.crc32(b"".join(leaves)))
    return config, state


def started_from(init: str, config: Config, state: dj.TrainState) -> dj.TrainState:
    """The state before the first step, with the parameters of the network in `init`. A network of two times also has the layer
    "interval", which starts at 0.

    Raises ValueError as `open_run` does, and unless the network there has the same options INIT_MUST_SHARE and the same shapes.
    A distilled run also needs a teacher that takes one time and was trained on the same data.
    """
    run = open_run(init, "init")
    require(not (config.distilled and run.config.few_calls), "init", init, "a run that is not itself distilled or mean_flow")
    for name in INIT_MUST_SHARE + (("dataset", "images") if config.distilled else ()):
        found, wanted = getattr(run.config, name), getattr(config, name)
        require(found == wanted, "init", init, f"a network with this run's {name} {wanted}, not {found}")
    arrays: list[Any] = [flatten_dict(params) for params in (run.restore("newest").ema_params, state.params)]
    theirs, own = arrays
    merged = {**own, **theirs}
    for name, x in merged.items():
        added = name not in theirs and config.few_calls and "interval" in name
        fits = added or (name in theirs and name in own and own[name].shape == x.shape)
        require(fits, "init", init, f"a network of this run's shapes ({'/'.join(name)} differs)")
    params = jax.tree.map(jnp.asarray, unflatten_dict(merged))
    return state.replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
