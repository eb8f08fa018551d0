"""Save and restore the training state with Orbax. A step counts as saved once its folder has its final name.

A folder gets its final name only after it has been read back and compared with the state in memory. Orbax and TensorStore do
not detect a bit in the values that flips later, so each folder also holds the checksums of its files.
"""

import errno
import json
import operator
import os
import re
import shutil
import tempfile
import warnings
import weakref
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from diffusion_jax.training import TrainState

CHECKSUMS = "checksums.json"
UNFINISHED = ".orbax-checkpoint-tmp*"
MISREAD = set("*?[]\\")  # Orbax reads a path as a glob pattern, and TensorStore reads a backslash as a slash
_UNDER_WAY: weakref.WeakKeyDictionary[ocp.CheckpointManager, dict[int, PyTree]] = weakref.WeakKeyDictionary()
"""For each manager, the step that it is saving and the arrays of that step."""


def open_checkpoints(directory: str | Path) -> ocp.CheckpointManager:
    """Open the checkpoints in `directory`. Keeps the last two and the one with the lowest loss (`best_step()`).

    Close the manager, or use `with`, to finish the last save. If there are several processes, it belongs only to this one.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    _set_damaged_losses_aside(directory)
    path = _link_to(directory) if MISREAD & set(str(directory)) else directory
    loss = operator.itemgetter("loss")
    best = BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    this_process, under_way = jax.process_index(), {}
    options = ocp.CheckpointManagerOptions(
        create=False,
        preservation_policy=AnyPreservationPolicy([LatestN(2), best]),
        best_fn=loss,
        best_mode="min",
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=this_process, active_processes={this_process}),
        async_options=ocp.options.AsyncOptions(post_finalization_callback=partial(_certify, path, under_way)),
    )
    checkpoints = ocp.CheckpointManager(path, item_handlers=ocp.StandardCheckpointHandler(), options=options)
    _UNDER_WAY[checkpoints] = under_way
    if path != directory:
        weakref.finalize(checkpoints, shutil.rmtree, path.parent)
    return checkpoints


def save(checkpoints: ocp.CheckpointManager, state: TrainState, loss: float | None = None) -> None:
    """Save `state` under its step, in the background, unless that step is already saved. `loss` ranks it for `best_step()`.

    If a save fails in the background, the next save, or closing the manager, raises its error.
    """
    step = int(state.step)
    if step not in checkpoints.all_steps():
        metrics = None if loss is None else {"loss": loss}
        arrays = jax.device_get(_arrays(state))
        checkpoints.wait_until_finished()
        _UNDER_WAY[checkpoints].clear()
        _UNDER_WAY[checkpoints][step] = arrays
        checkpoints.save(step, args=ocp.args.StandardSave(arrays), metrics=metrics)


def restore_latest(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest usable checkpoint, placed like `state`; `state` itself if none is saved.

    Skips a checkpoint that is damaged or differs in a shape or dtype, and warns of it. Raises ValueError if none is usable.
    """
    steps = sorted(checkpoints.all_steps(), reverse=True)
    for step in steps:
        try:
            return restore(checkpoints, step, state)
        except ValueError as problem:
            if step == steps[-1]:
                raise
            warnings.warn(f"{problem}; looking for the one before it", stacklevel=2)
    return state


def restore(checkpoints: ocp.CheckpointManager, step: int, state: TrainState) -> TrainState:
    """The state saved at `step`, placed like `state`. Raises ValueError if it is damaged or differs in a shape or dtype."""
    wanted = _arrays(state)
    target = _empty_like(wanted)
    try:
        _check_files(Path(checkpoints.directory) / str(step))
        _check_shapes(checkpoints.item_metadata(step), target)
        saved = checkpoints.restore(step, args=ocp.args.StandardRestore(target))
    except Exception as problem:  # TensorStore and Orbax raise many types
        if isinstance(problem, MemoryError | OSError) and not isinstance(problem, FileNotFoundError):
            raise  # a problem of this machine, not of the checkpoint
        if code := re.search(r"os_error_code='(?!2')(\d+)'", str(problem)):  # TensorStore's form of an OSError
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from problem
        where = Path(checkpoints.directory).resolve()
        raise ValueError(f"checkpoint {step} in {where} cannot be used: {_first_line(problem)}") from problem
    return state.replace(**jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), saved, wanted))


