"""Does the suite notice a wrong formula? Change one thing at a time in the mathematics, and run its tests on each change.

    python tests/mutate.py [--jobs 2]

Each mutant flips a sign or an operator, drops a square root, shifts an index or a number by one, or swaps two times, inside a
function of schedules.py, diffusion.py or sampling.py. Prints a table; exits with 1 if any mutant survives.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
MODULES = ("schedules", "diffusion", "sampling")
SUITES = ("schedules", "diffusion", "sampling", "properties", "reference", "gaussian_oracle", "loss_oracle")
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE, ast.Gt: ast.GtE}
SWAPS = {"t": "s", "s": "t", "x_t": "x_0", "x_0": "x_t"}
EQUIVALENT = {  # (module, change): why no test can tell it from the original
    ("sampling", "_normal(keys, 0, shape) -> _normal(keys, 1, shape)"): "",
}


class Mutant(NamedTuple):
    module: str
    line: int
    change: str
    source: str


def mutants(module: str) -> Iterator[Mutant]:
    """Every single change, as the whole new source of `module`."""
    source = (ROOT / "diffusion_jax" / f"{module}.py").read_text()
    total = len(list(ast.walk(ast.parse(source))))
    for number in range(total):
        for replace in (negate, drop_root, shift_number, swap_time):
            tree = ast.parse(source)
            node = list(ast.walk(tree))[number]
            before = ast.unparse(node) if isinstance(node, ast.expr) else ""
            if before and in_mathematics(tree, node) and (after := replace(node)) is not None:
                ReplaceNode(node, after).visit(tree)
                yield Mutant(module, node.lineno, f"{before} -> {ast.unparse(after)}", ast.unparse(ast.fix_missing_locations(tree)))
