"""What a run keeps while it trains: rows of metrics.csv, events, pictures and checkpoints, all by its first process alone."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from diffusion_jax.checkpoints import save
from diffusion_jax.training import TrainState
from support.events import open_events
from support.pictures import save_picture
from support.processes import failing_together, is_first_process
from support.workdir import append_rows, losses_between


class Record:
    """The record of a run that starts at step `start`. Metrics are kept on the device until `write`.

    `config` has iterations, checkpoint_every and seed. A checkpoint has the mean loss over the steps after the previous one.
    One that is saved early has none: a mean of fewer steps could be the lowest by chance.
    """

    def __init__(self, workdir: Path, config: Any, checkpoints: ocp.CheckpointManager | None, start: int):
        self.workdir, self.config, self.checkpoints = workdir, config, checkpoints
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.losses: list[float] = []
        with failing_together():
            self.events = open_events(workdir, start) if checkpoints else None
        if checkpoints:
            self.losses = losses_between(workdir, start - start % config.checkpoint_every, start)
        hidden: dict[str, Any] = {} if is_first_process() else {"disable": True}
        self.bar = tqdm(total=config.iterations, initial=start, unit="step", dynamic_ncols=True, **hidden)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.pending.append((step, metrics))

    def add_picture(self, step: int, picture: np.ndarray) -> None:
        with failing_together():
            if self.events:
                save_picture(self.workdir / f"samples_{step:06d}.png", picture)
                self.events(step, {}, {"samples": picture})

    def write(self, state: TrainState, saves: bool) -> None:
        """Write all metrics, before the checkpoint that covers them. Exits, and saves nothing, if one is not finite."""
        rows = [{"step": number, **jax.device_get(metrics)} for number, metrics in self.pending]
        self.pending = []
        self.losses += [float(row["loss"]) for row in rows]
        self.bar.set_postfix(loss=f"{sum(self.losses[-len(rows) :]) / len(rows):.4f}", refresh=False)
        self.bar.update(len(rows))
        with failing_together():
            if self.checkpoints and self.events:
                append_rows(self.workdir, rows)
                for row in rows:
                    self.events(row["step"], {name: row[name] for name in row if name != "step"}, {})
                self.checkpoints.check_for_errors()
            check_finite(rows, self.workdir, self.config.seed)
            if saves and self.checkpoints:
                whole = len(self.losses) == self.config.checkpoint_every
                save(self.checkpoints, state, loss=sum(self.losses) / len(self.losses) if whole else None)
        if saves:
            self.losses = []

    def close(self) -> None:
        self.bar.close()


def check_finite(rows: list[dict[str, Any]], workdir: Path, seed: int) -> None:
    """Exit with one line, and status 1, on the first step whose metrics are not finite."""
    for row in rows:
        if not all(math.isfinite(value) for value in row.values()):
            values = ", ".join(f"{name} {value:g}" for name, value in row.items() if name != "step")
            raise SystemExit(
                f"error: step {row['step']} of seed {seed} is not finite ({values}); {workdir} keeps its last checkpoint "
                "before it, but would fail again there; try a lower --learning-rate in another --workdir"
            )
