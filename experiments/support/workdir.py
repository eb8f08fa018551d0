"""A run's folder: config.json says what the run is, checkpoints/ holds its state, metrics.csv has one row a step."""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from diffusion_jax.checkpoints import UNFINISHED, restore_latest
from diffusion_jax.training import TrainState

# Options newer than version 0.2.0, with the meaning of a run without them.
ADDED = {
    "time_input": "t",
    "time_density": "uniform",
    "stratified": False,
    "network": "unet",
    "depth": 6,
    "patch_size": 1,
    "optimizer": "adam",
    "training_guidance": 1.0,
    "init": None,
    "teacher": None,
    "image_size": 32,
    "channels": 1,
    "num_classes": 10,
    "images": None,
}
HIDDEN = {
    "__macosx",
    "$recycle.bin",
    "#recycle",
    "@eadir",
    "lost+found",
    "system volume information",
    "thumbs.db",
    "desktop.ini",
}


def open_workdir(config: Any, may_differ: Collection[str], **more: str | int | None) -> Path:
    """Create `config.workdir`, or open it if its run agrees with `config` in all fields but `may_differ`. Lock it until this
    process ends.

    config.json also has `more`: what describes the run but is no option. Raises ValueError, and changes no file, if the folder
    holds another run or other files, or if another process uses it.
    """
    workdir, wanted = Path(config.workdir), json.loads(json.dumps(dataclasses.asdict(config) | more))
    if (workdir / "config.json").exists():
        _check_same_run(workdir, wanted, may_differ, more)
    elif workdir.exists() and not (workdir.is_dir() and all(map(_may_be_in_new_workdir, os.listdir(workdir)))):
        raise ValueError(f"--workdir must be a new or empty folder or one that holds a run, got {workdir}")
    workdir.mkdir(parents=True, exist_ok=True)
    _lock(workdir)
    if (workdir / "config.json").exists():  # perhaps since a moment ago
        _check_same_run(workdir, wanted, may_differ, more)
    else:
        (workdir / "config.json.new").write_text(json.dumps(wanted, indent=2) + "\n")
        os.replace(workdir / "config.json.new", workdir / "config.json")
    return workdir


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name was put there by the system or a program, and not by a person."""
    return name.startswith(".") or name.lower() in HIDDEN


def _may_be_in_new_workdir(name: str) -> bool:
    return name in ("config.json.new", "lock") or is_hidden(name)


def _check_same_run(workdir: Path, wanted: dict[str, Any], may_differ: Collection[str], more: Collection[str]) -> None:
    saved = read_config(workdir, wanted)
    for name in [*wanted, *saved]:
        if name not in may_differ and saved.get(name) != wanted.get(name):
            flag = f"--{name.replace('_', '-')}"
            known, repeat = (name, "") if name in more else (flag, f"repeat that run's {flag}, or ")
            fixed = "its learning rate falls to 0 at that many steps, which cannot change; " if name == "iterations" else ""
            raise ValueError(
                f"{workdir} holds a run with {known} {saved.get(name)}, and this command has {wanted.get(name)}: "
                f"{fixed}{repeat}choose another --workdir{' for a run from the start' if fixed else ''}"
            )


def _lock(workdir: Path) -> None:
    lock = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT)  # stays open, and so locked, until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"--workdir must be a folder in which no other process is at work, got {workdir}") from None
    except OSError as problem:  # Lustre, and NFS in part, have no locks
        warnings.warn(f"{workdir} cannot be locked ({problem.strerror}): start no second run in it", stacklevel=3)


def read_config(workdir: str | Path, names: Collection[str], option: str = "workdir") -> dict[str, Any]:
    """The config of a saved run. Options of `names` that are newer than the run get the value that describes it.

    Raises ValueError if `workdir` holds no run.
    """
    try:
        config = json.loads((Path(workdir) / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(f"--{option} must be the folder of a run, with its config.json; got {workdir} ({problem})") from None
    if not isinstance(config, dict):
        raise ValueError(f"--{option} must be the folder of a run; {workdir}/config.json holds no options but {config!r:.50}")
    return with_added(config, names)


def with_added(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in ADDED.items() if name in names} | config


def resume(workdir: Path, checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The state of the newest intact checkpoint, or `state` if there is none.

    Later metrics are dropped, and damaged checkpoints renamed. Raises ValueError if all are damaged.
    """
    for unfinished in (workdir / "checkpoints").glob(f"*{UNFINISHED}"):
        shutil.rmtree(unfinished)
    state = restore_latest(checkpoints, state)
    for step in checkpoints.all_steps():
        if step > state.step:
            os.rename(workdir / "checkpoints" / str(step), workdir / "checkpoints" / f"{step}.damaged.{time.time():.0f}")
    checkpoints.reload()
    keep_rows(workdir, int(state.step))
    return state


def keep_rows(workdir: Path, count: int) -> None:
    """Leave the rows of the first `count` steps in metrics.csv, each once. Warns if there are fewer."""
    file = workdir / "metrics.csv"
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
    header, rows = next((line for line in lines if line.startswith("step,") and line.endswith("\n")), ""), {}
    for line in lines:
        step = _step_of_row(line, header.count(","))
        if step is not None and step <= count:
            rows[step] = line
    if len(rows) < count:
        warnings.warn(f"{file} lacks rows of steps up to {count}", stacklevel=2)
    if lines and not header:
        aside = file.with_suffix(f".damaged.{time.time():.0f}")
        os.rename(file, aside)
        warnings.warn(f"{file} has no line that names its columns: moved to {aside.name}", stacklevel=2)
    file.with_suffix(".new").write_text("".join([header, *rows.values()]) if rows else "")
    os.replace(file.with_suffix(".new"), file)


def _step_of_row(line: str, numbers: int) -> int | None:
    """None if `line` is not a whole row of a step and `numbers` numbers."""
    try:
        step, *values = line.split(",")
        whole = line.endswith("\n") and len([float(value) for value in values]) == numbers
        return int(step) if whole else None
    except ValueError:
        return None


def losses_between(workdir: Path, start: int, stop: int) -> list[float]:
    """The loss of the steps after `start` up to `stop`, as metrics.csv has them."""
    file = workdir / "metrics.csv"
    if start == stop or not file.exists():
        return []
    with file.open() as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines) if start < int(row["step"]) <= stop]


def append_rows(workdir: Path, rows: list[dict[str, Any]]) -> None:
    """One row a step; rows[0] names the columns of a file that is new or empty."""
    with (workdir / "metrics.csv").open("a", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        if out.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def one_line_if_unwritable(workdir: Path) -> Iterator[None]:
    """Exit with one line and status 1 if the disk is full or cannot be written."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as problem:
        code = re.search(r"os_error_code='(\d+)'", str(problem))  # TensorStore's way to say it
        if not code and not isinstance(problem, OSError):
            raise
        reason = os.strerror(int(code[1])) if code else getattr(problem, "strerror", None) or str(problem)
        raise SystemExit(
            f"error: {workdir.absolute()} cannot be written ({reason}); its checkpoints are intact: fix this and repeat the "
            "command"
        ) from None
