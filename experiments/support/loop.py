"""The training loop of every experiment: metrics, checkpoints and signals around the step that it is given."""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from diffusion_jax.checkpoints import open_checkpoints, save
from diffusion_jax.training import TrainState
from support.command_line import one_line_errors
from support.events import open_events
from support.pictures import save_picture
from support.processes import failing_together, from_first_process, is_first_process, largest_of_all
from support.workdir import append_rows, losses_between, one_line_if_unwritable, resume

LOG_EVERY = 10
SAID_ELSEWHERE = (
    "_SignalingThread.run() raised an exception",
    "Commit operations or the Commit callback in background save thread",
    "Save Finalize thread",
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

    With `draw`, a picture of samples is written every `config.sample_every` steps but the last.
    Metrics are written before the checkpoint that covers them, and rows past the checkpoint that a run resumes from are
    dropped, so metrics.csv has each step once however often the run was stopped. Ctrl-C and SIGTERM save and exit with 128 and
    the signal's number. A loss or gradient that is not finite exits with 1, and no state past it is saved; so does a full disk.
    """
    keep_failed_saves_quiet()
    first, stop, pending, losses = is_first_process(), 0, [], []
    with one_line_errors(), one_line_if_unwritable(workdir), failing_together():
        folder = open_checkpoints(workdir / "checkpoints") if first else contextlib.nullcontext()
    with one_line_if_unwritable(workdir), stop_requests() as requests, folder as checkpoints:
        with one_line_errors(), failing_together():
            state = resume(workdir, checkpoints, state) if checkpoints else state
        state = from_first_process(state)
        start = int(state.step)
        with failing_together():
            events = open_events(workdir, start) if first else lambda *_: None
        if first:
            losses = losses_between(workdir, start - start % config.checkpoint_every, start)
        if start and first:
            print(f"resuming {workdir} at step {start} of {config.iterations}", file=sys.stderr)
        with progress_bar(start, config.iterations) as bar:
            for step in range(start + 1, config.iterations + 1):
                state, metrics = step_fn(state, step - 1)
                pending.append((step, metrics))
                if draw and config.sample_every and step % config.sample_every == 0 and step < config.iterations:
                    picture = draw(state)  # before the save that covers it
                    with failing_together():
                        if checkpoints:
                            save_picture(workdir / f"samples_{step:06d}.png", picture)
                            events(step, {}, {"samples": picture})
                due = step == config.iterations or step % config.checkpoint_every == 0
                logged = due or step % LOG_EVERY == 0
                if logged or jax.process_count() == 1:
                    # asked once: a signal after this line waits for the next step, which saves
                    stop = largest_of_all(requests[0] if requests else 0)
                if logged or stop:
                    rows = [{"step": number, **jax.device_get(values)} for number, values in pending]
                    pending = []
                    losses += [float(row["loss"]) for row in rows]
                    bar.set_postfix(loss=f"{sum(losses[-len(rows) :]) / len(rows):.4f}", refresh=False)
                    bar.update(len(rows))
                    with failing_together():
                        if checkpoints:
                            append_rows(workdir, rows)
                            for row in rows:
                                events(row["step"], {name: row[name] for name in row if name != "step"}, {})
                            checkpoints.check_for_errors()
                        check_finite(rows, workdir, config.seed)
                        if (due or stop) and checkpoints:  # the mean loss of fewer steps than the others' may not be the best
                            whole = len(losses) == config.checkpoint_every
                            save(checkpoints, state, loss=sum(losses) / len(losses) if whole else None)
                    losses = [] if due or stop else losses
                if stop:
                    break
        with failing_together():
            checkpoints.wait_until_finished() if checkpoints else None
        stop = largest_of_all(requests[0] if requests else 0)
    if stop:
        where = f"{signal.Signals(stop).name}: saved {workdir} at step {state.step} of {config.iterations}"
        print(f"{where}; the same command continues it", file=sys.stderr) if first else None
        raise SystemExit(128 + stop)
    return state


def keep_failed_saves_quiet() -> None:
    """Hide Orbax's log of a failed save, whose error is raised, and the tracebacks of its unfinished writes."""
    logging.get_absl_logger().addFilter(is_news)
    report = sys.unraisablehook
    sys.unraisablehook = lambda error: None if is_late_write(error) else report(error)


def is_news(record: Any) -> bool:
    return not any(text in record.getMessage() for text in SAID_ELSEWHERE)


def is_late_write(error: Any) -> bool:
    return type(error.exc_value) is RuntimeError and str(error.exc_value) == "Event loop is closed" and error.object is None


def progress_bar(start: int, iterations: int) -> tqdm:
    """The progress bar, shown by the first process alone."""
    hidden: dict[str, Any] = {} if is_first_process() else {"disable": True}
    return tqdm(total=iterations, initial=start, unit="step", dynamic_ncols=True, **hidden)


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
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield requests
    finally:
        restore()


def check_finite(rows: list[dict[str, Any]], workdir: Path, seed: int) -> None:
    """Exit with one line, and status 1, on the first step whose metrics are not finite."""
    for row in rows:
        if not all(math.isfinite(value) for value in row.values()):
            values = ", ".join(f"{name} {value:g}" for name, value in row.items() if name != "step")
            raise SystemExit(
                f"error: step {row['step']} of seed {seed} is not finite ({values}); {workdir} keeps its last checkpoint "
                "before it, from which the same command comes to the same step; try a lower --learning-rate"
            )
