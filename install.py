"""Adds the packages that the extension needs and the WebUI lacks.

The WebUI runs this file at each start, unless it was started with --skip-install. A package that is already there, in
whatever version, belongs to the host and stays as it is; pip's --no-deps keeps the rest of the environment still too.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from typing import NamedTuple


class Package(NamedTuple):
    """A package to add when absent; with `needed_by`, only when that one is added or asks for it."""

    name: str
    version: str
    needed_by: str | None = None


# Measured on AUTOMATIC1111 1.10.1 (transformers 4.30.2, torch 2.1.2), Forge and reForge (transformers 4.46 and 4.48).
# PEFT 0.14 and newer fails on the first; Forge has exactly this diffusers and PEFT; reForge has its own diffusers.
PACKAGES = (
    Package("diffusers", "0.31.0"),
    Package("importlib_metadata", "8.5.0", needed_by="diffusers"),
    Package("zipp", "3.20.2", needed_by="importlib_metadata"),
    Package("peft", "0.13.2"),
    Package("msgspec", "0.22.0"),
    # Newer Pythons read TOML themselves.
    *([Package("tomli", "2.0.2")] if sys.version_info < (3, 11) else []),
)


def missing() -> list[str]:
    """The packages to add, as pip writes them: `peft==0.13.2`."""
    absent: dict[str, str] = {}
    for name, version, parent in PACKAGES:
        needed = parent is None or parent in absent or _asks_for(parent, name)
        if needed and not _is_installed(name):
            absent[name] = version
    return [f"{name}=={version}" for name, version in absent.items()]


def command() -> str:
    """The command that adds what is missing, ready to paste into a terminal; empty when nothing is missing."""
    words = _pip(missing())
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def main() -> None:
    """Add what is missing. A failure is told and not raised: the WebUI works without this extension."""
    packages = missing()
    if not packages:
        return
    # The WebUI prints stdout as it is, but buries it in a longer report when the exit status is not 0.
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    result = subprocess.run(_pip(packages), **output)
    if result.returncode == 0:
        print(f"LoRA Trainer: installed {', '.join(packages)}.")
        return
    print(
        f"LoRA Trainer: could not install {', '.join(packages)}. The WebUI works; the LoRA Trainer tab needs them.\n"
        f"{_reason(result.stdout)}\n"
        f"To install them yourself, run this and restart the WebUI:\n    {command()}"
    )


def _pip(packages: list[str]) -> list[str]:
    if not packages:
        return []
    index = os.environ.get("INDEX_URL", "")  # the WebUI's own variable for a package mirror
    words = [sys.executable, "-m", "pip", "install", "--no-deps", "--prefer-binary", *packages]
    return [*words, "--index-url", index] if index else words


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _asks_for(name: str, dependency: str) -> bool:
    """Whether an installed package names this dependency (its extras aside)."""
    if not _is_installed(name):
        return False
    lines = importlib.metadata.requires(name) or []
    names = {_normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines if "extra ==" not in line}
    return _normal(dependency) in names


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _reason(output: str) -> str:
    """What pip gave as the reason: its last error line, or else its last line."""
    if "connection broken by" in output:  # pip's last line then says that there is no such version, which misleads
        return "pip could not reach its package index. Is this machine online?"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason."])[-1]


if __name__ == "__main__":
    main()
