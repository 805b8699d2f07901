"""What the WebUI shows where the extension cannot work. Needs nothing that may be missing."""

from __future__ import annotations

import importlib.util
from html import escape
from pathlib import Path

from modules import script_callbacks

from lora_trainer.ui import absent


def register_absent(error: ImportError, root: Path) -> None:
    """A package is missing, or one that is there does not fit."""
    spec = importlib.util.spec_from_file_location("lora_trainer_install", root / "install.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    what = f"LoRA Trainer lacks a package, or one that is there does not fit: {error}."
    command = install.command()
    _show(what, f"Close the WebUI, run this, and start it again:\n{command}" if command else "Start the WebUI again.")


def register_outdated(version: str) -> None:
    """The files were updated under the running process."""
    _show(f"LoRA Trainer was updated to {version}.", "Restart the WebUI (not only its page) to use it.")


def _show(what: str, remedy: str) -> None:
    print(f"{what} {remedy}")
    html = f"<p>{escape(what)}</p><pre>{escape(remedy)}</pre>"
    script_callbacks.on_ui_tabs(lambda: [(absent.build(html), "Train LoRA", "lora_trainer_tab")])
