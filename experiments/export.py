"""Write the network of a run of experiments/mnist.py to one file, which --workdir of the other scripts takes as well.

python experiments/export.py --workdir runs/mnist --out mnist.safetensors
"""

import support.terminal  # isort: skip  # noqa: F401

import dataclasses
import sys
from typing import Literal

from support.command_line import one_line_errors, output_file, parse_command_line
from support.exported import SUFFIX, write_model
from support.machine import prepare_machine
from support.model import DTYPES
from support.saved_run import Source, open_run


@dataclasses.dataclass(frozen=True)
class Config(Source):
    workdir: str = "runs/mnist"
    """Folder of the run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters in the file. float32 keeps every bit; bfloat16 takes half the space."""
    out: str = "mnist.safetensors"
    """Output file."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        out = output_file(config.out, SUFFIX)
        run = open_run(config.workdir)
        state = run.restore(config.checkpoint)
        write_model(out, run.config, state.ema_params, int(state.step), DTYPES[config.dtype])
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB, step {int(state.step)} of {run.config.iterations}", file=sys.stderr)


if __name__ == "__main__":
    main()
