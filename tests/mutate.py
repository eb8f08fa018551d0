"""Does the suite notice a wrong formula? Change one thing at a time in the mathematics, and run the tests on each change.

    python tests/mutate.py                # all of the modules below; one to two hours on two cores
    python tests/mutate.py likelihood     # those that are named

Each mutant flips a sign or an operator, drops a square root, changes a number (an index by one), or swaps two quantities, in a
function of the mathematics. Slow tests and type checks are left out. Prints a line for each mutant; exits with 1 if one
survives.
"""

import ast
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SUITES = {  # the quickest to notice first
    "schedules": "schedules peers paths properties reference sampling hostile",
    "diffusion": "diffusion reference loss_oracle properties sampling likelihood paths hostile",
    "losses": "diffusion loss_oracle reference paths likelihood hostile",
    "sampling": "sampling reference peers properties gaussian_oracle editing paths hostile",
    "solvers": "peers sampling paths",
    "likelihood": "likelihood flow_likelihood",
    "editing": "editing",
    "flow_map": "flow_map",
    "optimizers": "optimizers",
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Gt: ast.GtE,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
}
PAIRS = [("t", "s"), ("signal", "noise"), ("x_t", "x_0"), ("k", "m"), ("signal_t", "signal_s"), ("noise_t", "noise_s")]
PAIRS += [("p", "q"), ("to_p", "to_q"), ("a", "b"), ("e", "f"), ("nodes", "lambdas"), ("rise", "fall"), ("w", "unknown")]
SWAPS = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}
SAME_OF_BOTH = {  # so that one of a pair of names may stand for the other
    "check_shape('prediction', u, x_t)": "x_0 and x_t have one shape",
    "len(": "all have one length",
    "jnp.ones_like(": "all have one shape",
    "jnp.zeros_like(": "all have one shape",
    "np.zeros_like(": "all have one shape",
    "x_0.dtype": "x_0 and x_t have one dtype",
    "float_dtype(x_0)": "x_0 and x_t have one dtype",
    "look_up(column, t - 1, x_0)": "x_0 and x_t have one dtype",
    "look_up(probabilities, t - 1, x_t)": "x_0 and x_t have one dtype",
    "x_0[0]": "x_0 and x_t have one shape",
    "x_t[0]": "x_0 and x_t have one shape",
    "x_0.ndim": "x_0 and x_t have one rank",
    "x_t.ndim": "x_0 and x_t have one rank",
}
EQUIVALENT = {
    "jnp.append(times[1:]": "the last step is known by its a",
    "jnp.linalg.norm(matrix) + 1.01": "any number that is small",
    "matrix / (jnp.linalg.norm(matrix) - 1e-08": "any number that is small",
    "FAR =": "any number that is far",
    "NO_SIGNAL =": "any number that is far",
    "np.polynomial.legendre.leggauss(": "any number of points that is large",
    "np.empty(": "not used",
    "(1 - POINTS)": "the points are symmetric",
    "initial=": "any number",
    "np.where(np.isinf(sigma), 1, sigma)": "the result is not used there",
    "jnp.where(x >= mean": "at the mean both tails are alike",
    "jnp.where(x >= 0.999": "no level is there",
    "jnp.where(x <= -0.999": "no level is there",
}
# No type checks: jaxtyping's hook must come before the first import of diffusion_jax, so a second pytest.main would fail.
ARGUMENTS = ["-xqq", "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider"]
NOTICES = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)  # the latter: a file cannot be imported
TIMEOUT = 400  # seconds; a module's tests take up to 100
NOTICED = defaultdict(list)  # for each module the tests that noticed a mutant, the last one first
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "hypothesis", "chex", "optax", "flax.linen", "scipy.stats", "beartype"])


class Mutant(NamedTuple):
    module: str
    kind: str
    line: int
    change: str
    source: str


