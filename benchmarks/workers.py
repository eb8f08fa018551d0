"""The parent's side of contenders.py: a contender in a process of its own, asked line by line."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any


class Worker:
    """A contender that imports its framework at once and touches the device at its first task.

    It is stopped after `seconds`; `log` takes its standard error.
    """

    def __init__(self, name: str, options: dict, environment: dict[str, str], seconds: float, log: IO | None = None):
        command = [sys.executable, str(Path(__file__).with_name("contenders.py")), name, json.dumps(options)]
        pipe = subprocess.PIPE
        self.name = name
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=os.environ | environment)
        self.timer = threading.Timer(seconds, self.process.kill)
        self.timer.daemon = True
        self.timer.start()

    def tell(self, task: str) -> None:
        """Start a task, so that several contenders can prepare at the same time. `answer` waits for it."""
        try:
            print(task, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError(f"{self.name} stopped with status {self.process.wait()}") from None

    def answer(self) -> Any:
        """The answer to the oldest open task. Raises RuntimeError if the contender failed or has run out of time."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} stopped with status {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, task: str) -> Any:
        self.tell(task)
        return self.answer()

    def close(self) -> None:
        self.timer.cancel()
        self.process.kill()
        self.process.wait()
