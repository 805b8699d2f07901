"""The layers and the limits of the house, read from the source and seen in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lora_trainer"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}

# room: what its code never imports, not even inside a function. `modules` is the WebUI's package.
NEVER = {
    "config/": {"torch", "gradio", "modules"},
    "dataset/": {"gradio", "modules"},
    "doctor/": {"torch", "gradio", "modules"},
    "captioning/": {"gradio", "modules"},
    "editing/": {"torch", "gradio", "modules"},
    "models/": {"gradio", "modules"},
    "adapters/": {"gradio", "modules"},
    "kernels/": {"gradio", "modules", "diffusers", "peft", "transformers"},
    "tools/": {"gradio", "modules"},
    "training/": {"gradio", "modules"},
    "imports/": {"torch", "gradio", "modules"},
    "jobs/": {"torch", "gradio", "modules"},
    "curve.py": {"torch", "gradio", "modules"},
    "events.py": {"torch", "gradio", "modules"},
    "errors.py": {"torch", "gradio", "modules"},
    "files.py": {"torch", "gradio", "modules"},
    "hosts/": {"gradio"},
    "ui/": {"modules"},
    "api/": {"modules"},
    "cli.py": {"modules"},
}
# What starts fast and works where torch does not: importing it must not import these, however indirectly.
LIGHT = (
    "config/",
    "doctor/",
    "captioning/",
    "imports/",
    "editing/",
    "jobs/",
    "curve.py",
    "events.py",
    "errors.py",
    "hosts/ports.py",
    "ui/",
    "api/",
    "cli.py",
)
HEAVY = ("torch", "diffusers", "transformers", "peft", "modules")

LINES_PER_FILE = 300
LINES_PER_FUNCTION = 60
ARGUMENTS = 6


def imported(tree: ast.AST) -> Iterator[str]:
    """The top-level packages that `tree` imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield PACKAGE.name if node.level else str(node.module).split(".")[0]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def dotted(name: str) -> str:
    return ".".join((PACKAGE.name, *Path(name).with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.parametrize("room", NEVER)
def test_a_room_does_not_import_what_it_knows_nothing_of(room: str) -> None:
    files = [name for name in TREES if name.startswith(room)]
    found = [(name, package) for name in files for package in imported(TREES[name]) if package in NEVER[room]]
    assert found == []


def test_only_the_webui_host_imports_the_webui() -> None:
    found = [name for name, tree in TREES.items() if "modules" in imported(tree)]
    assert [name for name in found if not name.startswith("hosts/webui/")] == []


def test_ports_import_only_the_standard_library_at_run_time() -> None:
    body = TREES["hosts/ports.py"].body
    run_time = [node for node in body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    assert set(imported(ast.Module(run_time, []))) <= sys.stdlib_module_names


def test_light_rooms_import_nothing_heavy() -> None:
    light = [dotted(name) for name in SOURCES if name.startswith(LIGHT)]
    script = f"""
import importlib, sys
for name in {light!r}:
    importlib.import_module(name)
    heavy = sorted(set({HEAVY!r}) & set(sys.modules))
    if heavy:
        sys.exit(f"importing {{name}} imports {{', '.join(heavy)}}")
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_files_stay_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_PER_FILE} == {}


def test_functions_stay_short() -> None:
    lengths = {
        f"{name}:{node.lineno} {node.name}": int(node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in functions(tree)
    }
    assert {where: lines for where, lines in lengths.items() if lines > LINES_PER_FUNCTION} == {}


def test_functions_take_few_arguments() -> None:
    counts = {
        f"{name}:{node.lineno} {node.name}": sum(
            argument.arg not in {"self", "cls", "ctx"}
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        )
        for name, tree in TREES.items()
        for node in functions(tree)
        # A kernel has nothing but its arguments.
        if "triton.jit" not in map(ast.unparse, node.decorator_list)
    }
    assert {where: count for where, count in counts.items() if count > ARGUMENTS} == {}
