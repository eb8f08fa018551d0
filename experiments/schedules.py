"""Draw the noise schedules: how much noise each step adds, how much signal is left, and the signal-to-noise ratio.

python experiments/schedules.py --out schedules.png
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import sys

from support.command_line import one_line_errors, output_file, parse_command_line
from support.figures import save_schedules_figure
from support.model import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Config:
    num_timesteps: int = 500
    """Number T of steps of the forward process."""
    out: str = "schedules.png"
    """Output .png."""


def main() -> None:
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        out = output_file(config.out, ".png")
        save_schedules_figure(out, {name: make(config.num_timesteps) for name, make in SCHEDULES.items()})
    print(f"wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
