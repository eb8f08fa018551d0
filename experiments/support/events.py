"""TensorBoard event files, each record written at once: a writer in a thread would meet a full disk without telling anyone."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter


def open_events(workdir: Path, start: int) -> Callable[[int, dict[str, float], dict[str, np.ndarray]], None]:
    """add(step, numbers, pictures), with pictures as bytes [H, W] or [H, W, 3]. TensorBoard drops old records past `start`."""
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    writer = RecordWriter(str(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))

    def write(**what) -> None:
        writer.write(Event(wall_time=time.time(), **what).SerializeToString())

    def add(step: int, numbers: dict[str, float], pictures: dict[str, np.ndarray]) -> None:
        for name, value in numbers.items():
            write(step=step, summary=summary.scalar(name, float(value)))
        for name, picture in pictures.items():
            write(step=step, summary=summary.image(name, picture, dataformats="HWC"[: picture.ndim]))
        writer.flush()

    write(file_version="brain.Event:2")
    write(step=start + 1, session_log=SessionLog(status=SessionLog.START))
    writer.flush()
    return add
