"""A run's folder: config.json says what the run is, checkpoints/ holds its state, metrics.csv has one row a step."""

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from diffusion_jax.checkpoints import open_checkpoints, restore_latest, save
from diffusion_jax.training import TrainState

LOG_EVERY = 10


def open_workdir(config: Any, may_differ: Collection[str]) -> Path:
    """The folder `config.workdir`, made now, or found to hold a run that agrees with `config` but for the fields `may_differ`.

    Raises ValueError, and touches nothing, if it holds another run or anything that is not a run.
    """
    workdir, wanted = Path(config.workdir), json.loads(json.dumps(dataclasses.asdict(config)))
    if (workdir / "config.json").exists():
        saved = read_config(workdir)
        for name in wanted:
            if name not in may_differ and saved.get(name) != wanted[name]:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{workdir} holds a run with {flag} {saved.get(name)}, and this command has {wanted[name]}: "
                    f"repeat that run's {flag}, or choose another --workdir"
                )
    elif workdir.exists() and (not workdir.is_dir() or set(os.listdir(workdir)) - {"config.json.new"}):
        raise ValueError(f"--workdir must be a new or empty folder or one that holds a run, got {workdir}")
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json.new").write_text(json.dumps(wanted, indent=2) + "\n")
        os.replace(workdir / "config.json.new", workdir / "config.json")
    return workdir


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The config that a run was started with. Raises ValueError if `workdir` holds no run."""
    try:
        return json.loads((Path(workdir) / "config.json").read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"--workdir must be the folder of a run, with its config.json; got {workdir} ({problem})") from None


def train_in(
    workdir: Path,
    state: TrainState,
    step_fn: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]],
    iterations: int,
    checkpoint_every: int,
    after_step: Callable[[TrainState, int], None] = lambda state, step: None,
) -> TrainState:
    """Continue from the newest checkpoint, or from `state`, to `iterations` steps; `step_fn(state, step)` takes one of them.

    Metrics are written before the checkpoint that covers them, and rows past the checkpoint that a run resumes from are
    dropped, so metrics.csv has each step once however often the run was stopped.
    """
    with open_checkpoints(workdir / "checkpoints") as checkpoints:
        state = restore_latest(checkpoints, state)
        start = int(state.step)
        if start:
            print(f"resuming {workdir} at step {start} of {iterations}", file=sys.stderr)
        _drop_rows_after(workdir / "metrics.csv", start)
        pending = []
        patience = 0.5 if sys.stderr.isatty() else 30
        with tqdm(total=iterations, initial=start, unit="step", mininterval=patience, dynamic_ncols=True) as bar:
            for step in range(start + 1, iterations + 1):
                state, metrics = step_fn(state, step - 1)
                pending.append((step, metrics))
                due = step == iterations or step % checkpoint_every == 0
                if due or step % LOG_EVERY == 0:
                    rows = [{"step": number, **jax.device_get(values)} for number, values in pending]
                    _append_rows(workdir / "metrics.csv", rows)
                    bar.set_postfix(loss=f"{sum(row['loss'] for row in rows) / len(rows):.4f}", refresh=False)
                    bar.update(len(rows))
                    pending = []
                if due:
                    save(checkpoints, state)
                after_step(state, step)
    return state


def _append_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _drop_rows_after(file: Path, step: int) -> None:
    if not file.exists():
        return
    header, *rows = file.read_text().splitlines()
    kept = [header, *(row for row in rows if int(row.split(",")[0]) <= step)]
    file.with_suffix(".new").write_text("\n".join(kept) + "\n")
    os.replace(file.with_suffix(".new"), file)