def _arrays(state: TrainState) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in ("step", "params", "ema_params", "opt_state")}


def _empty_like(arrays: PyTree) -> PyTree:
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), arrays)


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0][:300]


def _link_to(directory: Path) -> Path:
    """A symbolic link to `directory` with no character of MISREAD in its path. Raises ValueError if TMPDIR has one."""
    if MISREAD & set(tempfile.gettempdir()):
        characters = " ".join(sorted(MISREAD))
        raise ValueError(f"TMPDIR must not contain any of {characters} if the path of a run does, got {tempfile.gettempdir()}")
    link = Path(tempfile.mkdtemp()) / "checkpoints"
    link.symlink_to(directory)
    return link


def _certify(directory: Path, under_way: dict[int, PyTree]) -> None:
    """Read back the save in progress and write its checksums, before Orbax gives the folder its final name.

    Raises OSError if the folder does not hold the saved arrays; Orbax then never gives it the final name.
    """
    step, arrays = under_way.popitem() if under_way else ("*", None)  # "*" for a save not started by `save`
    folder = max(directory.glob(f"{step}{UNFINISHED}"), key=lambda folder: folder.stat().st_mtime)
    if arrays is not None:
        _read_back(folder, arrays)
    _write_checksums(folder)


def _read_back(folder: Path, arrays: PyTree) -> None:
    try:
        target = ocp.args.StandardRestore(_empty_like(arrays))
        found = ocp.StandardCheckpointHandler().restore(epath.Path(folder / "default"), args=target)
    except Exception as problem:  # TensorStore and Orbax raise many types
        if isinstance(problem, MemoryError):
            raise
        raise OSError(errno.EIO, f"{folder.name} cannot be read back: {_first_line(problem)}") from problem
    for (path, one), other in zip(jax.tree.leaves_with_path(arrays), jax.tree.leaves(found), strict=True):
        if np.asarray(one).tobytes() != np.asarray(other).tobytes():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise OSError(errno.EIO, f"{folder.name}: {name} differs from what was saved")


def _write_checksums(folder: Path) -> None:
    files = [file for file in (folder / "default").rglob("*") if file.is_file()]
    checksums = {str(file.relative_to(folder)): zlib.crc32(file.read_bytes()) for file in files}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))


def _set_damaged_losses_aside(directory: Path) -> None:
    for file in directory.glob("[0-9]*/metrics/metrics"):  # Orbax reads all of these at the start, but does not need them
        if not file.parts[-3].isdigit():
            continue
        try:
            json.loads(file.read_text())
        except ValueError:
            warnings.warn(f"{file} is damaged: that checkpoint cannot be the best one", stacklevel=3)
            file.rename(file.with_suffix(".damaged"))


def _check_files(folder: Path) -> None:
    if not (folder / CHECKSUMS).exists():
        raise ValueError(f"it has no {CHECKSUMS}: the save was interrupted, or an older version of this library wrote it")
    for name, checksum in json.loads((folder / CHECKSUMS).read_text()).items():
        if zlib.crc32((folder / name).read_bytes()) != checksum:
            raise ValueError(f"{name} is damaged")


def _check_shapes(metadata: PyTree, target: PyTree) -> None:
    leaves = jax.tree.leaves_with_path(target)
    for what, of in (("shape", lambda leaf: tuple(leaf.shape)), ("dtype", lambda leaf: np.dtype(leaf.dtype))):
        saved = {leaf.name: of(leaf) for leaf in jax.tree.leaves(metadata.tree)}
        wanted = {jax.tree_util.keystr(path, simple=True, separator="."): of(leaf) for path, leaf in leaves}
        for name in [*wanted, *saved]:
            if saved.get(name) != wanted.get(name):
                raise ValueError(f"{name} has the {what} {saved.get(name)}, expected {wanted.get(name)}")
