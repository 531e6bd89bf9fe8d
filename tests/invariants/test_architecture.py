"""Rules of ARCHITECTURE.md that a machine can keep. The layers of packages are checked by `make lint`."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdlm.checkpoints.export import REMOTE_FILES

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
ENTRY = PACKAGE / "checkpoints" / "modeling_opdlm.py"
"""The file of a result folder that transformers imports."""
FOUNDATIONS = {"modeling": ("modeling",), "decoding": ("modeling", "decoding")}
"""Which packages the model and the sampler may import, beside torch and transformers."""
STAYS_AT_HOME = {
    "decoding/streaming": {"opdlm.errors", "rich"},
    "modeling/compiled": {"opdlm.errors"},
}
"""Files of the two packages that are not copied into result folders, and what else they import."""

MOST_FILES = 12
"""In one folder of the package."""


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
    counts = Counter(path.parent for path in FILES)
    assert max(counts.values()) <= MOST_FILES, counts.most_common(3)


def test_file_names_are_unique_where_remote_code_flattens_them() -> None:
    names = Counter(path.stem for path in FILES if path.parent.name in ("modeling", "decoding"))
    assert not [name for name, count in names.items() if count > 1 and name != "__init__"]


def files_imported(path: Path) -> set[Path]:
    """Files of the package that a file imports anywhere; relative imports are resolved."""
    found = set()
    for node in ast.walk(parse(path)):
        match node:
            case ast.ImportFrom(module=module, names=names, level=level):
                folder = [*path.relative_to(ROOT).parent.parts]
                start = [".".join(folder[: len(folder) - level + 1])] if level else []
                source = ".".join([*start, *([module] if module else [])])
                candidates = [source, *(f"{source}.{alias.name}" for alias in names)]
            case ast.Import(names=names):
                candidates = [alias.name for alias in names]
            case _:
                continue
        found |= {ROOT / f"{name.replace('.', '/')}.py" for name in candidates if name.startswith("opdlm")}
    return {file for file in found if file.is_file()}


def needed_by(entry: Path) -> set[Path]:
    """The file and everything that it imports, directly or not."""
    needed, new = {entry}, {entry}
    while new:
        new = set().union(*map(files_imported, new)) - needed
        needed |= new
    return needed


def test_a_result_folder_holds_exactly_the_files_that_its_remote_code_needs() -> None:
    copied = {PACKAGE / file for file in REMOTE_FILES}
    assert copied == needed_by(ENTRY)
    assert len({path.name for path in copied}) == len(REMOTE_FILES)
    assert not copied & {PACKAGE / f"{name}.py" for name in STAYS_AT_HOME}


def test_the_remote_code_s_entry_imports_every_other_file_itself() -> None:
    """transformers copies only the files that the entry imports, not those that they import in turn."""
    assert files_imported(ENTRY) == {PACKAGE / file for file in REMOTE_FILES} - {ENTRY}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in FOUNDATIONS], ids=name_of)
def test_model_and_sampler_import_torch_and_transformers_only(path: Path) -> None:
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    inner = tuple(PACKAGE / name for name in FOUNDATIONS[path.parent.name])
    extra = STAYS_AT_HOME.get(name_of(path), set())
    for node in ast.walk(parse(path)):
        for name in imported_names(node):
            top = name.split(".")[0]
            assert top in allowed | extra | {"opdlm"}, f"{path.name} imports {name}"
    outside = {
        file
        for file in files_imported(path)
        if file.parent not in inner and f"opdlm.{name_of(file).replace('/', '.')}" not in extra
    }
    assert not outside, f"{path.name} imports {sorted(map(name_of, outside))}"


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


def test_every_module_imports_without_resource_as_on_windows() -> None:
    """The libraries are imported before it is taken away: theirs differ by system."""
    libraries = "torch, transformers.generation, transformers.modeling_utils, peft, accelerate, datasets"
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    program = (
        f"import importlib, sys, {libraries}\n"
        "sys.modules['resource'] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_texts_with_values_are_printed_without_markup(path: Path) -> None:
    """`Console.print` reads brackets as markup and `:bug:` as a picture; `Console.out` does not."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "print":
            assert not [argument for argument in node.args if isinstance(argument, ast.JoinedStr)], (
                node.lineno
            )
