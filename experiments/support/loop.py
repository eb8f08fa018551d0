"""The training loop of every experiment, and the signals that stop it."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from diffusion_jax.checkpoints import open_checkpoints
from diffusion_jax.training import TrainState
from support.command_line import one_line_errors
from support.processes import failing_together, from_first_process, is_first_process, largest_of_all
from support.record import Record
from support.workdir import one_line_if_unwritable, resume

LOG_EVERY = 10
SAID_ELSEWHERE = (
    "_SignalingThread.run() raised an exception",
    "Commit operations or the Commit callback in background save thread",
    "Save Finalize thread",
    "Failed to write metadata=",
    "Failed to update metadata=",
    "Requested `tracked_metric`; did not provide metrics",  # as intended: a save after a signal may have no loss
)


def train_in(
    workdir: Path,
    config: Any,
    state: TrainState,
    step_fn: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]],
    draw: Callable[[TrainState], np.ndarray] | None = None,
) -> TrainState:
    """Continue from the newest whole checkpoint, or from `state`, to `config.iterations` steps; each is `step_fn(state, step)`.

    With `draw`, a picture of samples is written every `config.sample_every` steps but the last. A resumed run drops the rows of
    metrics.csv past its checkpoint, so each step has one row. Ctrl-C and SIGTERM save, then exit with 128 plus the signal's
    number. A full disk exits with 1; so does a loss or gradient that is not finite, and no state past it is saved.
    """
    keep_failed_saves_quiet()
    with one_line_errors(), one_line_if_unwritable(workdir), failing_together():
        folder = open_checkpoints(workdir / "checkpoints") if is_first_process() else contextlib.nullcontext()
    with one_line_if_unwritable(workdir), stop_requests() as requests, folder as checkpoints:
        with one_line_errors(), failing_together():
            state = resume(workdir, checkpoints, state) if checkpoints else state
        state = from_first_process(state)
        if state.step and is_first_process():
            print(f"resuming {workdir} at step {state.step} of {config.iterations}", file=sys.stderr)
        with contextlib.closing(Record(workdir, config, checkpoints, int(state.step))) as record:
            state = run_steps(config, state, step_fn, draw, record, requests)
        with failing_together():
            checkpoints.wait_until_finished() if checkpoints else None
        stop = largest_of_all(requests[0] if requests else 0)
    if stop:
        where = f"{signal.Signals(stop).name}: saved {workdir} at step {state.step} of {config.iterations}"
        print(f"{where}; the same command continues it", file=sys.stderr) if is_first_process() else None
        raise SystemExit(128 + stop)
    return state


def run_steps(
    config: Any, state: TrainState, step_fn: Callable, draw: Callable | None, record: Record, requests: list[int]
) -> TrainState:
    """The steps that are left, or those until a signal is in `requests`, whose last state is then saved as well."""
    stop = 0
    for step in range(int(state.step) + 1, config.iterations + 1):
        state, metrics = step_fn(state, step - 1)
        record.add(step, metrics)
        if draw and config.sample_every and step % config.sample_every == 0 and step < config.iterations:
            record.add_picture(step, draw(state))  # before the save that covers it
        due = step == config.iterations or step % config.checkpoint_every == 0
        logged = due or step % LOG_EVERY == 0
        if logged or jax.process_count() == 1:
            # asked once: a signal after this line waits for the next step, which saves
            stop = largest_of_all(requests[0] if requests else 0)
        if logged or stop:
            record.write(state, saves=bool(due or stop))
        if stop:
            break
    return state


def write_once(workdir: Path, write: Callable[[], None]) -> None:
    """Call `write` in the first process alone, which the others wait for. Exits with one line if the disk is full."""
    with one_line_if_unwritable(workdir), failing_together():
        if is_first_process():
            write()


def keep_failed_saves_quiet() -> None:
    """Hide Orbax's log of a failed save, whose error is raised, and the tracebacks of its unfinished writes."""
    logging.get_absl_logger().addFilter(is_news)
    report = sys.unraisablehook
    sys.unraisablehook = lambda error: None if is_late_write(error) else report(error)


def is_news(record: Any) -> bool:
    return not any(text in record.getMessage() for text in SAID_ELSEWHERE)


def is_late_write(error: Any) -> bool:
    return type(error.exc_value) is RuntimeError and str(error.exc_value) == "Event loop is closed" and error.object is None


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list to which the first SIGINT or SIGTERM is added; the second has its usual effect."""
    requests, before = [], {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        requests.append(number)
        restore()
        with contextlib.suppress(OSError):  # print is not safe in a handler
            os.write(2, b"\nstopping soon; once more stops at once\n")

    before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield requests
    finally:
        restore()
