"""Prepares Ctrl-C, the standard streams and progress bars. Scripts import it before anything slow."""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any


class Messages(io.FileIO):
    """A file that loses what it cannot take, because a disk is full or a reader is gone, without an error."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def prepare_terminal() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the process at once, even in XLA, without a traceback
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file to be opened takes its number, and messages go into that file
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = io.TextIOWrapper(Messages(2, "w", closefd=False), errors="backslashreplace", write_through=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "30")  # few lines in a log file


script = getattr(sys.modules["__main__"], "__file__", None)
if script and Path(script).resolve().parent == Path(__file__).resolve().parents[1]:
    prepare_terminal()  # only where a script is run, not where a test or a notebook imports one