def mutate(node: ast.AST, bound: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """The changes of one node, each with the name of its kind."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield "operator", ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                if type(op) in OPERATORS:
                    yield "operator", ast.Compare(left, [*ops[:i], OPERATORS[type(op)](), *ops[i + 1 :]], comparators)
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign", operand
        case ast.Call(ast.Attribute(_, "sqrt"), [argument]):
            yield "root", argument
        case ast.Attribute(value, "signal"):
            yield "root", ast.Attribute(value, "alpha_bar", ast.Load())
        case ast.Constant(bool() | str() | None):
            pass
        case ast.Constant(int() as value):
            yield "number", ast.Constant(value + 1)
        case ast.Constant(float() as value):
            yield "number", ast.Constant(value * 1.01 if value else 1.0)
        case ast.Name(name, ast.Load()) if SWAPS.get(name) in bound:
            yield "swap", ast.Name(SWAPS[name], ast.Load())


def mutants(module: str) -> Iterator[Mutant]:
    source = (ROOT / "diffusion_jax" / f"{module}.py").read_text()
    tree = ast.parse(source)
    nodes = [node for part in tree.body for node in (part.body if isinstance(part, ast.ClassDef) else [part])]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.Assign)]
    for function in functions:
        bound = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        bound |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        body = function.body if isinstance(function, ast.FunctionDef) else [function]
        for parent, field, index, node in children(body):
            for kind, changed in mutate(node, bound):
                put(parent, field, index, changed)
                change = f"{ast.unparse(node)} -> {ast.unparse(changed)}  in  {ast.unparse(parent).splitlines()[0][:90]}"
                yield Mutant(module, kind, node.lineno, change, ast.unparse(ast.fix_missing_locations(tree)))
                put(parent, field, index, node)


def children(nodes: list) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every expression below, with its place in its parent; error messages, annotations and defaults are left out."""
    for parent in nodes:
        if isinstance(parent, ast.Raise | ast.arguments | ast.JoinedStr):
            continue
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "ctx", "op"):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.AST):
                    if isinstance(node, ast.expr):
                        yield parent, field, index, node
                    yield from children([node])


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def is_equivalent(mutant: Mutant) -> bool:
    place = mutant.change.split("  in  ")[1]
    return place.startswith(tuple(EQUIVALENT)) or (mutant.kind == "swap" and place.startswith(tuple(SAME_OF_BOTH)))


def fate(mutant: Mutant, tree: Path) -> str:
    """Run the tests of a mutant's module in a process of their own: "killed", "SURVIVED" or "TIMED OUT", as a loop may.

    The tests that noticed the mutants before it come first.
    """
    noticed = NOTICED[mutant.module]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("diffusion_jax", "tests", "experiments"):
            shutil.copytree(tree / part, Path(folder) / part)
        shutil.copy(tree / "pyproject.toml", folder)
        (Path(folder) / "diffusion_jax" / f"{mutant.module}.py").write_text(mutant.source)
        process = PROCESSES.Process(target=run_tests, args=(folder, noticed[:8], SUITES[mutant.module].split()))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
            return "TIMED OUT"
        result = Path(folder) / "result"
        if not result.exists():
            raise RuntimeError(f"pytest could not run on {mutant.change}")
        failed = result.read_text().splitlines()
        noticed[:] = dict.fromkeys([*(test for test in failed if "::" in test), *noticed])
        return "killed" if failed else "SURVIVED"


class Failures:
    """A plugin of pytest that keeps the tests that fail."""

    def __init__(self) -> None:
        self.tests = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests += [report.nodeid] if report.failed else []


def run_tests(folder: str, tests: list[str], suites: list[str]) -> None:
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder
    failures, code = Failures(), pytest.ExitCode.OK
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        if tests:  # a mutant may change their names, which is an error here and no failure
            code = pytest.main([*ARGUMENTS, *tests], [failures])
        for suite in suites if code not in NOTICES else ():
            code = pytest.main([*ARGUMENTS, f"tests/test_{suite}.py"], [failures])
            if code != pytest.ExitCode.OK:
                break
    if code == pytest.ExitCode.OK or code in NOTICES:
        Path("result").write_text("" if code == pytest.ExitCode.OK else "\n".join(failures.tests) or "at import")


def main() -> None:
    modules = sys.argv[1:] or list(SUITES)
    found = [mutant for module in modules for mutant in mutants(module)]
    changed = [mutant for mutant in found if not is_equivalent(mutant)]
    sources = [ast.unparse(ast.parse((ROOT / "diffusion_jax" / f"{module}.py").read_text())) for module in modules]
    unchanged = [Mutant(module, "none", 0, "nothing", source) for module, source in zip(modules, sources, strict=True)]
    counts, alive = Counter(), 0
    with tempfile.TemporaryDirectory() as tree, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs"), dirs_exist_ok=True)

        def check_unchanged() -> None:
            for module, result in zip(modules, pool.map(fate, unchanged, repeat(Path(tree))), strict=True):
                if result != "SURVIVED":
                    sys.exit(f"the tests of {module} fail without any change")

        check_unchanged()
        print(f"{len(changed)} mutants, and {len(found) - len(changed)} that no test could tell from the original", flush=True)
        for mutant, result in zip(changed, pool.map(fate, changed, repeat(Path(tree))), strict=True):
            print(f"{result:9}", f"{mutant.module}:{mutant.line}", mutant.kind, mutant.change, flush=True)
            counts[mutant.module, mutant.kind, result] += 1
            alive += result == "SURVIVED"
        check_unchanged()  # with the tests in the order in which the mutants had them
    for (module, kind, result), count in sorted(counts.items()):
        print(f"| {module} | {kind} | {count} {result} |")
    sys.exit(f"{alive} of {len(changed)} survived" if alive else 0)


if __name__ == "__main__":
    main()
