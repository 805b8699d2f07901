"""docs/troubleshooting.md: every error that the package raises for its user, read from the source.

usage: python -m tools.troubleshooting [--check]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, TARGET = ROOT / "lora_trainer", ROOT / "docs" / "troubleshooting.md"
BASE = "UserError"
# Errors of one value or file, which another error carries to the user.
CARRIED = {"Problem": "ConfigError", "ImageError": "DataError"}
TITLES = {
    "ConfigError": "Settings",
    "DataError": "Pictures and captions",
    "ModelError": "Checkpoints and LoRA files",
    "ResumeError": "Going on with a run",
    "OutOfMemoryError": "Memory",
    "DivergedError": "Numbers gone bad",
    "OutputError": "Saving",
}
SYMPTOMS = """| what you see | what helps |
|---|---|
| out of memory | `batch_size=2`, then `1`; `gradient_checkpointing=true` (about a third slower); no `sample_prompts` |
| the same with SDXL after all that | on the command line `base_precision=fp8`, then `nf4` |
| weak or blurry style | `lora_rank=16`; 15 to 20 epochs; captions that say concretely what is in the picture |
| overfitting (low loss, poor pictures) | stop earlier; `learning_rate=1e-4`; more varied pictures; `lora_dropout` |
| the WebUI or the computer went down in the middle | **Continue**, or `--resume` on the command line |
| a job failed | mend what it names, then **Continue**: it goes on from its last state |
"""


@dataclass(frozen=True)
class Raised:
    """Where an error is raised, and its words; … stands for what it names."""

    kind: str
    text: str
    file: str


def collect() -> list[Raised]:
    """Every message, in the order of the source."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    kinds = _kinds(trees.values())
    return [raised for path, tree in trees.items() for raised in _of(tree, kinds, path.relative_to(PACKAGE).as_posix())]


def document() -> str:
    lines = ["# Troubleshooting", "", "What is most often asked:", "", SYMPTOMS]
    lines += [
        "A failed job in the tab, and a failure on the command line, have a block of details: paste it into an issue.",
        "",
        "## Every error",
        "",
        "Each names the file or the key, what was expected and what was found; … stands for those here. This list is",
        "made from the code: `python -m tools.troubleshooting`.",
        "",
    ]
    found = collect()
    for kind in [*TITLES, *sorted({raised.kind for raised in found} - set(TITLES))]:
        texts = dict.fromkeys(raised.text for raised in found if raised.kind == kind)
        if texts:
            lines += [f"### {TITLES.get(kind, kind)}", "", *(f"- {text}" for text in texts), ""]
    return "\n".join(lines).rstrip() + "\n"


def _kinds(trees: object) -> dict[str, str]:
    """Each error class and the heading it stands under: its own, where it has one, else its parent's."""
    parents = {
        node.name: base.id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    }
    kinds = dict(CARRIED)
    for name in parents:
        line = [name]
        while line[-1] in parents:
            line.append(parents[line[-1]])
        if BASE in line and name not in kinds:
            kinds[name] = next((one for one in line if one in TITLES), name)
    return kinds


def _of(tree: ast.Module, kinds: dict[str, str], file: str) -> Iterator[Raised]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in kinds:
            for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
                if ast.unparse(call.func) == "super().__init__":
                    yield from _messages(call.args, kinds[node.name], file)
        elif isinstance(node, ast.Call) and _name(node.func) in kinds:
            yield from _messages(node.args, kinds[_name(node.func)], file)
        elif isinstance(node, ast.Yield) and file == "config/rules.py" and node.value is not None:
            yield from _messages([node.value], "ConfigError", file)


def _messages(arguments: list[ast.expr], kind: str, file: str) -> Iterator[Raised]:
    for argument in arguments:
        for part in argument.elts if isinstance(argument, ast.List) else [argument]:
            text = _words(part)
            if len(text.replace("…", "").split()) > 1:
                yield Raised(kind, text, file)


def _words(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left) + _words(node.right)
    return "…"


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == document() else f"{TARGET} is not up to date")
    TARGET.write_text(document(), encoding="utf-8")
