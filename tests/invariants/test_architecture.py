"""Rules of ARCHITECTURE.md that a machine can keep. The layers of packages are checked by `make lint`."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "opdlm"
OPTIONAL_PACKAGES = {
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
    "lm_eval",
    "math_verify",
    "sglang",
    "sklearn",
    "fastapi",
    "starlette",
    "uvicorn",
    "tensorboard",
    "vllm",
    "wandb",
}
FILES = sorted(PACKAGE.rglob("*.py"))


MOST_FILES = 12
"""In one folder of the package, `__init__` not counted."""


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(node: ast.AST) -> list[str]:
    """Dotted names that one statement imports, `from .x import y` written as `opdlm.x.y`."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            source = ".".join(filter(None, ["opdlm" if level else "", module]))
            return [f"{source}.{alias.name}" for alias in names]
        case _:
            return []


def statements_run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module outside functions and outside `if TYPE_CHECKING:`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        type_checking = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)
        for field in ("orelse",) if type_checking else ("body", "orelse", "finalbody", "handlers"):
            yield from statements_run_on_import(getattr(statement, field, []))


def optional_imports(tree: ast.Module) -> list[str]:
    """Optional packages that importing the module would need."""
    names = [name for statement in statements_run_on_import(tree.body) for name in imported_names(statement)]
    return sorted({name.split(".")[0] for name in names} & OPTIONAL_PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    found = optional_imports(parse(path))
    assert not found, f"{path.name} imports {found} at module level: move it into the function that uses it"


def test_no_folder_holds_more_files_than_a_reader_takes_in() -> None:
    counts = Counter(path.parent for path in FILES if path.stem != "__init__")
    assert max(counts.values()) <= MOST_FILES, counts.most_common(3)


def test_file_names_are_unique_where_remote_code_flattens_them() -> None:
    names = Counter(path.stem for path in FILES if path.parent.name in ("modeling", "decoding"))
    assert not [name for name, count in names.items() if count > 1 and name != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(parse(path)), f"{path.name}: say the file's purpose in its first line"


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['opdlm', '--help']\n"
        "from opdlm.cli.main import main\n"
        "try:\n"
        "    status = main()\n"
        "except SystemExit as stop:\n"
        "    status = stop.code\n"
        "sys.exit(status or ('--help imported torch' if 'torch' in sys.modules else 0))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout


def test_optional_imports_are_told_apart_by_where_they_stand() -> None:
    assert optional_imports(ast.parse("try:\n    import vllm.x\nexcept ImportError:\n    pass")) == ["vllm"]
    assert optional_imports(ast.parse("class A:\n    from wandb import init")) == ["wandb"]
    assert not optional_imports(ast.parse("def f():\n    import vllm"))
    assert not optional_imports(ast.parse("if TYPE_CHECKING:\n    import vllm"))
