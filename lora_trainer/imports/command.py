"""`lora-trainer import`: another trainer's file as a YAML of ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_trainer.errors import OutputError
from lora_trainer.files import publish
from lora_trainer.imports.read import missing, read_file, to_yaml, told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a .toml or .json file of kohya, lora-scripts or OneTrainer")
    parser.add_argument("--output", type=Path, help="the .yaml file to write; standard output when left out")


def run(arguments: argparse.Namespace) -> None:
    """Print or write the settings, and say what did not become one. Raises UserError."""
    name, taken = read_file(arguments.file)
    text, target = to_yaml(arguments.file, name, taken), arguments.output
    # The file may hold what the terminal's encoding does not.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if target is None:
        print(text, end="")
        return
    if target.exists():
        raise OutputError(f"{target}: expected a new name, found a file or folder there")
    publish(text.encode(), target)
    print(f"{target}: {len(taken.settings)} settings from {name}")
    for line in (*(f"needed: {line}" for line in missing(taken)), *told(taken)):
        print(f"  {line}")
