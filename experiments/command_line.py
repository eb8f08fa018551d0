"""The edge between a person and a script: flags from a dataclass, and one line on stderr for whatever is wrong."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn, TypeVar

import tyro

from diffusion_jax.data import DataUnavailable

Config = TypeVar("Config")

warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def parse_command_line(default: Config, description: str | None, args: Sequence[str] | None = None) -> Config:
    """The config that the command line asks for, starting from `default`; a wrong option exits with one line."""
    messages = io.StringIO()
    description = description and description.replace("\npython", "\n\npython")  # a paragraph each, which tyro keeps apart
    if os.environ.get("NO_COLOR"):  # https://no-color.org, of which tyro knows only the other way to say it
        os.environ["TERM"] = "dumb"
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(type(default), default=default, description=description, args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
        stop_with(_first_paragraph(messages.getvalue()))


def _first_paragraph(box: str) -> str:
    """The message in the box that tyro draws, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    return " ".join(line for line in lines[:end] if line)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """For the set-up of a run: what the person can mend becomes one line, and status 2."""
    try:
        yield
    except (ValueError, OSError, DataUnavailable) as error:
        stop_with(str(error))


def stop_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError with one line that names the option, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
