"""A run's folder: config.json says what the run is, checkpoints/ holds its state, metrics.csv has one row a step."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
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
    dropped, so metrics.csv has each step once however often the run was stopped. Ctrl-C and SIGTERM save and exit with 128 and
    the signal's number; a loss or gradient that is not finite exits with 1, and no state past it is saved.
    """
    with open_checkpoints(workdir / "checkpoints") as checkpoints, stop_requests() as requests:
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
                stopping = bool(requests)  # asked once: a signal after this line waits for the next step, which saves
                due = step == iterations or step % checkpoint_every == 0 or stopping
                if due or step % LOG_EVERY == 0:
                    rows = [{"step": number, **jax.device_get(values)} for number, values in pending]
                    _append_rows(workdir / "metrics.csv", rows)
                    check_finite(rows, workdir)
                    bar.set_postfix(loss=f"{sum(row['loss'] for row in rows) / len(rows):.4f}", refresh=False)
                    bar.update(len(rows))
                    pending = []
                if due:
                    save(checkpoints, state)
                if stopping:
                    break
                after_step(state, step)
    if requests and state.step < iterations:
        name = signal.Signals(requests[0]).name
        print(f"{name}: saved {workdir} at step {state.step} of {iterations}; the same command continues it", file=sys.stderr)
        raise SystemExit(128 + requests[0])
    return state


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM, as the first of them arrives; the second does what it always did."""
    requests, before = [], {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        requests.append(number)
        restore()
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print is not safe in a handler

    before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield requests
    finally:
        restore()


def check_finite(rows: list[dict[str, Any]], workdir: Path) -> None:
    """Exit with one line, and status 1, on the first step whose metrics are not finite."""
    for row in rows:
        if not all(math.isfinite(value) for value in row.values()):
            values = ", ".join(f"{name} {value:g}" for name, value in row.items() if name != "step")
            raise SystemExit(
                f"error: step {row['step']} is not finite ({values}); {workdir} keeps its last checkpoint before it, from "
                f"which the same command (with the seed in config.json) comes to the same step; try a lower --learning-rate"
            )


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
