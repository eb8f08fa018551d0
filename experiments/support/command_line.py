"""Parse flags into a dataclass, and report errors of the user in one line on stderr."""

import contextlib
import dataclasses
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from support.machine import why_no_device

Config = TypeVar("Config")
PATHS = ("workdir", "dataset", "data_dir", "samples", "out", "init")
COUNTS = ("depth", "iterations", "batch_size", "num_timesteps", "checkpoint_every", "num_samples", "num_images")
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(COUNTS, (lambda value: value is None or value >= 1, "at least 1")),
    **dict.fromkeys(("seed", "sample_every"), (lambda value: 0 <= value < 2**31, "between 0 and 2^31 - 1")),
    "image_size": (lambda value: value >= 0 and value % 2 == 0, "even and at least 2, or 0 for the size of the images"),
    "port": (lambda value: 1 <= value < 2**16, "between 1 and 65535"),
    "embed_dim": (lambda value: value >= 4 and value % 2 == 0, "even and at least 4"),
    "dim_scales": (lambda value: min(value, default=0) >= 1, "one or more numbers of at least 1"),
    "learning_rate": (lambda value: 0 < value < math.inf, "positive and finite"),
    "warmup": (lambda value: value >= 0, "at least 0"),
    "ema_decay": (lambda value: 0 <= value < 1, "at least 0 and less than 1"),
    "training_guidance": (lambda value: 0 <= value < math.inf, "at least 0 and finite"),
    "label_dropout": (lambda value: 0 < value < 1, "strictly between 0 and 1"),
    "likelihood_images": (lambda value: value >= 0, "at least 0"),
    "bound_images": (lambda value: value == 0 or value >= 2, "0, or at least 2"),
}

warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def parse_command_line(default: Config, description: str | None, args: Sequence[str] | None = None) -> Config:
    """The config given on the command line, with the defaults of `default`. Exits with one line on a wrong option.

    Raises ValueError on the first value that ALLOWED does not permit.
    """
    messages = io.StringIO()
    description = description and description.replace("\npython", "\n\npython")  # a paragraph each, which tyro keeps apart
    if os.environ.get("NO_COLOR"):  # https://no-color.org, of which tyro knows only the other way to say it
        os.environ["TERM"] = "dumb"
    try:
        with contextlib.redirect_stderr(messages):
            parts = _in_groups(default)
            given = tyro.cli(type(parts), default=parts, description=description, args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
        stop_with(_first_paragraph(messages.getvalue()))
    groups = [given] if parts is default else vars(given).values()
    values = {name: value for group in groups for name, value in vars(group).items()}
    home = {name: os.path.expanduser(values[name]) for name in PATHS if values.get(name)}
    config = type(default)(**values | home)
    check_values(config)
    return config


def _in_groups(config: Any) -> Any:
    """A config with one field for each base class of `config`, which --help shows as a group."""
    bases = type(config).__bases__[::-1]
    if len(bases) == 1:
        return config
    fields = [(base.__name__.lower(), tyro.conf.OmitArgPrefixes[base]) for base in bases]
    parts = [base(**{field.name: getattr(config, field.name) for field in dataclasses.fields(base)}) for base in bases]
    return dataclasses.make_dataclass("Groups", fields)(*parts)


def _first_paragraph(box: str) -> str:
    """The first paragraph of tyro's error box, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    return " ".join(line for line in lines[:end] if line)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that the user can fix into one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop_with(str(error))
    except (RuntimeError, AssertionError):
        if problem := why_no_device():
            stop_with(problem)
        raise


def stop_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_values(config: Any) -> None:
    """Raise ValueError on the first value that ALLOWED does not permit."""
    for name, value in vars(config).items():
        if name in ALLOWED:
            holds, allowed = ALLOWED[name]
            require(holds(value), name, value, allowed)


def output_file(name: str, *suffixes: str) -> Path:
    """The path of that name. Raises ValueError unless it can be written and ends in one of the suffixes."""
    out = Path(name)
    require(out.suffix.lower() in suffixes, "out", out, f"a file that ends in {' or '.join(suffixes)}")
    require(out.parent.is_dir(), "out", out, "in a folder that exists")
    writable = os.access(out if out.exists() else out.parent, os.W_OK)
    require(writable and not out.is_dir(), "out", out, "a file that can be written")
    return out


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError, naming the option, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} must be {allowed}, got {value}")
