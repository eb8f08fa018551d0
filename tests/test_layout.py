"""The order in which files may know of each other, and the budget of the core."""

import ast
import importlib.metadata
import tokenize
from pathlib import Path

import diffusion_jax

PACKAGE = Path(diffusion_jax.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"
LIBRARY = sorted(PACKAGE.glob("*.py"))
SCRIPTS = {script.stem for script in EXPERIMENTS.glob("*.py")}
CORE = ("schedules", "diffusion", "sampling", "unet", "mlp")
METHOD = (*CORE, "losses", "solvers")


def imported_modules(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_the_mathematics_knows_no_network_optimizer_checkpoint_or_data_set():
    forbidden = ("flax", "optax", "orbax", "tensorflow")
    for module in ("schedules", "diffusion", "losses", "sampling", "solvers", "likelihood", "editing", "flow_map"):
        assert not [name for name in imported_modules(PACKAGE / f"{module}.py") if name.startswith(forbidden)], module


def test_the_library_does_not_import_the_experiments_and_no_file_imports_a_script():
    assert "mnist" in SCRIPTS
    for file in LIBRARY:
        assert not {name.split(".")[0] for name in imported_modules(file)} & {*SCRIPTS, "support", "experiments"}, file
    for file in EXPERIMENTS.rglob("*.py"):
        assert not imported_modules(file) & SCRIPTS, file


def test_mnist_has_at_most_60_lines_of_code_and_uses_six_files_of_support_to_train():
    file = EXPERIMENTS / "mnist.py"
    assert lines_of_code(file) <= 60
    used = {name.removeprefix("support.") for name in imported_modules(file) if name.startswith("support.")}
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    used |= {alias.name for node in imports if node.module == "support" for alias in node.names}
    assert used - {"terminal", "figures"} == {"model", "objective", "data", "image_run", "loop", "pictures"}


def test_files_are_short():
    assert not [file.name for file in (*LIBRARY, *EXPERIMENTS.rglob("*.py")) if len(file.read_text().splitlines()) > 250]


def test_only_the_networks_import_linen():
    assert {file.stem for file in LIBRARY if "flax.linen" in imported_modules(file)} == {"layers", "unet", "dit", "mlp"}


def test_the_core_holds_at_most_450_lines_of_code_and_the_whole_method_650():
    assert sum(lines_of_code(PACKAGE / f"{module}.py") for module in CORE) <= 450
    assert sum(lines_of_code(PACKAGE / f"{module}.py") for module in METHOD) <= 650


def lines_of_code(file: Path) -> int:
    """Lines with code on them: not blank, not only a comment, not in a docstring."""
    lines = set()
    previous = tokenize.NEWLINE
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with file.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            docstring = token.type == tokenize.STRING and previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            if token.type not in (*skipped, tokenize.ENCODING) and not docstring:
                lines.update(range(token.start[0], token.end[0] + 1))
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
                previous = token.type
    return len(lines)


def test_the_public_names_exist_and_the_versions_agree():
    assert all(hasattr(diffusion_jax, name) for name in diffusion_jax.__all__)
    assert importlib.metadata.version("diffusion-jax") == diffusion_jax.__version__
    assert f"\nversion: {diffusion_jax.__version__}\n" in (PACKAGE.parent / "CITATION.cff").read_text()
