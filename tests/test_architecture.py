"""Rules of ARCHITECTURE.md that a machine can keep: floors, optional packages, docstrings, a light CLI."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opdlm"
FLOORS = {
    0: {
        "configuration_sdar",
        "code_tests",
        "errors",
        "records",
        "blocks",
        "intervals",
        "seeds",
        "tables",
        "cpu_linear",
    },
    1: {"scoring", "analytics", "settings", "cache", "unmasking", "losses", "verdicts"},
    2: {"config", "attention", "rows", "checkpoint", "metrics", "generation_log"},
    3: {
        "config_rules",
        "diffusion",
        "optimizer",
        "curricula",
        "mask_rates",
        "zero",
        "grid",
        "stdlib_text",
        "vllm_gate",
        "openai_protocol",
    },
    4: {"text_config", "adapter", "dropout", "data", "denoise", "devices", "states", "vllm_canvases"},
    5: {"vllm_plugin", "corpus", "models", "lossless", "student_copy", "compiled"},
    6: {
        "text_rows",
        "convert",
        "targets",
        "generate",
        "export",
        "rollout_file",
        "answer",
        "loop",
        "vllm_engine",
    },
    7: {"text_likelihood", "rollout", "decode_thread", "evaluate", "modeling_opdlm", "plots", "card"},
    8: {"text_trainer", "rollout_sources", "self_prompts", "likelihood", "report", "watch"},
    9: {"costs", "trainer", "text_options", "text_subjects", "retention"},
    10: {"text_eval", "text_pipeline", "pipeline", "plan", "harness", "bench", "verbs"},
    11: {"serve", "chat", "text_study", "study_sft", "study_conversion"},
    12: {"study_crossover", "study_dual", "study_parity", "study_window"},
    13: {"studies", "recipe_files"},
    14: {"commands"},
    15: {"cli"},
    16: {"__main__"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
OPTIONAL_PACKAGES = {
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
    "lm_eval",
    "math_verify",
    "sglang",
    "sklearn",
    "starlette",
    "uvicorn",
    "tensorboard",
    "vllm",
    "wandb",
}
FILES = sorted(PACKAGE.glob("*.py"))
ROOM_FILES = [path for path in FILES if path.stem != "__init__"]


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


def imported_rooms(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room of each import from opdlm, wherever in the file it stands."""
    for node in ast.walk(tree):
        for name in imported_names(node):
            package, _, rest = name.partition(".")
            if package == "opdlm" and rest != "__version__":
                yield node.lineno, rest.partition(".")[0]


def statements_run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module outside functions and outside `if TYPE_CHECKING:`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        type_checking = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)
        for field in ("orelse",) if type_checking else ("body", "orelse", "finalbody", "handlers"):
            yield from statements_run_on_import(getattr(statement, field, []))


def floor_violations(room: str, tree: ast.Module) -> list[str]:
    """Imports that do not point strictly down, each as a sentence."""
    problems = []
    for line, imported in imported_rooms(tree):
        if imported not in FLOOR_OF:
            problems.append(f"{room}.py:{line} imports {imported!r}, which is no room: import from its room")
        elif FLOOR_OF[imported] >= FLOOR_OF[room]:
            problems.append(
                f"{room}.py:{line} (floor {FLOOR_OF[room]}) imports {imported} (floor {FLOOR_OF[imported]}): "
                "imports only go down"
            )
    return problems


def optional_imports(tree: ast.Module) -> list[str]:
    """Optional packages that importing the module would need."""
    names = [name for statement in statements_run_on_import(tree.body) for name in imported_names(statement)]
    return sorted({name.split(".")[0] for name in names} & OPTIONAL_PACKAGES)


def test_every_file_is_a_room_of_the_table() -> None:
    unknown = [path.name for path in ROOM_FILES if path.stem not in FLOOR_OF]
    assert not unknown, f"add {unknown} to FLOORS here and to the table in ARCHITECTURE.md"


@pytest.mark.parametrize("path", [path for path in ROOM_FILES if path.stem in FLOOR_OF], ids=lambda p: p.stem)
def test_imports_point_strictly_down(path: Path) -> None:
    problems = floor_violations(path.stem, parse(path))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    found = optional_imports(parse(path))
    assert not found, f"{path.name} imports {found} at module level: move it into the function that uses it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(parse(path)), f"{path.name}: say the file's purpose in its first line"


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['opdlm', '--help']\n"
        "import opdlm.cli.main\n"
        "try:\n"
        "    status = opdlm.cli.main()\n"
        "except SystemExit as stop:\n"
        "    status = stop.code\n"
        "sys.exit(status or ('--help imported torch' if 'torch' in sys.modules else 0))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "from .trainer import train",
        "from . import trainer",
        "from opdlm import trainer",
        "from opdlm.distill.trainer import train",
        "import opdlm.distill.trainer as t",
        "def f():\n    from .trainer import train",
        "from .rows import Rows",
        "from .nowhere import x",
        "from opdlm import train",
    ],
)
def test_an_import_that_does_not_point_down_is_noticed(statement: str) -> None:
    assert floor_violations("attention", ast.parse(statement))


@pytest.mark.parametrize("statement", ["from .records import C", "from . import blocks", "import torch"])
def test_an_import_that_points_down_is_allowed(statement: str) -> None:
    assert not floor_violations("attention", ast.parse(statement))


def test_optional_imports_are_told_apart_by_where_they_stand() -> None:
    assert optional_imports(ast.parse("try:\n    import vllm.x\nexcept ImportError:\n    pass")) == ["vllm"]
    assert optional_imports(ast.parse("class A:\n    from wandb import init")) == ["wandb"]
    assert not optional_imports(ast.parse("def f():\n    import vllm"))
    assert not optional_imports(ast.parse("if TYPE_CHECKING:\n    import vllm"))
